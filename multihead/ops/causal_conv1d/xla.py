"""Causal depthwise convolution as a sum of shifted products.

A compiler fuses the W products into one pass over x, and splits them over any
mesh axis without communication. The backward pass is written out: it recomputes
the sum before the activation, so that a call keeps x and no copies of it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from multihead.ops import manual_axes


def supports(args: dict[str, Any]) -> str | None:
  """Returns None: plain array arithmetic serves every call on every device."""
  del args
  return None


def run(
  x: jax.Array,
  kernel: jax.Array,
  bias: jax.Array | None,
  *,
  activation: str | None,
  initial_state: jax.Array | None,
  segment_ids: jax.Array | None,
  return_final_state: bool,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `multihead.ops.causal_conv1d`."""
  length, past = x.shape[1], kernel.shape[0] - 1
  if initial_state is not None:
    initial_state = initial_state.astype(x.dtype)
  runs = None
  if segment_ids is not None:
    # Numbers the runs of equal ids, so that an id may come back later. The
    # inputs before the first token belong to run 0.
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    runs = jnp.cumsum(jnp.pad(change, ((0, 0), (1, 0))), 1, dtype=jnp.int32)
    runs = jnp.pad(runs, ((0, 0), (past, 0)))
  x, kernel, bias, initial_state, runs = manual_axes.alike(
    x, kernel, bias, initial_state, runs
  )
  y = _convolve(activation, x, kernel, bias, initial_state, runs)
  if not return_final_state:
    return y
  final = _with_past(x, initial_state, past)[:, length:]
  if runs is not None:
    same = runs[:, length:] == runs[:, -1:]
    final = jnp.where(same[..., None], final, 0)
  return y, final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(activation, x, kernel, bias, state, runs):
  """y like x; runs [B, W - 1 + T] numbers the segments, state's included."""
  y, _ = _sum(x, kernel, bias, state, runs)
  if activation == "silu":
    y = jax.nn.silu(y)
  return y.astype(x.dtype)


def _forward(activation, *args):
  return _convolve(activation, *args), args


def _backward(activation, args, dy):
  x, kernel, bias, state, runs = args
  length, past = x.shape[1], kernel.shape[0] - 1
  total, taps = _sum(*args)
  d_sum = dy.astype(total.dtype)
  if activation == "silu":
    gate = jax.nn.sigmoid(total)
    d_sum *= gate * (1 + total * (1 - gate))
  d_kernel = jnp.stack([jnp.sum(d_sum * tap, axis=(0, 1)) for tap in taps])
  d_bias = None
  if bias is not None:
    d_bias = jnp.sum(d_sum, axis=(0, 1)).astype(bias.dtype)

  # Input j of [state, x] is tap i of output j - i.
  padded = jnp.pad(d_sum, ((0, 0), (past, past), (0, 0)))
  outputs = None
  if runs is not None:
    outputs = jnp.pad(runs, ((0, 0), (0, past)), constant_values=-1)

  def d_inputs(start, size):
    total = 0
    for i in range(past + 1):
      at = slice(start + past - i, start + past - i + size)
      part = padded[:, at]
      if runs is not None and i != past:
        same = outputs[:, at] == runs[:, start : start + size]
        part = jnp.where(same[..., None], part, 0)
      total += kernel[i].astype(part.dtype) * part
    return total.astype(x.dtype)

  d_state = None if state is None else d_inputs(0, past)
  d_x = d_inputs(past, length)
  return d_x, d_kernel.astype(kernel.dtype), d_bias, d_state, None


_convolve.defvjp(_forward, _backward)


def _with_past(x, state, past):
  if state is None:
    return jnp.pad(x, ((0, 0), (past, 0), (0, 0)))
  return jnp.concatenate([state, x], axis=1)


def _sum(x, kernel, bias, state, runs):
  """The sum before the activation, and its W taps, in float32 at least."""
  length, past = x.shape[1], kernel.shape[0] - 1
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  inputs = _with_past(x, state, past)
  taps = []
  for i in range(past + 1):
    tap = inputs[:, i : i + length].astype(dtype)
    if runs is not None and i != past:
      same = runs[:, i : i + length] == runs[:, past:]
      tap = jnp.where(same[..., None], tap, 0)
    taps.append(tap)
  total = 0 if bias is None else bias.astype(dtype)
  for weight, tap in zip(kernel.astype(dtype), taps):
    total += weight * tap
  return total, taps
