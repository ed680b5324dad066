"""From the arrays of a call to launches of the kernels, and derivatives."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from multihead.ops import manual_axes
from multihead.ops.attention import positions, reference
from multihead.ops.attention.row_terms import row_terms
from multihead.ops.attention.triton import blocks as blocks_lib
from multihead.ops.attention.triton import launches, mapping


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
  kv_lengths: jax.Array | None,
  dropout_rate: float,
  dropout_words: jax.Array | None,
  return_lse: bool,
  blocks: blocks_lib.Blocks | None = None,
  **unused: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `multihead.ops.attention`; for arguments that `supports` accepts."""
  del unused  # Every call is deterministic.
  T, S = q.shape[1], k.shape[1]
  left, right = positions.bounds(causal, window, q_offset, T, S)
  if left is None and right is None:
    q_offset = 0  # Nothing depends on it.
  fixed = isinstance(q_offset, int)
  static = launches.Static(
    scale=scale,
    softcap=softcap,
    left=left,
    right=right,
    offset=q_offset if fixed else None,
    dropout_rate=dropout_rate,
    blocks=blocks
    or blocks_lib.choose(
      *(T, S, (q.shape[3], v.shape[3]), q.dtype.itemsize),
      more=sum(x.dtype.itemsize for x in (bias, mask) if x is not None),
    ),
  )
  items = None
  if dropout_words is not None:
    items = jnp.arange(q.shape[0], dtype=jnp.int32)
  arrays = launches.Arrays(
    bias=bias,
    mask=mask,
    offset=None if fixed else q_offset,
    lengths=None if kv_lengths is None else jnp.clip(kv_lengths, 0, S),
    q_ids=q_segment_ids,
    kv_ids=kv_segment_ids,
    items=items,
    words=dropout_words,
  )
  q, k, v, *arrays = manual_axes.alike(q, k, v, *arrays)
  out, lse = _attention(static, q, k, v, *arrays)
  return (out, lse) if return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
  static: launches.Static,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *arrays: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Output [B, T, N, Hv] and lse [B, N, T]; the rest is a `launches.Arrays`."""
  launch = functools.partial(launches.forward, static)
  return mapping.mappable(launch)((q, k, v), launches.Arrays(*arrays))


def _forward(
  static: launches.Static, *arrays: jax.Array | None
) -> tuple[Any, Any]:
  out, lse = _attention(static, *arrays)
  # So that a rematerialisation policy can keep these two by name.
  out = checkpoint_name(out, "attention_out")
  lse = checkpoint_name(lse, "attention_lse")
  return (out, lse), (arrays, out, lse)


def _backward(
  static: launches.Static,
  residuals: Any,
  cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
  arrays, out, lse = residuals
  gradients = _gradients(static, *arrays, out, lse, *cotangents)
  return *gradients, *(None for _ in arrays[4:])


_attention.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(
  static: launches.Static, *args: jax.Array | None
) -> tuple[jax.Array | None, ...]:
  """The gradients of q, k, v and bias."""
  q, k, v, *arrays, out, lse, d_out, d_lse = args
  arrays = launches.Arrays(*arrays)
  own = q, k, v, *row_terms(out, lse, d_out, d_lse), d_out
  launch = functools.partial(launches.gradients, static)
  d_q, d_k, d_v = mapping.mappable(launch)(own, arrays)
  d_bias = None
  if arrays.bias is not None:
    # A launch of its own, which the compiler drops if nobody asks for it.
    launch = functools.partial(launches.bias_gradient, static)
    d_bias = jax.custom_batching.sequential_vmap(launch)(own, arrays)
  return d_q, d_k, d_v, d_bias


def _gradients_forward(static: launches.Static, *args: Any) -> tuple[Any, Any]:
  return _gradients(static, *args), args


def _gradients_backward(
  static: launches.Static, args: tuple[Any, ...], cotangents: Any
) -> tuple[Any, ...]:
  """Second derivatives, which are rare, are those of the definition."""
  q, k, v, bias, *rest, out, lse, d_out, d_lse = args
  plain = functools.partial(_plain, static, rest)

  def gradients(q, k, v, bias, d_out, d_lse):
    # The output is a function of the others, so nothing is lost.
    return jax.vjp(plain, q, k, v, bias)[1]((d_out, d_lse))

  seconds = jax.vjp(gradients, q, k, v, bias, d_out, d_lse)[1](cotangents)
  return (
    *seconds[:4],
    *(None for _ in rest),
    *(jnp.zeros_like(out), jnp.zeros_like(lse)),
    *seconds[4:],
  )


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _plain(
  static: launches.Static,
  rest: list[jax.Array | None],
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """The same attention as array arithmetic, all logits at once."""
  arrays = launches.Arrays(bias, *rest)
  return reference.run(
    q,
    k,
    v,
    bias=bias,
    mask=arrays.mask,
    causal=False,
    q_offset=arrays.offset if static.offset is None else static.offset,
    scale=static.scale,
    window=(static.left, static.right),
    softcap=static.softcap,
    q_segment_ids=arrays.q_ids,
    kv_segment_ids=arrays.kv_ids,
    kv_lengths=arrays.lengths,
    dropout_rate=static.dropout_rate,
    dropout_words=arrays.words,
    deterministic=True,
    return_lse=True,
  )
