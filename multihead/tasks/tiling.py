"""Prediction of images of any size, in overlapping tiles or padded."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Num, Shaped

from multihead.errors import UserError

WINDOWS = ("hann", "linear")


def predict_tiled(
  predict: Callable[[np.ndarray], Any],
  image: Num[np.ndarray, "H W C"],
  *,
  tile: int = 256,
  overlap: int | None = None,
  multiple: int = 32,
  batch_size: int = 4,
  window: str = "hann",
  finish: Callable[[np.ndarray], np.ndarray] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Shaped[np.ndarray, "H W ..."]:
  """Predicts tile by tile and blends where the tiles overlap.

  The tiles lie evenly and overlap by at least `overlap` pixels. A side that is
  shorter than a tile is padded by reflection, up to a multiple of `multiple`.
  Where tiles meet, the weight of each rises over its outermost `overlap` pixels
  and all weights of a pixel add up to 1; so a function of single pixels gives
  exactly what it gives of the whole image.

  Besides the image and the result, memory holds one row of tiles.

  Args:
    predict: [batch_size, h, w, C] to [batch_size, h, w, K], such as
      probabilities; always called with the same shape. It gets the image's own
      dtype.
    image: the whole image.
    tile: side of a tile in pixels, a multiple of `multiple`.
    overlap: of neighbours, in pixels; None: a quarter of the tile.
    multiple: what divides the sides of what `predict` gets.
    batch_size: tiles at a time.
    window: how weights rise, "hann" or "linear".
    finish: makes of finished rows [h, W, K] what is kept, such as class
      numbers [h, W]; None keeps them, as float32.
    progress: told how many tiles of how many are done.

  Raises:
    UserError: sizes or a window that cannot be used.
    ValueError: predict gives another shape than that.
  """
  overlap = tile // 4 if overlap is None else overlap
  if tile < multiple or tile % multiple:
    raise UserError(f"tile={tile} must be a multiple of {multiple}")
  if not 0 <= overlap <= tile // 2:
    raise UserError(
      f"overlap={overlap} must lie between 0 and half of tile={tile}"
    )
  if window not in WINDOWS:
    raise UserError(f"window={window!r}; allowed are {', '.join(WINDOWS)}")
  if image.ndim != 3 or not image.size:
    raise UserError(
      f"an image must be [height, width, channels], got {list(image.shape)}"
    )
  height, width = image.shape[:2]
  sides = [min(tile, -(-n // multiple) * multiple) for n in (height, width)]
  image = _padded(image, sides)
  axes = [
    _Axis(n, side, min(overlap, side // 2), window)
    for n, side in zip(image.shape, sides, strict=False)
  ]
  finish = finish or (lambda rows: rows.astype(np.float32))
  tiles = _Tiles(predict, image, axes, batch_size, progress)
  return tiles.blend(finish)[:height, :width]


def _padded(image: np.ndarray, sides: list[int]) -> np.ndarray:
  """At least of these sides, reflected at the right and at the bottom."""
  missing = [
    max(0, side - n) for side, n in zip(sides, image.shape, strict=False)
  ]
  if not any(missing):
    return image
  # Of a single row there is nothing to reflect: it is repeated.
  for axis, count in enumerate(missing):
    where = [(0, 0)] * image.ndim
    where[axis] = (0, count)
    mode = "reflect" if image.shape[axis] > 1 else "edge"
    image = np.pad(image, where, mode=mode)
  return image


class _Axis:
  """Where tiles begin along an axis, and the weights of their pixels."""

  def __init__(self, length: int, side: int, overlap: int, window: str):
    self.length, self.side = length, side
    count = -(-(length - overlap) // (side - overlap)) if length > side else 1
    self.starts = np.linspace(0, length - side, count).round().astype(int)
    rise = (np.arange(overlap) + 0.5) / max(overlap, 1)
    if window == "hann":
      rise = np.sin(np.pi / 2 * rise) ** 2
    shape = np.ones(side)
    shape[:overlap] = rise
    shape[side - overlap :] = rise[::-1]
    total = np.zeros(length)
    for start in self.starts:
      total[start : start + side] += shape
    self.weights = [shape / total[s : s + side] for s in self.starts]


class _Tiles:
  """The tiles of an image, row by row of them."""

  def __init__(
    self,
    predict: Callable[[np.ndarray], Any],
    image: np.ndarray,
    axes: list[_Axis],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
  ):
    self.predict, self.image, self.batch_size = predict, image, batch_size
    self.rows, self.columns = axes
    self.progress, self.done = progress, 0

  def blend(self, finish: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """What `finish` makes of the blended rows."""
    rows, band, out = self.rows, None, None
    ends = [*rows.starts[1:], rows.length]
    for start, end, weights in zip(
      rows.starts, ends, rows.weights, strict=True
    ):
      row = self._row(start) * weights[:, None, None]
      # What is left of the rows before overlaps the first rows of this one.
      if band is not None:
        row[: len(band)] += band
      ready = finish(row[: end - start])
      if out is None:
        shape = (rows.length, self.columns.length, *ready.shape[2:])
        out = np.empty(shape, ready.dtype)
      out[start:end] = ready
      band = row[end - start :]
    return out

  def _row(self, top: int) -> Float[np.ndarray, "side W K"]:
    """A row of tiles blended with one another, in float64."""
    columns, rows = self.columns, slice(top, top + self.rows.side)
    starts, out = list(columns.starts), None
    for first in range(0, len(starts), self.batch_size):
      chosen = starts[first : first + self.batch_size]
      filled = chosen + chosen[-1:] * (self.batch_size - len(chosen))
      batch = np.stack([self.image[rows, s : s + columns.side] for s in filled])
      found = np.asarray(self.predict(batch))
      if found.ndim != 4 or found.shape[:3] != batch.shape[:3]:
        raise ValueError(
          f"predict made {list(found.shape)} of {list(batch.shape)}; it must "
          "keep all but the last axis"
        )
      if out is None:
        shape = (self.rows.side, columns.length, found.shape[-1])
        out = np.zeros(shape)
      for i, start in enumerate(chosen):
        weights = columns.weights[first + i][None, :, None]
        out[:, start : start + columns.side] += weights * found[i]
      self.done += len(chosen)
      if self.progress is not None:
        count = len(starts) * len(self.rows.starts)
        self.progress(self.done, count)
    return out
