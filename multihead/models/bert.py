"""BERT and its kin: bidirectional text encoders, post-norm.

"BERT: Pre-training of Deep Bidirectional Transformers", arXiv 1810.04805;
"RoBERTa", arXiv 1907.11692; "MiniLM", arXiv 2002.10957; sentence embeddings by
mean pooling: "Sentence-BERT", arXiv 1908.10084. Field names are those of the
published config.json files.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from multihead.errors import UserError
from multihead.layers import (
  Embedding,
  LayerNorm,
  Linear,
  stacking,
)
from multihead.layers.encoder import encoder_blocks
from multihead.layers.mlp import ACTIVATIONS
from multihead.parallel.sharding import BATCH_AXES, constrain


def _variant(layers: int, width: int, heads: int, **rest: Any) -> dict:
  shape = dict(
    num_hidden_layers=layers,
    hidden_size=width,
    num_attention_heads=heads,
    intermediate_size=4 * width,
    vocab_size=30522,
    max_position_embeddings=512,
    type_vocab_size=2,
  )
  return {**shape, **rest}


_ROBERTA = dict(
  vocab_size=50265,
  max_position_embeddings=514,
  type_vocab_size=1,
  layer_norm_eps=1e-5,
  position_offset=2,
)

# Encoders with pooler, without a task's head. The small ones: "Well-Read
# Students Learn Better", arXiv 1908.08962, table 1.
VARIANTS: dict[str, dict[str, Any]] = {
  "bert-tiny": _variant(2, 128, 2),
  "bert-mini": _variant(4, 256, 4),
  "minilm-l6": _variant(6, 384, 12),
  "bert-small": _variant(4, 512, 8),
  "minilm-l12": _variant(12, 384, 12),
  "bert-medium": _variant(8, 512, 8),
  "bert-base-cased": _variant(12, 768, 12, vocab_size=28996),
  "bert-base-uncased": _variant(12, 768, 12),
  "roberta-base": _variant(12, 768, 12, **_ROBERTA),
  "bert-large-cased": _variant(24, 1024, 16, vocab_size=28996),
  "bert-large-uncased": _variant(24, 1024, 16),
  "roberta-large": _variant(24, 1024, 16, **_ROBERTA),
}


class Bert(nn.Module):
  """The encoder, with a classifier if `num_labels` is set.

  Methods, for `model.apply(variables, tokens, mask, method=...)`: `encode`
  (tokens to the last hidden states) and `embed_sentences` (their mean over
  the real tokens, at unit length). Sown, per block and stacked if the blocks
  are scanned: `attention_out`, `mlp_out` and `heads`.

  Attributes beyond config.json's:
    num_labels: classes; 0: no classifier, and `__call__` gives hidden states.
    add_pooling_layer: whether there is a pooler: tanh of a projection of the
      first token, which a classifier reads. (RoBERTa's classifier has one of
      its own, which is the same function.)
    classifier_dropout: before the classifier; None: hidden_dropout_prob.
    position_offset: 0: token t has position t. Above 0 (RoBERTa: 2): the real
      tokens are counted from there, wherever padding stands.
    dtype: of activations and matrix products; norms, softmax and logits are
      float32.
    param_dtype: of the parameters.
    scan_layers: one compiled block, parameters stacked on a leading axis, or
      one after another.
    remat: what the backward pass recomputes: "none", "full" or "dots".
    attention_implementation: see `multihead.ops`.
  """

  vocab_size: int = 260
  hidden_size: int = 64
  num_hidden_layers: int = 2
  num_attention_heads: int = 4
  intermediate_size: int = 256
  hidden_act: str = "gelu"
  hidden_dropout_prob: float = 0.1
  attention_probs_dropout_prob: float = 0.1
  max_position_embeddings: int = 512
  type_vocab_size: int = 2
  initializer_range: float = 0.02
  layer_norm_eps: float = 1e-12
  num_labels: int = 0
  add_pooling_layer: bool = True
  classifier_dropout: float | None = None
  position_offset: int = 0
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  scan_layers: bool = True
  remat: str = "none"
  attention_implementation: Any = None

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.hidden_size % self.num_attention_heads:
      raise UserError(
        f"hidden_size={self.hidden_size} must be a multiple of "
        f"num_attention_heads={self.num_attention_heads}"
      )
    if self.hidden_act not in ACTIVATIONS:
      raise UserError(
        f"hidden_act={self.hidden_act!r}; allowed are {', '.join(ACTIVATIONS)}"
      )
    if self.num_labels and not self.add_pooling_layer:
      raise UserError(
        "num_labels > 0 needs add_pooling_layer=True: the classifier reads it"
      )
    if self.remat not in ("none", *stacking.REMAT_POLICIES):
      raise UserError(
        f"remat={self.remat!r}; allowed are 'none', 'full' and 'dots'"
      )

  @property
  def max_length(self) -> int:
    """The longest sequence, in tokens."""
    return self.max_position_embeddings - self.position_offset

  def setup(self) -> None:
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    init = nn.initializers.normal(self.initializer_range)
    table = dict(features=self.hidden_size, embedding_init=init, **types)
    self.word_embeddings = Embedding(self.vocab_size, **table)
    self.position_embeddings = Embedding(self.max_position_embeddings, **table)
    self.token_type_embeddings = Embedding(self.type_vocab_size, **table)
    self.embed_norm = LayerNorm(epsilon=self.layer_norm_eps, **types)
    self.dropout = nn.Dropout(self.hidden_dropout_prob)
    self.blocks = self._blocks(kernel_init=init, **types)
    if self.add_pooling_layer:
      self.pooler = Linear(
        (self.hidden_size,),
        ("embed", None),
        use_bias=True,
        kernel_init=init,
        **types,
      )
    if self.num_labels:
      rate = self.classifier_dropout
      self.head_drop = nn.Dropout(
        self.hidden_dropout_prob if rate is None else rate
      )
      self.head = Linear(
        (self.num_labels,),
        ("embed", "vocab"),
        use_bias=True,
        kernel_init=init,
        result_dtype=jnp.float32,
        **types,
      )

  def _blocks(self, **shared: Any) -> Any:
    return encoder_blocks(
      self.num_hidden_layers,
      remat=self.remat,
      scan_layers=self.scan_layers,
      scan_over=False,
      num_heads=self.num_attention_heads,
      mlp_dim=self.intermediate_size,
      pre_norm=False,
      act=self.hidden_act,
      dropout=self.hidden_dropout_prob,
      attention_dropout=self.attention_probs_dropout_prob,
      epsilon=self.layer_norm_eps,
      implementation=self.attention_implementation,
      **shared,
    )

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    token_types: Int[Array, "B T"] | None = None,
    *,
    deterministic: bool = True,
  ) -> Any:
    """Classifies texts, or encodes them if there is no classifier.

    Args:
      tokens: ids in [0, V).
      mask: True for real tokens. What stands at the others changes nothing at
        the real ones.
      token_types: the segment of each token, in [0, type_vocab_size); all 0 by
        default.
      deterministic: no dropout; it needs the rng "dropout" otherwise.

    Returns:
      Logits [B, num_labels] in float32, or hidden states [B, T, D].

    Raises:
      UserError: more tokens than positions.
      ValueError: shapes disagree.
    """
    x = self.encode(tokens, mask, token_types, deterministic=deterministic)
    if self.add_pooling_layer:
      pooled = jnp.tanh(self.pooler(x[:, 0]))
      self.sow("intermediates", "pooled", pooled)
    if not self.num_labels:
      return x
    return self.head(self.head_drop(pooled, deterministic=deterministic))

  def encode(
    self,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    token_types: Int[Array, "B T"] | None = None,
    *,
    deterministic: bool = True,
  ) -> Float[Array, "B T D"]:
    """The last hidden states; arguments as of `__call__`."""
    self._check(tokens, mask, token_types)
    if token_types is None:
      token_types = jnp.zeros_like(tokens)
    x = self.word_embeddings(tokens)
    x = x + self.position_embeddings(self._positions(tokens, mask))
    x = x + self.token_type_embeddings(token_types)
    x = self.dropout(self.embed_norm(x), deterministic=deterministic)
    x = constrain(x, BATCH_AXES, "sequence", None)
    if self.scan_layers:
      return self.blocks(x, None, mask, deterministic)[0]
    for block in self.blocks:
      x, _ = block(x, None, mask, deterministic)
    return x

  def _positions(self, tokens: Array, mask: Array | None) -> Array:
    if mask is None or not self.position_offset:
      row = jnp.arange(tokens.shape[1], dtype=jnp.int32) + self.position_offset
      return jnp.broadcast_to(row, tokens.shape)
    counts = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    return counts + self.position_offset - 1

  def _check(self, tokens: Any, mask: Any, token_types: Any) -> None:
    if tokens.ndim != 2:
      raise ValueError(f"tokens must be [B, T], got shape {tokens.shape}")
    for name, value in (("mask", mask), ("token_types", token_types)):
      if value is not None and value.shape != tokens.shape:
        raise ValueError(
          f"{name} has shape {value.shape}, tokens {tokens.shape}; they must "
          "be equal"
        )
    if tokens.shape[1] > self.max_length:
      raise UserError(
        f"a sequence of {tokens.shape[1]} tokens is longer than the model's "
        f"{self.max_length} positions"
      )

  def embed_sentences(
    self,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    normalise: bool = True,
  ) -> Float[Array, "B D"]:
    """The mean of the last hidden states over the real tokens.

    Args:
      tokens: ids.
      mask: True for real tokens.
      normalise: scale to unit length, so that products are cosines.

    Returns:
      float32 embeddings; zeros for a row without a real token.
    """
    x = self.encode(tokens, mask).astype(jnp.float32)
    if mask is None:
      mask = jnp.ones(tokens.shape, bool)
    weights = mask[..., None].astype(jnp.float32)
    total = jnp.maximum(weights.sum(axis=1), 1.0)
    mean = jnp.where(mask[..., None], x, 0.0).sum(axis=1) / total
    if not normalise:
      return mean
    length = jnp.linalg.norm(mean, axis=-1, keepdims=True)
    return mean / jnp.maximum(length, 1e-12)

  def unroll(self, params: Any) -> tuple["Bert", Any]:
    """The same model with its blocks one after another, and its parameters."""
    if not self.scan_layers:
      return self, params
    params = stacking.unstack(params, "blocks", self.num_hidden_layers)
    return self.clone(scan_layers=False), params

  def stack(self, params: Any) -> tuple["Bert", Any]:
    """The same model with its blocks scanned, and its parameters stacked."""
    if self.scan_layers:
      return self, params
    params = stacking.stack(params, "blocks", self.num_hidden_layers)
    return self.clone(scan_layers=True), params
