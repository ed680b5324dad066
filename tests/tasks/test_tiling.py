"""Tiles that add up to the whole."""

import tracemalloc

import numpy as np
import pytest

from multihead.errors import UserError
from multihead.tasks import tiling


def image(height, width, channels=2, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(height, width, channels)).astype(np.float32)


def pixelwise(batch):
  return np.stack([np.tanh(batch[..., 0]), batch[..., 1] ** 2], axis=-1)


SIZES = [(96, 96), (64, 64), (100, 257), (31, 130), (5, 3), (1, 1), (97, 64)]


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("overlap, window", [
  (0, "hann"), (16, "hann"), (32, "linear"), (None, "hann"), (7, "linear"),
])  # fmt: skip
def test_a_function_of_pixels_gives_exactly_that(
  height, width, overlap, window
):
  x = image(height, width)
  found = tiling.predict_tiled(
    pixelwise, x, tile=64, overlap=overlap, window=window, batch_size=3
  )
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, pixelwise(x[None])[0])


def test_what_the_model_is_given():
  shapes, seen = set(), []

  def predict(batch):
    shapes.add(batch.shape)
    seen.extend(batch)
    return batch[..., :1]

  x = image(70, 200)
  tiling.predict_tiled(predict, x, tile=64, overlap=16, batch_size=3)
  # One shape, so one compilation; rows of tiles from 0 and 6, four in each.
  assert shapes == {(3, 64, 64, 2)}
  assert len(seen) == 2 * 2 * 3
  np.testing.assert_array_equal(seen[0], x[:64, :64])
  np.testing.assert_array_equal(seen[6], x[6:, :64])
  # The last tile of a row reaches the border, and fills up the batch.
  for i in (3, 4, 5):
    np.testing.assert_array_equal(seen[i], x[:64, 136:])


def test_short_sides_are_reflected_up_to_a_multiple():
  given = []

  def predict(batch):
    given.append(batch[0])
    return batch[..., :1]

  x = image(40, 70, 1)
  tiling.predict_tiled(predict, x, tile=128, batch_size=1)
  (padded,) = given
  assert padded.shape == (64, 96, 1)
  np.testing.assert_array_equal(padded[40:], padded[15:39][::-1])
  np.testing.assert_array_equal(padded[:40, 70:], x[:, 43:69][:, ::-1])


def test_where_tiles_meet_they_are_blended():
  """Each tile gives its number; between two the result goes smoothly over."""
  count = iter(range(9))

  def predict(batch):
    return np.full((*batch.shape[:3], 1), float(next(count)))

  found = tiling.predict_tiled(
    predict, image(32, 32 + 24), tile=32, overlap=8, batch_size=1
  )[..., 0]
  assert (found == found[0]).all()
  line = found[0]
  assert (line[:24] == 0).all() and (line[32:] == 1).all()
  want = np.sin(np.pi / 2 * (np.arange(8) + 0.5) / 8) ** 2
  np.testing.assert_allclose(line[24:32], want, rtol=1e-6)


@pytest.mark.parametrize("window", tiling.WINDOWS)
def test_weights_add_up_to_one(window):
  for length, side, overlap in ((300, 64, 20), (65, 64, 32), (64, 64, 0)):
    axis = tiling._Axis(length, side, overlap, window)
    total = np.zeros(length)
    for start, weights in zip(axis.starts, axis.weights):
      assert (weights > 0).all()
      total[start : start + side] += weights
    np.testing.assert_allclose(total, 1, rtol=1e-14)
    assert (np.diff(axis.starts) <= side - overlap).all()
    assert axis.starts[0] == 0 and axis.starts[-1] == length - side


def test_memory_is_that_of_a_row_of_tiles():
  x = np.zeros((2048, 512, 1), np.uint8)
  calls = []
  predict = lambda batch: np.ones((*batch.shape[:3], 4), np.float32)
  tracemalloc.start()
  found = tiling.predict_tiled(
    predict, x, tile=64, overlap=16, batch_size=2,
    finish=lambda rows: rows.argmax(-1).astype(np.uint8),
    progress=lambda done, count: calls.append((done, count)),
  )  # fmt: skip
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert found.shape == (2048, 512) and found.dtype == np.uint8
  row = 64 * 512 * 4 * 8
  assert peak < found.nbytes + 4 * row  # all in float32: 16 MB, a row: 1 MB
  assert calls[-1] == (43 * 11, 43 * 11)
  assert [done for done, _ in calls] == sorted({done for done, _ in calls})


@pytest.mark.parametrize("settings, text", [
  (dict(tile=50), "tile=50 must be a multiple of 32"),
  (dict(tile=0), "tile=0"),
  (dict(tile=64, overlap=33), "overlap=33"),
  (dict(tile=64, overlap=-1), "overlap=-1"),
  (dict(window="square"), "hann, linear"),
])  # fmt: skip
def test_settings_that_cannot_be_used(settings, text):
  with pytest.raises(UserError, match=text):
    tiling.predict_tiled(pixelwise, image(64, 64), **settings)


def test_what_is_no_image_and_no_prediction():
  with pytest.raises(UserError, match=r"\[64, 64\]"):
    tiling.predict_tiled(pixelwise, np.zeros((64, 64)))
  with pytest.raises(ValueError, match="must keep all"):
    tiling.predict_tiled(lambda x: x[:, ::2], image(64, 64), tile=64)
