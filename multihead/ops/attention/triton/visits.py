"""Which tiles of the attention matrix are visited, and which need no mask.

A tile is visited if something in it may be visible, by position, lengths, ids
(whose ranges must meet) and mask, each on its own; it is free if all of it is.
A row of tiles visits one range, from its first such tile to its last, and the
first run of free tiles in it goes without masks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Sight(NamedTuple):
  """What decides which logits are visible.

  Attributes:
    T: number of rows.
    S: number of columns.
    left: see ../positions.py.
    right: likewise.
    offset: an int or [B].
    lengths: keys in use, [B] or None.
    q_ids: [B, T] or None.
    kv_ids: [B, S] or None.
    mask: [#B, #N, #T, #S] or None.
  """

  T: int
  S: int
  left: int | None
  right: int | None
  offset: int | jax.Array
  lengths: jax.Array | None
  q_ids: jax.Array | None
  kv_ids: jax.Array | None
  mask: jax.Array | None


Bounds = np.ndarray | jax.Array


def row_bounds(sight: Sight, rows: int, columns: int) -> Bounds:
  """int32 [#B, #N, row tiles, 4]: (first, free, free_stop, stop) of each.

  Of the column tiles first..stop-1, those of free..free_stop-1 are free.
  """
  return _ranges(*_tiles(sight, rows, columns))


def column_bounds(sight: Sight, rows: int, columns: int) -> Bounds:
  """The same of row tiles: int32 [#B, #N, column tiles, 4]."""
  some, every = _tiles(sight, rows, columns)
  return _ranges(some.swapaxes(2, 3), every.swapaxes(2, 3))


def loops(bounds: Bounds) -> tuple[bool, bool]:
  """Whether there may be tiles that are not free, and free ones."""
  if not isinstance(bounds, np.ndarray):
    return True, True
  first, free, free_stop, stop = np.moveaxis(bounds, -1, 0)
  count = free_stop - free
  return bool((stop - first > count).any()), bool((count > 0).any())


def _tiles(sight: Sight, rows: int, columns: int) -> tuple[Bounds, Bounds]:
  """(some, every) of each tile: bool [#B, #N, row tiles, column tiles]."""
  start_i = np.arange(0, sight.T, rows)[:, None]
  start_j = np.arange(0, sight.S, columns)[None, :]
  last_i = np.minimum(start_i + rows, sight.T) - 1
  last_j = np.minimum(start_j + columns, sight.S) - 1
  # A ragged tile is never free: what lies past the arrays is hidden.
  some = np.ones((1, 1, len(start_i), start_j.shape[1]), bool)
  every = (last_i - start_i == rows - 1) & (last_j - start_j == columns - 1)
  every = every & some
  if sight.lengths is not None:
    lengths = sight.lengths[:, None, None, None]
    some = some & (start_j < lengths)
    every = every & (last_j < lengths)
  offset = sight.offset
  if not isinstance(offset, int):
    offset = offset[:, None, None, None]
  if sight.left is not None:
    some = some & (last_j - start_i - offset >= -sight.left)
    every = every & (start_j - last_i - offset >= -sight.left)
  if sight.right is not None:
    some = some & (start_j - last_i - offset <= sight.right)
    every = every & (last_j - start_i - offset <= sight.right)
  if sight.q_ids is not None:
    low, high = (x[:, None, :, None] for x in _extremes(sight.q_ids, rows))
    least, most = (
      x[:, None, None, :] for x in _extremes(sight.kv_ids, columns)
    )
    some = some & (low <= most) & (least <= high)
    every = every & (low == high) & (least == most) & (low == least)
  if sight.mask is not None:
    some = some & _reduce(sight.mask, rows, columns, "any")
    every = every & _reduce(sight.mask, rows, columns, "all")
  return some, every


def _api(array: Bounds) -> Any:
  """What computes with an array: numpy where it is known while tracing."""
  return np if isinstance(array, np.ndarray) else jnp


def _extremes(ids: Bounds, size: int) -> tuple[Bounds, Bounds]:
  """Least and largest id of each tile [B, tiles]."""
  # What is appended lies between the two.
  widths = ((0, 0), (0, -ids.shape[1] % size))
  ids = _api(ids).pad(ids, widths, mode="edge")
  ids = ids.reshape(ids.shape[0], -1, size)
  return ids.min(axis=2), ids.max(axis=2)


def _reduce(mask: Bounds, rows: int, columns: int, how: str) -> Bounds:
  """Whether "any" or "all" of a tile is True: [#B, #N, #tiles, #tiles]."""
  for axis, size in ((2, rows), (3, columns)):
    if mask.shape[axis] == 1:
      continue
    widths = [(0, 0)] * 4
    widths[axis] = (0, -mask.shape[axis] % size)
    # What is appended hides nothing and shows nothing.
    mask = _api(mask).pad(mask, widths, constant_values=how == "all")
    shape = mask.shape
    mask = mask.reshape(*shape[:axis], -1, size, *shape[axis + 1 :])
    mask = getattr(mask, how)(axis=axis + 1)
  return mask


def _ranges(some: Bounds, every: Bounds) -> Bounds:
  """`row_bounds` from `_tiles`."""
  api = _api(some)
  at = np.arange(some.shape[3])
  count = some.shape[3]
  first = api.where(some, at, count).min(axis=3)
  stop = api.where(some, at + 1, 0).max(axis=3)
  first = api.minimum(first, stop)
  free = api.where(every, at, count).min(axis=3)
  free = api.clip(free, first, stop)
  blocked = ~every & (at >= free[..., None])
  free_stop = api.where(blocked, at, count).min(axis=3)
  free_stop = api.clip(free_stop, free, stop)
  return api.stack([first, free, free_stop, stop], axis=-1).astype(np.int32)
