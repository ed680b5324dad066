"""Block sizes of the kernels by head dim, for the devices that were timed."""

import dataclasses
from collections.abc import Mapping

import jax

from multihead.ops.attention.triton import options


@dataclasses.dataclass(frozen=True)
class Launch:
  """How one kernel cuts its work.

  Attributes:
    rows: query rows of a tile, a power of two from 16 on.
    columns: keys of a tile, likewise.
    warps: warps of a program.
    stages: tiles that its loop has loaded or is loading.
  """

  rows: int
  columns: int
  warps: int
  stages: int


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Launches of the four kernels.

  Attributes:
    forward: of `kernels.forward`.
    queries: of `kernels.query_gradient`.
    keys: of `kernels.key_value_gradients`.
    bias: of `kernels.bias_gradient`.
  """

  forward: Launch
  queries: Launch
  keys: Launch
  bias: Launch


# By padded head dim (the wider of H and Hv) and bytes of a number.
Table = Mapping[tuple[int, int], Blocks]

# Bytes 2 and head dims 64 and 128: the fastest of those timed in bfloat16 at
# T = 4096 (docs/operations/attention.md). The others: what leaves the sums of a
# program in registers, or spills least. Few of float32 fit, which takes each
# number in three parts.
_H100: Table = {
  (64, 2): Blocks(
    Launch(64, 64, 4, 3),
    Launch(128, 64, 8, 3),
    Launch(64, 64, 4, 3),
    Launch(64, 64, 4, 2),
  ),
  (128, 2): Blocks(
    Launch(64, 64, 4, 3),
    Launch(128, 64, 8, 3),
    Launch(64, 64, 4, 2),
    Launch(64, 64, 4, 2),
  ),
  (256, 2): Blocks(
    Launch(128, 64, 8, 2),
    Launch(64, 32, 8, 2),
    Launch(32, 64, 8, 2),
    Launch(64, 32, 4, 2),
  ),
  (64, 4): Blocks(
    Launch(64, 64, 4, 2),
    Launch(64, 32, 4, 2),
    Launch(32, 64, 8, 2),
    Launch(32, 32, 4, 2),
  ),
  (128, 4): Blocks(
    Launch(32, 32, 4, 2),
    Launch(32, 32, 8, 2),
    Launch(32, 32, 8, 2),
    Launch(32, 32, 4, 2),
  ),
  (256, 4): Blocks(
    Launch(16, 32, 4, 2),
    Launch(16, 32, 8, 2),
    Launch(16, 16, 8, 2),
    Launch(16, 16, 4, 2),
  ),
}
TABLES: Mapping[str, Table] = {"NVIDIA H100 80GB HBM3": _H100}


# Bytes of shared memory that a program may take, by compute capability; a GPU
# that is missing is taken for one of the smaller.
_SHARED = {"8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227, "10.3": 227}
_SHARED_ELSE = 99


def choose(
  T: int,
  S: int,
  widths: tuple[int, int],
  itemsize: int,
  more: int = 0,
) -> Blocks:
  """Blocks for the default device.

  Args:
    T: number of rows.
    S: number of columns.
    widths: head dims of keys and of values.
    itemsize: bytes of a number.
    more: bytes of a bias and a mask for each logit.
  """
  device = jax.devices()[0]
  table = TABLES.get(device.device_kind, _H100)
  widths = tuple(map(options.padded, widths))
  found = table[
    min(k for k in table if k[1] == itemsize and k[0] >= max(widths))
  ]
  capability = str(getattr(device, "compute_capability", "9.0"))
  limit = 1024 * _SHARED.get(capability, _SHARED_ELSE)

  def fit(launch: Launch, held: str, width: int) -> Launch:
    rows = min(launch.rows, options.padded(T))
    columns = min(launch.columns, options.padded(S))
    if (rows, columns) != (launch.rows, launch.columns):
      launch = Launch(rows, columns, min(launch.warps, 4), launch.stages)
    while (
      shared_bytes(launch, held, width, sum(widths), itemsize, more) > limit
    ):
      launch = _smaller(launch, held)
    return launch

  return Blocks(
    fit(found.forward, "rows", widths[0]),
    fit(found.queries, "rows", sum(widths)),
    fit(found.keys, "columns", sum(widths)),
    fit(found.bias, "rows", sum(widths)),
  )


def shared_bytes(
  launch: Launch,
  held: str,
  held_width: int,
  streamed_width: int,
  itemsize: int,
  more: int = 0,
) -> int:
  """Shared memory that a program takes at most.

  Args:
    launch: its blocks.
    held: "rows" or "columns", what stays while the other streams by.
    held_width: padded width of what is held.
    streamed_width: likewise of what streams by.
    itemsize: bytes of a number.
    more: bytes of a bias and a mask for each logit.
  """
  stays, streams = launch.rows, launch.columns
  if held == "columns":
    stays, streams = streams, stays
  # float32 is held in the two parts that it is multiplied in.
  stays *= held_width * itemsize * (2 if itemsize == 4 else 1)
  streams *= streamed_width * itemsize
  logits = launch.rows * launch.columns * more
  # Two numbers more for each row, its lse and delta.
  return stays + launch.stages * (streams + logits + 8 * launch.rows)


def _smaller(launch: Launch, held: str) -> Launch:
  """What to do without next."""
  streamed = "rows" if held == "columns" else "columns"
  if launch.stages > 2:
    change = dict(stages=launch.stages - 1)
  elif getattr(launch, streamed) > 32:
    change = {streamed: getattr(launch, streamed) // 2}
  elif launch.stages > 1:
    change = dict(stages=1)
  elif getattr(launch, streamed) > 16:
    change = {streamed: getattr(launch, streamed) // 2}
  else:
    change = {held: getattr(launch, held) // 2}
  return dataclasses.replace(launch, **change)
