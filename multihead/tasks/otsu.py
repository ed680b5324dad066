"""Otsu's threshold: the segmentation that needs no training.

"A Threshold Selection Method from Gray-Level Histograms", IEEE Transactions on
Systems, Man, and Cybernetics 9 (1979).
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Num

_LEVELS = 256

# Grey levels of an image, the threshold for it, and its mask.
Sample = tuple[np.ndarray, float, np.ndarray]


def threshold(grey: Num[np.ndarray, "..."]) -> float:
  """The grey level that parts the histogram into the two clearest classes.

  It maximises the variance between the classes (equation 14 there) over the
  values of 8-bit images, else over 256 levels of the range; of a constant image
  it is that constant.
  """
  low, high = float(grey.min()), float(grey.max())
  if low == high:
    return low
  bins, bounds = _LEVELS, (low, high)
  if grey.dtype == np.uint8:  # a level for each
    bins, bounds = int(high - low) + 1, (low - 0.5, high + 0.5)
  counts, edges = np.histogram(grey.astype(np.float64), bins, bounds)
  levels = (edges[:-1] + edges[1:]) / 2
  share = counts / grey.size
  below = np.cumsum(share)[:-1]  # at the level or below it
  moment = np.cumsum(share * levels)
  between = (moment[-1] * below - moment[:-1]) ** 2 / (below * (1 - below))
  return float(levels[np.argmax(between)])


def foreground(
  grey: Num[np.ndarray, "H W"], at: float, bright: bool
) -> Bool[np.ndarray, "H W"]:
  """What lies above a threshold, or what does not."""
  return (grey > at) == bright


def score(samples: Iterable[Sample], bright: bool) -> tuple[float, float]:
  """Pooled IoU and Dice coefficient of thresholded images.

  Args:
    samples: see Sample; a mask of fractions counts from 1/2 on.
    bright: whether the foreground is above the threshold.
  """
  counts = np.zeros(3)
  for grey, at, mask in samples:
    taken, truth = foreground(grey, at, bright), mask >= 0.5
    counts += (taken & truth).sum(), taken.sum(), truth.sum()
  hits, taken, truth = counts
  union = taken + truth - hits
  if not union:
    return 0.0, 0.0
  return float(hits / union), float(2 * hits / (taken + truth))
