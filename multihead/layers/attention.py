"""Self-attention: causal with rotary positions and a cache; bidirectional."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from multihead.layers.linear import Initializer, Linear
from multihead.layers.rope import apply_rope
from multihead.parallel import sharded_ops


class SelfAttention(nn.Module):
  """Causal softmax attention, N query heads over K key heads of width H.

  Attributes:
    num_heads: N.
    num_key_value_heads: K; query head n reads key head n // (N // K).
    head_dim: H; N * H need not equal the model width.
    rope_theta: base of the rotary frequencies.
    key_multiplier: a fixed factor on the keys, before the rotation.
    use_bias: biases on all four projections.
    window: (left, right) keys that a query sees, see `ops.attention`.
    dtype: of the arithmetic; softmax is in float32.
    param_dtype: of the parameters.
    kernel_init: initialiser of the kernels.
    implementation: of `ops.attention`.
  """

  num_heads: int
  num_key_value_heads: int
  head_dim: int
  rope_theta: float = 10000.0
  key_multiplier: float = 1.0
  use_bias: bool = False
  window: tuple[int | None, int | None] | None = None
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  kernel_init: Initializer = nn.initializers.normal(0.02)
  implementation: Any = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    *,
    mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: dict[str, Array] | None = None,
    index: Int[Array, ""] | None = None,
    valid: Bool[Array, "B S"] | None = None,
    prefill: bool = False,
  ) -> tuple[Float[Array, "B T D"], dict[str, Array] | None]:
    """Attends to x, or to the cache with x appended.

    Args:
      x: inputs.
      positions: for the rotation.
      mask: True for real tokens; the others are not attended to.
      segment_ids: tokens attend within their segment.
      cache: {"k", "v"} of shape [B, S, K * H]: keys after the multiplier and
        the rotation.
      index: the slot that the first of the T tokens takes.
      valid: slots that hold real tokens, the new ones included.
      prefill: promises that the cache is empty, so that only x is read.

    Returns:
      The output, and the cache with the new keys and values.
    """

    def project(heads: int, axis: str, name: str) -> Linear:
      return Linear(
        (heads, self.head_dim),
        ("embed", axis, "head_dim"),
        use_bias=self.use_bias,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        kernel_init=self.kernel_init,
        name=name,
      )

    q = project(self.num_heads, "heads", "query")(x)
    k = project(self.num_key_value_heads, "kv_heads", "key")(x)
    v = project(self.num_key_value_heads, "kv_heads", "value")(x)
    q = apply_rope(q, positions, theta=self.rope_theta)
    k = apply_rope(k * self.key_multiplier, positions, theta=self.rope_theta)
    options = dict(
      causal=True, window=self.window, implementation=self.implementation
    )
    if cache is not None:
      # Heads and their width are one axis of the cache, as products with all
      # heads at once read it: between the update and such a product, a reshape
      # makes XLA copy the whole cache in every step.
      cache = {
        name: lax.dynamic_update_slice_in_dim(
          cache[name],
          new.reshape(*new.shape[:2], -1).astype(cache[name].dtype),
          index,
          axis=1,
        )
        for name, new in (("k", k), ("v", v))
      }
    if cache is None or prefill:
      y = sharded_ops.attention(
        q,
        k,
        v,
        mask=None if mask is None else mask[:, None, None, :],
        q_segment_ids=segment_ids,
        kv_segment_ids=segment_ids,
        **options,
      )
    else:
      y = sharded_ops.attention(
        q,
        *(
          cache[name].reshape(*valid.shape, *k.shape[2:]).astype(q.dtype)
          for name in ("k", "v")
        ),
        mask=valid[:, None, None, :],
        q_offset=index,
        **options,
      )
    y = Linear(
      x.shape[-1:],
      ("heads", "head_dim", "embed"),
      inputs=2,
      use_bias=self.use_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=self.kernel_init,
      name="out",
    )(y)
    return y, cache


class MultiHeadAttention(nn.Module):
  """Bidirectional softmax attention, N heads of width H, without positions.

  What the heads put out, before the output projection mixes them, is sown as
  `heads` [B, T, N, H].

  Attributes:
    num_heads: N.
    head_dim: H.
    qkv_bias: biases on the projections to queries, keys and values.
    out_bias: a bias on the output projection.
    dropout: rate of dropout on the attention weights. While it acts, the
      weights [B, N, T, T] are held; `ops.attention` runs otherwise.
    dtype: of the arithmetic; softmax is in float32.
    param_dtype: of the parameters.
    kernel_init: initialiser of the kernels.
    implementation: of `ops.attention`.
  """

  num_heads: int
  head_dim: int
  qkv_bias: bool = True
  out_bias: bool = True
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  kernel_init: Initializer = nn.initializers.normal(0.02)
  implementation: Any = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    mask: Bool[Array, "B T"] | None = None,
    deterministic: bool = True,
  ) -> Float[Array, "B T D"]:
    """Attends from every token to all real ones.

    Args:
      x: inputs.
      mask: True for real tokens; the others are not attended to.
      deterministic: no dropout.
    """
    types = dict(
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=self.kernel_init,
    )

    def project(axis: str, name: str) -> Array:
      return Linear(
        (self.num_heads, self.head_dim),
        ("embed", axis, "head_dim"),
        use_bias=self.qkv_bias,
        name=name,
        **types,
      )(x)

    q = project("heads", "query")
    k, v = project("kv_heads", "key"), project("kv_heads", "value")
    visible = None if mask is None else mask[:, None, None, :]
    if self.dropout and not deterministic:
      y = self._dropped(q, k, v, visible)
    else:
      y = sharded_ops.attention(
        q, k, v, mask=visible, implementation=self.implementation
      )
    self.sow("intermediates", "heads", y)
    return Linear(
      x.shape[-1:],
      ("heads", "head_dim", "embed"),
      inputs=2,
      use_bias=self.out_bias,
      name="out",
      **types,
    )(y)

  def _dropped(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Attention by its formula, with dropout between softmax and product."""
    logits = jnp.einsum(
      "bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32
    )
    logits = logits * self.head_dim**-0.5
    if mask is not None:
      logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    weights = jax.nn.softmax(logits)
    if mask is not None:  # a row without a real token: zeros, as in the op
      weights = jnp.where(mask, weights, 0)
    weights = nn.Dropout(self.dropout, deterministic=False)(weights)
    return jnp.einsum("bnqk,bknh->bqnh", weights.astype(v.dtype), v)
