"""Which tiles a row of tiles visits, and which elements of a tile are visible.

Columns are visited from the right to the left: keys that only some rows see by
position (the diagonal, the end of the keys) come first, so the loop without
masks follows, and the left edge of a window comes last.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from multihead.ops import pallas_compat as pc


@dataclasses.dataclass(frozen=True)
class Visibility:
  """What is static about the visible part of the matrix.

  Attributes:
    T: rows.
    S: columns.
    left: see positions.py.
    right: likewise.
    offset: position of row 0.
  """

  T: int
  S: int
  left: int | None
  right: int | None
  offset: int

  @property
  def full(self) -> bool:
    """Whether every row sees every column."""
    return self.left is None and self.right is None

  def transposed(self, rows: int) -> "Visibility":
    """Which rows a column sees, of T rounded up to a multiple of `rows`."""
    T = -(-self.T // rows) * rows
    return Visibility(self.S, T, self.right, self.left, -self.offset)


def _floor(a, b):
  # Operands are clipped to be >= 0 first: lax.div rounds to zero.
  return a // b if isinstance(a, int) else lax.div(a, jnp.int32(b))


def _clip(x, low, high):
  if isinstance(x, int) and isinstance(low, int) and isinstance(high, int):
    return min(max(x, low), high)
  x, low, high = (
    jnp.int32(a) if isinstance(a, int) else a for a in (x, low, high)
  )
  return lax.min(lax.max(x, low), high)


def column_tiles(see: Visibility, first, rows: int, columns: int):
  """(start, free_start, free_stop, stop): tiles that rows first.. visit.

  Of tiles start..stop-1, which are at least one, free_start..free_stop-1 need
  no mask.

  Args:
    see: the visible part.
    first: first row, an int or an int32 scalar.
    rows: number of rows.
    columns: width of a tile.
  """
  count = -(-see.S // columns)
  last = first + rows - 1
  low = see.left is not None
  high = see.right is not None
  stop = free_stop = see.S
  if high:
    stop = last + (see.offset + see.right + 1)
    free_stop = first + (see.offset + see.right + 1)
  start = free_start = 0
  if low:
    start = first + (see.offset - see.left)
    free_start = last + (see.offset - see.left)
  start = _floor(_clip(start, 0, see.S - 1), columns)
  stop = _floor(_clip(stop, 0, see.S) + (columns - 1), columns)
  stop = _clip(stop, start + 1, count)
  free_stop = _floor(_clip(free_stop, 0, see.S), columns)
  free_stop = _clip(free_stop, start, stop)
  free_start = _floor(_clip(free_start, 0, see.S) + (columns - 1), columns)
  free_start = _clip(free_start, start, free_stop)
  return start, free_start, free_stop, stop


def edges(see: Visibility, rows: int, columns: int) -> tuple[bool, bool, bool]:
  """Whether there are masked tiles: the first one, more at the right, left.

  Args:
    see: the visible part.
    rows: rows of a tile row; the first one starts at row 0.
    columns: width of a tile.
  """
  tail = see.S % columns != 0
  first = tail or not see.full
  more = False
  if see.right is not None:
    # The bounds of a tile's rows, a step of one each, may lie in two tiles.
    end = (see.offset + see.right + 1) % columns
    more = rows != columns or end > 1
  return first, more, see.left is not None


def visible(
  see: Visibility,
  first,
  column,
  rows: int,
  columns: int,
  *,
  offset=None,
  length=None,
  ids=None,
):
  """bool [rows, columns] in registers: which elements of a tile are visible.

  Args:
    see: the visible part.
    first: first row of the tile.
    column: first column of the tile.
    rows: rows of the tile.
    columns: columns of the tile.
    offset: position of row 0, an int32 scalar, in place of that of `see`.
    length: number of columns in use, likewise.
    ids: those of the rows and of the columns, which must be equal.
  """
  shape = (rows, columns)
  at = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=pc.WGMMA)
  place = None
  if not see.full:
    row = plgpu.broadcasted_iota(
      jnp.int32, (rows,), 0, layout=pc.WGMMA.reduce(1)
    )
    place = row + (first + (see.offset if offset is None else offset) - column)
  # A bound per row: what is left for every element is one sum, one comparison.
  stop = None
  if see.right is not None:
    stop = place + (see.right + 1)
  if length is not None or see.S % columns:
    end = (see.S if length is None else length) - column
    stop = end if stop is None else jnp.minimum(stop, end)
  keep = None
  if stop is not None:
    keep = at < (stop if stop.ndim == 0 else pc.widen(stop, shape))
  if see.left is not None:
    more = at >= pc.widen(place - see.left, shape)
    keep = more if keep is None else keep & more
  if ids is not None:
    row_ids, column_ids = ids
    same = pc.widen(row_ids, shape) == pc.widen_rows(column_ids, shape)
    keep = same if keep is None else keep & same
  return keep
