"""Labelled images: where they come from and what is done to them."""

import numpy as np
import pytest

from multihead.data import images, labelled
from multihead.errors import UserError

PIL = pytest.importorskip(
  "PIL.Image", reason="Pillow is not installed: pip install 'multihead[vision]'"
)


def photo(seed, size=(12, 10), channels=3):
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 256, (*size, channels)).astype(np.uint8)
  return pixels if channels > 1 else pixels[..., 0]


def write(path, seed=0, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.fromarray(photo(seed, **options)).save(path)


class Rows:
  """Draws that are given."""

  def __init__(self, *draws):
    self.draws = iter(np.atleast_2d(draws).T)

  def random(self):
    return next(self.draws)


def test_digits():
  pytest.importorskip("sklearn", reason="pip install 'multihead[vision]'")
  found = images.load_images()
  assert len(found.names) == 1797
  assert found.classes == tuple("0123456789")
  first = found.read(0)
  assert first.shape == (8, 8, 1) and first.dtype == np.uint8
  assert first.max() > 200
  assert found.fingerprint == images.load_images("digits").fingerprint
  chosen = labelled.select(found.names, found.labels, found.classes)
  error = images.nearest_centroid_error(found, chosen)
  assert 0.05 < error < 0.2  # a known number: about one in ten


def test_folder_per_class(tmp_path):
  for i, name in enumerate(["cat/b.png", "cat/a.png", "dog/x/c.png"]):
    write(tmp_path / name, i)
  write(tmp_path / "dog" / "grey.png", 9, channels=1)
  (tmp_path / "dog" / "notes.txt").write_text("no image")
  found = images.load_images(tmp_path)
  assert list(found.names) == [
    "cat/a.png", "cat/b.png", "dog/grey.png", "dog/x/c.png"
  ]  # fmt: skip
  assert found.classes == ("cat", "dog")
  np.testing.assert_array_equal(found.labels, [0, 0, 1, 1])
  np.testing.assert_array_equal(found.read(0), photo(1))
  assert found.read(2).shape == (12, 10, 1)
  assert found.validation is None


@pytest.mark.parametrize("held", ["val", "test", "validation"])
def test_folder_with_its_split(held, tmp_path):
  for split in ("train", held):
    for kind in ("a", "b"):
      write(tmp_path / split / kind / f"{split}.png")
  found = images.load_images(str(tmp_path))
  assert found.classes == ("a", "b")
  np.testing.assert_array_equal(
    found.validation, [held in name for name in found.names]
  )


def test_npz(tmp_path):
  pixels = np.random.default_rng(0).random((4, 5, 6))
  file = tmp_path / "x.npz"
  np.savez(
    file, images=pixels, labels=["u", "v", "u", "v"],
    validation_images=pixels[:1], validation_labels=["v"],
  )  # fmt: skip
  found = images.load_images(file)
  assert found.classes == ("u", "v")
  np.testing.assert_array_equal(found.labels, [0, 1, 0, 1, 1])
  np.testing.assert_array_equal(found.validation, [0, 0, 0, 0, 1])
  np.testing.assert_allclose(found.read(1)[..., 0], pixels[1] * 255, atol=0.51)


@pytest.mark.parametrize("arrays, text", [
  (dict(images=np.zeros((2, 3, 3))), "no array 'labels'"),
  (dict(images=np.zeros((2, 3)), labels=[0, 1]), "must be"),
  (dict(images=np.zeros((2, 3, 3)), labels=[0]), "must be"),
  (dict(images=np.full((2, 3, 3), 2.0), labels=[0, 1]), "in .0, 1."),
  (dict(images=np.zeros((2, 3, 3), int), labels=[0, 1]), "uint8"),
])  # fmt: skip
def test_npz_mistakes(arrays, text, tmp_path):
  np.savez(tmp_path / "x.npz", **arrays)
  with pytest.raises(UserError, match=text):
    images.load_images(tmp_path / "x.npz")


def test_nothing_pickled_is_read(tmp_path):
  np.savez(tmp_path / "x.npz", images=np.array([{}, {}], object), labels=[0, 1])
  with pytest.raises(UserError, match="cannot be read"):
    images.load_images(tmp_path / "x.npz")


def test_other_mistakes(tmp_path):
  with pytest.raises(UserError, match="did you mean 'digits'"):
    images.load_images("digit")
  write(tmp_path / "one" / "a.png")
  with pytest.raises(UserError, match="images of 1 classes"):
    images.load_images(tmp_path)
  (tmp_path / "two").mkdir()
  (tmp_path / "two" / "torn.png").write_bytes(b"\x89PNG nothing more")
  with pytest.raises(UserError, match="torn.png: not an image"):
    images.load_images(tmp_path).read(1)


def of(*pixels):
  """A set of these images."""
  return images.ImageSet(
    pixels.__getitem__, "", np.zeros(len(pixels)), (), None, "", ""
  )


def test_normalisation():
  pixels = photo(0, size=(4, 4))
  steps = images.Preprocessing((4, 4), 3, "imagenet")
  got = steps.batch(of(pixels), np.array([0, 0]), None)["images"]
  mean, std = (
    np.array([0.485, 0.456, 0.406]),
    np.array([0.229, 0.224, 0.225]),
  )
  assert got.dtype == np.float32
  np.testing.assert_allclose(got[1], (pixels / 255 - mean) / std, rtol=1e-5)


def test_channels():
  grey, colour = photo(0, channels=1)[..., None], photo(0)
  run = lambda x, channels: (
    images.Preprocessing((12, 10), channels, "none").batch(
      of(x), np.array([0]), None
    )["images"][0]
    * 255
  )
  np.testing.assert_allclose(run(grey, 3), np.repeat(grey, 3, -1), atol=1e-3)
  luma = np.asarray(PIL.fromarray(colour).convert("L"))
  np.testing.assert_allclose(run(colour, 1)[..., 0], luma, atol=1)
  with pytest.raises(UserError, match="in_chans"):
    run(photo(0, channels=2), 3)


def test_resizing_is_pillows():
  pixels = photo(3, size=(20, 30))
  steps = images.Preprocessing((8, 6), 3, "none", centre_crop=0.5)
  got = steps.batch(of(pixels), np.array([0]), None)["images"][0] * 255
  # Proportions 8:6 inside 20x30: the whole 20, half of it, around the middle.
  want = PIL.fromarray(pixels).resize(
    (6, 8), PIL.Resampling.BICUBIC, box=(15 - 3.75, 5, 15 + 3.75, 15)
  )
  np.testing.assert_allclose(got, np.asarray(want), atol=1e-3)


def test_translation():
  pixels = np.arange(1, 17, dtype=np.uint8).reshape(4, 4, 1)
  steps = images.Preprocessing((4, 4), 1, "none", shift=1)

  def run(down, right):  # draws that give these moves
    draws = [0.5] * 5 + [(down + 1.5) / 3, (right + 1.5) / 3]
    batch = steps.batch(of(pixels), np.array([0]), Rows(draws))
    return np.round(batch["images"][0, ..., 0] * 255)

  plain = pixels[..., 0]
  np.testing.assert_array_equal(run(0, 0), plain)
  np.testing.assert_array_equal(run(1, 0), np.pad(plain, ((1, 0), (0, 0)))[:4])
  np.testing.assert_array_equal(
    run(-1, 1), np.pad(plain, ((0, 1), (1, 0)))[1:, :4]
  )


def test_flips_and_crops_keep_to_the_draws():
  pixels = photo(5, size=(8, 8))
  steps = images.Preprocessing((8, 8), 3, "none", flip=True)
  run = lambda *draws: steps.batch(of(pixels), np.array([0]), Rows(draws))
  got = run(*[0.5] * 4, 0.4, 0.5, 0.5)["images"][0] * 255
  np.testing.assert_allclose(got, pixels[:, ::-1], atol=1e-3)
  got = run(*[0.5] * 4, 0.6, 0.5, 0.5)["images"][0] * 255
  np.testing.assert_allclose(got, pixels, atol=1e-3)
  steps = images.Preprocessing((8, 8), 3, "none", random_crop=0.25)
  boxes = [
    steps._random_box((8, 8), np.random.default_rng(i).random(7))
    for i in range(200)
  ]
  left, top, right, bottom = np.array(boxes).T
  assert min(left.min(), top.min()) >= 0 and max(right.max(), bottom.max()) <= 8
  area = (right - left) * (bottom - top) / 64
  assert 0.24 < area.min() < 0.3 and area.max() > 0.9
  ratio = (right - left) / (bottom - top)
  assert ratio.min() > 0.7 and ratio.max() < 1.4


@pytest.mark.parametrize("options, text", [
  (dict(normalise="imagnet"), "did you mean 'imagenet'"),
  (dict(channels=1, normalise="imagenet"), "3 channels"),
  (dict(centre_crop=1.2), "centre_crop"),
  (dict(random_crop=-1), "random_crop"),
  (dict(shift=8), "shift"),
])  # fmt: skip
def test_preprocessing_that_cannot_be(options, text):
  with pytest.raises(UserError, match=text):
    images.Preprocessing(**{"size": (8, 8), "channels": 3, **options})
