"""Selecting classes, splitting, and batches of labelled examples."""

import numpy as np
import pytest

from multihead.data import labelled, order
from multihead.errors import UserError

NAMES = [f"example-{i}" for i in range(50)]
LABELS = np.array([i % 5 for i in range(50)])
CLASSES = ("a", "b", "c", "d", "e")


def select(**options):
  return labelled.select(NAMES, LABELS, CLASSES, **options)


def test_split_is_a_share_of_every_class():
  chosen = select(validation_fraction=0.2)
  assert not set(chosen.train) & set(chosen.validation)
  assert len(chosen.train) + len(chosen.validation) == 50
  counts = np.bincount(chosen.labels[chosen.validation])
  np.testing.assert_array_equal(counts, [2] * 5)


def test_split_does_not_depend_on_the_order():
  chosen = select(seed=3)
  back = np.random.default_rng(0).permutation(50)
  again = labelled.select(
    [NAMES[i] for i in back], LABELS[back], CLASSES, seed=3
  )
  names = lambda members, order: {NAMES[order[i]] for i in members}
  assert names(again.validation, back) == names(chosen.validation, range(50))
  other = select(seed=4)
  assert set(other.validation) != set(chosen.validation)


def test_classes_are_numbered_as_they_are_named():
  chosen = select(only="d, b", train_per_class=3)
  assert chosen.classes == ("d", "b")
  used = np.concatenate([chosen.train, chosen.validation])
  np.testing.assert_array_equal(
    chosen.labels[used], [{3: 0, 1: 1}[LABELS[i]] for i in used]
  )
  np.testing.assert_array_equal(
    np.bincount(chosen.labels[chosen.train]), [3, 3]
  )
  # The validation split is the same whatever is taken for training.
  more = select(only="d, b")
  np.testing.assert_array_equal(more.validation, chosen.validation)
  assert set(chosen.train) < set(more.train)


def test_a_split_that_is_given():
  held = np.arange(50) >= 40
  chosen = select(validation=held)
  np.testing.assert_array_equal(chosen.validation, np.arange(40, 50))


@pytest.mark.parametrize("options, text", [
  (dict(only="a,f"), "no class 'f'"),
  (dict(only="a,a"), "twice"),
  (dict(validation_fraction=0.0), "between 0 and 1"),
  (dict(validation_fraction=0.999), "needs one for each"),
  (dict(validation=np.ones(50, bool)), "needs one for each"),
])  # fmt: skip
def test_selections_that_cannot_be(options, text):
  with pytest.raises(UserError, match=text):
    select(**options)


def make(members, rng):
  drawn = np.zeros(len(members)) if rng is None else rng.random()
  return {"x": members.copy(), "draw": drawn}


def build(split="train", batch_size=8, seed=0, index=0, count=1, **options):
  return labelled.build(
    make,
    select(),
    split,
    batch_size=batch_size,
    seed=seed,
    fingerprint=options.get("fingerprint", "f"),
    process_index=index,
    process_count=count,
  )


def test_every_epoch_has_every_example_once():
  chosen = select()
  batches = iter(build())
  seen = np.concatenate([next(batches)["x"] for _ in range(10)])
  for epoch in (seen[:40], seen[40:]):
    np.testing.assert_array_equal(np.sort(epoch), chosen.train)
  assert not np.array_equal(seen[:40], seen[40:])
  batch = next(batches)
  np.testing.assert_array_equal(batch["labels"], LABELS[batch["x"]])
  np.testing.assert_array_equal(batch["weights"], np.ones(8))


def test_validation_is_there_once_and_padded():
  batches = list(build("validation"))
  assert [len(b["labels"]) for b in batches] == [8, 8]
  weights = np.concatenate([b["weights"] for b in batches])
  seen = np.concatenate([b["x"] for b in batches])[weights > 0]
  np.testing.assert_array_equal(seen, select().validation)
  assert all((b["draw"] == 0).all() for b in batches)


def test_processes_share_one_batch_and_its_draws():
  whole = build().source
  parts = [build(index=i, count=4).source for i in range(4)]
  for number in (0, 7, 1000):
    joined = [part[number] for part in parts]
    for name, array in whole[number].items():
      np.testing.assert_array_equal(
        array, np.concatenate([part[name] for part in joined])
      )
  assert not np.allclose(whole[0]["draw"], whole[1]["draw"])


def test_resumes_at_the_exact_batch():
  batches = iter(build())
  for _ in range(7):
    next(batches)
  state = batches.get_state()
  expected = [next(batches) for _ in range(3)]
  again = iter(build(index=1, count=2))
  again.set_state(state)
  for batch in expected:
    got = next(again)
    for name, array in batch.items():
      np.testing.assert_array_equal(got[name], array[4:])
  with pytest.raises(UserError, match="examples was"):
    iter(build(fingerprint="other")).set_state(state)
  with pytest.raises(UserError, match="batch_size was"):
    iter(build(batch_size=4)).set_state(state)


def test_order_is_a_permutation_each_epoch():
  first, second = (order.epoch_order(5, epoch, 100) for epoch in (0, 1))
  np.testing.assert_array_equal(np.sort(first), np.arange(100))
  assert not np.array_equal(first, second)
