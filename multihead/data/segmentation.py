"""Segmentation: images with masks to batches, split, cropped and augmented.

Where the pairs come from stands in image_pairs.py, synapse.py and
generated_pairs.py; what moves them in pair_transforms.py.
"""

import dataclasses
import functools
import hashlib
import threading
from pathlib import Path

import numpy as np

from multihead.data import generated_pairs, image_pairs, synapse
from multihead.data import pair_transforms as transforms
from multihead.data.image_pairs import PairSet
from multihead.data.labelled import Batch, Dataset, rank
from multihead.data.order import Order
from multihead.errors import UserError, nearest

_FITS = ("auto", "resize", "crop")
_NAMED = ("nuclei", "lesions", "lesions:photos", "maze")


@dataclasses.dataclass(frozen=True)
class SegmentationData:
  """The `config.data` section of segmentation.

  Attributes:
    path: None or "nuclei": real, see `image_pairs.nuclei`; "lesions" or
      "lesions:photos": see `generated_pairs.lesions`; "maze" or "maze:4" (the
      pixels to a place): see `generated_pairs.mazes`; a folder of images and
      masks, see `image_pairs.folder`; a folder of Synapse's files, see
      `synapse.load`.
    images, masks: names of the folders inside a folder.
    size: side of the square that the model reads.
    fit: "resize": the whole image becomes that square; "crop": training takes
      squares from anywhere in an image, validation the tiles that fit beside
      each other from its top left corner; "auto": crops of nuclei, else
      resized.
    num_classes: 1: foreground and background; n: masks hold classes 0 to n-1.
    instances: masks of a folder hold a number for every object, all of which
      are foreground.
    classes: their names, separated by commas, the background first; "": those
      of the source.
    normalise: see `pair_transforms.scaling`; the statistics are those of the
      whole image.
    augment: see `pair_transforms.draw_motion`. With "isic" and "synapse" the
      image is normalised and moved before it is resized, as published, and
      with "synapse" resized by splines.
    soft_masks: masks are resized bilinearly, as published for ISIC, and hold
      fractions; else by the nearest pixel.
    validation_fraction: of the images, where the source gives no split.
    split_seed: chooses it; and all that is drawn, where pairs are.
    examples: pairs that are drawn, where they are, for both splits.
    cache_mb: megabytes of decoded pairs that are kept.
    prefetch: batches made ahead.
  """

  path: str | None = None
  images: str = "images"
  masks: str = "masks"
  size: int = 256
  fit: str = "auto"
  num_classes: int = 1
  instances: bool = False
  classes: str = ""
  normalise: str = "standard"
  augment: str = "rotations"
  soft_masks: bool = False
  validation_fraction: float = 0.2
  split_seed: int = 0
  examples: int = 500
  cache_mb: int = 1024
  prefetch: int = 2


@dataclasses.dataclass(frozen=True)
class Split:
  """Numbers of the images for training and for validation, ascending."""

  train: np.ndarray
  validation: np.ndarray


def load_pairs(data: SegmentationData) -> PairSet:
  """Finds the images and masks that `data.path` names.

  Raises:
    UserError: nothing there, or what a model cannot be trained on.
  """
  for key, least in (("size", 1), ("examples", 1), ("prefetch", 0)):
    if (given := getattr(data, key)) < least:
      raise UserError(f"config.data.{key}={given} must be at least {least}")
  if data.path == "":
    raise UserError(
      f"config.data.path is not set: the folder that holds {data.images} and "
      f"{data.masks}, or train/ and val/ with these"
    )
  name = data.path or "nuclei"
  kind, _, option = name.partition(":")
  if kind in ("nuclei", "lesions", "maze") and data.num_classes != 1:
    raise UserError(
      f"config.data.num_classes={data.num_classes}: {kind} are foreground and "
      "background; set it to 1"
    )
  if name == "nuclei":
    return image_pairs.nuclei()
  if name in ("lesions", "lesions:photos"):
    return generated_pairs.lesions(
      data.size,
      data.examples,
      fraction=data.validation_fraction,
      seed=data.split_seed,
      photos=bool(option),
    )
  if kind == "maze" and (option.isdecimal() or name == "maze"):
    return generated_pairs.mazes(
      data.size, data.examples, scale=int(option or 2), seed=data.split_seed
    )
  root = Path(name).expanduser()
  if not root.is_dir():
    raise UserError(
      f"{name}: no such folder{nearest(name, _NAMED)}; give a folder that "
      f"holds {data.images} and {data.masks}, or one of {', '.join(_NAMED)}"
    )
  classes = [c.strip() for c in data.classes.split(",")] if data.classes else ()
  if synapse.recognised(root):
    return synapse.load(root, num_classes=data.num_classes, classes=classes)
  return image_pairs.folder(
    root,
    images=data.images,
    masks=data.masks,
    num_classes=data.num_classes,
    instances=data.instances,
    classes=classes,
  )


def split(source: PairSet, data: SegmentationData) -> Split:
  """The split that the source gives, or one by a hash of the names.

  Slices of one volume stay together. The hash knows neither the order of the
  files nor the machine.

  Raises:
    UserError: a side would be empty.
  """
  held = source.validation
  if held is None:
    fraction = data.validation_fraction
    if not 0 < fraction < 1:
      raise UserError(
        f"config.data.validation_fraction={fraction} must lie between 0 and "
        "1, for example 0.2"
      )
    units = source.names if source.groups is None else source.groups
    order = functools.partial(rank, data.split_seed)
    ranked = sorted(set(units), key=order)
    chosen = set(ranked[: max(1, round(fraction * len(ranked)))])
    held = np.array([unit in chosen for unit in units])
  found = Split(np.flatnonzero(~held), np.flatnonzero(held))
  if not len(found.train) or not len(found.validation):
    raise UserError(
      f"{source.title}: {len(held)} pairs, of which {len(found.validation)} "
      f"are for validation and {len(found.train)} for training; each needs one"
    )
  return found


def cuts_crops(data: SegmentationData) -> bool:
  """Whether samples are crops of the images, not the images resized."""
  if data.fit == "auto":
    return (data.path or "nuclei") == "nuclei"
  return data.fit == "crop"


@dataclasses.dataclass(frozen=True)
class _Prepared:
  """A decoded pair with the shift and factor that normalise it."""

  image: np.ndarray
  mask: np.ndarray
  shift: float
  factor: float


class Pairs:
  """Batches of pairs. Each sample is an image, or a crop of one.

  A batch, of numpy arrays, holds for this process's rows
    images: float32 [b, size, size, channels];
    masks: float32 [b, size, size] of 0 and 1 (of fractions, if soft) where
      num_classes is 1; else int32 of class numbers;
    weights: float32 [b], 0 for the rows that fill up the last batch of a
      validation split;
    index: int32 [b], the number of the sample within its split.
  """

  def __init__(
    self,
    source: PairSet,
    selection: Split,
    data: SegmentationData,
    channels: int = 3,
  ):
    """Plans the samples.

    Args:
      source: the pairs.
      selection: their split.
      data: what is done to them.
      channels: of the images that the model reads.

    Raises:
      UserError: settings that do not go together, or images smaller than the
        crops.
    """
    transforms.check_choice("fit", data.fit, _FITS)
    transforms.check_choice(
      "normalise", data.normalise, transforms.NORMALISATIONS
    )
    transforms.check_choice("augment", data.augment, transforms.AUGMENTATIONS)
    if data.soft_masks and data.num_classes > 1:
      raise UserError(
        "config.data.soft_masks=True is for num_classes=1; here there are "
        f"{data.num_classes}, and a class number has no fraction"
      )
    self.source = source
    self.data = data
    self.channels = channels
    self.crops = cuts_crops(data)
    if self.crops and (data.soft_masks or data.augment == "synapse"):
      raise UserError(
        "config.data.fit='crop' resizes nothing; soft_masks and "
        "augment='synapse' are for fit='resize'"
      )
    self._samples = {
      "train": self._plan(selection.train),
      "validation": self._plan(selection.validation),
    }
    self._cache: dict[int, _Prepared] = {}
    self._room = data.cache_mb * 2**20
    self._lock = threading.Lock()

  @property
  def counts(self) -> dict[str, int]:
    """Samples of each split."""
    return {name: len(samples) for name, samples in self._samples.items()}

  @property
  def fingerprint(self) -> str:
    """Equal where batches are: of the pairs and all that is done to them."""
    made = dataclasses.replace(
      self.data, path=None, cache_mb=0, prefetch=0, fit=str(self.crops)
    )
    return f"{self.source.fingerprint} {self.channels} {made}"

  def where(self, part: str, number: int) -> tuple[int, int, int]:
    """The image of a sample, and the top left corner of its tile in it.

    The training samples of an image are as many as its tiles, but cut out
    anywhere.
    """
    image, top, left = self._samples[part][number]
    return int(image), int(top), int(left)

  def _plan(self, members: np.ndarray) -> np.ndarray:
    """Rows of image, top, left."""
    if not self.crops:
      corner = np.zeros_like(members)
      return np.stack([members, corner, corner], axis=1)
    size, rows = self.data.size, []
    for i in members:
      height, width = self.source.shape(int(i))
      if min(height, width) < size:
        raise UserError(
          f"{self.source.names[i]}: {height} x {width} pixels are less than a "
          f"crop of {size} x {size}; set config.data.size to at most "
          f"{min(height, width)}, or config.data.fit='resize'"
        )
      rows += [
        (i, top, left)
        for top in range(0, height - size + 1, size)
        for left in range(0, width - size + 1, size)
      ]
    return np.array(rows)

  def dataset(
    self,
    part: str,
    *,
    batch_size: int,
    seed: int = 0,
    index: int = 0,
    count: int = 1,
  ) -> Dataset:
    """The batches of "train" or "validation" for one process.

    Args:
      part: training is endless and shuffled anew in every epoch, validation is
        every sample once and in order.
      batch_size: rows of the global batch; a multiple of count.
      seed: of order and augmentation.
      index: which part of every batch is made.
      count: into how many parts batches are cut.
    """
    training = part == "train"
    rows = batch_size // count
    source = _Batches(
      self,
      part,
      batch_size=batch_size,
      rows=slice(index * rows, (index + 1) * rows),
      seed=seed if training else None,
    )
    digest = hashlib.blake2b(self.fingerprint.encode(), digest_size=16)
    digest.update(self._samples[part].astype(np.int64).tobytes())
    return Dataset(
      source=source,
      num_batches=None if training else len(source),
      identity={
        "split": part,
        "examples": digest.hexdigest(),
        "batch_size": batch_size,
        "seed": seed if training else 0,
      },
      prefetch=self.data.prefetch,
    )

  def sample(
    self,
    part: str,
    number: int,
    draws: np.ndarray | None = None,
    run_angle: float = 0.0,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Image and mask of a sample, as they stand in a batch.

    Args:
      part: "train" or "validation".
      number: of the sample.
      draws: 2 + pair_transforms.NUM_DRAWS uniform numbers in [0, 1), of the
        crop and the motion; None: the tile, as it lies.
      run_angle: see `pair_transforms.draw_motion`.
    """
    data = self.data
    i, top, left = self.where(part, number)
    pair = self._prepare(i)
    image, mask = pair.image, pair.mask
    motion = transforms.Motion()
    if draws is not None:
      motion = transforms.draw_motion(data.augment, draws[2:], run_angle)
    if self.crops:
      # What is turned is cut larger, so that no empty corner comes in.
      side = min(data.size + motion.margin(data.size), *mask.shape)
      if draws is not None:
        top, left = (
          int(draw * (length - side + 1))
          for draw, length in zip(draws, mask.shape, strict=False)
        )
      here = (slice(top, top + side), slice(left, left + side))
      image, mask = image[here], mask[here]
    image = transforms.rescaled(image, pair.shift, pair.factor)
    image, mask = motion.image(image), motion.mask(mask)
    if self.crops:
      start = (len(mask) - data.size) // 2
      here = (slice(start, start + data.size),) * 2
      image, mask = image[here], mask[here]
    image, mask = self._resized(image, mask)
    image = transforms.to_channels(image, self.channels)
    return image, mask.astype(np.float32 if data.num_classes == 1 else np.int32)

  def _resized(
    self, image: np.ndarray, mask: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    size = (self.data.size, self.data.size)
    if self.data.augment == "synapse":
      return transforms.zoom(image, mask, size)
    image = transforms.resize_image(image, size)
    if not self.data.soft_masks:
      return image, transforms.resize_mask(mask, size)
    soft = mask[..., None].astype(np.float32)
    return image, transforms.resize_image(soft, size)[..., 0]

  def _prepare(self, i: int) -> _Prepared:
    if (found := self._cache.get(i)) is not None:
      return found
    data = self.data
    image, mask = self.source.read(i)
    published = data.augment in ("isic", "synapse")
    if not (published or self.crops or data.soft_masks):
      image, mask = self._resized(image, mask)
    found = _Prepared(
      image,
      mask,
      *transforms.scaling(image, data.normalise, self.source.names[i]),
    )
    with self._lock:
      if i not in self._cache and self._room >= image.nbytes + mask.nbytes:
        self._room -= image.nbytes + mask.nbytes
        self._cache[i] = found
    return found


class _Batches:
  """Batches by their number: a random-access source for grain.

  The draws of a training sample are those of its place in the endless order,
  so a batch is the same on any number of processes.
  """

  def __init__(
    self,
    pairs: Pairs,
    part: str,
    *,
    batch_size: int,
    rows: slice,
    seed: int | None,
  ):
    self._pairs = pairs
    self._part = part
    self._order = Order(pairs.counts[part], batch_size, rows, seed)
    self._run_angle = 0.0
    if seed is not None:
      self._run_angle = 360 * float(_draws(seed, 0, 3)[0])

  def __len__(self) -> int:
    return len(self._order)

  def __repr__(self) -> str:
    return f"Batches({self._pairs.counts[self._part]} in batches)"

  def __getitem__(self, batch: int) -> Batch:
    order = self._order
    records = order.records(batch)
    real = records >= 0
    numbers = np.where(real, records, 0)
    samples = []
    for row, number in zip(order.rows, numbers, strict=True):
      draws = None
      if order.seed is not None:
        place = batch * order.batch_size + int(row)
        draws = _draws(order.seed, place, 2)
      samples.append(
        self._pairs.sample(self._part, int(number), draws, self._run_angle)
      )
    images, masks = zip(*samples, strict=True)
    return {
      "images": np.stack(images),
      "masks": np.stack(masks),
      "weights": real.astype(np.float32),
      "index": numbers.astype(np.int32),
    }


def _draws(seed: int, place: int, stream: int) -> np.ndarray:
  """Uniform numbers: another stream than the one that orders the epochs."""
  key = np.random.SeedSequence([seed, place, stream])
  rng = np.random.Generator(np.random.Philox(key))
  return rng.random(2 + transforms.NUM_DRAWS)
