"""The call that joins forward and backward, under `vmap` and derivatives."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from multihead.ops import manual_axes
from multihead.ops.attention import dropout, positions, reference
from multihead.ops.attention.mosaic_gpu import (
  backward,
  bias_gradient,
  blocks,
  forward,
  fused_backward,
  key_values,
  visibility,
)
from multihead.ops.attention.mosaic_gpu.limits import Limits
from multihead.ops.attention.row_terms import row_terms


class _Static(NamedTuple):
  """What is static in a call.

  All but the last are options of every kernel, by the same names.
  """

  scale: float
  softcap: float | None
  see: visibility.Visibility
  interpret: Any
  dropout: float
  deterministic: bool

  def full(self, limits: Limits | None) -> bool:
    """Whether every row sees every column."""
    return self.see.full and not (limits or Limits()).moving

  def options(self) -> dict[str, Any]:
    options = self._asdict()
    del options["deterministic"]
    return options


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  causal: bool,
  q_offset: int | jax.Array,
  scale: float,
  window: tuple[int | None, int | None],
  softcap: float | None,
  return_lse: bool,
  q_segment_ids: jax.Array | None = None,
  kv_segment_ids: jax.Array | None = None,
  kv_lengths: jax.Array | None = None,
  dropout_rate: float = 0.0,
  dropout_words: jax.Array | None = None,
  deterministic: bool = False,
  interpret: Any = None,
  **unused: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `multihead.ops.attention`; for arguments that `supports` accepts.

  `interpret` is None or `pallas_compat.interpreter()`, to run on a CPU.
  """
  del unused
  (B, T, N, _), S = q.shape, k.shape[1]
  left, right = positions.bounds(causal, window, q_offset, T, S)
  offsets = None
  if not isinstance(q_offset, int):
    offsets = q_offset if (left, right) != (None, None) else None
    q_offset = 0
  see = visibility.Visibility(T, S, left, right, q_offset)
  static = _Static(scale, softcap, see, interpret, dropout_rate, deterministic)
  hidden = None
  if mask is not None:
    # Only what is added has a gradient.
    dtype = q.dtype if bias is None else bias.dtype
    hidden = jnp.where(mask, 0.0 if bias is None else bias, -jnp.inf)
    hidden = hidden.astype(dtype)
    if bias is not None:
      bias, hidden = hidden, None
  limits = Limits(
    offsets,
    None if kv_lengths is None else jnp.clip(kv_lengths, 0, S),
    # Ids that differ by a multiple of 2**32 would count as equal.
    *(
      ids if ids is None else ids.astype(jnp.int32)
      for ids in (q_segment_ids, kv_segment_ids)
    ),
    bias=hidden,
    states=(
      dropout.all_row_states(dropout_words, B, N, T) if dropout_rate else None
    ),
  )
  q, k, v, bias, *limits = manual_axes.alike(q, k, v, bias, *limits)
  limits = None if all(x is None for x in limits) else Limits(*limits)
  out, lse = _attention(static, q, k, v, bias, limits)
  return (out, lse) if return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
  static: _Static,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array | None,
  limits: Limits | None,
) -> tuple[jax.Array, jax.Array]:
  """Output [B, T, N, Hv] and lse [B, N, T]."""
  config = blocks.forward(q.shape[3], v.shape[3], static.full(limits))
  limits = _with_bias(limits, bias)
  if limits is not None and limits.bias is not None:
    config = blocks.biased(config)
  return _mappable(
    functools.partial(forward.attend, config=config, **static.options())
  )(q, k, v, limits)


def _with_bias(limits: Limits | None, bias: jax.Array | None) -> Limits | None:
  if bias is None:
    return limits
  return (limits or Limits())._replace(bias=bias)


def _forward(static: _Static, *arrays: Any) -> tuple[Any, Any]:
  out, lse = _attention(static, *arrays)
  # So that a rematerialisation policy can keep these two by name.
  out = checkpoint_name(out, "attention_out")
  lse = checkpoint_name(lse, "attention_lse")
  return (out, lse), (arrays, out, lse)


def _backward(
  static: _Static, residuals: Any, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
  arrays, out, lse = residuals
  return *_gradients(static, *arrays, out, lse, *cotangents), None


_attention.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(
  static: _Static,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array | None,
  limits: Limits | None,
  out: jax.Array,
  lse: jax.Array,
  d_out: jax.Array,
  d_lse: jax.Array,
) -> tuple[jax.Array | None, ...]:
  """The gradients of q, k, v and bias."""
  terms = row_terms(out, lse, d_out, d_lse)
  sizes = q.shape[3], v.shape[3], static.full(limits)
  limits = _with_bias(limits, bias)
  arrays = q, k, v, d_out, *terms, limits

  def launch(kernel, **options):
    options |= static.options()
    return _mappable(functools.partial(kernel, **options))(*arrays)

  if limits is None and not static.deterministic:
    choice = fused_backward.choose(q, k, v, static.see, static.softcap)
    if choice is not None:
      options = static.options() | {"config": choice}
      del options["dropout"]
      one = functools.partial(fused_backward.gradients, **options)
      return *_mappable(one)(*arrays[:-1]), None

  configs = blocks.queries(*sizes), blocks.keys(*sizes)
  if limits is not None and limits.bias is not None:
    configs = tuple(map(blocks.biased, configs))
  d_q = launch(backward.query_gradient, config=configs[0])
  d_kv = launch(key_values.key_value_gradients, config=configs[1])
  d_bias = None if bias is None else launch(bias_gradient.bias_gradient)
  return d_q, *d_kv, d_bias


def _gradients_forward(static: _Static, *args: jax.Array) -> tuple[Any, Any]:
  return _gradients(static, *args), args


def _gradients_backward(
  static: _Static, args: tuple[Any, ...], cotangents: Any
) -> tuple[jax.Array | None, ...]:
  """Second derivatives, which are rare, are those of the definition."""
  q, k, v, bias, limits, out, lse, d_out, d_lse = args
  if static.dropout:
    raise NotImplementedError(
      "mosaic_gpu has no second derivatives with dropout; name "
      "implementation='reference'"
    )

  def gradients(q, k, v, bias, d_out, d_lse):
    # The output is a function of the first four, so nothing is lost.
    plain = functools.partial(_plain, static, limits or Limits())
    return jax.vjp(plain, q, k, v, bias)[1]((d_out, d_lse))

  seconds = jax.vjp(gradients, q, k, v, bias, d_out, d_lse)[1](cotangents)
  zeros = jnp.zeros_like(out), jnp.zeros_like(lse)
  return *seconds[:4], None, *zeros, *seconds[4:]


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _plain(
  static: _Static,
  limits: Limits,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """The same attention as array arithmetic, all logits at once."""
  return reference.run(
    q,
    k,
    v,
    bias=limits.bias if bias is None else bias,
    mask=None,
    causal=False,
    q_offset=static.see.offset if limits.offsets is None else limits.offsets,
    scale=static.scale,
    window=(static.see.left, static.see.right),
    softcap=static.softcap,
    q_segment_ids=limits.row_ids,
    kv_segment_ids=limits.column_ids,
    kv_lengths=limits.lengths,
    return_lse=True,
  )


def _mappable(launch: Callable[..., Any]) -> Callable[..., Any]:
  """`launch`, whose arrays [A, B, ...] under `vmap` become [A B, ...]."""
  mappable = jax.custom_batching.custom_vmap(launch)

  @mappable.def_vmap
  def rule(size, mapped, *arrays):
    def flat(array, is_mapped):
      if not is_mapped:
        array = jnp.broadcast_to(array, (size, *array.shape))
      return array.reshape(-1, *array.shape[2:])

    out = mappable(*jax.tree.map(flat, arrays, tuple(mapped)))
    out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
    return out, jax.tree.map(lambda _: True, out)

  return mappable
