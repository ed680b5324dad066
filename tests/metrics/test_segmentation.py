"""Segmentation metrics against counting, scikit-learn and brute force."""

import jax
import numpy as np
import pytest

from multihead.metrics import segmentation

update = jax.jit(segmentation.update, static_argnums=3)


def random_classes(shape, classes, seed=0):
  return np.random.default_rng(seed).integers(0, classes, shape, np.int32)


def test_pooled_numbers_are_those_of_scikit_learn():
  sklearn = pytest.importorskip(
    "sklearn.metrics", reason="pip install 'multihead[vision]'"
  )
  truth, taken = (random_classes((5, 7, 9), 2, s) for s in (0, 1))
  sums = update(taken, truth, np.ones(5, np.float32), 1)
  (tn, fp), (fn, tp) = sklearn.confusion_matrix(truth.ravel(), taken.ravel())
  np.testing.assert_array_equal(sums.confusion, [[tn, fp], [fn, tp]])
  found = segmentation.compute(sums)
  flat = truth.ravel(), taken.ravel()
  for name, want in {
    "iou": sklearn.jaccard_score(*flat),
    "dsc": sklearn.f1_score(*flat),
    "accuracy": sklearn.accuracy_score(*flat),
    "sensitivity": sklearn.recall_score(*flat),
    "specificity": sklearn.recall_score(*flat, pos_label=0),
  }.items():
    assert found[name] == pytest.approx(want, abs=1e-12), name
  assert found["dsc"] == pytest.approx(2 * found["iou"] / (1 + found["iou"]))


def test_many_classes_are_those_of_scikit_learn():
  sklearn = pytest.importorskip(
    "sklearn.metrics", reason="pip install 'multihead[vision]'"
  )
  # Class 4 does not occur: it has no part in the means.
  truth, taken = (random_classes((3, 8, 5), 4, s) for s in (2, 3))
  sums = update(taken, truth, np.ones(3, np.float32), 5)
  flat = truth.ravel(), taken.ravel()
  np.testing.assert_array_equal(
    sums.confusion, sklearn.confusion_matrix(*flat, labels=range(5))
  )
  found = segmentation.compute(sums, ["none", "a", "b", "c", "d"])
  each = dict(labels=[1, 2, 3], average=None)
  ious = sklearn.jaccard_score(*flat, **each)
  assert [found[f"iou_{n}"] for n in "abc"] == pytest.approx(list(ious))
  assert found["iou"] == pytest.approx(ious.mean())
  assert found["dsc"] == pytest.approx(sklearn.f1_score(*flat, **each).mean())
  assert found["iou_d"] == 0


def test_means_over_images_by_hand():
  """Jaccard 1/3 (failed), 2/3 (passed), and nothing where nothing is: 1."""
  truth = np.zeros((4, 1, 4), np.int32)
  taken = np.zeros((4, 1, 4), np.int32)
  truth[0, 0, :2], taken[0, 0, 1:3] = 1, 1
  truth[1, 0, :3], taken[1, 0, :2] = 1, 1
  taken[3] = 1  # has no weight
  weights = np.array([1, 1, 1, 0], np.float32)
  found = segmentation.compute(update(taken, truth, weights, 1))
  assert found["image_jaccard"] == pytest.approx((1 / 3 + 2 / 3 + 1) / 3)
  assert found["image_threshold_jaccard"] == pytest.approx((2 / 3 + 1) / 3)
  assert found["image_dice"] == pytest.approx((1 / 2 + 4 / 5 + 1) / 3)
  # Pooled, 3 of 6 pixels: another number.
  assert found["iou"] == pytest.approx(3 / 6)
  assert found["accuracy"] == pytest.approx(9 / 12)


def test_empty_masks_pooled():
  nothing = np.zeros((2, 3, 3), np.int32)
  ones = np.ones(2, np.float32)
  found = segmentation.compute(update(nothing, nothing, ones, 1))
  assert (found["iou"], found["dsc"], found["sensitivity"]) == (0, 0, 0)
  assert (found["accuracy"], found["specificity"]) == (1, 1)
  assert found["image_jaccard"] == found["image_dice"] == 1
  full = segmentation.compute(update(nothing + 1, nothing + 1, ones, 1))
  assert (full["iou"], full["specificity"]) == (1, 0)
  with pytest.raises(ValueError, match="no image"):
    segmentation.compute(update(nothing, nothing, 0 * ones, 1))


@pytest.mark.parametrize("classes", [1, 4])
def test_batches_merge_to_the_whole(classes):
  shape = (7, 6, 5)
  truth, taken = (random_classes(shape, max(classes, 2), s) for s in (4, 5))
  whole = update(taken, truth, np.ones(7, np.float32), classes)
  pad = lambda x: np.concatenate([x[4:], x[:1]])
  parts = [
    update(taken[:4], truth[:4], np.ones(4, np.float32), classes),
    update(pad(taken), pad(truth), np.array([1, 1, 1, 0.0]), classes),
  ]
  merged = segmentation.merge(*parts)
  assert segmentation.compute(merged) == pytest.approx(
    segmentation.compute(whole), rel=1e-6
  )


def test_pixels_are_counted_exactly_beyond_float32():
  taken = np.zeros((3, 4096, 2049), np.int32)
  taken[:, 0, 0] = 1
  sums = update(taken, np.zeros_like(taken), np.ones(3, np.float32), 1)
  np.testing.assert_array_equal(
    sums.confusion, [[3 * 4096 * 2049 - 3, 3], [0, 0]]
  )


def test_classes_of_logits_and_of_soft_masks():
  logits = np.array([[[[-1.0], [0.0], [0.5], [np.nan]]]], np.float32)
  at = lambda t: segmentation.predict(logits, t).tolist()
  assert at(0.5) == [[[0, 1, 1, 0]]]
  assert at(0.6) == [[[0, 0, 1, 0]]]
  assert at(0.2) == [[[1, 1, 1, 0]]]
  many = np.array([[[[1.0, 3, 2], [5, 0, 0]]]], np.float32)
  assert segmentation.predict(many).tolist() == [[[1, 0]]]
  soft = np.array([[[0.49, 0.5, 1]]], np.float32)
  assert segmentation.classes_of(soft, 1).tolist() == [[[0, 1, 1]]]
  assert segmentation.classes_of(np.array([[[2, 0]]]), 3).tolist() == [[[2, 0]]]
  with pytest.raises(ValueError, match="threshold=1"):
    segmentation.predict(logits, 1)
  with pytest.raises(ValueError, match=r"\[1, 2\].*\[1, 3\]"):
    segmentation.update(np.ones((1, 2)), np.ones((1, 3)), np.ones(1), 1)


def surface(mask):
  """Foreground with a background neighbour, found pixel by pixel."""
  padded = np.pad(mask, 1)
  found = []
  for at in np.argwhere(mask):
    steps = [s * np.eye(mask.ndim, dtype=int)[a]
             for a in range(mask.ndim) for s in (1, -1)]  # fmt: skip
    if not all(padded[tuple(at + 1 + step)] for step in steps):
      found.append(at)
  return np.array(found)


def brute_hd95(a, b, spacing):
  a, b = (surface(mask) * np.asarray(spacing) for mask in (a, b))
  far = np.linalg.norm(a[:, None] - b[None], axis=-1)
  return np.percentile(np.concatenate([far.min(1), far.min(0)]), 95)


@pytest.mark.parametrize("shape, spacing", [
  ((9, 14), 1.0), ((9, 14), (0.5, 2.0)), ((6, 7, 8), (3.0, 1.0, 1.0)),
  ((20,), 1),
])  # fmt: skip
def test_hd95_by_brute_force(shape, spacing):
  rng = np.random.default_rng(len(shape))
  for density in (0.05, 0.5, 0.95):
    one, other = rng.random((2, *shape)) < density
    one.flat[3] = other.flat[-2] = True
    found = segmentation.hd95(one, other, spacing)
    assert found == pytest.approx(brute_hd95(one, other, spacing), abs=1e-9)
    assert found == pytest.approx(segmentation.hd95(other, one, spacing))


def test_hd95_is_not_the_larger_of_two_percentiles():
  truth = np.zeros((40, 40), bool)
  truth[5:25, 5:25] = True
  taken = truth.copy()
  taken[35:38, 35:38] = True
  a, b = surface(taken), surface(truth)
  far = np.linalg.norm(a[:, None] - b[None], axis=-1)
  larger = max(np.percentile(far.min(1), 95), np.percentile(far.min(0), 95))
  found = segmentation.hd95(taken, truth)
  assert found == pytest.approx(brute_hd95(taken, truth, 1))
  assert found < larger - 1


def test_rules_of_synapse():
  truth = np.zeros((3, 6, 6), int)
  taken = np.zeros((3, 6, 6), int)
  truth[:, 1:4, 1:4] = 1
  taken[:, 1:4, 2:5] = 1
  truth[1, 5, 5] = 2  # missed
  taken[1, 0, 0] = 3  # invented
  found = segmentation.case_scores(taken, truth, 5)
  np.testing.assert_allclose(found[0], [2 / 3, 1])
  # Missed; invented; in neither.
  np.testing.assert_array_equal(found[1:], [[0, 0], [1, 0], [0, 0]])


def test_masks_that_have_no_distance():
  mask = np.eye(3)
  for pair, text in (
    ((mask, 0 * mask), "truth is empty"),
    ((0 * mask, mask), "the prediction is empty"),
    ((mask, np.eye(4)), "shapes"),
  ):
    with pytest.raises(ValueError, match=text):
      segmentation.hd95(*pair)
  assert segmentation.dice(0 * mask, 0 * mask) == 0
