"""The call that joins forward and backward, under `vmap` and derivatives."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from multihead.ops import manual_axes
from multihead.ops.attention import positions, reference
from multihead.ops.attention.mosaic_gpu import (
  backward,
  blocks,
  forward,
  visibility,
)


class _Static(NamedTuple):
  """What is static in a call; the names are those of the kernels' options."""

  scale: float
  softcap: float | None
  see: visibility.Visibility
  interpret: Any


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  causal: bool,
  q_offset: int,
  scale: float,
  window: tuple[int | None, int | None],
  softcap: float | None,
  return_lse: bool,
  interpret: Any = None,
  **unused: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `multihead.ops.attention`; for arguments that `supports` accepts.

  `interpret` is None or `pallas_compat.interpreter()`, to run on a CPU.
  """
  del unused
  T, S = q.shape[1], k.shape[1]
  left, right = positions.bounds(causal, window, q_offset, T, S)
  see = visibility.Visibility(T, S, left, right, q_offset)
  static = _Static(scale, softcap, see, interpret)
  out, lse = _attention(static, *manual_axes.alike(q, k, v))
  return (out, lse) if return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
  static: _Static, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Output [B, T, N, Hv] and lse [B, N, T]."""
  config = blocks.forward(q.shape[3], v.shape[3], static.see.full)
  return _mappable(
    functools.partial(forward.attend, config=config, **static._asdict())
  )(q, k, v)


def _forward(static: _Static, *arrays: jax.Array) -> tuple[Any, Any]:
  out, lse = _attention(static, *arrays)
  # So that a rematerialisation policy can keep these two by name.
  out = checkpoint_name(out, "attention_out")
  lse = checkpoint_name(lse, "attention_lse")
  return (out, lse), (arrays, out, lse)


def _backward(
  static: _Static, residuals: Any, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, ...]:
  arrays, out, lse = residuals
  return _gradients(static, *arrays, out, lse, *cotangents)


_attention.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(
  static: _Static,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  out: jax.Array,
  lse: jax.Array,
  d_out: jax.Array,
  d_lse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The gradients of q, k and v."""
  arrays = q, k, v, d_out, *backward.row_terms(out, lse, d_out, d_lse)
  sizes = q.shape[3], v.shape[3], static.see.full

  def launch(kernel, config):
    options = dict(config=config, **static._asdict())
    return _mappable(functools.partial(kernel, **options))(*arrays)

  d_q = launch(backward.query_gradient, blocks.queries(*sizes))
  return d_q, *launch(backward.key_value_gradients, blocks.keys(*sizes))


def _gradients_forward(static: _Static, *args: jax.Array) -> tuple[Any, Any]:
  return _gradients(static, *args), args


def _gradients_backward(
  static: _Static, args: tuple[jax.Array, ...], cotangents: Any
) -> tuple[jax.Array, ...]:
  """Second derivatives, which are rare, are those of the definition."""
  q, k, v, out, lse, d_out, d_lse = args

  def gradients(q, k, v, d_out, d_lse):
    # The output is a function of q, k and v, so nothing is lost.
    plain = functools.partial(_plain, static)
    return jax.vjp(plain, q, k, v)[1]((d_out, d_lse))

  seconds = jax.vjp(gradients, q, k, v, d_out, d_lse)[1](cotangents)
  return *seconds[:3], jnp.zeros_like(out), jnp.zeros_like(lse), *seconds[3:]


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _plain(
  static: _Static, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The same attention as array arithmetic, all logits at once."""
  return reference.run(
    q,
    k,
    v,
    bias=None,
    mask=None,
    causal=False,
    q_offset=static.see.offset,
    scale=static.scale,
    window=(static.see.left, static.see.right),
    softcap=static.softcap,
    q_segment_ids=None,
    kv_segment_ids=None,
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

    out = mappable(*map(flat, arrays, mapped))
    out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
    return out, jax.tree.map(lambda _: True, out)

  return mappable
