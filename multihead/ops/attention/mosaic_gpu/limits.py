"""Limits of the visible part that are known only when the kernels run.

Lengths of keys, offsets and segment ids are arrays. What they leave of the
matrix is found here, outside of the kernels, as a few integers per tile of
rows; a kernel reads them as scalars and loads nothing beyond them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from multihead.ops import pallas_compat as pc
from multihead.ops.attention.mosaic_gpu.visibility import Visibility

# What `bounds` holds for a tile of rows, in this order, after four tiles.
_OFFSET, _LENGTH = 4, 5
_NUMBERS = 8


class Limits(NamedTuple):
  """Arrays that limit what a row sees; None where they limit nothing.

  Attributes:
    offsets: int32 [B], positions of row 0.
    lengths: int32 [B] from 0 to S, columns in use.
    row_ids: int32 [B, T], together with
    column_ids: int32 [B, S]: a row sees the columns of its own id.
    bias: [b, n, t, s], added to the logits; each axis is 1 or full, b may be
      any divisor of B.
    states: uint32 [B, N, T], see dropout.py.
  """

  offsets: jax.Array | None = None
  lengths: jax.Array | None = None
  row_ids: jax.Array | None = None
  column_ids: jax.Array | None = None
  bias: jax.Array | None = None
  states: jax.Array | None = None

  @property
  def segments(self) -> bool:
    """Whether there are ids."""
    return self.row_ids is not None

  @property
  def moving(self) -> bool:
    """Whether which tiles a row visits depends on arrays."""
    some = self.offsets, self.lengths, self.row_ids
    return any(x is not None for x in some)

  def transposed(self) -> "Limits":
    """Those of the transposed matrix, whose rows past a length see nothing."""
    offsets = None if self.offsets is None else -self.offsets
    bias = None if self.bias is None else self.bias.swapaxes(2, 3)
    ids = self.column_ids, self.row_ids
    return Limits(offsets, self.lengths, *ids, bias, self.states)


class Scalars(NamedTuple):
  """What a kernel reads of `bounds` for its tile of rows.

  Attributes:
    tiles: as `visibility.column_tiles` returns them, but of any number.
    offset: position of row 0.
    length: columns in use (rows, if transposed).
  """

  tiles: list[jax.Array]
  offset: jax.Array | None = None
  length: jax.Array | None = None


def read(ref: jax.Array, item: jax.Array, row: jax.Array) -> Scalars:
  """The scalars of a tile of rows, in a kernel."""
  tiles = [ref[item, row, i] for i in range(4)]
  return Scalars(tiles, ref[item, row, _OFFSET], ref[item, row, _LENGTH])


def bounds(
  see: Visibility,
  limits: Limits,
  batch: int,
  rows: int,
  columns: int,
  transposed: bool = False,
) -> jax.Array:
  """int32 [B, row tiles, 8]: what the kernel needs to know of a tile of rows.

  Args:
    see: the visible part, but for the limits.
    limits: the limits.
    batch: B.
    rows: rows of a tile.
    columns: columns of a tile.
    transposed: whether both are, so that lengths are of rows, and rows may
      visit no tile at all; otherwise they visit one at least, which holds no
      more than columns in use and, after them, those that `tail` empties.
  """
  first = jnp.arange(-(-see.T // rows), dtype=jnp.int32)[None] * rows
  last = first + rows - 1
  one = lambda x, default: (
    jnp.full((batch, 1), default, jnp.int32) if x is None else x[:, None]
  )
  offset = one(limits.offsets, see.offset)
  length = one(limits.lengths, see.T if transposed else see.S)
  end = jnp.full_like(length, see.S) if transposed else length

  start = free_start = jnp.zeros_like(first)
  stop = free_stop = end
  if see.left is not None:
    start = first + (offset - see.left)
    free_start = last + (offset - see.left)
  if see.right is not None:
    stop = last + (offset + see.right + 1)
    free_stop = first + (offset + see.right + 1)
  up = lambda x: -(-x // columns)
  start = jnp.clip(start, 0, end) // columns
  stop = up(jnp.clip(stop, 0, end))
  free_start = up(jnp.clip(free_start, 0, see.S))
  free_stop = jnp.clip(free_stop, 0, end) // columns
  if transposed:
    stop = jnp.where(first < length, stop, 0)
  if limits.segments:
    start, free_start, free_stop, stop = _segment_tiles(
      (start, free_start, free_stop, stop), see, limits, rows, columns
    )
  if not transposed:
    some = jnp.minimum(start, jnp.maximum(up(end), 1) - 1)
    start = jnp.where(stop > start, start, some)
    stop = jnp.maximum(stop, start + 1)
  stop = jnp.maximum(stop, start)
  free_stop = jnp.clip(free_stop, start, stop)
  free_start = jnp.clip(free_start, start, free_stop)
  numbers = [start, free_start, free_stop, stop, offset, length]
  numbers += [jnp.zeros_like(start)] * (_NUMBERS - len(numbers))
  shape = batch, first.shape[1]
  numbers = [jnp.broadcast_to(x, shape) for x in numbers]
  return jnp.stack(numbers, axis=-1).astype(jnp.int32)


def _segment_tiles(
  tiles: tuple[jax.Array, ...],
  see: Visibility,
  limits: Limits,
  rows: int,
  columns: int,
) -> tuple[jax.Array, ...]:
  """Of the tiles that positions leave, those in which ids may meet.

  In order of their ids, as packed documents are, these are all that meet.
  Others that lie between them are visited too, and masked.
  """
  start, free_start, free_stop, stop = (x[..., None] for x in tiles)
  least, most = (x[:, :, None] for x in _ranges(limits.row_ids, rows))
  low, high = (x[:, None] for x in _ranges(limits.column_ids, columns))
  count = -(-see.S // columns)
  tile = jnp.arange(count, dtype=jnp.int32)
  # A transposed see.S is a multiple of columns, the ids may be fewer.
  meet = (least <= high) & (low <= most) & (tile >= start) & (tile < stop)
  equal = (least == most) & (low == high) & (least == low)
  free = equal & (tile >= free_start) & (tile < free_stop)
  first_of = lambda where: jnp.where(where, tile, count).min(-1)
  stop = jnp.where(meet, tile + 1, 0).max(-1)
  start = jnp.minimum(first_of(meet), stop)
  free_start = first_of(free)
  free_stop = first_of(~free & (tile > free_start[..., None]))
  return start, free_start, free_stop, stop


def _ranges(ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  """Smallest and largest id of every tile, both [B, tiles]."""
  ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % size)), mode="edge")
  ids = ids.reshape(ids.shape[0], -1, size)
  return ids.min(axis=-1), ids.max(axis=-1)


def tail(x: jax.Array, lengths: jax.Array, columns: int) -> jax.Array:
  """The tile that a length ends in [B, columns, K, H], zero past the length.

  What is there instead, NaN even, must not meet a weight of 0 in a product.
  """
  at = (lengths // columns * columns)[:, None] + jnp.arange(columns)
  item = jnp.arange(x.shape[0])[:, None]
  values = x[item, jnp.minimum(at, x.shape[1] - 1)]
  used = (at < lengths[:, None])[..., None, None]
  return jnp.where(used, values, jnp.zeros_like(values))


def used_rows(first: jax.Array, rows: int, length: jax.Array) -> jax.Array:
  """bool [rows] in registers: which rows of a tile are before the length."""
  row = plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=pc.WGMMA.reduce(1))
  return row < length - first
