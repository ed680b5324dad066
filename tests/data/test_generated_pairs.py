"""Drawn images: their masks are the truth."""

import importlib.util

import numpy as np
import pytest
from scipy import ndimage

from multihead.data import generated_pairs as generated
from multihead.data import segmentation
from multihead.data.segmentation import SegmentationData
from multihead.errors import UserError


def test_the_area_of_a_blob():
  # In closed form, where all of it lies inside the image.
  rng = np.random.default_rng(0)
  for _ in range(20):
    blob = generated.draw_blob(256, rng)
    blob = generated.Blob(
      128.3, 127.6, min(blob.radius, 70), blob.amplitudes, blob.phases
    )
    pixels = (blob.depth(256) > 0).sum()
    assert blob.area == pytest.approx(pixels, rel=0.01)


def test_the_border_of_a_blob():
  # A circle: the mask holds the pixels whose centres are nearer than r.
  blob = generated.Blob(10.0, 12.0, 5.0, np.zeros(5), np.zeros(5))
  at = np.arange(24) + 0.5
  distance = np.hypot(at[:, None] - 10, at[None] - 12)
  np.testing.assert_allclose(blob.depth(24), 5 - distance)


@pytest.mark.parametrize("size", [64, 96])
def test_the_mask_is_where_the_lesion_is(size):
  # Flat textures: hairs only darken, so red is inside and blue outside.
  red = np.tile([200.0, 0, 0], (size, size, 1))
  blue = np.tile([0, 0, 200.0], (size, size, 1))
  clear = 0
  for seed in range(10):
    rng = np.random.default_rng(seed)
    image, mask = generated.draw_lesion(blue, red, rng)
    inside = image[..., 0].astype(int) > image[..., 2]
    sure = abs(image[..., 0].astype(int) - image[..., 2]) > 40
    np.testing.assert_array_equal(mask[sure] == 1, inside[sure])
    clear += sure.mean() / 10
  assert clear > 0.9


def test_lesions():
  found = generated.lesions(32, 500, fraction=0.2, seed=0)
  assert found.validation.sum() == 100
  textures = np.arange(500) % 50
  held = set(textures[found.validation])
  assert not held & set(textures[~found.validation])
  share = []
  for i in range(60):
    image, mask = found.read(i)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    share.append(mask.mean())
    again = generated.lesions(32, 500, fraction=0.2, seed=0).read(i)
    np.testing.assert_array_equal(image, again[0])
    # Darker inside, in the mean over a lesion.
    if mask.sum() > 20:
      assert image[mask == 1].mean() < image[mask == 0].mean()
  assert min(share) > 0.01 and max(share) < 0.5
  other = generated.lesions(32, 500, fraction=0.2, seed=1).read(0)
  assert not np.array_equal(found.read(0)[0], other[0])


def test_coloured_noise_has_its_spectrum():
  power = np.zeros((64, 33))
  for seed in range(30):
    noise = generated._coloured_noise(64, 1.2, 5.0, np.random.default_rng(seed))
    assert noise.std() == pytest.approx(5)
    power += abs(np.fft.rfft2(noise[..., 0])) ** 2
  f = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(64)[None])
  band = (f > 0.05) & (f < 0.4)
  slope = np.polyfit(np.log(f[band]), np.log(power[band]), 1)[0]
  assert slope == pytest.approx(-2.4, abs=0.1)


def test_lesions_of_photographs():
  if importlib.util.find_spec("skimage") is None:
    pytest.skip("no scikit-image: pip install 'multihead[vision]'")
  found = generated.lesions(48, 48, fraction=0.25, seed=0, photos=True)
  assert found.validation.sum() == 12
  for i in range(12):
    image, mask = found.read(i)
    assert image.shape == (48, 48, 3) and 0 < mask.sum() < 48 * 48
  # Larger than most of the photographs: mirrored at their border.
  image, _ = generated.lesions(
    600, 12, fraction=0.25, seed=0, photos=True
  ).read(3)
  assert image.shape == (600, 600, 3)


@pytest.mark.parametrize("size, scale", [(33, 1), (64, 4), (50, 3)])
def test_mazes_against_scipy(size, scale):
  found = generated.mazes(size, 20, scale=scale, seed=0)
  share = []
  for i in range(20):
    image, mask = found.read(i)
    assert image.shape == (size, size, 3)
    marker = (image == [230, 40, 40]).all(axis=-1)
    assert marker.sum() == scale**2
    way = (image == 200).all(axis=-1) | marker
    regions, count = ndimage.label(way)
    (here,) = np.unique(regions[marker])
    np.testing.assert_array_equal(mask, regions == here)
    assert count == 4
    share.append(mask.sum() / way.sum())
  assert min(share) < 0.4 < max(share)


def test_a_maze_has_no_loops():
  # A forest: as many passages as cells less parts.
  place, _ = generated.draw_maze(6, np.random.default_rng(0))
  passages = place[1::2, 2::2].sum() + place[2::2, 1::2].sum()
  _, parts = ndimage.label(place)
  assert passages == 36 - parts
  assert not place[0].any() and not place[:, -1].any()


@pytest.mark.parametrize("path", ["lesions", "maze", "maze:4"])
def test_batches(path):
  data = SegmentationData(path=path, size=32, examples=50)
  source = segmentation.load_pairs(data)
  chosen = segmentation.split(source, data)
  made = segmentation.Pairs(source, chosen, data)
  assert made.counts == {"train": 40, "validation": 10}
  batch = made.dataset("train", batch_size=4).source[0]
  assert batch["images"].shape == (4, 32, 32, 3)
  assert np.isfinite(batch["images"]).all()


def test_too_few_for_both_sides():
  with pytest.raises(UserError, match="leaves a texture"):
    generated.lesions(32, 500, fraction=0.001, seed=0)
