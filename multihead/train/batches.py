"""From the rows that a process reads to arrays that span the mesh."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from multihead.errors import UserError


def check_batch(
  batch_size: int, ways: int, micro_batches: int, sequence: tuple[int, int]
) -> None:
  """Checks that a batch can be cut as the mesh and accumulation want.

  Args:
    batch_size: sequences in a step.
    ways: devices along the batch (data * fsdp).
    micro_batches: gradient accumulation.
    sequence: length of a sequence, and devices along it.

  Raises:
    UserError: something does not divide.
  """
  if batch_size % (ways * micro_batches):
    raise UserError(
      f"config.batch_size={batch_size} must be a multiple of mesh.data * "
      f"mesh.fsdp * grad_accum_steps = {ways} * {micro_batches} = "
      f"{ways * micro_batches}"
    )
  length, parts = sequence
  if length % parts:
    raise UserError(
      f"config.sequence_length={length} must be a multiple of "
      f"mesh.sequence={parts}"
    )


def process_rows(
  sharding: NamedSharding, batch_size: int, length: int = 1
) -> tuple[int, int]:
  """Which part of every batch this process reads.

  Processes that only split sequences or heads among them read the same rows.

  Args:
    sharding: of the batches.
    batch_size: rows of a global batch.
    length: size of the second dimension, to be divisible as the mesh wants.

  Returns:
    (index, count): the rows [index * b, (index + 1) * b), b = batch_size/count.

  Raises:
    UserError: the mesh gives this process rows that are not neighbours.
  """
  places = sharding.addressable_devices_indices_map((batch_size, length))
  spans = {
    (rows.start or 0, batch_size if rows.stop is None else rows.stop)
    for rows, *_ in places.values()
  }
  low, high = min(start for start, _ in spans), max(stop for _, stop in spans)
  held = sum(stop - start for start, stop in spans)
  if held != high - low or batch_size % held or low % held:
    raise UserError(
      f"process {jax.process_index()} holds the rows {sorted(spans)} of a "
      f"batch of {batch_size}, which are not one even part of it; choose "
      "mesh.data and mesh.fsdp so that each process holds neighbouring rows"
    )
  return low // held, batch_size // held


def to_global(
  batch: dict[str, np.ndarray], sharding: NamedSharding, batch_size: int
) -> dict[str, Any]:
  """Makes global arrays [B, ...] of the rows that this process has read.

  Args:
    batch: arrays [b, ...], the rows of `process_rows`.
    sharding: of the batches; further dimensions are not split.
    batch_size: B.
  """

  def place(array: np.ndarray) -> jax.Array:
    shape = (batch_size, *array.shape[1:])
    spec = PartitionSpec(*sharding.spec[: array.ndim])
    where = NamedSharding(sharding.mesh, spec)
    if jax.process_count() == 1:
      return jax.device_put(array, where)
    index, _ = process_rows(sharding, batch_size)
    first = index * array.shape[0]

    def shard(place: tuple[slice, ...]) -> np.ndarray:
      rows, *rest = place
      start, stop, _ = rows.indices(batch_size)
      return array[(slice(start - first, stop - first), *rest)]

    return jax.make_array_from_callback(shape, where, shard)

  return {name: place(array) for name, array in batch.items()}
