"""What is done to an image and its mask alike: scaling, motion, resizing.

Images are [height, width, channels], masks [height, width]. Pillow turns them:
scipy takes more than twice as long.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Num, UInt8

from multihead.errors import UserError, nearest

NORMALISATIONS = ("standard", "minmax", "published", "half", "none")
AUGMENTATIONS = ("none", "flips", "rotations", "isic", "synapse")
# What a motion draws, see `draw_motion`.
NUM_DRAWS = 6


def scaling(
  image: Num[np.ndarray, "H W C"], how: str, name: str
) -> tuple[float, float]:
  """The shift and factor that normalise an image: (x - shift) * factor.

  Args:
    image: the whole image, so that its crops agree.
    how:
      "standard": mean 0 and standard deviation 1 over all pixels and channels;
        a constant image becomes zeros.
      "minmax": to [0, 1].
      "published": to [0, 255], as MHS-VM does; its division by mean and
        standard deviation before that cancels.
      "half": uint8 to [-1, 1].
      "none": as it is.
    name: of the image, for errors.

  Raises:
    UserError: the image is constant and its range is to be stretched, is not
      finite, or has the wrong dtype.
  """
  check_choice("normalise", how, NORMALISATIONS)
  if how == "half":
    if image.dtype != np.uint8:
      raise UserError(
        f"{name}: config.data.normalise='half' is for 8-bit images and this "
        f"one holds {image.dtype}; use 'standard' or 'minmax'"
      )
    return 127.5, 1 / 127.5
  low, high = float(image.min()), float(image.max())
  if not np.isfinite(high - low):
    raise UserError(f"{name}: holds values that are NaN or infinite")
  if how == "none":
    return 0.0, 1.0
  if how == "standard":
    deviation = float(image.std(dtype=np.float64))
    # Of a constant float image the rounded mean may differ from its value.
    if low == high:
      return low, 0.0
    return float(image.mean(dtype=np.float64)), 1 / deviation
  if low == high:
    raise UserError(
      f"{name}: all pixels are {low:g}; a constant image cannot be stretched "
      "to its range; take it out, or set config.data.normalise='standard', "
      "which gives zeros"
    )
  return low, (255.0 if how == "published" else 1.0) / (high - low)


def normalise(
  image: Num[np.ndarray, "H W C"], how: str, name: str = "the image"
) -> Float[np.ndarray, "H W C"]:
  """The image as float32, scaled as `scaling` says."""
  shift, factor = scaling(image, how, name)
  return rescaled(image, shift, factor)


def rescaled(
  image: Num[np.ndarray, "H W C"], shift: float, factor: float
) -> Float[np.ndarray, "H W C"]:
  """(image - shift) * factor in float32."""
  return (image.astype(np.float32) - np.float32(shift)) * np.float32(factor)


def to_channels(
  image: Num[np.ndarray, "H W C"], channels: int
) -> Num[np.ndarray, "H W D"]:
  """Grey repeated, or colour as luma, to the channels that a model reads.

  Raises:
    UserError: neither is what it takes.
  """
  found = image.shape[-1]
  if found == channels:
    return image
  if found == 1:
    return np.repeat(image, channels, axis=-1)
  if channels == 1 and found == 3:
    grey = image @ np.array([0.299, 0.587, 0.114], np.float32)
    if np.issubdtype(image.dtype, np.integer):
      grey = np.round(grey)
    return grey[..., None].astype(image.dtype)
  raise UserError(
    f"an image has {found} channels and the model reads {channels}; set "
    "config.model.in_chans"
  )


@dataclasses.dataclass(frozen=True)
class Motion:
  """How an image and its mask are moved: flipped, then turned.

  Attributes:
    across: mirrored left to right.
    down: mirrored top to bottom.
    quarters: quarter turns to the left.
    angle: turn to the left in degrees, about the centre; the corners that come
      in are zero, which in a mask is the background.
    smooth: the image is interpolated bilinearly; else as the mask, whose
      pixels are always those nearest.
  """

  across: bool = False
  down: bool = False
  quarters: int = 0
  angle: float = 0.0
  smooth: bool = True

  def margin(self, size: int) -> int:
    """By how much a square must be larger to give one of that size, turned."""
    if not self.angle:
      return 0
    angle = np.radians(self.angle)
    return int(np.ceil(size * (abs(np.cos(angle)) + abs(np.sin(angle)) - 1)))

  def image(self, image: Num[np.ndarray, "H W C"]) -> np.ndarray:
    """The image moved; float32 if it is turned by an angle."""
    image = self._mirror(image)
    return rotate(image, self.angle, self.smooth) if self.angle else image

  def mask(self, mask: Num[np.ndarray, "H W"]) -> np.ndarray:
    """The mask moved likewise, of its own dtype."""
    moved = self._mirror(mask)
    if self.angle:
      moved = rotate(moved[..., None], self.angle, False)[..., 0]
    return moved.astype(mask.dtype)

  def _mirror(self, array: np.ndarray) -> np.ndarray:
    if self.across:
      array = array[:, ::-1]
    if self.down:
      array = array[::-1]
    return np.rot90(array, self.quarters) if self.quarters else array


def draw_motion(augment: str, draws: np.ndarray, run_angle: float) -> Motion:
  """The motion of a training sample.

  Args:
    augment:
      "none".
      "flips": each mirror image every other time.
      "rotations": and every other time a turn by any angle.
      "isic": that, but by the same angle in the whole run, and nearest
        pixels: as MHS-VM and VM-UNet are published, where the angle is drawn
        when the transform is made.
      "synapse": every other time quarter turns and a mirror image, else every
        other time a turn by whole degrees of [-20, 20), of nearest pixels.
    draws: NUM_DRAWS uniform numbers in [0, 1).
    run_angle: the angle of "isic" in degrees.
  """
  check_choice("augment", augment, AUGMENTATIONS)
  across, down, turned, angle, quarters, axis = draws
  if augment == "none":
    return Motion()
  if augment == "synapse":
    if across < 0.5:
      mirror = {"down": True} if axis < 0.5 else {"across": True}
      # Mirroring after k quarter turns is mirroring before -k of them.
      return Motion(quarters=-int(4 * quarters), smooth=False, **mirror)
    degrees = float(int(40 * angle) - 20) if turned < 0.5 else 0.0
    return Motion(angle=degrees, smooth=False)
  motion = Motion(across=bool(across < 0.5), down=bool(down < 0.5))
  if augment == "flips" or turned >= 0.5:
    return motion
  if augment == "isic":
    return dataclasses.replace(motion, angle=run_angle, smooth=False)
  return dataclasses.replace(motion, angle=360 * float(angle) - 180)


def rotate(
  image: Num[np.ndarray, "H W C"], angle: float, smooth: bool
) -> Float[np.ndarray, "H W C"]:
  """Turns an image to the left about its centre; zero comes in.

  Args:
    image: any numbers.
    angle: degrees; by 90, a square image is that of np.rot90.
    smooth: bilinear; else the nearest pixels.

  Returns:
    float32, of the same size.
  """
  picture = _pillow()
  height, width = image.shape[:2]
  cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
  x, y = width / 2, height / 2
  # Where a pixel of the result, counted from its corner, comes from.
  matrix = (
    *(cos, -sin, x - cos * x + sin * y),
    *(sin, cos, y - sin * x - cos * y),
  )
  kind = picture.Resampling.BILINEAR if smooth else picture.Resampling.NEAREST
  return _by_channel(
    image,
    lambda plane: plane.transform(
      (width, height), picture.Transform.AFFINE, matrix, kind
    ),
  )


def resize_image(
  image: Num[np.ndarray, "H W C"], size: tuple[int, int]
) -> Num[np.ndarray, "h w C"]:
  """Bilinear, with antialiasing where it shrinks; of the image's dtype."""
  if image.shape[:2] == tuple(size):
    return image
  picture = _pillow()
  move = lambda plane: plane.resize(size[::-1], picture.Resampling.BILINEAR)
  if image.dtype == np.uint8 and image.shape[-1] in (1, 3):
    plane = image[..., 0] if image.shape[-1] == 1 else image
    resized = np.asarray(move(picture.fromarray(np.ascontiguousarray(plane))))
    return resized.reshape(*size, image.shape[-1])
  resized = _by_channel(image, move)
  if np.issubdtype(image.dtype, np.integer):
    resized = np.round(resized)
  return resized.astype(image.dtype)


def resize_mask(
  mask: Num[np.ndarray, "H W"], size: tuple[int, int]
) -> Num[np.ndarray, "h w"]:
  """The nearest pixels; of the mask's dtype."""
  if mask.shape == tuple(size):
    return mask
  rows, columns = (
    ((np.arange(new) + 0.5) * (old / new)).astype(int)
    for old, new in zip(mask.shape, size, strict=True)
  )
  return mask[rows[:, None], columns]


def zoom(
  image: Num[np.ndarray, "H W C"],
  mask: UInt8[np.ndarray, "H W"],
  size: tuple[int, int],
) -> tuple[Float[np.ndarray, "h w C"], UInt8[np.ndarray, "h w"]]:
  """Resizes as the Synapse recipe does: cubic splines, nearest for the mask.

  Its corners are the centres of the corner pixels.
  """
  from scipy import ndimage  # a dependency of jax

  if mask.shape == tuple(size):
    return image.astype(np.float32), mask
  factors = [new / old for new, old in zip(size, mask.shape, strict=True)]
  resized = ndimage.zoom(image.astype(np.float32), (*factors, 1), order=3)
  return resized, ndimage.zoom(mask, factors, order=0)


def check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
  """Raises UserError unless config.data.KEY is one of `allowed`."""
  if value not in allowed:
    raise UserError(
      f"config.data.{key}={value!r}{nearest(value, allowed)}; allowed are "
      f"{', '.join(allowed)}"
    )


def _by_channel(image: np.ndarray, move: Any) -> np.ndarray:
  """Moves every channel as a float image, the only kind with any numbers."""
  picture = _pillow()
  planes = [
    np.asarray(move(picture.fromarray(np.ascontiguousarray(plane))))
    for plane in np.moveaxis(image.astype(np.float32), -1, 0)
  ]
  return np.stack(planes, axis=-1)


def _pillow() -> Any:
  from PIL import Image  # a dependency of matplotlib

  return Image
