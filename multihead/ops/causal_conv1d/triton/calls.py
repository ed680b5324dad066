"""Launches the kernels, and says what a derivative or `vmap` of one is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from multihead.ops import manual_axes, triton_compat
from multihead.ops.causal_conv1d import xla


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How a kernel is cut into programs; see `kernels`.

  Attributes:
    rows: runs of tokens of a program.
    span: tokens of a run, at least W - 1.
    ahead: tokens loaded together, a divisor of `span`.
    columns: channels of a program, a power of two.
    warps: groups of 32 threads of a program.
  """

  rows: int = 1
  span: int = 32
  ahead: int = 8
  columns: int = 128
  warps: int = 1


FORWARD = Blocks()
BACKWARD = Blocks(ahead=4)


@dataclasses.dataclass(frozen=True)
class _Options:
  silu: bool
  forward: Blocks
  backward: Blocks


def run(
  x: jax.Array,
  kernel: jax.Array,
  bias: jax.Array | None,
  *,
  activation: str | None,
  initial_state: jax.Array | None,
  segment_ids: jax.Array | None,
  return_final_state: bool,
  forward: Blocks | None = None,
  backward: Blocks | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `multihead.ops.causal_conv1d`, for what `supports` accepts."""
  if initial_state is not None:
    initial_state = initial_state.astype(x.dtype)
  kernel, bias = (_narrow(v) for v in (kernel, bias))
  # With one tap the state has no elements, and nothing may point at it.
  seen = initial_state if kernel.shape[0] > 1 else None
  arrays = manual_axes.alike(x, kernel, bias, seen, segment_ids)
  options = _Options(
    activation == "silu", forward or FORWARD, backward or BACKWARD
  )
  y = _convolve(options, *arrays)
  if not return_final_state:
    return y
  return y, xla.final_state(x, initial_state, segment_ids, kernel.shape[0])


def _narrow(array: jax.Array | None) -> jax.Array | None:
  """Parameters of another dtype than the kernels read."""
  if array is None or array.dtype.itemsize in (2, 4):
    return array
  return array.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(options, x, kernel, bias, state, ids):
  return triton_compat.mappable(functools.partial(_launch_forward, options))(
    (x, state, ids), (kernel, bias)
  )


def _convolve_forward(options, *args):
  return _convolve(options, *args), args


def _convolve_backward(options, args, dy):
  return (*_gradients(options, *args, dy), None)


_convolve.defvjp(_convolve_forward, _convolve_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(options, x, kernel, bias, state, ids, dy):
  """The gradients of x, kernel, bias and state."""
  dx, d_state, sums = triton_compat.mappable(
    functools.partial(_launch_backward, options)
  )((x, state, ids, dy), (kernel, bias))
  sums = jnp.sum(sums, axis=(0, 1))
  return (
    dx,
    sums[:-1].astype(kernel.dtype),
    None if bias is None else sums[-1].astype(bias.dtype),
    d_state,
  )


def _gradients_forward(options, *args):
  return _gradients(options, *args), args


def _gradients_backward(options, args, cotangents):
  """Second derivatives, which are rare, are those of the XLA form."""
  *args, ids, dy = args
  activation = "silu" if options.silu else None

  def gradients(x, kernel, bias, state, dy):
    return xla.gradients(activation, x, kernel, bias, state, ids, dy)

  *seconds, d_dy = jax.vjp(gradients, *args, dy)[1](cotangents)
  return (*seconds, None, d_dy)


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _launch_forward(options, arrays, parameters):
  from multihead.ops.causal_conv1d.triton import kernels

  x, state, ids = arrays
  kernel, bias = parameters
  (y,) = triton_compat.call(
    kernels.forward,
    *_operands(x, kernel, bias, state, ids),
    out=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    **_constants(options, options.forward, x, kernel, bias, state, ids),
  )
  return y


def _launch_backward(options, arrays, parameters):
  """dx, d_state or None, and sums [B, pieces, W + 1, C]."""
  from multihead.ops.causal_conv1d.triton import kernels

  x, state, ids, dy = arrays
  kernel, bias = parameters
  batch, length, channels = x.shape
  blocks = options.backward
  pieces = -(-length // (blocks.rows * blocks.span))
  struct = jax.ShapeDtypeStruct
  dx, d_state, sums = triton_compat.call(
    kernels.backward,
    *_operands(x, kernel, bias, state, ids),
    dy,
    out=[
      struct(x.shape, x.dtype),
      struct((1,) if state is None else state.shape, x.dtype),
      struct((batch, pieces, kernel.shape[0] + 1, channels), jnp.float32),
    ],
    **_constants(options, blocks, x, kernel, bias, state, ids),
  )
  return dx, None if state is None else d_state, sums


def _operands(x, kernel, bias, state, ids):
  """The kernels' first arguments; x stands for what is not there."""
  return tuple(x if v is None else v for v in (x, kernel, bias, state, ids))


def _constants(options, blocks, x, kernel, bias, state, ids):
  batch, length, channels = x.shape
  columns = blocks.columns
  pieces = -(-length // (blocks.rows * blocks.span))
  return dict(
    grid=(-(-channels // columns) * pieces * batch,),
    num_warps=blocks.warps,
    num_stages=1,
    length=length,
    channels=channels,
    width=kernel.shape[0],
    silu=options.silu,
    has_bias=bias is not None,
    has_state=state is not None,
    has_ids=ids is not None,
    rows=blocks.rows,
    span=blocks.span,
    ahead=blocks.ahead,
    columns=columns,
  )
