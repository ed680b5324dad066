"""Normalising, moving and resizing images with their masks."""

import numpy as np
import pytest
from scipy import ndimage

from multihead.data import pair_transforms as transforms
from multihead.errors import UserError


def picture(height=8, width=8, channels=2, seed=0):
  rng = np.random.default_rng(seed)
  return rng.random((height, width, channels)).astype(np.float32)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
@pytest.mark.parametrize("side", [8, 9])
def test_right_angles_are_those_of_rot90(quarters, side, smooth):
  image = picture(side, side)
  np.testing.assert_allclose(
    transforms.rotate(image, 90 * quarters, smooth),
    np.rot90(image, quarters),
    atol=1e-5,
  )


@pytest.mark.parametrize("size", [(31, 31), (30, 21)])
def test_any_angle_is_that_of_scipy(size):
  # Away from the border, where the two differ in what they take for outside.
  image = picture(*size)
  image = ndimage.gaussian_filter(image, (2, 2, 0))
  ours = transforms.rotate(image, 25, True)
  theirs = ndimage.rotate(image, 25, reshape=False, order=1)
  inside = ndimage.rotate(np.ones(size), 25, reshape=False, order=1) > 0.99
  inside = ndimage.binary_erosion(inside, iterations=2)
  assert inside.sum() > 100
  np.testing.assert_allclose(ours[inside], theirs[inside], atol=1e-4)
  assert (ours[0, 0] == 0).all()


def test_the_mask_keeps_its_values():
  mask = np.random.default_rng(0).integers(0, 9, (20, 20)).astype(np.uint8)
  moved = transforms.Motion(angle=33.0).mask(mask)
  assert moved.dtype == np.uint8 and set(np.unique(moved)) <= set(range(9))


def draws(**given):
  names = ("across", "down", "turned", "angle", "quarters", "axis")
  return np.array([given.get(name, 0.9) for name in names])


@pytest.mark.parametrize("augment, given, expected", [
  ("none", dict(across=0, down=0, turned=0), lambda x: x),
  ("flips", dict(across=0, turned=0), np.fliplr),
  ("flips", dict(down=0), np.flipud),
  ("rotations", dict(down=0, across=0, turned=0.6), lambda x: x[::-1, ::-1]),
  ("rotations", dict(turned=0, angle=0.75), np.rot90),
  ("rotations", dict(turned=0, angle=0.25), lambda x: np.rot90(x, -1)),
  ("isic", dict(turned=0, angle=0.1), lambda x: np.rot90(x, 2)),
  # Published: quarter turns, then mirrored; here k = 1 and 3.
  ("synapse", dict(across=0, quarters=0.3, axis=0),
   lambda x: np.flipud(np.rot90(x, 1))),
  ("synapse", dict(across=0, quarters=0.8),
   lambda x: np.fliplr(np.rot90(x, 3))),
  ("synapse", dict(across=0.6, turned=0.6), lambda x: x),
])  # fmt: skip
def test_motions(augment, given, expected):
  motion = transforms.draw_motion(augment, draws(**given), 180.0)
  image = picture()
  np.testing.assert_allclose(motion.image(image), expected(image), atol=1e-5)
  mask = np.arange(64).reshape(8, 8)
  np.testing.assert_array_equal(motion.mask(mask), expected(mask))


def test_the_turns_of_synapse_are_small():
  turn = lambda angle: transforms.draw_motion(
    "synapse", draws(turned=0, angle=angle), 0.0
  )
  assert turn(0.0).angle == -20 and turn(0.999).angle == 19
  assert not turn(0.3).smooth


def test_normalisations():
  image = np.array([[[0], [50]], [[100], [200]]], np.uint8)
  standard = transforms.normalise(image, "standard")
  np.testing.assert_allclose(standard.mean(), 0, atol=1e-6)
  np.testing.assert_allclose(standard.std(), 1, atol=1e-6)
  values = lambda how: transforms.normalise(image, how).ravel()
  np.testing.assert_allclose(values("minmax"), [0, 0.25, 0.5, 1])
  np.testing.assert_allclose(values("published"), [0, 63.75, 127.5, 255])
  np.testing.assert_allclose(values("half"), np.array([0, 50, 100, 200])
                             / 127.5 - 1, atol=1e-6)  # fmt: skip
  np.testing.assert_array_equal(values("none"), [0, 50, 100, 200])
  assert standard.dtype == np.float32


def test_published_normalisation_cancels_what_comes_before():
  # The recipe standardises with scalars of the data set first.
  image = picture() * 255
  before = (image - 157.561) / 26.706
  np.testing.assert_allclose(
    transforms.normalise(before, "published"),
    transforms.normalise(image, "published"),
    atol=1e-3,
  )


@pytest.mark.parametrize("value", [0.1, 300.7])
def test_a_constant_image_is_zeros(value):
  image = np.full((7, 7, 3), value, np.float32)
  np.testing.assert_array_equal(transforms.normalise(image, "standard"), 0)


@pytest.mark.parametrize("image, how, text", [
  (np.full((2, 2, 1), 3, np.uint8), "published", "all pixels are 3"),
  (np.full((2, 2, 1), np.nan, np.float32), "standard", "NaN"),
  (np.zeros((2, 2, 1), np.uint16), "half", "uint16"),
  (np.zeros((2, 2, 1), np.uint8), "mean", "allowed are"),
])  # fmt: skip
def test_images_that_cannot_be_normalised(image, how, text):
  with pytest.raises(UserError, match=text) as caught:
    transforms.normalise(image, how, "a.png")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_resizing(dtype):
  # Halved, a pixel is a weighted mean of those around; a ramp stays one.
  ramp = np.repeat(np.arange(32)[None] * 8, 32, axis=0).astype(dtype)
  small = transforms.resize_image(ramp[..., None], (16, 16))
  assert small.dtype == dtype and small.shape == (16, 16, 1)
  expected = np.arange(16) * 16 + 4
  np.testing.assert_allclose(
    small[:, 2:-2, 0].astype(float), np.tile(expected[2:-2], (16, 1)), atol=1
  )
  mask = (np.arange(64).reshape(8, 8) % 5).astype(dtype)
  double = transforms.resize_mask(mask, (16, 24))
  np.testing.assert_array_equal(double, np.kron(mask, np.ones((2, 3))))
  np.testing.assert_array_equal(transforms.resize_mask(double, (8, 8)), mask)
  third = transforms.resize_mask(np.arange(81).reshape(9, 9), (3, 3))
  np.testing.assert_array_equal(
    third, [[10, 13, 16], [37, 40, 43], [64, 67, 70]]
  )


def test_zoom_is_that_of_the_published_recipe():
  image, mask = (
    picture(12, 12, 1),
    (picture(12, 12, 1)[..., 0] * 4).astype(np.uint8),
  )
  zoomed, labels = transforms.zoom(image, mask, (8, 8))
  np.testing.assert_allclose(
    zoomed[..., 0],
    ndimage.zoom(image[..., 0].astype(float), 8 / 12, order=3),
    atol=1e-5,
  )
  np.testing.assert_array_equal(labels, ndimage.zoom(mask, 8 / 12, order=0))


def test_channels():
  colour = np.array([[[255, 0, 0]]], np.uint8)
  grey = transforms.to_channels(colour, 1)
  assert grey.dtype == np.uint8 and grey.item() == 76  # 0.299 of 255
  np.testing.assert_array_equal(transforms.to_channels(grey, 3), [[[76] * 3]])
  with pytest.raises(UserError, match="in_chans"):
    transforms.to_channels(colour, 4)
