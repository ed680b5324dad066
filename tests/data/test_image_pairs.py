"""Where images with masks come from, and what is wrong with them."""

import importlib.util

import numpy as np
import pytest

from multihead.data import image_pairs, segmentation, synapse
from multihead.data.segmentation import SegmentationData
from multihead.errors import UserError

PIL = pytest.importorskip("PIL.Image", reason="pip install 'multihead[vision]'")


def save(path, pixels, mode=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  image = PIL.fromarray(pixels)
  (image.convert(mode) if mode else image).save(path)


def pixels(seed, shape=(6, 5, 3)):
  return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def disc(seed, value=255, shape=(6, 5)):
  bits = np.random.default_rng(seed).integers(0, 2, shape)
  bits[0, 0] = 1
  return (bits * value).astype(np.uint8)


def write(root, names, suffix="", value=255):
  for i, name in enumerate(names):
    save(root / "images" / f"{name}.bmp", pixels(i))
    save(root / "masks" / f"{name}{suffix}.png", disc(i, value))


def error(root, **options):
  with pytest.raises(UserError) as caught:
    image_pairs.folder(root, **options)
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize("suffix", ["", "_segmentation", "_mask"])
@pytest.mark.parametrize("value", [1, 255])
def test_a_folder(suffix, value, tmp_path):
  write(tmp_path, ["c", "a", "sub/b"], suffix, value)
  found = image_pairs.folder(tmp_path)
  assert found.names == ["images/a.bmp", "images/c.bmp", "images/sub/b.bmp"]
  assert found.validation is None
  for i, seed in enumerate([1, 0, 2]):
    image, mask = found.read(i)
    np.testing.assert_array_equal(image, pixels(seed))
    np.testing.assert_array_equal(mask, disc(seed, 1))
    assert mask.dtype == np.uint8 and found.shape(i) == (6, 5)


def test_names_that_end_as_a_suffix_pair_with_themselves(tmp_path):
  write(tmp_path, ["a_mask", "a"])
  found = image_pairs.folder(tmp_path)
  np.testing.assert_array_equal(found.read(0)[1], disc(1, 1))
  np.testing.assert_array_equal(found.read(1)[1], disc(0, 1))


@pytest.mark.parametrize("held", ["val", "test"])
def test_a_folder_with_its_split(held, tmp_path):
  write(tmp_path / "train", ["a", "b"])
  write(tmp_path / held, ["a"])
  found = image_pairs.folder(tmp_path)
  np.testing.assert_array_equal(found.validation, [False, False, True])
  assert len(set(found.names)) == 3


def test_isic_as_it_is_unpacked(tmp_path):
  for i, name in enumerate(["ISIC_0000000", "ISIC_0000001"]):
    save(tmp_path / "Data" / f"{name}.jpg", pixels(i))
    save(tmp_path / "Data" / f"{name}_superpixels.png", pixels(i))
    save(tmp_path / "Truth" / f"{name}_segmentation.png", disc(i))
  found = image_pairs.folder(tmp_path, images="Data", masks="Truth")
  assert len(found.names) == 2


def test_masks_of_other_kinds(tmp_path):
  for name in ("bits", "palette", "grey3", "numbers"):
    save(tmp_path / "images" / f"{name}.png", pixels(0))
  masks = tmp_path / "masks"
  save(masks / "bits.png", disc(1), "1")
  palette = PIL.fromarray(disc(2, 1)).convert("P")
  palette.putdata(disc(2, 1).ravel())
  palette.putpalette([0, 0, 0, 200, 10, 10])
  palette.save(masks / "palette.png")
  save(masks / "grey3.png", np.repeat(disc(3)[..., None], 3, axis=-1))
  save(masks / "numbers.tif", np.arange(30, dtype=np.uint16).reshape(6, 5) * 99)
  found = image_pairs.folder(tmp_path, instances=True)
  masks = {n[7:-4]: found.read(i)[1] for i, n in enumerate(found.names)}
  np.testing.assert_array_equal(masks["bits"], disc(1, 1))
  np.testing.assert_array_equal(masks["palette"], disc(2, 1))
  np.testing.assert_array_equal(masks["grey3"], disc(3, 1))
  assert masks["numbers"].sum() == 29
  assert "99, 198, 297 and 26 more" in error(tmp_path)


def test_classes(tmp_path):
  save(tmp_path / "images" / "a.png", pixels(0))
  save(tmp_path / "masks" / "a.png", disc(0, 3))
  found = image_pairs.folder(
    tmp_path, num_classes=4, classes=["air", "lung", "heart", "liver"]
  )
  np.testing.assert_array_equal(found.read(0)[1], disc(0, 3))
  assert found.classes[3] == "liver"
  text = error(tmp_path, num_classes=3)
  assert "holds 3; allowed are the classes 0 to 2" in text
  assert "names 1 classes" in error(tmp_path, num_classes=4, classes=["x"])


@pytest.mark.parametrize("values", [[0, 1, 255], [0, 254], [0, 2]])
def test_unexpected_values(values, tmp_path):
  write(tmp_path, ["a"])
  mask = np.resize(np.array(values, np.uint8), (6, 5))
  save(tmp_path / "masks" / "a.png", mask)
  text = error(tmp_path)
  odd = [str(v) for v in values if v not in (0, 255)]
  assert "a.png: the mask holds " + ", ".join(odd) + "; allowed" in text
  assert "0 and 255, or 0 and 1" in text


def test_an_unpaired_file(tmp_path):
  write(tmp_path, [f"n{i}" for i in range(8)])
  for i in (0, 2, 3, 5, 7):
    (tmp_path / "masks" / f"n{i}.png").unlink()
  save(tmp_path / "masks" / "other_segmentation.png", disc(0))
  text = error(tmp_path)
  assert "5 without a mask (n0, n2, n3 and 2 more)" in text
  assert "1 without an image (other)" in text


def test_sizes_that_differ(tmp_path):
  write(tmp_path, ["a", "b"])
  save(tmp_path / "masks" / "b.png", disc(0, shape=(6, 4)))
  text = error(tmp_path)
  assert (
    "b.bmp: the image has 6 x 5 pixels and its mask b.png has 6 x 4" in text
  )


def test_other_mistakes(tmp_path):
  assert "no folder 'images'" in error(tmp_path)
  (tmp_path / "images").mkdir()
  assert "images without masks" in error(tmp_path)
  (tmp_path / "masks").mkdir()
  assert "no images; files that end in" in error(tmp_path)
  write(tmp_path, ["a"])
  save(tmp_path / "masks" / "a_mask.png", disc(0))
  assert "are of one name" in error(tmp_path)
  (tmp_path / "masks" / "a_mask.png").unlink()
  save(tmp_path / "masks" / "a.png", pixels(0))
  assert "a mask in colours" in error(tmp_path)
  (tmp_path / "images" / "a.bmp").write_bytes(b"no image")
  assert "a.bmp: not an image that can be read" in error(tmp_path)
  # Cut off in the middle: its header can be read.
  save(tmp_path / "masks" / "a.png", disc(0))
  save(tmp_path / "images" / "a.bmp", pixels(0))
  whole = (tmp_path / "images" / "a.bmp").read_bytes()
  (tmp_path / "images" / "a.bmp").write_bytes(whole[:70])
  assert "a.bmp: not an image that can be read" in error(tmp_path)


def test_a_split_without_its_masks(tmp_path):
  write(tmp_path / "train", ["a"])
  (tmp_path / "val").mkdir()
  assert "val: no folder 'images'" in error(tmp_path)


def test_a_stack_is_no_image(tmp_path):
  first, *rest = (PIL.fromarray(pixels(i)) for i in range(3))
  first.save(tmp_path / "a.tif", save_all=True, append_images=rest)
  with pytest.raises(UserError, match="a stack of 3 images"):
    image_pairs.read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA", "1"])
def test_images_of_other_kinds(mode, tmp_path):
  grey = pixels(0, (4, 3))
  if mode == "I;16":
    PIL.fromarray(grey.astype(np.uint16) * 250).save(tmp_path / "a.png")
  else:
    PIL.fromarray(grey).convert(mode).save(tmp_path / "a.png")
  found = image_pairs.read_image(tmp_path / "a.png")
  assert found.shape == (4, 3, 3 if mode == "RGBA" else 1)
  if mode == "I;16":
    np.testing.assert_array_equal(found[..., 0], grey.astype(int) * 250)


def test_nuclei():
  # Not importorskip: nothing of the package needs to be imported.
  if importlib.util.find_spec("stardist") is None:
    pytest.skip("stardist is not installed: pip install 'multihead[vision]'")
  found = segmentation.load_pairs(SegmentationData())
  assert [found.shape(i) for i in (0, 1)] == [(512, 320), (512, 160)]
  masks = [found.read(i)[1] for i in (0, 1)]
  # Of 125 outlined nuclei, none is on both sides: 89 and 35 of them.
  path = image_pairs.installed("stardist", "data/images/mask2d.tif", "stardist")
  numbers = np.asarray(PIL.open(path))
  assert len(np.unique(numbers)) - 1 == 125
  sides = [numbers[:, :320], numbers[:, 352:]]
  ids = [set(np.unique(side)) - {0} for side in sides]
  assert not ids[0] & ids[1] and [len(i) for i in ids] == [89, 35]
  for mask, side in zip(masks, sides):
    np.testing.assert_array_equal(mask, side > 0)
  data = SegmentationData(size=64)
  made = segmentation.Pairs(found, segmentation.split(found, data), data)
  assert made.counts == {"train": 40, "validation": 16}
  batch = made.dataset("train", batch_size=3).source[0]
  assert batch["images"].shape == (3, 64, 64, 3)
  # Nuclei are the brighter: the mask lies on the image.
  image, mask = found.read(1)
  inside, outside = (image[mask == k].mean() for k in (1, 0))
  assert inside > 2 * outside


def test_a_package_that_is_missing():
  with pytest.raises(UserError, match=r"multihead\[vision\]"):
    image_pairs.installed("no_such_package", "x.png", "no-such-package")


def write_synapse(root, cases=("case0005", "case0006"), volumes=True):
  rng = np.random.default_rng(0)
  (root / "train_npz").mkdir(parents=True)
  for case in cases:
    for z in range(3):
      np.savez(
        root / "train_npz" / f"{case}_slice{z:03d}.npz",
        image=rng.random((10, 12)),
        label=rng.integers(0, 9, (10, 12)).astype(np.float64),
      )
  if volumes:
    h5py = pytest.importorskip("h5py", reason="pip install 'multihead[vision]'")
    (root / "test_vol_h5").mkdir()
    with h5py.File(root / "test_vol_h5" / "case0008.npy.h5", "w") as file:
      file["image"] = rng.random((2, 10, 12))
      file["label"] = rng.integers(0, 9, (2, 10, 12))
      return np.asarray(file["label"])


def test_synapse(tmp_path):
  labels = write_synapse(tmp_path)
  data = SegmentationData(
    path=str(tmp_path), num_classes=9, size=8, augment="synapse",
    normalise="none",
  )  # fmt: skip
  found = segmentation.load_pairs(data)
  assert found.classes == synapse.ORGANS
  assert found.names[-2:] == ["case0008/0", "case0008/1"]
  assert found.groups[-1] == "case0008" and found.groups[0] == "case0005"
  chosen = segmentation.split(found, data)
  np.testing.assert_array_equal(chosen.validation, [6, 7])
  for z in range(2):
    image, mask = found.read(6 + z)
    assert image.shape == (10, 12, 1) == (*found.shape(6 + z), 1)
    np.testing.assert_array_equal(mask, labels[z])
  made = segmentation.Pairs(found, chosen, data)
  batch = made.dataset("validation", batch_size=2).source[0]
  assert batch["images"].shape == (2, 8, 8, 3)
  assert batch["masks"].dtype == np.int32


def test_synapse_without_volumes_is_split_by_case(tmp_path):
  write_synapse(tmp_path, volumes=False)
  data = SegmentationData(path=str(tmp_path), num_classes=9)
  found = segmentation.load_pairs(data)
  chosen = segmentation.split(found, data)
  held = {found.groups[i] for i in chosen.validation}
  assert len(held) == 1 and len(chosen.validation) == 3


def test_mistakes_of_synapse(tmp_path):
  write_synapse(tmp_path, volumes=False)
  file = tmp_path / "train_npz" / "case0005_slice000.npz"

  def read(**arrays):
    np.savez(file, **arrays)
    with pytest.raises(UserError) as caught:
      synapse.load(tmp_path).read(0)
    assert "\n" not in str(caught.value)
    return str(caught.value)

  flat = np.zeros((3, 4))
  assert "image and label" in read(image=flat)
  assert "label [3, 5]" in read(image=flat, label=np.zeros((3, 5)))
  assert "fractions" in read(image=flat, label=flat + 0.5)
  assert "allowed are the classes 0 to 8" in read(image=flat, label=flat + 9)
  file.write_bytes(b"x")
  with pytest.raises(UserError, match="must hold the arrays"):
    synapse.load(tmp_path)
