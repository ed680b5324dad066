"""From arrays as users have them to calls of the kernels, and derivatives.

Where the channels of all rows are too few to fill the device, T is cut into
parts that run side by side, each twice: once for where it would end from zero
(`forward.ends`), and, with the true first states from those, once for real.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from multihead.ops import manual_axes, pallas_compat
from multihead.ops.selective_scan import reference, xla
from multihead.ops.selective_scan.mosaic_gpu import (
  backward,
  chunks,
  forward,
  tile,
)

# A part shorter than this is not worth its second run.
_SHORTEST_PART = 256


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a scan runs; None for what the shapes decide.

  Attributes:
    chunk: tokens that a program loads at a time.
    parts: parts of T that run side by side.
    gradient_chunk: `chunk` where a gradient is taken, for both passes: states
      are kept at this distance.
    gradient_parts: `parts` there.
    unroll: steps that are written out one after another.
    exchange: whether sums over states are taken of four steps at once, which
      costs fewer instructions, or of each, which takes less time to the result.
    interpret: what interprets the kernels on a CPU, or None.
  """

  chunk: int | None = None
  parts: int | None = None
  gradient_chunk: int | None = None
  gradient_parts: int | None = None
  unroll: int | None = None
  exchange: bool | None = None
  interpret: Any = None

  def fill(self, batch, length, channels, size, dtype) -> "Plan":
    """The plan for these shapes."""
    small = size <= 16
    narrow = jnp.dtype(dtype).itemsize == 2
    programs = batch * channels // tile.CHANNELS
    cores = pallas_compat.cores()
    most = max(1, min(3 * cores // programs, length // _SHORTEST_PART))
    decided = Plan(
      chunk=64 if small else 32,
      # Half of the cores idle cost less than the exponentials of a second run.
      parts=most if programs < cores / 2 else 1,
      gradient_chunk=32 if small and narrow else 16,
      gradient_parts=most if programs < 0.75 * cores else 1,
      unroll=8 if small else tile.STEPS,
      # With one program a core nothing hides the latency of a step.
      exchange=programs > cores,
    )
    given = {k: v for k, v in vars(self).items() if v is not None}
    return dataclasses.replace(decided, **given)


def run(
  u: jax.Array,
  delta: jax.Array,
  A: jax.Array,
  B: jax.Array,
  C: jax.Array,
  D: jax.Array | None,
  z: jax.Array | None,
  delta_bias: jax.Array | None,
  initial_state: jax.Array | None,
  segment_ids: jax.Array | None,
  *,
  delta_softplus: bool,
  reverse: bool,
  return_final_state: bool,
  plan: Plan | None = None,
) -> tuple[jax.Array, jax.Array]:
  """See `multihead.ops.selective_scan`; returns y and the final state."""
  del return_final_state
  batch, length, channels = u.shape
  groups, size = B.shape[2:]
  f32 = jnp.float32
  keep = None
  if segment_ids is not None:
    fresh = reference.fresh_tokens(segment_ids, reverse=reverse)
    keep = 1 - fresh.astype(f32)

  # Programs hold whole tiles: of channels of one group, and of states.
  per_group = channels // groups
  more_channels = -per_group % tile.CHANNELS
  padded_size = next(n for n in (8, 16, 32, 64) if n >= size)
  more_states = padded_size - size
  total = groups * (per_group + more_channels)
  plan = (plan or Plan()).fill(batch, length, total, padded_size, u.dtype)
  chunk_sizes = plan.chunk, plan.gradient_chunk
  if total == tile.CHANNELS and any(length % c for c in chunk_sizes):
    # Of one tile the tokens are contiguous in memory, and the copy of the last
    # ones is not cut off at the end of its row.
    more_channels += tile.CHANNELS

  def pad_channels(x, axis):
    if x is None or not more_channels:
      return x
    x = x.reshape(*x.shape[:axis], groups, per_group, *x.shape[axis + 1 :])
    widths = [(0, 0)] * x.ndim
    widths[axis + 1] = (0, more_channels)
    x = jnp.pad(x, widths)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

  def pad_states(x):
    if x is None or not more_states:
      return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more_states)])

  def wide(x):
    return None if x is None else x.astype(f32)

  arrays = (
    pad_channels(u, 2),
    pad_channels(delta, 2),
    pad_states(pad_channels(wide(A), 0)),
    pad_states(B),
    pad_states(C),
    pad_channels(wide(D), 0),
    pad_channels(wide(delta_bias), 0),
    keep,
    pad_states(pad_channels(wide(initial_state), 1)),
  )
  call = _Call(plan, delta_softplus, reverse)
  y, final = _scan(call, *manual_axes.alike(*arrays))
  if more_channels:
    y = y.reshape(batch, length, groups, -1)[..., :per_group]
    y = y.reshape(u.shape)
    final = final.reshape(batch, groups, -1, padded_size)[:, :, :per_group]
    final = final.reshape(batch, channels, padded_size)
  if z is not None:
    y = (y.astype(f32) * jax.nn.silu(z.astype(f32))).astype(u.dtype)
  return y, final[..., :size]


@dataclasses.dataclass(frozen=True)
class _Call:
  plan: Plan
  delta_softplus: bool
  reverse: bool

  def options(self, *, gradient: bool, backwards: bool = False):
    plan = self.plan
    return chunks.Options(
      delta_softplus=self.delta_softplus,
      reverse=self.reverse != backwards,
      chunk=plan.gradient_chunk if gradient else plan.chunk,
      unroll=plan.unroll,
      exchange=plan.exchange,
      interpret=plan.interpret,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(call, u, delta, A, B, C, D, bias, keep, initial):
  arrays = (u, delta, A, B, C, D, bias, keep, initial)
  return _forward(call, arrays, gradient=False)[0]


def _scan_forward(call, *arrays):
  (y, final), states = _with_states(call, *arrays)
  return (y, final), (arrays, states)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_states(call, *arrays):
  """What `_scan_forward` launches, so that it has derivatives of its own."""
  return _forward(call, arrays, gradient=True)


def _with_states_forward(call, *arrays):
  out, states = _with_states(call, *arrays)
  return (out, states), (arrays, states)


def _with_states_backward(call, residuals, cotangents):
  # `_gradients` has no use for the states beyond the arrays.
  return _scan_backward(call, residuals, cotangents[0])


def _forward(call, arrays, *, gradient):
  u, delta, A, B, C, D, bias, keep, initial = arrays
  options = call.options(gradient=gradient)
  cut = _Parts(call, options, u.shape, gradient=gradient)
  A2 = A * chunks.LOG2_E
  u_, delta_, bias_ = cut.tokens(u), *cut.delta(delta, bias)
  B_, C_, keep_ = cut.tokens(B), cut.tokens(C), cut.keep(keep)
  first = initial
  if cut.parts > 1:
    last, total = forward.ends(
      u_, delta_, A2, B_, bias_, keep_, options, adjoint=False
    )
    first = cut.firsts(last, cut.decay(total, A, keep_), initial)
  y, states, final = forward.scan(
    u_,
    delta_,
    A2,
    B_,
    C_,
    D,
    bias_,
    keep_,
    first,
    options,
    keep_states=gradient,
  )
  return (cut.whole(y), cut.last(final)), states


def _scan_backward(call, residuals, cotangents):
  arrays, states = residuals
  return _gradients(call, arrays, states, *cotangents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(call, arrays, states, dy, d_final):
  """Gradients of all arrays, from the states between chunks."""
  u, delta, A, B, C, D, bias, keep, initial = arrays
  options = call.options(gradient=True)
  cut = _Parts(call, options, u.shape, gradient=True)
  A2 = A * chunks.LOG2_E
  u_, delta_, bias_ = cut.tokens(u), *cut.delta(delta, bias)
  B_, C_, keep_ = cut.tokens(B), cut.tokens(C), cut.keep(keep)
  dy = cut.tokens(dy)
  if cut.parts > 1:
    back = call.options(gradient=True, backwards=True)
    last, total = forward.ends(
      dy, delta_, A2, C_, bias_, keep_, back, adjoint=True
    )
    decay = cut.decay(total, A, keep_)
    d_final = cut.firsts(last, decay, d_final, backwards=True)
  du, d_delta, dA, dB, dC, dD, d_bias, d_first = backward.gradients(
    u_,
    delta_,
    A2,
    B_,
    C_,
    D,
    bias_,
    keep_,
    states,
    dy,
    d_final,
    options,
  )
  d_delta = cut.whole(d_delta)
  if bias is not None and bias_ is None:
    # The kernel's sum holds the tokens past T too.
    d_bias = jnp.sum(d_delta, axis=(0, 1), dtype=jnp.float32)
  return (
    cut.whole(du),
    d_delta,
    dA,
    cut.whole(dB).astype(B.dtype),
    cut.whole(dC).astype(C.dtype),
    None if D is None else dD,
    None if bias is None else d_bias,
    None if keep is None else jnp.zeros_like(keep),
    None if initial is None else cut.first(d_first),
  )


def _gradients_forward(call, *args):
  return _gradients(call, *args), args


def _gradients_backward(call, args, cotangents):
  """Second derivatives, which are rare, are those of the XLA form."""
  arrays, states, dy, d_final = args

  def gradients(arrays, dy, d_final):
    # The states are a function of the arrays, so nothing is lost.
    return jax.vjp(functools.partial(_plain, call), *arrays)[1]((dy, d_final))

  again, d_dy, d_d_final = jax.vjp(gradients, arrays, dy, d_final)[1](
    cotangents
  )
  return again, jnp.zeros_like(states), d_dy, d_d_final


def _plain(call, u, delta, A, B, C, D, bias, keep, initial):
  """The same scan as array arithmetic."""
  ids = None
  if keep is not None:
    changes = jnp.cumsum(1 - keep[:, :: -1 if call.reverse else 1], axis=1)
    ids = changes[:, :: -1 if call.reverse else 1].astype(jnp.int32)
  return xla.run(
    u,
    delta,
    A,
    B,
    C,
    D,
    None,
    bias,
    initial,
    ids,
    delta_softplus=call.delta_softplus,
    reverse=call.reverse,
    return_final_state=True,
  )


_scan.defvjp(_scan_forward, _scan_backward)
_with_states.defvjp(_with_states_forward, _with_states_backward)
_gradients.defvjp(_gradients_forward, _gradients_backward)


class _Parts:
  """T in parts that run side by side, as rows of a longer batch."""

  def __init__(
    self, call: _Call, options: chunks.Options, shape, *, gradient: bool
  ):
    self.batch, self.length, self.channels = shape
    self.softplus = call.delta_softplus
    self.reverse = call.reverse
    plan = call.plan
    self.parts = plan.gradient_parts if gradient else plan.parts
    self.chunk = options.chunk
    self.past = 0
    if self.parts > 1:
      self.past = -self.length % (self.parts * options.chunk)

  def tokens(self, x, value=0.0):
    """[b, T, ..] -> [b parts, T / parts, ..]."""
    if self.parts == 1:
      return x
    if self.past:
      widths = [(0, 0), (0, self.past)] + [(0, 0)] * (x.ndim - 2)
      x = jnp.pad(x, widths, constant_values=value)
    return x.reshape(self.batch * self.parts, -1, *x.shape[2:])

  def whole(self, x):
    """The inverse of `tokens`."""
    if self.parts == 1:
      return x
    x = x.reshape(self.batch, -1, *x.shape[2:])
    return x[:, : self.length]

  def delta(self, delta, bias):
    """delta and its bias in parts; nothing happens at tokens past T."""
    if self.parts == 1 or not self.past:
      return self.tokens(delta), bias
    if self.softplus:
      return self.tokens(delta, -jnp.inf), bias
    if bias is not None:
      # Zero must stay zero. The gradients of the two stay what they were.
      delta = (delta + bias).astype(delta.dtype)
    return self.tokens(delta), None

  def keep(self, keep):
    """`keep` in parts and chunks [b parts, chunks, at least 32]."""
    if keep is None:
      return None
    keep = self.tokens(keep, 1.0)
    past = -keep.shape[1] % self.chunk
    keep = jnp.pad(keep, ((0, 0), (0, past)), constant_values=1.0)
    keep = keep.reshape(keep.shape[0], -1, self.chunk)
    # No copy is shorter than 128 bytes.
    past = max(0, 32 - self.chunk)
    return jnp.pad(keep, ((0, 0), (0, 0), (0, past)), constant_values=1.0)

  def decay(self, total, A, keep):
    """What each part leaves of the state before it [b parts, E, M]."""
    decay = jnp.exp(total[..., None] * A)
    if keep is not None:
      decay = decay * jnp.min(keep, axis=(1, 2))[:, None, None]
    return decay

  def firsts(self, last, decay, initial, *, backwards=False):
    """The state before each part, from where each ends from zero."""
    shape = (self.batch, self.parts, *last.shape[1:])
    last = jnp.moveaxis(last.reshape(shape), 1, 0)
    decay = jnp.moveaxis(decay.reshape(shape), 1, 0)
    state = jnp.zeros_like(last[0]) if initial is None else initial

    def step(state, now):
      last, decay = now
      return decay * state + last, state

    reverse = self.reverse != backwards
    _, firsts = lax.scan(step, state, (last, decay), reverse=reverse)
    return jnp.moveaxis(firsts, 0, 1).reshape(-1, *last.shape[2:])

  def last(self, x):
    """What the part that is run last has of [b parts, ..]."""
    x = x.reshape(self.batch, self.parts, *x.shape[1:])
    return x[:, 0 if self.reverse else -1]

  def first(self, x):
    """What the part that is run first has."""
    x = x.reshape(self.batch, self.parts, *x.shape[1:])
    return x[:, -1 if self.reverse else 0]
