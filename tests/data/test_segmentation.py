"""Splits, samples and batches of images with masks."""

import dataclasses

import numpy as np
import pytest

from multihead.data import image_pairs, segmentation
from multihead.data import pair_transforms as transforms
from multihead.data.segmentation import SegmentationData
from multihead.errors import UserError

NUM_DRAWS = 2 + transforms.NUM_DRAWS


def pair_set(count=10, shape=(24, 24), **options):
  """Random masks that are their images, so that whoever moves shows."""

  def read(i):
    rng = np.random.default_rng(i)
    mask = np.kron(rng.integers(0, 2, (shape[0] // 4, shape[1] // 4)),
                   np.ones((4, 4))).astype(np.uint8)  # fmt: skip
    mask[0, 0], mask[-1, -1] = 0, 1
    return mask[..., None] * np.uint8(255), mask

  settings = dict(
    read=read,
    shape=lambda i: shape,
    names=[f"image-{i}" for i in range(count)],
    classes=("background", "foreground"),
    validation=None,
    fingerprint="squares",
    title="squares",
  )
  return image_pairs.PairSet(**{**settings, **options})


def pairs(source=None, channels=1, **data):
  data = SegmentationData(
    **{"path": "squares", "size": 24, "normalise": "minmax", **data}
  )
  source = source or pair_set()
  chosen = segmentation.split(source, data)
  return segmentation.Pairs(source, chosen, data, channels)


def batches(made, number, start=0, **options):
  options = {"batch_size": 4, "seed": 1, **options}
  source = made.dataset("train", **options).source
  return [source[i] for i in range(start, start + number)]


def assert_equal(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name], name)


@pytest.mark.parametrize("augment", ["none", "flips", "isic", "synapse"])
def test_image_and_mask_move_alike(augment):
  # Of nearest pixels alone: the image is the mask, before and after.
  moved = 0
  for batch in batches(pairs(augment=augment), 10):
    images = batch["images"][..., 0]
    np.testing.assert_array_equal(images, batch["masks"])
    for image, number in zip(images, batch["index"]):
      still = pairs(augment=augment).sample("train", int(number))[0][..., 0]
      moved += not np.array_equal(image, still)
  assert (moved > 10) == (augment != "none")


def test_smooth_turns_move_alike():
  # Where the bilinear image is sure, the nearest mask says the same.
  turned = 0
  for batch in batches(pairs(augment="rotations"), 10):
    image, mask = batch["images"][..., 0], batch["masks"]
    np.testing.assert_array_equal(mask[image > 0.99], 1)
    np.testing.assert_array_equal(mask[image < 0.01], 0)
    turned += ((image > 0.01) & (image < 0.99)).any(axis=(1, 2)).sum()
  assert 8 < turned < 32  # about half of 40


def test_the_published_angle_is_one_for_the_run():
  made = pairs(pair_set(40, (24, 24)), augment="isic")
  angles = set()
  for seed in (0, 1, 2):
    source = made.dataset("train", batch_size=2, seed=seed).source
    angles.add(source._run_angle)
    turn = source._run_angle
    for batch in (source[i] for i in range(5)):
      for image, number in zip(batch["images"], batch["index"]):
        still, _ = made.sample("train", int(number))
        candidates = [
          transforms.Motion(a, d, 0, angle, smooth=False).image(still)
          for a in (False, True)
          for d in (False, True)
          for angle in (0.0, turn)
        ]
        assert any(np.array_equal(image, c) for c in candidates)
  assert len(angles) == 3


def test_batches_are_those_of_their_number():
  made = pairs()
  first, again = batches(made, 3), batches(pairs(), 3)
  for one, other in zip(first, again):
    assert_equal(one, other)
  other = batches(made, 1, seed=2)[0]
  assert not np.array_equal(first[0]["images"], other["images"])
  alone = pairs(pair_set(2))  # one to train on, so in one order
  motions = [batches(alone, 1, seed=s)[0]["images"] for s in (1, 2)]
  assert not np.array_equal(*motions)
  # The same image has another motion in the next epoch.
  epochs = batches(made, 2, batch_size=8)
  np.testing.assert_array_equal(*(np.sort(b["index"]) for b in epochs))
  order = [np.argsort(b["index"]) for b in epochs]
  images = [b["images"][o] for b, o in zip(epochs, order)]
  assert not np.array_equal(*images)


def test_a_part_of_a_batch_for_each_process():
  made = pairs()
  whole = batches(made, 2)
  parts = [batches(made, 2, index=i, count=2) for i in (0, 1)]
  for i, batch in enumerate(whole):
    joined = {k: np.concatenate([p[i][k] for p in parts]) for k in batch}
    assert_equal(batch, joined)


def test_resume():
  made = pairs()
  running = iter(made.dataset("train", batch_size=4, seed=3))
  for _ in range(3):
    next(running)
  state = running.get_state()
  rest = [next(running) for _ in range(3)]
  running.close()
  resumed = iter(pairs().dataset("train", batch_size=4, seed=3))
  resumed.set_state(state)
  for batch in rest:
    assert_equal(batch, next(resumed))
  resumed.close()


@pytest.mark.parametrize("change", [
  dict(augment="flips"), dict(normalise="standard"), dict(split_seed=1),
  dict(size=20),
])  # fmt: skip
def test_a_position_belongs_to_its_data(change):
  state = iter(pairs().dataset("train", batch_size=4)).get_state()
  with pytest.raises(UserError, match="cannot continue"):
    iter(pairs(**change).dataset("train", batch_size=4)).set_state(state)


def test_a_position_belongs_to_its_images():
  source = pair_set()
  data = SegmentationData(path="x", size=24)
  state, other = (
    segmentation.Pairs(source, segmentation.Split(train, np.array([9])), data)
    for train in (np.arange(8), np.arange(9))
  )
  state = iter(state.dataset("train", batch_size=4)).get_state()
  with pytest.raises(UserError, match="cannot continue"):
    iter(other.dataset("train", batch_size=4)).set_state(state)


def test_validation_is_everything_once():
  made = pairs(pair_set(35))
  dataset = made.dataset("validation", batch_size=4)
  found = list(dataset)
  assert dataset.num_batches == len(found) == 2 and made.counts == {
    "train": 28, "validation": 7
  }  # fmt: skip
  weights = np.concatenate([b["weights"] for b in found])
  np.testing.assert_array_equal(weights, [1] * 7 + [0])
  index = np.concatenate([b["index"] for b in found])
  np.testing.assert_array_equal(index, [*range(7), 0])
  for batch in found:
    assert batch["images"].dtype == batch["masks"].dtype == np.float32
    for row, number in enumerate(batch["index"]):
      image, _, _ = made.where("validation", int(number))
      mask = made.source.read(image)[1]
      np.testing.assert_array_equal(batch["masks"][row], mask)


def test_no_image_in_both_splits():
  source = pair_set(50)
  data = SegmentationData(path="x", size=8, fit="crop")
  made = segmentation.Pairs(source, segmentation.split(source, data), data, 1)
  sides = [
    {made.where(part, n)[0] for n in range(made.counts[part])}
    for part in ("train", "validation")
  ]
  assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 50
  assert len(sides[1]) == 10


def test_split_knows_no_order_and_keeps_groups_together():
  data = SegmentationData(path="x")
  names = [f"n{i}" for i in range(30)]
  held = lambda s: {s.names[i] for i in segmentation.split(s, data).validation}
  there = held(pair_set(names=names))
  assert len(there) == 6
  assert held(pair_set(names=names[::-1])) == there
  other = dataclasses.replace(data, split_seed=5)
  source = pair_set(names=names)
  found = segmentation.split(source, other).validation
  assert {names[i] for i in found} != there
  groups = [f"case{i // 6}" for i in range(30)]
  found = segmentation.split(pair_set(names=names, groups=groups), data)
  assert len(found.validation) == 6
  assert len({groups[i] for i in found.validation}) == 1


def test_tiles_lie_beside_each_other():
  numbers = np.arange(20 * 28, dtype=np.uint16).reshape(20, 28)
  source = pair_set(
    2,
    (20, 28),
    read=lambda i: (numbers[..., None], np.zeros((20, 28), np.uint8)),
    validation=np.array([False, True]),
  )
  made = pairs(source, size=8, fit="crop", normalise="none")
  assert made.counts == {"train": 6, "validation": 6}
  seen = []
  for n in range(6):
    image, top, left = made.where("validation", n)
    tile = made.sample("validation", n)[0][..., 0]
    assert image == 1
    np.testing.assert_array_equal(tile, numbers[top : top + 8, left : left + 8])
    seen.append(tile)
  assert len(np.unique(seen)) == 6 * 64  # no pixel twice


def test_crops_come_from_anywhere_and_are_full():
  # Of ones alone: a corner that a turn leaves empty would be a zero.
  ones = lambda i: (np.ones((40, 50, 1), np.uint8), np.ones((40, 50), np.uint8))
  source = pair_set(2, (40, 50), read=ones, validation=np.array([False, True]))
  made = pairs(source, size=16, fit="crop", normalise="none")
  for batch in batches(made, 20):
    np.testing.assert_allclose(batch["images"], 1, atol=1e-5)
    np.testing.assert_array_equal(batch["masks"], 1)
  numbers = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50)
  source = dataclasses.replace(
    source, read=lambda i: (numbers[..., None], np.zeros((40, 50), np.uint8))
  )
  made = pairs(source, size=16, fit="crop", normalise="none", augment="none")
  corners = np.array(
    [b["images"][:, 0, 0, 0] for b in batches(made, 200)], int
  ).ravel()
  rows, columns = corners // 50, corners % 50
  assert rows.min() == 0 and rows.max() == 24
  assert columns.min() == 0 and columns.max() == 34


@pytest.mark.parametrize("soft", [False, True])
def test_masks_are_soft_only_where_asked(soft):
  made = pairs(size=10, soft_masks=soft)
  masks = next(iter(made.dataset("validation", batch_size=2)))["masks"]
  fractions = (masks > 0) & (masks < 1)
  assert fractions.any() == soft and masks.min() >= 0 and masks.max() <= 1


def test_classes_are_integers():
  mask = np.arange(16, dtype=np.uint8).reshape(4, 4) % 3
  source = pair_set(read=lambda i: (mask[..., None], mask), shape=(4, 4))
  made = pairs(source, size=8, num_classes=3)
  masks = batches(made, 1)[0]["masks"]
  assert masks.dtype == np.int32
  assert set(np.unique(masks)) <= {0, 1, 2}


def test_channels():
  made = pairs(channels=3)
  assert batches(made, 1)[0]["images"].shape == (4, 24, 24, 3)


def test_pairs_are_kept_while_there_is_room():
  reads = []
  source = pair_set(10)
  read = lambda i: (reads.append(i), source.read(i))[1]
  counted = dataclasses.replace(source, read=read)
  for megabytes, expected in ((1, 8), (0, 16)):
    reads.clear()
    batches(pairs(counted, cache_mb=megabytes), 4)
    assert len(reads) == expected


@pytest.mark.parametrize("data, text", [
  (dict(path="nuclie"), "did you mean 'nuclei'"),
  (dict(path="maze:x"), "no such folder"),
  (dict(path="lesions", num_classes=3), "set it to 1"),
  (dict(path="lesions", examples=1), "at least 2"),
  (dict(path="maze", size=8), "holds no maze"),
  (dict(path=""), "config.data.path is not set"),
  (dict(path="maze", examples=0), "examples=0 must be at least 1"),
  (dict(path="maze", size=-16), "size=-16 must be at least 1"),
  (dict(path="maze", prefetch=-1), "prefetch=-1 must be at least 0"),
])  # fmt: skip
def test_sources_that_are_not_there(data, text):
  with pytest.raises(UserError, match=text) as caught:
    segmentation.load_pairs(SegmentationData(**data))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data, text", [
  (dict(fit="crops"), "did you mean 'crop'"),
  (dict(normalise="minimax"), "did you mean 'minmax'"),
  (dict(augment="rotation"), "did you mean 'rotations'"),
  (dict(soft_masks=True, num_classes=3), "has no fraction"),
  (dict(fit="crop", soft_masks=True), "resizes nothing"),
  (dict(fit="crop", size=32), "at most 24"),
  (dict(validation_fraction=1.0), "between 0 and 1"),
  (dict(split_seed=0, source=pair_set(1)), "each needs one"),
])  # fmt: skip
def test_settings_that_cannot_be(data, text):
  with pytest.raises(UserError, match=text) as caught:
    pairs(**data)
  assert "\n" not in str(caught.value)


def test_a_constant_image():
  flat = lambda i: (np.full((24, 24, 1), 7, np.uint8), np.zeros((24, 24), int))
  source = pair_set(read=flat)
  for how in ("minmax", "published"):
    with pytest.raises(UserError, match=r"image-\d+: all pixels are 7"):
      batches(pairs(source, normalise=how), 1)
  images = batches(pairs(source, normalise="standard"), 1)[0]["images"]
  np.testing.assert_array_equal(images, 0)
