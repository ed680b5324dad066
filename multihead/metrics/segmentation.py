"""Overlap and distance of masks.

sums = update(predict(logits), classes_of(masks, C), weights, C)  # of one batch
print(compute(merge(sums, others)))

Papers on lesions pool the pixels of all images into one table (`iou`, `dsc`);
the scorer of the ISIC challenges takes the mean over images (`image_jaccard`,
`threshold_jaccard`). Both are computed, and differ. Distances and the rules of
Synapse are for whole volumes, on the host: `hd95`, `case_scores`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, Shaped

# Below this the ISIC challenges count a mask as failed.
THRESHOLD_JACCARD = 0.65


class Sums(NamedTuple):
  """What batches add up to.

  Attributes:
    confusion: [C, C], pixels of class i taken for class j.
    jaccard: [C], sum over images of the Jaccard index of each class.
    threshold_jaccard: the same, of those that reach THRESHOLD_JACCARD.
    dice: [C], likewise of the Dice coefficient.
    images: how many were counted.
  """

  confusion: Int[Array, "C C"]
  jaccard: Float[Array, " C"]
  threshold_jaccard: Float[Array, " C"]
  dice: Float[Array, " C"]
  images: Float[Array, ""]


def predict(
  logits: Float[Array, "B height width C"], threshold: float = 0.5
) -> Int[Array, "B height width"]:
  """Class numbers from logits.

  Args:
    logits: of one class, the foreground, or of all classes.
    threshold: of the probability of the foreground, from where on a pixel
      belongs to it; for one class alone.

  Raises:
    ValueError: a threshold that is not between 0 and 1.
  """
  if not 0 < threshold < 1:
    raise ValueError(f"threshold={threshold} must lie between 0 and 1")
  if logits.shape[-1] > 1:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  # That of 0.5 is exactly 0.
  bound = math.log(threshold / (1 - threshold))
  return (logits[..., 0] >= bound).astype(jnp.int32)


def classes_of(
  masks: Num[Array, "B height width"], num_classes: int
) -> Int[Array, "B height width"]:
  """Class numbers of masks: fractions of the foreground count from 1/2 on."""
  if num_classes == 1:
    return (masks >= 0.5).astype(jnp.int32)
  return masks.astype(jnp.int32)


def update(
  predicted: Int[Array, "B ..."],
  truth: Int[Array, "B ..."],
  weights: Float[Array, " B"],
  num_classes: int,
) -> Sums:
  """The sums of one batch; images whose weight is 0 do not count.

  Args:
    predicted: class numbers; for num_classes 1, 0 and 1.
    truth: likewise.
    weights: 1 for an image, 0 for what fills up a batch.
    num_classes: of the model; 1 is background and foreground, so C = 2.

  Raises:
    ValueError: the shapes differ.
  """
  if predicted.shape != truth.shape:
    raise ValueError(
      f"predicted is {list(predicted.shape)} and truth {list(truth.shape)}; "
      "they must be equal"
    )
  count = max(num_classes, 2)
  index = (truth * count + predicted).reshape(len(truth), -1, 1)
  # Fused into the sum: what is compared never lies in memory.
  table = jnp.sum(index == jnp.arange(count**2), axis=1, dtype=jnp.int32)
  table = table.reshape(-1, count, count)
  return of_tables(table, weights)


def of_tables(table: Int[Array, "B C C"], weights: Float[Array, " B"]) -> Sums:
  """The sums of images whose pixels have been counted.

  Args:
    table: of each image the pixels of class i taken for class j.
    weights: 0 takes an image out.
  """
  there = weights > 0
  hits = jnp.diagonal(table, axis1=1, axis2=2)
  sizes = table.sum(1) + table.sum(2)
  # Neither truth nor prediction has the class: the ISIC scorer gives 1.
  jaccard = jnp.where(sizes > 0, hits / jnp.maximum(sizes - hits, 1), 1.0)
  dice = jnp.where(sizes > 0, 2 * hits / jnp.maximum(sizes, 1), 1.0)
  passed = jnp.where(jaccard >= THRESHOLD_JACCARD, jaccard, 0.0)
  total = lambda x: jnp.sum(jnp.where(there[:, None], x, 0.0), axis=0)
  counted = jnp.where(there[:, None, None], table, 0)
  return Sums(
    confusion=counted.sum(0),
    jaccard=total(jaccard),
    threshold_jaccard=total(passed),
    dice=total(dice),
    images=jnp.sum(there, dtype=jnp.float32),
  )


def merge(first: Sums, second: Sums) -> Sums:
  """The sums of two sets of images together."""
  return jax.tree.map(lambda a, b: a + b, first, second)


def compute(sums: Sums, names: Sequence[str] = ()) -> dict[str, float]:
  """Numbers of all images together.

  Args:
    sums: of all of them; beyond 2^31 pixels to be added in double precision.
    names: of the classes, the background first. With more than two, iou_NAME
      and dsc_NAME of every other class are added.

  Returns:
    Of the pooled pixels iou, dsc, sensitivity and specificity, which are those
    of the foreground, or means over all classes but the background, without
    the classes that neither truth nor prediction has; and accuracy. A ratio
    whose parts are all 0 is 0. Means over images: image_jaccard,
    image_threshold_jaccard and image_dice, an image counting 1 where truth and
    prediction both lack the class.

  Raises:
    ValueError: no image has been counted, or names of other classes.
  """
  table = np.asarray(sums.confusion, np.float64)
  images, count = float(sums.images), len(table)
  if not images:
    raise ValueError("no image has been counted")
  if names and len(names) != count:
    raise ValueError(f"{len(names)} names for {count} classes")
  hits = np.diag(table)
  missed, extra = table.sum(1) - hits, table.sum(0) - hits
  rest = table.sum() - hits - missed - extra
  ratio = lambda a, b: np.divide(a, b, out=np.zeros_like(a), where=b > 0)
  found = {
    "iou": ratio(hits, hits + missed + extra),
    "dsc": ratio(2 * hits, 2 * hits + missed + extra),
    "sensitivity": ratio(hits, hits + missed),
    "specificity": ratio(rest, rest + extra),
  }
  there = (hits + missed + extra > 0) & (np.arange(count) > 0)
  mean = lambda x: float(x[there].mean()) if there.any() else 0.0
  numbers = {name: mean(values) for name, values in found.items()}
  if not there.any():
    numbers["specificity"] = float(found["specificity"][1:].mean())
  numbers["accuracy"] = float(hits.sum() / table.sum())
  for name in ("jaccard", "threshold_jaccard", "dice"):
    values = np.asarray(getattr(sums, name), np.float64)[1:] / images
    numbers[f"image_{name}"] = float(values.mean())
  if count > 2 and names:
    for i in range(1, count):
      for name in ("iou", "dsc"):
        numbers[f"{name}_{names[i]}"] = float(found[name][i])
  return numbers


def dice(
  predicted: Shaped[np.ndarray, "..."], truth: Shaped[np.ndarray, "..."]
) -> float:
  """2 |A and B| / (|A| + |B|) of two masks; 0 where both are empty."""
  predicted, truth = _masks(predicted, truth)
  sizes = np.count_nonzero(predicted) + np.count_nonzero(truth)
  return 2 * np.count_nonzero(predicted & truth) / sizes if sizes else 0.0


def hd95(
  predicted: Shaped[np.ndarray, "..."],
  truth: Shaped[np.ndarray, "..."],
  spacing: float | Sequence[float] = 1.0,
) -> float:
  """The 95th percentile of the distances between the surfaces of two masks.

  The distances of every surface pixel of each mask to the other's surface are
  pooled, as medpy does: not the larger one of two percentiles. A pixel is on
  the surface if a neighbour that shares a side with it is background or
  outside of the image. Percentiles are interpolated linearly.

  Args:
    predicted: in any number of dimensions; what is not 0 is foreground.
    truth: of the same shape.
    spacing: of the pixels, one for all dimensions or one for each.

  Returns:
    In the unit of the spacing.

  Raises:
    ValueError: masks of two shapes, or an empty one, which has no surface.
  """
  from scipy import ndimage  # a dependency of jax

  predicted, truth = _masks(predicted, truth)
  if not (predicted.any() and truth.any()):
    which = "truth" if predicted.any() else "the prediction"
    raise ValueError(
      f"{which} is empty, so there is no distance; case_scores has a rule"
    )
  # Nothing outside of the box around both has a part in this.
  (box,) = ndimage.find_objects((predicted | truth).astype(np.uint8))
  spacing = np.broadcast_to(np.asarray(spacing, np.float64), predicted.ndim)
  surfaces = [
    mask & ~ndimage.binary_erosion(mask)
    for mask in (predicted[box], truth[box])
  ]
  far = [
    ndimage.distance_transform_edt(~other, sampling=spacing)[one]
    for one, other in (surfaces, surfaces[::-1])
  ]
  return float(np.percentile(np.concatenate(far), 95))


def case_scores(
  predicted: Int[np.ndarray, "..."],
  truth: Int[np.ndarray, "..."],
  num_classes: int,
  spacing: float | Sequence[float] = 1.0,
) -> Float[np.ndarray, "classes 2"]:
  """Dice and HD95 of every class but the background, by the rules of Synapse.

  Where the prediction lacks the class the two are 0 and 0; where only the truth
  does they are 1 and 0. The published means are over cases, then classes.

  Args:
    predicted: class numbers of one volume or image.
    truth: likewise.
    num_classes: of the model; 1 is background and foreground.
    spacing: see `hd95`.
  """
  scores = np.zeros((max(num_classes, 2) - 1, 2))
  for row, number in enumerate(range(1, len(scores) + 1)):
    ours, theirs = predicted == number, truth == number
    if not ours.any():
      continue
    if not theirs.any():
      scores[row] = 1, 0
    else:
      scores[row] = dice(ours, theirs), hd95(ours, theirs, spacing)
  return scores


def _masks(*masks: np.ndarray) -> list[np.ndarray]:
  masks = [np.asarray(mask) != 0 for mask in masks]
  if masks[0].shape != masks[1].shape:
    raise ValueError(
      f"masks of shapes {list(masks[0].shape)} and {list(masks[1].shape)}; "
      "they must be equal"
    )
  return masks
