"""Block sizes of the kernels, and what they take of a multiprocessor."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from multihead.ops import pallas_compat as pc
from multihead.ops.attention.mosaic_gpu import tables


@dataclasses.dataclass(frozen=True)
class Forward:
  """How the forward kernel cuts its work.

  Attributes:
    rows: query rows of one consumer warpgroup, 64 or 128.
    columns: keys of a tile, a multiple of 64.
    consumers: warpgroups that compute; one more loads.
    stages: tiles of keys, and of values, that fit in shared memory.
    overlap: whether the scores of a tile are computed while the values of the
      one before are summed.
    turns: whether the warpgroups issue their products in turn, so that one's
      softmax runs under the other's products.
    persistent: whether one program per multiprocessor walks over all tiles, so
      that the next tile loads while the last one ends; else a program a tile.
  """

  rows: int = 64
  columns: int = 128
  consumers: int = 2
  stages: int = 2
  overlap: bool = True
  turns: bool = True
  persistent: bool = True


def padded_width(width: int) -> int:
  """The head dim that the kernels compute with: a multiple of 32."""
  return -(-width // 32) * 32


def forward_bytes(
  config: Forward, width: int, v_width: int, dtype: jax.typing.DTypeLike
) -> tuple[int, bool]:
  """Shared memory of the forward kernel, and whether outputs replace queries.

  Args:
    config: block sizes.
    width: head dim of queries and keys, padded.
    v_width: head dim of values, padded.
    dtype: of all three.
  """
  size = lambda *shape: pc.tiled_bytes(shape, dtype)
  queries = config.consumers * size(config.rows, width)
  outputs = config.consumers * size(config.rows, v_width)
  ring = config.stages * (
    size(config.columns, width) + size(config.columns, v_width)
  )
  rest = pc.tiled_bytes((config.consumers, config.rows), jnp.float32) + 2048
  total = queries + outputs + ring + rest
  if total <= pc.SHARED_MEMORY or width != v_width:
    return total, False
  return total - outputs, True


@dataclasses.dataclass(frozen=True)
class Backward:
  """How a backward kernel cuts its work.

  Attributes:
    rows: rows of one consumer warpgroup that stay: queries in the kernel for
      their gradient, keys in the one for keys and values.
    columns: of the tiles that stream by.
    consumers: warpgroups that compute; one more loads.
    stages: streaming tiles in shared memory.
    persistent: as above.
  """

  rows: int = 64
  columns: int = 64
  consumers: int = 2
  stages: int = 2
  persistent: bool = True


@dataclasses.dataclass(frozen=True)
class Fused:
  """How the kernel for all gradients cuts its work: 128 keys, 64 queries.

  Attributes:
    stages: tiles of queries in shared memory.
    persistent: as above.
  """

  stages: int = 2
  persistent: bool = True


@dataclasses.dataclass(frozen=True)
class Table:
  """Block sizes by padded head dim, and by whether rows see all keys.

  A head dim that is missing takes the next larger one's.

  Attributes:
    forward: of the forward kernel.
    queries: of the kernel for the gradient of queries.
    keys: of the kernel for the gradients of keys and values.
    fused: of the kernel for all gradients, only for the head dims that are
      given.
  """

  forward: Mapping[tuple[int, bool], Forward]
  queries: Mapping[tuple[int, bool], Backward]
  keys: Mapping[tuple[int, bool], Backward]
  fused: Mapping[tuple[int, bool], Fused]


# Head dims 64 and 128: the fastest of those timed in bfloat16 at T = 4096
# (docs/operations/attention.md), with two exceptions that were not timed: keys
# at (64, False) takes the columns of (64, True), which are 1.21 times as fast
# there, and windows take the sizes of causal calls. Where rows see different
# numbers of keys, the hardware shares out tiles better than `persistent` does,
# by 1.55 forward at 128; not so with the three warpgroups of 64, which hide
# more than overlap does. Head dims 192 and 256: what fits, and else what holds
# at 128.
_H100 = Table(
  forward={
    (64, True): Forward(consumers=3, overlap=False),
    (64, False): Forward(consumers=3, overlap=False),
    (128, True): Forward(),
    (128, False): Forward(persistent=False),
    (192, True): Forward(columns=64),
    (192, False): Forward(columns=64, persistent=False),
    (256, True): Forward(columns=64),
    (256, False): Forward(columns=64, persistent=False),
  },
  queries={
    (64, True): Backward(columns=128),
    (64, False): Backward(columns=128, persistent=False),
    (128, True): Backward(persistent=False),
    (128, False): Backward(persistent=False),
    (192, True): Backward(persistent=False),
    (192, False): Backward(persistent=False),
    (256, True): Backward(stages=1, persistent=False),
    (256, False): Backward(stages=1, persistent=False),
  },
  keys={
    (64, True): Backward(columns=128),
    (64, False): Backward(columns=128, persistent=False),
    (128, True): Backward(),
    (128, False): Backward(persistent=False),
    (192, True): Backward(),
    (192, False): Backward(persistent=False),
    (256, True): Backward(stages=1),
    (256, False): Backward(stages=1, persistent=False),
  },
  fused={(128, True): Fused(), (128, False): Fused(persistent=False)},
)
# By device kind; a device that is missing takes the H100's. A file that
# `tables` finds goes before.
TABLES = {"NVIDIA H100 80GB HBM3": _H100}


def forward(width: int, v_width: int, full: bool) -> Forward:
  """Block sizes of the forward kernel.

  Args:
    width: head dim of queries and keys.
    v_width: head dim of values.
    full: whether rows see all keys.
  """
  return _look_up(table().forward, width, v_width, full)


def queries(width: int, v_width: int, full: bool) -> Backward:
  """Those of the kernel for the gradient of queries; arguments as above."""
  return _look_up(table().queries, width, v_width, full)


def keys(width: int, v_width: int, full: bool) -> Backward:
  """Those of the kernel for the gradients of keys and values."""
  return _look_up(table().keys, width, v_width, full)


def biased(config: Any) -> Any:
  """Sizes for a call with bias, of which a tile streams by too."""
  changed = {"columns": 64, "consumers": 2}
  if isinstance(config, Forward):
    changed["overlap"] = False
  return dataclasses.replace(config, **changed)


def fused(width: int, v_width: int, full: bool) -> Fused | None:
  """Those of the kernel for all gradients; None where two kernels run.

  Args:
    width: head dim of queries and keys.
    v_width: head dim of values.
    full: whether rows see all keys.
  """
  return table().fused.get((width, full)) if width == v_width else None


def table() -> Table:
  """The sizes in force for the default device."""
  kind = jax.devices()[0].device_kind
  return tables.current(kind, TABLES.get(kind, _H100))


def _look_up(
  sizes: Mapping[tuple[int, bool], Any], width: int, v_width: int, full: bool
) -> Any:
  needed = max(padded_width(width), padded_width(v_width))
  return sizes[min(known for known, _ in sizes if known >= needed), full]
