"""Attention as its definition reads: every logit at once, [B, N, T, S].

What the other implementations are measured against, and the one that can be
differentiated in every mode. Computes in float32 (float64 for float64 inputs)
whatever the dtype of the inputs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from multihead.ops.attention import dropout


def supports(args: dict[str, Any]) -> str | None:
  """Always None: everything, everywhere, as far as memory goes."""
  del args
  return None


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  bias: jax.Array | None,
  mask: jax.Array | None,
  causal: bool,
  q_offset: int | jax.Array,
  scale: float,
  window: tuple[int | None, int | None],
  softcap: float | None,
  q_segment_ids: jax.Array | None,
  kv_segment_ids: jax.Array | None,
  kv_lengths: jax.Array | None = None,
  dropout_rate: float = 0.0,
  dropout_words: jax.Array | None = None,
  deterministic: bool = False,
  return_lse: bool,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `multihead.ops.attention`; arguments are checked there."""
  del deterministic  # It always is.
  dtype, out_dtype = jnp.promote_types(q.dtype, jnp.float32), q.dtype
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  group = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
  keep = _visible(
    q.shape,
    k.shape[1],
    mask,
    causal,
    q_offset,
    window,
    q_segment_ids,
    kv_segment_ids,
    kv_lengths,
  )

  # A NaN or Inf must hurt what sees it and nothing else, but 0 * NaN is NaN:
  # take it out of the products and mark the logits that it touches.
  bad_q, bad_k, bad_v = (~jnp.isfinite(x).all(axis=-1) for x in (q, k, v))
  q, k, v = (jnp.where(jnp.isfinite(x), x, 0) for x in (q, k, v))
  bad = bad_q[:, :, None] | (bad_k | bad_v)[:, None]
  bad = jnp.moveaxis(bad, 3, 1)

  precision = jax.lax.Precision.HIGHEST
  logits = jnp.einsum("btnh,bsnh->bnts", q, k, precision=precision) * scale
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  if bias is not None:
    logits = logits + bias.astype(dtype)
  logits = jnp.where(bad, jnp.nan, logits)
  logits = jnp.where(keep, logits, -jnp.inf)

  top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  top = jnp.where(top == -jnp.inf, 0, top)
  p = jnp.exp(logits - top)
  total = jnp.sum(p, axis=-1, keepdims=True)
  # An empty row has only zeros in p: any divisor but zero serves.
  empty = total == 0
  total = jnp.where(empty, 1, total)
  # In a row that sees a NaN also the weights of what it does not see are NaN.
  p = jnp.where(keep, p / total, 0)
  if dropout_words is not None:
    B, N, T, S = p.shape
    states = dropout.all_row_states(dropout_words, B, N, T)[..., None]
    columns = jnp.arange(S, dtype=jnp.uint32)
    p = p * dropout.factors(dropout_rate, states, columns, dtype)
  out = jnp.einsum("bnts,bsnh->btnh", p, v, precision=precision)
  # No news for the values, but it stops a NaN in an empty row's cotangent.
  out = jnp.where(jnp.moveaxis(empty, 1, 2), 0, out).astype(out_dtype)
  if not return_lse:
    return out
  lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
  return out, lse[..., 0]


def _visible(
  q_shape: tuple[int, ...],
  S: int,
  mask: jax.Array | None,
  causal: bool,
  q_offset: int | jax.Array,
  window: tuple[int | None, int | None],
  q_segment_ids: jax.Array | None,
  kv_segment_ids: jax.Array | None,
  kv_lengths: jax.Array | None,
) -> jax.Array:
  """[B, N, T, S] bool: whether row i may attend to key j."""
  B, T, N, _ = q_shape
  offset = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,))
  position = (jnp.arange(T) + offset[:, None])[:, None, :, None]
  key = jnp.arange(S)
  left, right = window
  keep = jnp.ones((B, N, T, S), bool)
  if causal:
    keep &= key <= position
  if left is not None:
    keep &= key >= position - left
  if right is not None:
    keep &= key <= position + right
  if mask is not None:
    keep &= mask
  if q_segment_ids is not None:
    same = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
    keep &= same[:, None]
  if kv_lengths is not None:
    keep &= key < kv_lengths[:, None, None, None]
  return keep
