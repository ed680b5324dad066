"""Language modelling: predict the next token of real text."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from multihead import generation
from multihead.data import splits, text, tokenizers
from multihead.errors import UserError
from multihead.metrics import compression
from multihead.metrics import language_modelling as lm_metrics
from multihead.tasks.parameters import ModelParameters

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The `config.data` section; see `data.text.build`.

  Attributes:
    path: a file, a folder or a .jsonl; None: the documentation that comes with
      this Python.
    tokenizer: "byte", or the path of a tokenizer.json.
    validation_fraction: share of the bytes kept for validation.
    split_seed: chooses the validation documents.
    shared_words: validation passages that share a run of this many words with
      the training text are left out; 0 leaves them in.
    text_field: the field of a jsonl line that holds the text.
    overlap: tokens at the start of each validation window that are there as
      context and scored in the window before.
    cache_dir: keeps the tokenised text; None: nowhere.
    prefetch: batches made ahead.
  """

  path: str | None = None
  tokenizer: str = "byte"
  validation_fraction: float = 0.1
  split_seed: int = 0
  shared_words: int = splits.SHARED_WORDS
  text_field: str = "text"
  overlap: int = 0
  cache_dir: str | None = None
  prefetch: int = 2


def token_losses(
  logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
  """Cross-entropy in nats and whether the likeliest token is the target.

  Reads the logits where they are, also if the vocabulary is split over
  devices; holds no second array of their size.

  Args:
    logits: of any floating dtype; computed in float32.
    targets: ids in [0, V).

  Returns:
    The losses, float32, and the hits.
  """
  logits = logits.astype(jnp.float32)
  top = jnp.max(jax.lax.stop_gradient(logits), axis=-1, keepdims=True)
  lse = top[..., 0] + jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1))
  # A comparison with an iota fuses into the sum, and partitions over the
  # vocabulary; a gather would do neither.
  here = jnp.arange(logits.shape[-1]) == targets[..., None]
  picked = jnp.sum(jnp.where(here, logits, 0.0), axis=-1)
  return lse - picked, picked >= top[..., 0]


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModelling(ModelParameters):
  """A causal language model and the text that it learns.

  Attributes:
    model: `model.apply({"params": p}, tokens, segment_ids=...)` gives logits.
    tokenizer: between text and ids.
    data: how the text is read.
    split: the documents.
    sequence_length: T.
    batch_size: B, over all processes.
    seed: of the order of the training windows.
  """

  data_config: ClassVar[type] = DataConfig
  unit: ClassVar[str] = "tokens"
  headline: ClassVar[str] = "bits_per_byte"

  model: nn.Module
  tokenizer: tokenizers.Tokenizer
  data: DataConfig
  split: splits.Split
  sequence_length: int
  batch_size: int
  seed: int = 0

  @classmethod
  def create(
    cls,
    model: nn.Module,
    data: DataConfig,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int = 0,
  ) -> "LanguageModelling":
    """Reads and splits the text, and checks that the model can score it.

    Raises:
      UserError: the text or the tokenizer cannot be used, or has more ids than
        the model.
    """
    tokenizer = tokenizers.load(data.tokenizer)
    if tokenizer.vocab_size > model.vocab_size:
      raise UserError(
        f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, but the "
        f"model's vocab_size is {model.vocab_size}; set config.model."
        f"vocab_size to at least {tokenizer.vocab_size}"
      )
    split = splits.load_split(
      data.path,
      validation_fraction=data.validation_fraction,
      seed=data.split_seed,
      shared_words=data.shared_words or None,
      text_field=data.text_field,
    )
    return cls(model, tokenizer, data, split, sequence_length, batch_size, seed)

  @property
  def units_per_step(self) -> int:
    """Tokens that a step reads."""
    return self.batch_size * self.sequence_length

  def init_batch(self) -> dict[str, np.ndarray]:
    """A batch of the shapes and dtypes that the iterators give."""
    shape = (self.batch_size, self.sequence_length)
    ints = np.zeros(shape, np.int32)
    return {
      "tokens": ints,
      "targets": ints,
      "segment_ids": ints,
      "weights": np.zeros(shape, np.float32),
    }

  def loss_fn(
    self, params: Any, batch: Batch, rng: jax.Array, train: bool
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy in nats over the tokens that count.

    Args:
      params: of the model.
      batch: tokens, targets, segment_ids and weights [B, T].
      rng: not used; the model has no dropout.
      train: not used, for the same reason.

    Returns:
      The loss, and accuracy and weight (the number of tokens that count).
    """
    del rng, train
    sums = self.eval_fn(params, batch)
    weight = sums.weight[0]
    # A batch without a token that counts has loss 0, not 0 / 0.
    total = jnp.maximum(weight, 1.0)
    metrics = {"accuracy": sums.correct[0] / total, "weight": weight}
    return sums.nll[0] / total, metrics

  def eval_fn(self, params: Any, batch: Batch) -> lm_metrics.Sums:
    """Sums over a batch, see `metrics.language_modelling`."""
    logits = self.model.apply(
      {"params": params}, batch["tokens"], segment_ids=batch["segment_ids"]
    )
    losses, hits = token_losses(logits, batch["targets"])
    return lm_metrics.update_from_losses(
      lm_metrics.empty(), losses, hits, batch["weights"]
    )

  def summarise(self, sums: lm_metrics.Sums) -> dict[str, float]:
    """Loss in nats a token, bits per byte of text, accuracy."""
    found = lm_metrics.compute(
      sums, bytes_per_token=self.dataset("validation").bytes_per_token
    )
    return {name: found[name] for name in ("loss", "bits_per_byte", "accuracy")}

  def baselines(self) -> dict[str, float]:
    """Bits per byte of gzip and Markov models on the validation documents."""
    found = compression.baselines(
      [document.text for document in self.split.train],
      [document.text for document in self.split.validation],
    )
    return {f"{name}_{self.headline}": bits for name, bits in found.items()}

  def sample(
    self,
    params: Any,
    *,
    prompt: str = "",
    length: int = 256,
    temperature: float = 0.8,
    seed: int = 0,
  ) -> str:
    """Continues a prompt, which may be empty: the beginning of a document.

    Args:
      params: of the model.
      prompt: the text to continue; the last tokens of it that leave room.
      length: tokens to make; fewer where the model has fewer positions.
      temperature: 0 takes the likeliest token each time.
      seed: of the choice.

    Returns:
      The prompt and its continuation, up to the end of the document.
    """
    most = self.model.max_position_embeddings
    length = min(length, most - 1)
    ids = self.tokenizer.encode(prompt)
    ids = ids[max(len(ids) - (most - length - 1), 0) :]
    ids = np.concatenate([[self.tokenizer.bos_id], ids]).astype(np.int32)
    # One layer after another decodes faster than a scan over stacked layers.
    model, params = self.model.unroll(params)
    tokens = generation.generate(
      model,
      params,
      jnp.asarray(ids[None]),
      max_new_tokens=length,
      temperature=temperature,
      eos_id=self.tokenizer.eos_id,
      rng=jax.random.key(seed),
    )
    made = np.asarray(tokens)[0, 1:]
    ends = np.flatnonzero(made[len(ids) - 1 :] == self.tokenizer.eos_id)
    if len(ends):
      made = made[: len(ids) - 1 + ends[0]]
    return self.tokenizer.decode(made)

  def facts(self) -> list[str]:
    """The data in words."""
    return [
      f"data: {self.data.path or 'documentation of this Python'}; {self.split}",
      f"tokenizer: {self.tokenizer.name}; {self.dataset('train')}",
    ]

  def dataset(
    self, split: str, index: int = 0, count: int = 1
  ) -> text.TextDataset:
    """The batches of a split for process `index` of `count`."""
    return _build(self, split, index, count)

  def train_iterator(self, index: int = 0, count: int = 1) -> Iterator[Any]:
    """Endless batches; `get_state` and `set_state` hold the position."""
    return iter(self.dataset("train", index, count))

  def eval_iterator(self, index: int = 0, count: int = 1) -> Iterator[Any]:
    """The validation text once."""
    return iter(self.dataset("validation", index, count))


@functools.lru_cache(maxsize=8)
def _build(
  task: LanguageModelling, split: str, index: int, count: int
) -> text.TextDataset:
  return text.build(
    task.split,
    task.tokenizer,
    task.sequence_length,
    task.batch_size,
    task.seed,
    split,
    process_index=index,
    process_count=count,
    overlap=task.data.overlap if split == "validation" else 0,
    cache_dir=task.data.cache_dir,
    prefetch=task.data.prefetch,
  )
