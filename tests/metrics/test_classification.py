"""Classification metrics against counting by hand."""

import jax
import numpy as np
import pytest

from multihead.metrics import classification

update = jax.jit(classification.update)

LOGITS = np.array(
  [[2, 1, 0], [0, 3, 1], [1, 0, 2], [5, 0, 0], [0, 1, 1], [9, 9, 9]], np.float32
)
LABELS = np.array([0, 1, 0, 2, 1, 2])
WEIGHTS = np.array([1, 1, 1, 1, 1, 0], np.float32)


def test_by_hand():
  """Rows 0, 1 and 4 are right; the last one has no weight."""
  sums = update(LOGITS, LABELS, WEIGHTS)
  np.testing.assert_array_equal(
    sums.confusion, [[1, 0, 1], [0, 2, 0], [1, 0, 0]]
  )
  found = classification.compute(sums)
  assert found["accuracy"] == pytest.approx(3 / 5)
  assert found["error"] == pytest.approx(2 / 5)
  assert found["mean_class_accuracy"] == pytest.approx((1 / 2 + 1 + 0) / 3)
  x = LOGITS[:5].astype(np.float64)
  nll = np.log(np.exp(x).sum(-1)) - x[np.arange(5), LABELS[:5]]
  assert found["loss"] == pytest.approx(nll.mean())
  assert "top5_accuracy" not in found


def test_matthews_of_two_classes_is_the_usual_formula():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 2, 200)
  logits = rng.normal(size=(200, 2)).astype(np.float32)
  logits[np.arange(200), labels] += 0.7
  sums = update(logits, labels, np.ones(200, np.float32))
  guess = logits.argmax(-1)
  tp = np.sum((guess == 1) & (labels == 1))
  tn = np.sum((guess == 0) & (labels == 0))
  fp = np.sum((guess == 1) & (labels == 0))
  fn = np.sum((guess == 0) & (labels == 1))
  want = (tp * tn - fp * fn) / np.sqrt(
    float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
  )
  assert classification.compute(sums)["matthews"] == pytest.approx(want)


def test_a_constant_answer_has_no_correlation():
  labels = np.array([0, 1, 1])
  logits = np.array([[1, 0]] * 3, np.float32)
  sums = update(logits, labels, np.ones(3, np.float32))
  assert classification.compute(sums)["matthews"] == 0


def test_batches_add_up_and_padding_counts_nothing():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(30, 8)).astype(np.float32)
  labels = rng.integers(0, 8, 30)
  ones = np.ones(30, np.float32)
  whole = classification.compute(update(logits, labels, ones))
  padded = np.concatenate([logits[20:], np.full((6, 8), np.nan, np.float32)])
  parts = [
    update(logits[:20], labels[:20], ones[:20]),
    update(padded, np.pad(labels[20:], (0, 6)), np.pad(ones[20:], (0, 6))),
  ]
  sums = jax.tree.map(lambda *x: np.sum(x, axis=0), *parts)
  assert classification.compute(sums) == pytest.approx(whole, rel=1e-6)
  order = np.argsort(-logits, axis=1)[:, :5]
  top = (order == labels[:, None]).any(axis=1).mean()
  assert whole["top5_accuracy"] == pytest.approx(top)


def test_nothing_counted():
  sums = update(LOGITS, LABELS, 0 * WEIGHTS)
  with pytest.raises(ValueError, match="no example"):
    classification.compute(sums)
