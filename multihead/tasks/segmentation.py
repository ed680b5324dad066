"""Segmentation: images to a mask, or to the class of every pixel."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from multihead.data import labelled, pair_transforms
from multihead.data import segmentation as data_lib
from multihead.errors import UserError
from multihead.layers.scan_routes import ROUTES
from multihead.metrics import segmentation as metrics
from multihead.tasks import otsu, segmentation_figures
from multihead.tasks.parameters import ModelParameters

Batch = dict[str, jax.Array]

# Smoothing of the Dice losses: of one mask in pixels, and of many classes.
_MASK_SMOOTHING, _CLASS_SMOOTHING = 1.0, 1e-5
# Training samples that decide which side of Otsu's threshold is foreground.
_POLARITY_SAMPLES = 200
_SHOWN = 6


@dataclasses.dataclass(frozen=True)
class SegmentationData(data_lib.SegmentationData):
  """The `config.data` section: that of `data.segmentation`, and the loss.

  Attributes:
    pixel_weight: of the cross-entropy in the loss.
    dice_weight: of the Dice loss in it.
    threshold: probability from where on a pixel is foreground, in evaluation.
  """

  pixel_weight: float = 1.0
  dice_weight: float = 1.0
  threshold: float = 0.5

  def pairs(self) -> data_lib.SegmentationData:
    """What the batches depend on: all but the above."""
    names = [f.name for f in dataclasses.fields(data_lib.SegmentationData)]
    return data_lib.SegmentationData(**{n: getattr(self, n) for n in names})


def mask_losses(
  logits: Float[Array, "B height width"],
  targets: Float[Array, "B height width"],
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
  """BceDice of VM-UNet and MHS-VM: its two parts, for each image.

  The cross-entropy is the mean over pixels, in nats, and from logits; the
  authors take probabilities and cut their logarithms at -100. With p the
  probability and t the target, the Dice loss is
  1 - (2 sum p t + 1) / (sum p + sum t + 1).

  Args:
    logits: of the foreground.
    targets: probabilities of it.

  Returns:
    The cross-entropy and the Dice loss.
  """
  logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
  total = functools.partial(jnp.sum, axis=(1, 2))
  pixel = optax.sigmoid_binary_cross_entropy(logits, targets)
  p, smooth = jax.nn.sigmoid(logits), _MASK_SMOOTHING
  overlap = 2 * total(p * targets) + smooth
  dice = 1 - overlap / (total(p) + total(targets) + smooth)
  return jnp.mean(pixel, axis=(1, 2)), dice


def class_losses(
  logits: Float[Array, "B height width C"],
  targets: Float[Array, "B height width C"],
  weights: Float[Array, " B"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """The loss of VM-UNet on many classes: its two parts, for the batch.

  The cross-entropy is the mean over pixels, in nats. The Dice loss of a class
  is 1 - (2 sum p t + e) / (sum p^2 + sum t^2 + e), with e = 1e-5, p the softmax
  and sums over the whole batch; all classes count alike, the background too.

  Args:
    logits: of the classes.
    targets: probabilities of them.
    weights: of the images; 0 takes one out.

  Returns:
    The cross-entropy and the Dice loss.
  """
  logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
  total = lambda x: jnp.einsum("b,bhwc->c", weights, x)
  log = jax.nn.log_softmax(logits)
  pixels = jnp.mean(-jnp.sum(targets * log, axis=-1), axis=(1, 2))
  pixel = jnp.sum(weights * pixels) / jnp.maximum(jnp.sum(weights), 1.0)
  p, smooth = jnp.exp(log), _CLASS_SMOOTHING
  overlap = 2 * total(p * targets) + smooth
  dice = 1 - overlap / (total(p * p) + total(targets * targets) + smooth)
  return pixel, jnp.mean(dice)


def forward(
  model: nn.Module, params: Any, images: Array
) -> tuple[Array, dict[str, Array]]:
  """Logits, and the fraction of open gates of each head, by block."""
  logits, state = model.apply(
    {"params": params}, images, mutable=["intermediates"]
  )
  sown = flax.traverse_util.flatten_dict(state.get("intermediates", {}))
  return logits, {
    path[0]: value[0] for path, value in sown.items() if "open_gate" in path
  }


@dataclasses.dataclass(frozen=True, eq=False)
class Segmentation(ModelParameters):
  """Images to masks; the model gives logits of every pixel of an image.

  Attributes:
    model: with `in_chans`, `num_classes` and `stride`. Of one class it gives
      logits, not probabilities as the authors' code does.
    data: how the images are read, and the loss.
    pairs: makes the samples.
    batch_size: B, over all processes.
    seed: of the order of the training images, and of augmentation.
  """

  data_config: ClassVar[type] = SegmentationData
  headline: ClassVar[str] = "iou"
  higher_is_better: ClassVar[bool] = True
  unit: ClassVar[str] = "images"

  model: nn.Module
  data: SegmentationData
  pairs: data_lib.Pairs
  batch_size: int
  seed: int = 0

  @classmethod
  def create(
    cls,
    model: nn.Module,
    data: SegmentationData,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int = 0,
  ) -> "Segmentation":
    """Finds and splits the images.

    Args:
      model: see the class.
      data: how the images are read, and the loss.
      sequence_length: not used.
      batch_size: B.
      seed: of order and augmentation.

    Raises:
      UserError: another kind of model, or images or settings that cannot be
        used.
    """
    del sequence_length
    if not hasattr(model, "stride"):
      raise UserError(
        f"task segmentation: {type(model).__name__} makes no masks; mhs_vm does"
      )
    if model.num_classes != data.num_classes:
      raise UserError(
        f"config.data.num_classes={data.num_classes}, but the model has "
        f"{model.num_classes}; set config.model.num_classes to the same"
      )
    if data.size % model.stride:
      raise UserError(
        f"config.data.size={data.size} must be a multiple of {model.stride}; "
        "experiments.segment pads or tiles images of any size"
      )
    for name in ("pixel_weight", "dice_weight"):
      if getattr(data, name) < 0:
        raise UserError(
          f"config.data.{name}={getattr(data, name)} must not be negative"
        )
    if not data.pixel_weight + data.dice_weight:
      raise UserError(
        "config.data.pixel_weight and dice_weight are both 0: there is no loss"
      )
    if not 0 < data.threshold < 1:
      raise UserError(
        f"config.data.threshold={data.threshold} must lie between 0 and 1"
      )
    settings = data.pairs()
    source = data_lib.load_pairs(settings)
    pairs = data_lib.Pairs(
      source, data_lib.split(source, settings), settings, model.in_chans
    )
    return cls(model, data, pairs, batch_size, seed)

  @property
  def units_per_step(self) -> int:
    """Images that a step reads."""
    return self.batch_size

  def init_batch(self) -> dict[str, np.ndarray]:
    """A batch of the shapes and dtypes that the iterators give."""
    first = self.dataset("validation").source[0]
    return {name: np.zeros_like(array) for name, array in first.items()}

  def _losses(
    self, logits: Array, batch: Batch
  ) -> tuple[Array, dict[str, Array]]:
    masks, weights = batch["masks"], batch["weights"]
    count = jnp.sum(weights)
    if self.data.num_classes == 1:
      parts = mask_losses(logits[..., 0], masks)
      mean = lambda x: jnp.sum(weights * x) / jnp.maximum(count, 1.0)
      pixel, dice = map(mean, parts)
    else:
      targets = jax.nn.one_hot(masks, self.data.num_classes)
      pixel, dice = class_losses(logits, targets, weights)
    loss = self.data.pixel_weight * pixel + self.data.dice_weight * dice
    return loss, {"pixel_loss": pixel, "dice_loss": dice, "weight": count}

  def loss_fn(
    self, params: Any, batch: Batch, rng: jax.Array, train: bool
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy and Dice loss, of the images that count.

    With gradient accumulation or an uneven last batch the Dice loss of many
    classes is the mean of those of the parts: it is not a mean over images.

    Args:
      params: of the model.
      batch: images, masks and weights.
      rng: of stochastic depth.
      train: whether that is on.

    Returns:
      The loss, and its parts and the weight (the number of images that count).
    """
    options = {}
    if train:
      options = {"deterministic": False, "rngs": {"dropout": rng}}
    logits = self.model.apply({"params": params}, batch["images"], **options)
    return self._losses(logits, batch)

  def eval_fn(self, params: Any, batch: Batch) -> dict[str, Any]:
    """Sums over a batch: of the loss, the overlap, and the open gates.

    The gates are those of the batch, rows that fill it up included.
    """
    logits, gates = forward(self.model, params, batch["images"])
    loss, parts = self._losses(logits, batch)
    classes = self.data.num_classes
    sums = {
      "loss": loss * parts["weight"],
      "overlap": metrics.update(
        metrics.predict(logits, self.data.threshold),
        metrics.classes_of(batch["masks"], classes),
        batch["weights"],
        classes,
      ),
    }
    if gates:
      mean = jnp.mean(jnp.stack([jnp.mean(x) for x in gates.values()]))
      sums["open_gates"] = mean * parts["weight"]
    return sums

  def summarise(self, sums: dict[str, Any]) -> dict[str, float]:
    """Loss, overlap (see `metrics.segmentation.compute`) and open gates."""
    images = float(sums["overlap"].images)
    found = {
      name: float(sums[name]) / images
      for name in ("loss", "open_gates")
      if name in sums
    }
    return found | metrics.compute(sums["overlap"], self.class_names)

  @property
  def class_names(self) -> tuple[str, ...]:
    """With underscores, as parts of names of metrics."""
    return tuple(c.replace(" ", "_") for c in self.pairs.source.classes)

  @functools.cached_property
  def _compiled(self) -> Any:
    return jax.jit(functools.partial(forward, self.model))

  def final_metrics(self, params: Any) -> dict[str, float]:
    """Dice and HD95 by the rules of Synapse, see `metrics.case_scores`.

    A case is a volume in the size of its files, where the images are slices of
    volumes, else a sample. The unit of HD95 is a pixel.

    Returns:
      case_dsc and case_hd95, means over cases, then classes; with more than
      two classes also those of each.
    """
    scores = []
    for _, slices in itertools.groupby(
      self._predictions(params), key=lambda item: item[0]
    ):
      predicted, truth = (
        np.stack(arrays) for arrays in list(zip(*slices, strict=True))[1:]
      )
      if len(predicted) == 1:
        predicted, truth = predicted[0], truth[0]
      scores.append(
        metrics.case_scores(predicted, truth, self.data.num_classes)
      )
    means = np.mean(scores, axis=0)
    found = dict(zip(("case_dsc", "case_hd95"), means.mean(0), strict=True))
    if len(means) > 1:
      for name, (dsc, distance) in zip(
        self.class_names[1:], means, strict=True
      ):
        found |= {f"case_dsc_{name}": dsc, f"case_hd95_{name}": distance}
    return {name: float(value) for name, value in found.items()}

  def _predictions(
    self, params: Any
  ) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """Case, predicted and true classes of every validation sample, in order."""
    source, classes = self.pairs.source, self.data.num_classes
    volumes = source.groups is not None and not self.pairs.crops
    for batch in self.eval_iterator():
      logits, _ = self._compiled(params, batch["images"])
      taken = np.asarray(metrics.predict(logits, self.data.threshold))
      truths = np.asarray(metrics.classes_of(batch["masks"], classes))
      for row in np.flatnonzero(batch["weights"] > 0):
        number = int(batch["index"][row])
        if not volumes:
          yield number, taken[row], truths[row]
          continue
        i, _, _ = self.pairs.where("validation", number)
        truth = source.read(i)[1]
        mask = self._to_size(taken[row].astype(np.uint8), truth.shape)
        yield source.groups[i], mask, truth

  def _to_size(self, mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    if self.data.augment != "synapse":
      return pair_transforms.resize_mask(mask, shape)
    # Back by the same resampling that made the sample, as published.
    from scipy import ndimage  # a dependency of jax

    factors = [new / old for new, old in zip(shape, mask.shape, strict=True)]
    return ndimage.zoom(mask, factors, order=0)

  def draw(self, params: Any, workdir: str) -> dict[str, str]:
    """Draws validation samples with their masks, and the gates of the scans.

    Args:
      params: of the model.
      workdir: where the PNG files go.

    Returns:
      Title -> name of the file.
    """
    count = min(_SHOWN, self.pairs.counts["validation"])
    chosen = np.linspace(0, self.pairs.counts["validation"] - 1, count)
    # A batch of the usual size, so that it divides among the devices.
    numbers = np.resize(chosen.round().astype(int), self.batch_size)
    samples = [self.pairs.sample("validation", int(n)) for n in numbers]
    images, masks = map(np.stack, zip(*samples, strict=True))
    logits, gates = jax.device_get(self._compiled(params, images))
    count = min(count, self.batch_size)
    where = [self.pairs.where("validation", int(n)) for n in numbers[:count]]
    name = "predictions.png"
    segmentation_figures.panels(
      os.path.join(workdir, name),
      images[:count],
      np.asarray(metrics.classes_of(masks[:count], self.data.num_classes)),
      np.asarray(metrics.predict(logits[:count], self.data.threshold)),
      [self.pairs.source.names[i] for i, _, _ in where],
      classes=self.pairs.source.classes,
    )
    figures = {"Validation images, true and predicted masks": name}
    if gates:
      name = "gates.png"
      routes = self.model.routes or ROUTES[: self.model.heads]
      segmentation_figures.gates(
        os.path.join(workdir, name),
        gates,
        [getattr(r, "__name__", r) for r in routes],
      )
      figures["Open gates of the scan routes"] = name
    return figures

  def baselines(self) -> dict[str, float]:
    """Otsu's threshold, and calling every pixel foreground; of one mask.

    Otsu's threshold is that of each validation sample, and where these are
    crops, in a second method, that of the whole image. Which side of it is
    foreground is what suits the training samples better.
    """
    if self.data.num_classes > 1:
      return {}
    found = {}
    methods = {"otsu": False}
    if self.pairs.crops:
      methods["otsu_of_whole_images"] = True
    for name, whole in methods.items():
      scores = {
        bright: otsu.score(self._grey("train", whole), bright)
        for bright in (True, False)
      }
      bright = max(scores, key=lambda side: scores[side][0])
      iou, dsc = otsu.score(self._grey("validation", whole), bright)
      found |= {f"{name}_iou": iou, f"{name}_dsc": dsc}
    shares = [np.mean(truth >= 0.5) for *_, truth in self._grey("validation")]
    found["all_foreground_iou"] = float(np.mean(shares))
    return found

  def _grey(self, part: str, whole: bool = False) -> Iterator[otsu.Sample]:
    """Samples without augmentation; of training some, evenly spaced."""
    pairs, count = self.pairs, self.pairs.counts[part]
    numbers = np.arange(count)
    if part == "train" and count > _POLARITY_SAMPLES:
      numbers = np.linspace(0, count - 1, _POLARITY_SAMPLES).astype(int)
    before = None
    for n in numbers.tolist():
      image, mask = pairs.sample(part, n)
      if not whole:
        grey = _grey_levels(image)
        yield grey, otsu.threshold(grey), mask
        continue
      i, top, left = pairs.where(part, n)
      if i != before:
        grey = _grey_levels(pairs.source.read(i)[0])
        before, at = i, otsu.threshold(grey)
      rows, columns = (slice(x, x + self.data.size) for x in (top, left))
      yield grey[rows, columns], at, mask

  def sample(self, params: Any, **options: Any) -> str | None:
    """No text is made."""
    del params, options
    return None

  def facts(self) -> list[str]:
    """The data in words."""
    counts, source = self.pairs.counts, self.pairs.source
    kind, size = "crops" if self.pairs.crops else "images", self.data.size
    return [
      f"data: {source.title}; classes: {', '.join(source.classes)}; "
      f"{counts['train']:,} {kind} for training, {counts['validation']:,} for "
      f"validation, of {size} x {size} pixels"
    ]

  def train_iterator(self, index: int = 0, count: int = 1) -> Iterator[Any]:
    """Endless batches; `get_state` and `set_state` hold the position."""
    return iter(self.dataset("train", index, count))

  def eval_iterator(self, index: int = 0, count: int = 1) -> Iterator[Any]:
    """The validation images once."""
    return iter(self.dataset("validation", index, count))

  def dataset(
    self, part: str, index: int = 0, count: int = 1
  ) -> labelled.Dataset:
    """The batches of a split for process `index` of `count`."""
    return self.pairs.dataset(
      part,
      batch_size=self.batch_size,
      seed=self.seed,
      index=index,
      count=count,
    )


def _grey_levels(image: np.ndarray) -> np.ndarray:
  if image.shape[-1] in (1, 3):
    return pair_transforms.to_channels(image, 1)[..., 0]
  return image.mean(axis=-1)
