"""Synapse's abdominal CT, as prepared for TransUNet: slices and volumes.

Training slices are .npz files of arrays `image` and `label` [height, width];
test volumes are .npy.h5 files of the same names, [depth, height, width].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multihead.data.image_pairs import (
  PairSet,
  class_names,
  class_numbers,
  fingerprint,
)
from multihead.errors import UserError

ORGANS = (
  "background", "aorta", "gallbladder", "left kidney", "right kidney", "liver",
  "pancreas", "spleen", "stomach",
)  # fmt: skip


def recognised(root: Path) -> bool:
  """Whether a folder holds such files, itself or one level down."""
  return bool(_files(root, "npz"))


def load(
  root: Path, *, num_classes: int = len(ORGANS), classes: Sequence[str] = ()
) -> PairSet:
  """Slices for training, and the slices of volumes for validation.

  Args:
    root: the .npz files and the .h5 files lie in it or in folders in it (such
      as train_npz and test_vol_h5). Without .h5 files a share of the volumes
      that the slices are of is for validation.
    num_classes: labels are below it.
    classes: their names; (): the eight organs, if there are nine classes.

  Raises:
    UserError: files that cannot be read, or that hold other things.
  """
  slices, volumes = _files(root, "npz"), _files(root, "h5")
  # Where a pair is: a file, and for a volume the number of the slice.
  places: list[tuple[Path, int | None]] = [(file, None) for file in slices]
  names = [file.stem for file in slices]
  # case0005_slice012 is of case0005.
  groups = [file.stem.partition("_slice")[0] for file in slices]
  shapes = {file: _read(file, None, shape_only=True) for file in slices[:1]}
  for file in volumes:
    shapes[file] = _read(file, None, shape_only=True)
    case = file.name.partition(".")[0]
    for z in range(shapes[file][0]):
      places.append((file, z))
      names.append(f"{case}/{z}")
      groups.append(case)

  def read(i: int) -> tuple[np.ndarray, np.ndarray]:
    image, label = _read(*places[i])
    name = f"{places[i][0]} ({names[i]})"
    if image.shape != label.shape or image.ndim != 2:
      raise UserError(
        f"{name}: image is {list(image.shape)} and label "
        f"{list(label.shape)}; both must be [height, width]"
      )
    numbers = label.astype(np.int32)
    if (numbers != label).any():
      raise UserError(f"{name}: label holds fractions; it must hold classes")
    mask = class_numbers(numbers, num_classes, False, name)
    return image.astype(np.float32)[..., None], mask

  def shape(i: int) -> tuple[int, int]:
    file = places[i][0]
    if file not in shapes:
      shapes[file] = _read(file, None, shape_only=True)
    return shapes[file][-2:]

  if num_classes == len(ORGANS) and not classes:
    classes = ORGANS
  return PairSet(
    read=read,
    shape=shape,
    names=names,
    classes=class_names(classes, num_classes),
    validation=(
      np.array([z is not None for _, z in places]) if volumes else None
    ),
    fingerprint=fingerprint(root, [*slices, *volumes]),
    title=str(root),
    groups=groups,
  )


def _files(root: Path, ending: str) -> list[Path]:
  return sorted({*root.glob(f"*.{ending}"), *root.glob(f"*/*.{ending}")})


def _read(path: Path, z: int | None, shape_only: bool = False) -> Any:
  """Image and label, or of a volume those of slice z; or the image's shape."""
  if path.suffix == ".h5":
    try:
      import h5py
    except ImportError:
      raise UserError(
        f"{path}: reading volumes needs h5py: pip install 'multihead[vision]'"
      ) from None
    opened = h5py.File
  else:
    opened = np.load
  try:
    with opened(path) as file:
      if shape_only:
        return tuple(file["image"].shape)
      at = () if z is None else z
      return np.asarray(file["image"][at]), np.asarray(file["label"][at])
  except (OSError, ValueError, KeyError) as error:
    raise UserError(
      f"{path}: must hold the arrays image and label: {error}"
    ) from error
