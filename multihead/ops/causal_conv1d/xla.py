"""Causal depthwise convolution as a sum of shifted products.

A compiler fuses the W products into one pass over x, and splits them over any
mesh axis without communication. The backward pass is written out: it recomputes
the sum before the activation, so that a call keeps x and no copies of it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from multihead.ops import manual_axes

# Elements [B, T, C] of a block of the backward pass that a CPU's cache holds.
_BLOCK_ELEMENTS_CPU = 2**16


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
  past = kernel.shape[0] - 1
  if initial_state is not None:
    initial_state = initial_state.astype(x.dtype)
  runs = _number_runs(segment_ids, past)
  x, kernel, bias, initial_state, runs = manual_axes.alike(
    x, kernel, bias, initial_state, runs
  )
  y = _convolve(activation, x, kernel, bias, initial_state, runs)
  if not return_final_state:
    return y
  return y, final_state(x, initial_state, segment_ids, past + 1)


def final_state(
  x: jax.Array,
  initial_state: jax.Array | None,
  segment_ids: jax.Array | None,
  width: int,
) -> jax.Array:
  """The last W - 1 inputs, zeros where of another segment than the last."""
  past = width - 1
  x, initial_state, segment_ids = manual_axes.alike(
    x, initial_state, segment_ids
  )
  last = slice(max(x.shape[1] - past, 0), None)
  x = x[:, last]
  length = x.shape[1]
  final = _with_past(x, initial_state, past)[:, length:]
  if segment_ids is not None:
    runs = _number_runs(segment_ids[:, last], past)
    same = runs[:, length:] == runs[:, -1:]
    final = jnp.where(same[..., None], final, 0)
  return final


def gradients(
  activation: str | None,
  x: jax.Array,
  kernel: jax.Array,
  bias: jax.Array | None,
  state: jax.Array | None,
  segment_ids: jax.Array | None,
  dy: jax.Array,
) -> tuple[jax.Array | None, ...]:
  """The gradients of x, kernel, bias and state for the gradient dy of y."""
  runs = _number_runs(segment_ids, kernel.shape[0] - 1)
  return _backward(activation, (x, kernel, bias, state, runs), dy)[:4]


def _number_runs(segment_ids, past):
  """Numbers the runs of equal ids, so that an id may come back later.

  The inputs before the first token belong to run 0.
  """
  if segment_ids is None:
    return None
  change = segment_ids[:, 1:] != segment_ids[:, :-1]
  runs = jnp.cumsum(jnp.pad(change, ((0, 0), (1, 0))), 1, dtype=jnp.int32)
  return jnp.pad(runs, ((0, 0), (past, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(activation, x, kernel, bias, state, runs):
  """y like x; runs [B, W - 1 + T] numbers the segments, state's included."""
  inputs = _with_past(x, state, kernel.shape[0] - 1)
  y = _sum(_taps(inputs, runs, kernel.shape[0]), kernel, bias)
  if activation == "silu":
    y = jax.nn.silu(y)
  return y.astype(x.dtype)


def _forward(activation, *args):
  return _convolve(activation, *args), args


def _backward(activation, args, dy):
  """Gradients, from the last block of tokens to the first.

  A block's inputs also reach `past` outputs of the block behind it, whose
  gradients the loop hands on.
  """
  x, kernel, bias, state, runs = args
  batch, length, channels = x.shape
  past = kernel.shape[0] - 1
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  blocks, size = _blocks(x, past)
  excess = blocks * size - length
  if excess:
    x, dy = (jnp.pad(v, ((0, 0), (0, excess), (0, 0))) for v in (x, dy))
  if runs is not None:
    # What stands at the end does not matter: its gradients are zeros.
    runs = jnp.pad(runs, ((0, 0), (0, excess + past)))

  def block(inputs, ids, dy, after, sums):
    """Gradient of a block's x, its first outputs' gradients, and sums.

    Args:
      inputs: [B, past + size, C].
      ids: [B, past + size + past], or None.
      dy: [B, size, C].
      after: [B, past, C], gradients of the outputs behind, before activation.
      sums: gradients of the kernel and bias from the blocks behind.
    """
    seen = None if ids is None else ids[:, : past + size]
    taps = _taps(inputs, seen, past + 1)
    d_sum = dy.astype(dtype)
    if activation == "silu":
      total = _sum(taps, kernel, bias)
      gate = jax.nn.sigmoid(total)
      d_sum *= gate * (1 + total * (1 - gate))
    now = [jnp.sum(d_sum * tap, axis=(0, 1)) for tap in taps]
    now.append(jnp.sum(d_sum, axis=(0, 1)))
    sums = [a + b for a, b in zip(sums, now, strict=True)]
    reached = jnp.concatenate([d_sum, after], axis=1)
    d_x = _reverse(reached, None if ids is None else ids[:, past:], kernel)
    return d_x.astype(x.dtype), reached[:, :past], sums

  after = manual_axes.zeros((batch, past, channels), dtype, x)
  sums = [manual_axes.zeros((channels,), dtype, x) for _ in range(past + 2)]
  if blocks == 1:
    inputs = _with_past(x, state, past)
    d_x, after, sums = block(inputs, runs, dy, after, sums)
  else:
    before = jnp.zeros((), x.dtype) if state is None else state

    def body(carry, i):
      d_x, after, sums = carry
      at = functools.partial(lax.dynamic_slice_in_dim, axis=1)
      start = i * size
      inputs = at(x, start, size)
      if past:
        earlier = at(x, jnp.maximum(start - past, 0), past)
        earlier = jnp.where(i > 0, earlier, before)
        inputs = jnp.concatenate([earlier, inputs], axis=1)
      ids = None if runs is None else at(runs, start, size + 2 * past)
      part, after, sums = block(inputs, ids, at(dy, start, size), after, sums)
      d_x = lax.dynamic_update_slice_in_dim(d_x, part, start, axis=1)
      return (d_x, after, sums), None

    d_x = manual_axes.zeros(x.shape, x.dtype, x)
    (d_x, after, sums), _ = lax.scan(
      body, (d_x, after, sums), jnp.arange(blocks), reverse=True
    )
  *d_kernel, d_bias = sums
  d_kernel = jnp.stack(d_kernel).astype(kernel.dtype)
  d_bias = None if bias is None else d_bias.astype(bias.dtype)
  d_state = None
  if state is not None:
    reached = jnp.concatenate([jnp.zeros_like(after), after], axis=1)
    ids = None if runs is None else runs[:, : 2 * past]
    d_state = _reverse(reached, ids, kernel).astype(x.dtype)
  return d_x[:, :length], d_kernel, d_bias, d_state, None


_convolve.defvjp(_forward, _backward)


def _blocks(x, past):
  """Number and size of the blocks of tokens of the backward pass."""
  batch, length, channels = x.shape
  if jax.default_backend() != "cpu":
    return 1, length
  blocks = math.ceil(batch * length * channels / _BLOCK_ELEMENTS_CPU)
  blocks = max(1, min(blocks, length // max(past, 32)))
  # A few more blocks of equal size need no padding.
  even = (n for n in range(blocks, 2 * blocks) if length % n == 0)
  blocks = next(even, blocks)
  return blocks, math.ceil(length / blocks)


def _with_past(x, state, past):
  if state is None:
    return jnp.pad(x, ((0, 0), (past, 0), (0, 0)))
  return jnp.concatenate([state, x], axis=1)


def _taps(inputs, runs, width):
  """[B, W - 1 + T, C] -> W times [B, T, C], in float32 at least."""
  dtype = jnp.promote_types(inputs.dtype, jnp.float32)
  length = inputs.shape[1] - width + 1
  taps = []
  for i in range(width):
    tap = inputs[:, i : i + length].astype(dtype)
    if runs is not None and i != width - 1:
      same = runs[:, i : i + length] == runs[:, width - 1 :]
      tap = jnp.where(same[..., None], tap, 0)
    taps.append(tap)
  return taps


def _sum(taps, kernel, bias):
  dtype = taps[0].dtype
  total = 0 if bias is None else bias.astype(dtype)
  for weight, tap in zip(kernel.astype(dtype), taps, strict=True):
    total += weight * tap
  return total


def _reverse(outputs, ids, kernel):
  """[B, T + W - 1, C] -> [B, T, C]: input t is tap i of output t + W - 1 - i.

  Here outputs and inputs count from the same token; ids [B, T + W - 1].
  """
  past = kernel.shape[0] - 1
  length = outputs.shape[1] - past
  total = 0
  for i in range(past + 1):
    at = slice(past - i, past - i + length)
    part = outputs[:, at]
    if ids is not None and i != past:
      same = ids[:, at] == ids[:, :length]
      part = jnp.where(same[..., None], part, 0)
    total += kernel[i].astype(part.dtype) * part
  return total
