"""Classification of images and of texts."""

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from multihead import checkpoints
from multihead.data import images, labelled, labelled_text, tokenizers
from multihead.errors import UserError
from multihead.metrics import classification as metrics
from multihead.metrics.language_modelling import token_losses
from multihead.tasks.parameters import ModelParameters

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ImageData:
  """The `config.data` section of images; see `data.images`.

  Attributes:
    path: "digits", a folder with one folder per class, or an .npz file.
    validation_fraction: share of each class kept for validation, where the
      source does not give the split.
    split_seed: chooses it.
    classes: names of the classes to keep, separated by commas; "": all.
    train_per_class: training examples of each class; 0: all.
    normalise: "none", "half", "imagenet" or "clip".
    centre_crop, random_crop, shift, flip: see `data.images.Preprocessing`.
    mixup: parameter of the Beta distribution of mixup; 0: no mixup.
    label_smoothing: share of the target spread evenly over all classes.
    prefetch: batches made ahead.
  """

  path: str | None = None
  validation_fraction: float = 0.2
  split_seed: int = 0
  classes: str = ""
  train_per_class: int = 0
  normalise: str = "half"
  centre_crop: float = 0.0
  random_crop: float = 0.0
  shift: int = 0
  flip: bool = False
  mixup: float = 0.0
  label_smoothing: float = 0.0
  prefetch: int = 2


@dataclasses.dataclass(frozen=True)
class TextData:
  """The `config.data` section of texts; see `data.labelled_text`.

  Attributes:
    path: "stdlib:packages", a .jsonl file, or a folder.
    text_field, pair_field, label_field: of a line of a .jsonl file.
    tokenizer: "byte", or the path of a tokenizer.json or of a folder with one,
      also inside an installed package (see `checkpoints.locate`).
    bos, eos: the tokens that open and close a text, where they cannot be told:
      of BERT's tokenizers "[CLS]" and "[SEP]".
    validation_fraction: share of each class kept for validation, where the
      source does not give the split.
    split_seed: chooses it.
    classes: names of the classes to keep, separated by commas; "": all.
    train_per_class: training examples of each class; 0: all.
    label_smoothing: share of the target spread evenly over all classes.
    prefetch: batches made ahead.
  """

  path: str | None = None
  text_field: str = "text"
  pair_field: str | None = None
  label_field: str = "label"
  tokenizer: str = "byte"
  bos: str | None = None
  eos: str | None = None
  validation_fraction: float = 0.2
  split_seed: int = 0
  classes: str = ""
  train_per_class: int = 0
  label_smoothing: float = 0.0
  prefetch: int = 2


def smoothed_losses(
  logits: Float[Array, "B C"], labels: Array, smoothing: float
) -> tuple[Float[Array, "B"], Array]:
  """Cross-entropy in nats with a smoothed target, and the hits.

  The target is 1 - smoothing + smoothing / C at the label and smoothing / C at
  every other class.
  """
  nll, hits = token_losses(logits, labels)
  if not smoothing:
    return nll, hits
  logits = logits.astype(jnp.float32)
  even = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
  return (1 - smoothing) * nll + smoothing * even, hits


@dataclasses.dataclass(frozen=True, eq=False)
class _Classification(ModelParameters):
  """What images and texts have in common.

  Attributes:
    model: the network; its logits have one column for each class.
    data: how the examples are read.
    source: the examples.
    selection: which of them are used, and their split.
    batch_size: B, over all processes.
    seed: of the order of the training examples, and of augmentation.
  """

  headline: ClassVar[str] = "error"

  model: nn.Module
  data: Any
  source: Any
  selection: labelled.Selection
  sequence_length: int
  batch_size: int
  seed: int = 0

  @property
  def units_per_step(self) -> int:
    """Examples that a step reads."""
    return self.batch_size

  def logits(self, params: Any, batch: Batch, **options: Any) -> Array:
    """[B, C] of a batch; options are those of the model's call."""
    raise NotImplementedError

  def init_batch(self) -> dict[str, np.ndarray]:
    """A batch of the shapes and dtypes that the iterators give."""
    first = self.dataset("validation").source[0]
    return {name: np.zeros_like(array) for name, array in first.items()}

  def loss_fn(
    self, params: Any, batch: Batch, rng: jax.Array, train: bool
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy over the examples that count.

    Args:
      params: of the model.
      batch: its inputs, labels and weights.
      rng: of dropout and mixup.
      train: whether they are on.

    Returns:
      The loss, and accuracy and weight (the number of examples that count).
    """
    options = {}
    mixed = None
    if train:
      rng, draw = jax.random.split(rng)
      options = {"deterministic": False, "rngs": {"dropout": rng}}
      batch, mixed = self.mix(batch, draw)
    logits = self.logits(params, batch, **options)
    smoothing = self.data.label_smoothing
    losses, hits = smoothed_losses(logits, batch["labels"], smoothing)
    if mixed is not None:
      share, labels = mixed
      others, _ = smoothed_losses(logits, labels, smoothing)
      losses = share * losses + (1 - share) * others
    weights = batch["weights"]
    weight = jnp.sum(weights)
    total = jnp.maximum(weight, 1.0)
    accuracy = jnp.sum(weights * hits) / total
    return jnp.sum(weights * losses) / total, {
      "accuracy": accuracy,
      "weight": weight,
    }

  def mix(
    self, batch: Batch, rng: jax.Array
  ) -> tuple[Batch, tuple[Array, Array] | None]:
    """The batch, mixed with another order of it: none by default."""
    del rng
    return batch, None

  def eval_fn(self, params: Any, batch: Batch) -> metrics.Sums:
    """Sums over a batch, see `metrics.classification`."""
    logits = self.logits(params, batch)
    return metrics.update(logits, batch["labels"], batch["weights"])

  def summarise(self, sums: metrics.Sums) -> dict[str, float]:
    """Loss, accuracy, error and their kin."""
    return metrics.compute(sums)

  def _majority(self) -> float:
    """Error of always naming the commonest training class."""
    labels = self.selection.labels
    counts = collections.Counter(labels[self.selection.train].tolist())
    guess = counts.most_common(1)[0][0]
    return float((labels[self.selection.validation] != guess).mean())

  def sample(self, params: Any, **options: Any) -> str | None:
    """A classifier makes no text."""
    del params, options
    return None

  def facts(self) -> list[str]:
    """The data in words."""
    chosen = self.selection
    return [
      f"data: {self.source.title}; {len(chosen.classes)} classes, "
      f"{len(chosen.train):,} {self.unit} for training, "
      f"{len(chosen.validation):,} for validation"
    ]

  def _check_classes(self, outputs: int, key: str) -> None:
    classes = len(self.selection.classes)
    if outputs != classes:
      raise UserError(
        f"the data has {classes} classes, but the model has {outputs}; set "
        f"config.model.{key}={classes}"
      )
    if not 0 <= self.data.label_smoothing < 1:
      raise UserError(
        f"config.data.label_smoothing={self.data.label_smoothing} must be at "
        "least 0 and less than 1"
      )

  def train_iterator(self, index: int = 0, count: int = 1) -> Iterator[Any]:
    """Endless batches; `get_state` and `set_state` hold the position."""
    return iter(self.dataset("train", index, count))

  def eval_iterator(self, index: int = 0, count: int = 1) -> Iterator[Any]:
    """The validation examples once."""
    return iter(self.dataset("validation", index, count))

  def dataset(
    self, split: str, index: int = 0, count: int = 1
  ) -> labelled.Dataset:
    """The batches of a split for process `index` of `count`."""
    make, fingerprint = self.maker()
    return labelled.build(
      make,
      self.selection,
      split,
      batch_size=self.batch_size,
      seed=self.seed,
      fingerprint=fingerprint,
      process_index=index,
      process_count=count,
      prefetch=self.data.prefetch,
    )

  def maker(self) -> tuple[Any, str]:
    """What makes the inputs of a batch, and what they depend on."""
    raise NotImplementedError


def _select(source: Any, data: Any) -> labelled.Selection:
  try:
    return labelled.select(
      source.names,
      source.labels,
      source.classes,
      validation=source.validation,
      validation_fraction=data.validation_fraction,
      seed=data.split_seed,
      only=data.classes,
      train_per_class=data.train_per_class,
    )
  except UserError as error:
    raise UserError(f"{source.title}: {error}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class ImageClassification(_Classification):
  """Images to classes; the model reads images [B, height, width, C]."""

  data_config: ClassVar[type] = ImageData
  unit: ClassVar[str] = "images"

  @classmethod
  def create(
    cls,
    model: nn.Module,
    data: ImageData,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int = 0,
  ) -> "ImageClassification":
    """Finds and splits the images.

    Args:
      model: with `image_shape`, `in_chans` and `num_classes`.
      data: how they are read.
      sequence_length: not used.
      batch_size: B.
      seed: of order and augmentation.

    Raises:
      UserError: the images cannot be used, or have other classes than the
        model.
    """
    if not hasattr(model, "image_shape"):
      raise UserError(
        f"task image_classification: {type(model).__name__} reads no images"
      )
    source = images.load_images(data.path)
    selection = _select(source, data)
    task = cls(
      model, data, source, selection, sequence_length, batch_size, seed
    )
    task._check_classes(model.num_classes, "num_classes")
    task.maker()
    return task

  def logits(self, params: Any, batch: Batch, **options: Any) -> Array:
    """[B, C] of the images of a batch."""
    return self.model.apply({"params": params}, batch["images"], **options)

  def mix(
    self, batch: Batch, rng: jax.Array
  ) -> tuple[Batch, tuple[Array, Array] | None]:
    """Mixup (arXiv 1710.09412): each image with the one across the batch.

    Returns:
      The mixed batch, and the share of its own label with the other labels.
    """
    alpha = self.data.mixup
    if not alpha:
      return batch, None
    share = jax.random.beta(rng, alpha, alpha)
    pixels, labels = batch["images"], batch["labels"]
    pixels = share * pixels + (1 - share) * pixels[::-1]
    return {**batch, "images": pixels}, (share, labels[::-1])

  def baselines(self) -> dict[str, float]:
    """Errors of the commonest class and of the nearest class mean."""
    found = {"commonest_class_error": self._majority()}
    nearest = images.nearest_centroid_error(self.source, self.selection)
    if np.isfinite(nearest):
      found["nearest_class_mean_error"] = nearest
    return found

  def maker(self) -> tuple[Any, str]:
    """Reads and preprocesses images."""
    data = self.data
    steps = images.Preprocessing(
      size=self.model.image_shape,
      channels=self.model.in_chans,
      normalise=data.normalise,
      centre_crop=data.centre_crop,
      random_crop=data.random_crop,
      shift=data.shift,
      flip=data.flip,
    )
    make = functools.partial(steps.batch, self.source)
    return make, f"{self.source.fingerprint} {steps}"


@dataclasses.dataclass(frozen=True, eq=False)
class TextClassification(_Classification):
  """Texts, or pairs of them, to classes; the model reads tokens and a mask.

  Attributes beyond those of the images' task:
    encoded: the texts as ids.
  """

  data_config: ClassVar[type] = TextData
  unit: ClassVar[str] = "texts"

  encoded: Any = None
  tokenizer: Any = None

  @classmethod
  def create(
    cls,
    model: nn.Module,
    data: TextData,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int = 0,
  ) -> "TextClassification":
    """Reads, splits and encodes the texts.

    Args:
      model: with `vocab_size` and `num_labels`.
      data: how they are read.
      sequence_length: T; longer texts are cut.
      batch_size: B.
      seed: of the order.

    Raises:
      UserError: the texts cannot be used, or have other classes or more ids
        than the model.
    """
    if not hasattr(model, "num_labels"):
      raise UserError(
        f"task text_classification: {type(model).__name__} has no num_labels"
      )
    spec = str(checkpoints.locate(data.tokenizer))
    tokenizer = tokenizers.load(spec, bos=data.bos, eos=data.eos)
    if tokenizer.vocab_size > model.vocab_size:
      raise UserError(
        f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, but the "
        f"model's vocab_size is {model.vocab_size}; set config.model."
        f"vocab_size to at least {tokenizer.vocab_size}"
      )
    source = labelled_text.load_texts(
      data.path,
      text_field=data.text_field,
      pair_field=data.pair_field,
      label_field=data.label_field,
    )
    if source.pairs is not None and model.type_vocab_size < 2:
      raise UserError(
        "pairs of texts need a model with type_vocab_size 2 or more; this one "
        f"has {model.type_vocab_size}"
      )
    selection = _select(source, data)
    encoded = labelled_text.encode(source, tokenizer, sequence_length)
    task = cls(
      model, data, source, selection, sequence_length, batch_size, seed,
      encoded, tokenizer,
    )  # fmt: skip
    task._check_classes(model.num_labels, "num_labels")
    return task

  def logits(self, params: Any, batch: Batch, **options: Any) -> Array:
    """[B, C] of the texts of a batch."""
    return self.model.apply(
      {"params": params},
      batch["tokens"],
      batch["mask"],
      batch["token_types"],
      **options,
    )

  def baselines(self) -> dict[str, float]:
    """Errors of the commonest class and of counting words."""
    bayes = labelled_text.naive_bayes_error(self.source, self.selection)
    return {
      "commonest_class_error": self._majority(),
      "naive_bayes_error": bayes,
    }

  def maker(self) -> tuple[Any, str]:
    """Pads encoded texts."""
    length = self.sequence_length

    def make(members: np.ndarray, rng: Any) -> dict[str, np.ndarray]:
      del rng
      return self.encoded.batch(members, length)

    parts = (self.source.fingerprint, self.tokenizer.fingerprint, length)
    return make, " ".join(map(str, parts))

  def facts(self) -> list[str]:
    """The data in words."""
    return [
      *super().facts(),
      f"tokenizer: {self.tokenizer.name}; {self.encoded.cut:,} of "
      f"{len(self.encoded.tokens):,} texts are cut to {self.sequence_length} "
      "tokens",
    ]
