"""Labelled images: scikit-learn's digits, a folder per class, an .npz.

Nothing is downloaded. Images are uint8 until a batch is made of them; files are
decoded then, so a folder may be larger than memory.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multihead.data import labelled
from multihead.errors import UserError, nearest

EXTENSIONS = frozenset(
  ".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()
)
# Folders beside `train` that are the other part of a split, best first.
VALIDATION = ("validation", "val", "valid", "test")

# Mean and standard deviation of a channel, of values in [0, 1].
NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
  "none": ((0.0,), (1.0,)),
  "half": ((0.5,), (0.5,)),
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  "clip": (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
  ),
}


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """Images with names and labels.

  Attributes:
    read: the image of that number, uint8 [height, width, channels].
    names: stable and distinct.
    labels: numbers of `classes`.
    classes: their names.
    validation: whether each is for validation; None: the source does not say.
    fingerprint: equal for equal images and labels.
    title: of the source, for people.
  """

  read: Callable[[int], np.ndarray]
  names: Sequence[str]
  labels: np.ndarray
  classes: tuple[str, ...]
  validation: np.ndarray | None
  fingerprint: str
  title: str


def load_images(path: str | os.PathLike[str] | None = None) -> ImageSet:
  """Finds labelled images.

  Args:
    path: what to read.
      None or "digits": the 1,797 handwritten digits (8x8, one channel) inside
        scikit-learn.
      a folder: one folder per class, named by it, of image files; or folders
        train and validation (val, valid, test) with those inside.
      an .npz file: arrays `images` [N, height, width] or [N, height, width, C],
        uint8 or floats in [0, 1], and `labels` [N], integers or texts; with
        `validation_images` and `validation_labels` beside them, if the split is
        given.

  Raises:
    UserError: nothing there, or not what is described above.
  """
  name = os.fspath(path) if path is not None else "digits"
  if name == "digits":
    return _digits()
  where = Path(name).expanduser()
  if where.suffix.lower() == ".npz":
    return _npz(where)
  if where.is_dir():
    return _folder(where)
  raise UserError(
    f"{name}: no such folder or .npz file{nearest(name, ['digits'])}; give a "
    "folder with one folder of images per class, an .npz file, or 'digits'"
  )


def _digits() -> ImageSet:
  try:
    from sklearn.datasets import load_digits
  except ImportError:
    raise UserError(
      "the digits are inside scikit-learn, which is not installed: pip install "
      "'multihead[vision]'; or give a folder of images as config.data.path"
    ) from None
  found = load_digits()
  pixels = np.round(found.images * (255 / 16)).astype(np.uint8)
  return _arrays(
    pixels[..., None],
    found.target,
    tuple(str(digit) for digit in range(10)),
    None,
    "digits of scikit-learn",
  )


def _arrays(
  images: np.ndarray,
  labels: np.ndarray,
  classes: tuple[str, ...],
  validation: np.ndarray | None,
  title: str,
) -> ImageSet:
  digest = hashlib.blake2b(images.tobytes(), digest_size=16)
  digest.update(np.asarray(labels, np.int64).tobytes())
  # Named by content, so that the split knows no order; equal images, which
  # must not stand on both sides of it, have hashes that are neighbours.
  names = [hashlib.blake2b(x.tobytes()).hexdigest() for x in images]
  return ImageSet(
    images.__getitem__,
    names,
    np.asarray(labels, np.int64),
    classes,
    validation,
    digest.hexdigest(),
    title,
  )


def _npz(path: Path) -> ImageSet:
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
  except (OSError, ValueError) as error:
    raise UserError(f"{path}: cannot be read as .npz: {error}") from error
  parts = []
  for prefix in ("", "validation_"):
    if f"{prefix}images" not in arrays and prefix:
      continue
    try:
      images, labels = (arrays[f"{prefix}{n}"] for n in ("images", "labels"))
    except KeyError as error:
      raise UserError(
        f"{path}: has no array {error}; its arrays are {', '.join(arrays)}"
      ) from None
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or len(images) != len(labels) or labels.ndim != 1:
      raise UserError(
        f"{path}: images must be [N, height, width] or [N, height, width, C] "
        f"and labels [N]; found {list(images.shape)} and {list(labels.shape)}"
      )
    if np.issubdtype(images.dtype, np.floating):
      if images.min() < 0 or images.max() > 1:
        raise UserError(
          f"{path}: images that are floats must lie in [0, 1]; these go from "
          f"{images.min():g} to {images.max():g}"
        )
      images = np.round(images * 255).astype(np.uint8)
    if images.dtype != np.uint8:
      raise UserError(f"{path}: images are {images.dtype}; uint8 is allowed")
    parts.append((images, labels))
  labels = np.concatenate([labels for _, labels in parts])
  classes, numbers = np.unique(labels, return_inverse=True)
  split = None
  if len(parts) == 2:
    split = np.repeat([False, True], [len(labels) for _, labels in parts])
  images = np.concatenate([images for images, _ in parts])
  names = tuple(str(name) for name in classes)
  return _arrays(images, numbers, names, split, str(path))


def _folder(root: Path) -> ImageSet:
  inside = {p.name: p for p in sorted(root.iterdir()) if p.is_dir()}
  held = [inside[name] for name in VALIDATION if name in inside]
  given = bool(held) and "train" in inside
  roots = (
    [(inside["train"], False), (held[0], True)] if given else [(root, None)]
  )
  files: list[tuple[Path, str, bool]] = []
  for folder, split in roots:
    for kind in sorted(p for p in folder.iterdir() if p.is_dir()):
      files += [
        (file, kind.name, bool(split))
        for file in sorted(kind.rglob("*"))
        if file.suffix.lower() in EXTENSIONS
      ]
  classes = sorted({kind for _, kind, _ in files})
  if len(classes) < 2:
    raise UserError(
      f"{root}: images of {len(classes)} classes; there must be two or more "
      f"folders, one for each class, with files that end in "
      f"{' '.join(sorted(EXTENSIONS))}"
    )
  names = [file.relative_to(root).as_posix() for file, _, _ in files]
  return ImageSet(
    lambda i: _decode(files[i][0]),
    names,
    np.array([classes.index(kind) for _, kind, _ in files]),
    tuple(classes),
    np.array([split for _, _, split in files]) if given else None,
    fingerprint(root, [file for file, _, _ in files]),
    str(root),
  )


def fingerprint(root: Path, files: Sequence[Path]) -> str:
  """Of the names and sizes of files."""
  digest = hashlib.blake2b(digest_size=16)
  for file in files:
    name = file.relative_to(root).as_posix()
    digest.update(f"{name}\0{file.stat().st_size}\0".encode())
  return digest.hexdigest()


def _pillow() -> Any:
  try:
    from PIL import Image
  except ImportError:
    raise UserError(
      "decoding and resizing images needs Pillow: pip install "
      "'multihead[vision]'"
    ) from None
  return Image


def _decode(path: Path) -> np.ndarray:
  try:
    with _pillow().open(path) as image:
      grey = image.mode in ("1", "L", "I;16")
      pixels = np.asarray(image.convert("L" if grey else "RGB"))
  except OSError as error:
    raise UserError(
      f"{path}: not an image that can be read: {error}"
    ) from error
  return pixels[..., None] if grey else pixels


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """From images of any size to what a model reads.

  Attributes:
    size: height and width of the result.
    channels: of the result, 1 or 3; others stay as they are.
    normalise: a key of NORMALISATIONS.
    centre_crop: the middle part of the shorter side that is taken in
      validation, e.g. 0.875; 0: the whole image is resized to the size.
    random_crop: in training, the smallest area of a random part that is taken
      and resized, e.g. 0.08, with sides as 3:4 to 4:3; 0: as in validation.
    shift: in training, largest translation in pixels, filled with black.
    flip: in training, mirror every other image.
  """

  size: tuple[int, int]
  channels: int
  normalise: str = "half"
  centre_crop: float = 0.0
  random_crop: float = 0.0
  shift: int = 0
  flip: bool = False

  def __post_init__(self):
    if self.normalise not in NORMALISATIONS:
      raise UserError(
        f"config.data.normalise={self.normalise!r}"
        f"{nearest(self.normalise, NORMALISATIONS)}; allowed are "
        f"{', '.join(NORMALISATIONS)}"
      )
    mean, _ = NORMALISATIONS[self.normalise]
    if len(mean) not in (1, self.channels):
      raise UserError(
        f"config.data.normalise={self.normalise!r} is for {len(mean)} "
        f"channels; the model has {self.channels}"
      )
    for name in ("centre_crop", "random_crop"):
      if not 0 <= getattr(self, name) <= 1:
        raise UserError(
          f"config.data.{name}={getattr(self, name)} must lie in [0, 1]"
        )
    if not 0 <= self.shift < min(self.size):
      raise UserError(
        f"config.data.shift={self.shift} must be at least 0 and less than the "
        f"image's {min(self.size)} pixels"
      )

  def batch(self, images: ImageSet, members: np.ndarray, rng: Any) -> dict:
    """Reads, augments (with an rng) and normalises these images.

    Returns:
      {"images": [b, height, width, channels] float32}.
    """
    draws = None
    if rng is not None:
      draws = np.stack([rng.random() for _ in range(7)], axis=1)
    pixels = np.stack(
      [
        self._one(images.read(int(i)), None if draws is None else draws[row])
        for row, i in enumerate(members)
      ]
    )
    mean, std = (
      np.asarray(v, np.float32) for v in NORMALISATIONS[self.normalise]
    )
    return {"images": (pixels.astype(np.float32) / 255 - mean) / std}

  def _one(self, image: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
    image = self._resize(image, draws)
    if draws is None:
      return image
    if self.flip and draws[4] < 0.5:
      image = image[:, ::-1]
    if self.shift:
      span = 2 * self.shift + 1
      down, right = (int(d * span) - self.shift for d in draws[5:])
      image = _translate(image, down, right)
    return image

  def _resize(self, image: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
    box = None
    if draws is not None and self.random_crop:
      box = self._random_box(image.shape[:2], draws)
    elif self.centre_crop:
      box = self._centre_box(image.shape[:2])
    if box is None and image.shape[:2] == self.size:
      return _channels(image, self.channels)
    height, width = self.size
    picture = _pillow()
    squeezed = image[..., 0] if image.shape[-1] == 1 else image
    resized = picture.fromarray(squeezed).resize(
      (width, height), picture.Resampling.BICUBIC, box=box
    )
    resized = np.asarray(resized).reshape(height, width, image.shape[-1])
    return _channels(resized, self.channels)

  def _centre_box(self, shape: tuple[int, int]) -> tuple[float, ...]:
    """Left, top, right, bottom of the middle, with the result's proportions."""
    scale = min(s / t for s, t in zip(shape, self.size, strict=True))
    high, wide = (self.centre_crop * scale * t for t in self.size)
    top, left = (shape[0] - high) / 2, (shape[1] - wide) / 2
    return left, top, left + wide, top + high

  def _random_box(
    self, shape: tuple[int, int], draws: np.ndarray
  ) -> tuple[float, ...]:
    area = (self.random_crop + (1 - self.random_crop) * draws[0]) * (
      shape[0] * shape[1]
    )
    ratio = np.exp((2 * draws[1] - 1) * np.log(4 / 3))
    wide = min(np.sqrt(area * ratio), shape[1])
    high = min(np.sqrt(area / ratio), shape[0])
    left = draws[2] * (shape[1] - wide)
    top = draws[3] * (shape[0] - high)
    return left, top, left + wide, top + high


def _channels(image: np.ndarray, channels: int) -> np.ndarray:
  found = image.shape[-1]
  if found == channels:
    return image
  if found == 1:
    return np.repeat(image, channels, axis=-1)
  if channels == 1 and found == 3:  # luma, as Pillow's conversion to L
    grey = image @ np.array([0.299, 0.587, 0.114])
    return np.round(grey)[..., None].astype(np.uint8)
  raise UserError(
    f"an image has {found} channels and the model reads {channels}; set "
    "config.model.in_chans"
  )


def _translate(image: np.ndarray, down: int, right: int) -> np.ndarray:
  """Moves an image; what comes in is black."""
  height, width = image.shape[:2]
  out = np.zeros_like(image)
  rows = slice(max(down, 0), height + min(down, 0))
  columns = slice(max(right, 0), width + min(right, 0))
  source = image[max(-down, 0) : height - max(down, 0)]
  out[rows, columns] = source[:, max(-right, 0) : width - max(right, 0)]
  return out


def nearest_centroid_error(
  images: ImageSet, selection: labelled.Selection, limit: int = 2000
) -> float:
  """Share of validation images that the nearest class mean gets wrong.

  Args:
    images: of one size.
    selection: classes and splits.
    limit: at most so many images of a split are looked at.

  Returns:
    The error; NaN if the images differ in size.
  """

  def read(members: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    step = max(1, len(members) // limit)
    members = members[::step]
    return [images.read(int(i)) for i in members], selection.labels[members]

  train, held = read(selection.train), read(selection.validation)
  if len({x.shape for x in train[0] + held[0]}) > 1:
    return float("nan")
  known, unknown = (
    np.stack(pixels).reshape(len(pixels), -1).astype(np.float32)
    for pixels, _ in (train, held)
  )
  means = np.stack(
    [known[train[1] == c].mean(axis=0) for c in range(len(selection.classes))]
  )
  distance = (means**2).sum(axis=1) - 2 * unknown @ means.T
  return float((distance.argmin(axis=1) != held[1]).mean())
