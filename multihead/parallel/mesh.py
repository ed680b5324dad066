"""The one device mesh of the house, and how processes find one another."""

import math
import os
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from multihead.errors import UserError

# Order matters: the last axis varies fastest over the devices, so `tensor`,
# which communicates in every layer, gets the closest neighbours.
AXES = ("data", "fsdp", "sequence", "tensor")


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  sequence: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Makes the mesh with axes data, fsdp, sequence and tensor.

  The axes are of type Auto: the compiler places what the code leaves open.

  Args:
    data: replicas that split the batch; -1 takes the devices that are left.
    fsdp: devices that split the batch and, with it, the parameters.
    sequence: devices that split the length of every sequence.
    tensor: devices that split heads, feed-forward width and vocabulary.
    devices: the devices to use, `jax.devices()` by default.

  Returns:
    A mesh over all given devices.

  Raises:
    UserError: the sizes do not multiply to the number of devices, an axis is
      not a positive integer, or more than one axis is -1.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = dict(zip(AXES, (data, fsdp, sequence, tensor), strict=True))
  free = [name for name, size in sizes.items() if size == -1]
  bad = {n: s for n, s in sizes.items() if s < 1 and s != -1}
  if bad or len(free) > 1:
    raise UserError(
      f"mesh sizes must be positive, and at most one may be -1; given {sizes}"
    )
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if free:
    sizes[free[0]] = len(devices) // fixed
  if math.prod(sizes.values()) != len(devices) or len(devices) % fixed:
    asked = zip(AXES, (data, fsdp, sequence, tensor), strict=True)
    given = ", ".join(f"{name}={size}" for name, size in asked)
    raise UserError(
      f"the mesh {given} needs {fixed}{' x n' if free else ''} devices, but "
      f"there are {len(devices)}; make the product of the axes equal it"
    )
  return jax.make_mesh(
    tuple(sizes.values()),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices,
  )


def initialize_distributed(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> bool:
  """Joins the processes of one job; call before any other use of JAX.

  With arguments, they say it all. Without, a SLURM step of several tasks, a
  TPU pod or a GKE job is found by JAX itself from its environment; a single
  process stays as it is.

  Args:
    coordinator_address: `host:port` of process 0.
    num_processes: how many processes the job has.
    process_id: the number of this one, from 0.

  Returns:
    Whether the processes were joined.

  Raises:
    UserError: some of the three arguments are given and some are missing.
  """
  given = (coordinator_address, num_processes, process_id)
  if any(value is not None for value in given):
    if any(value is None for value in given):
      raise UserError(
        "coordinator_address, num_processes and process_id go together; given "
        f"{coordinator_address}, {num_processes}, {process_id}"
      )
    jax.distributed.initialize(coordinator_address, num_processes, process_id)
    return True
  several = (
    int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    or len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    or "JAX_COORDINATOR_ADDRESS" in os.environ
  )
  if several:
    jax.distributed.initialize()
  return several
