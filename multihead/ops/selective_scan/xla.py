"""The selective scan as loops over tokens, many lanes at a time.

T is cut into chunks. A loop goes over the tokens of a chunk with the states
[n, G, M, R] of n lanes: the rows of the batch and, where those are too few to
keep a device busy, several chunks of each row side by side. Such chunks run
twice, first from zero to learn what each hands to the next.

The backward pass is written out: from the states at the borders of the chunks,
which are all that a call keeps beside its inputs, it recomputes the states of
one loop and then runs it backwards. Memory is linear in T, and the factor M is
on the states of one loop and of the borders only.

Letters in shapes: b batch, k chunk of a loop, n = b k lanes, q token of a
chunk, G groups, M state size, R channels of a group, which are last: that makes
the arithmetic a loop over adjacent numbers.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from multihead.ops import manual_axes
from multihead.ops.selective_scan import reference

# Numbers in the states of all lanes: what makes a turn of a loop worth its
# cost on a CPU core, and what keeps a large GPU busy.
_LANES_CPU = 2**12
_LANES = 2**21
# Tokens of a chunk, at least; M of them, so that the states at the borders of
# all chunks weigh no more than u.
_CHUNK = 64


def supports(args: dict[str, Any]) -> str | None:
  """Returns None: plain array arithmetic serves every call on every device."""
  del args
  return None


@dataclasses.dataclass(frozen=True)
class _Plan:
  """How T is cut: `loops`, each of `chunks` side by side of `size` tokens.

  `cpu` chooses how sums over products are written: as a dot, which a CPU
  vectorises, or as a sum, which a GPU fuses.
  """

  loops: int
  chunks: int
  size: int
  cpu: bool

  @property
  def length(self) -> int:
    return self.loops * self.chunks * self.size


def _on_cpu() -> bool:
  return jax.default_backend() == "cpu"


def _plan(batch: int, length: int, channels: int, state: int) -> _Plan:
  cpu = _on_cpu()
  lanes = _LANES_CPU if cpu else _LANES
  size = min(length, max(_CHUNK, state))
  chunks = min(lanes // (batch * channels * state), length // size)
  chunks = max(1, chunks)
  loops = math.ceil(length / (chunks * size))
  # Shares the tokens evenly, so that little is padded.
  size = math.ceil(length / (loops * chunks))
  return _Plan(loops, chunks, size, cpu)


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
) -> tuple[jax.Array, jax.Array]:
  """See `multihead.ops.selective_scan`; returns y and the final state."""
  del return_final_state
  batch, length, channels = u.shape
  groups, size = B.shape[2:]
  split = (groups, channels // groups)
  dtype = jnp.promote_types(u.dtype, jnp.float32)
  plan = _plan(batch, length, channels, size)

  def fit(v, *trailing, value=0):
    """[b, T, ...] -> [loops, q, n, *trailing]; a delta of 0 does nothing."""
    v = v.astype(dtype)
    v = jnp.flip(v, 1) if reverse else v
    past = [(0, 0), (0, plan.length - length)] + [(0, 0)] * (v.ndim - 2)
    v = jnp.pad(v, past, constant_values=value)
    v = v.reshape(batch, plan.loops, plan.chunks, plan.size, *trailing)
    v = jnp.moveaxis(v, (1, 3), (0, 1))
    return v.reshape(plan.loops, plan.size, -1, *trailing)

  def back(v):
    """The inverse of `fit`, to [b, T, E]."""
    v = v.reshape(plan.loops, plan.size, batch, plan.chunks, channels)
    v = jnp.moveaxis(v, (0, 1), (1, 3)).reshape(batch, plan.length, channels)
    v = v[:, :length]
    return jnp.flip(v, 1) if reverse else v

  step = reference.effective_delta(delta, delta_bias, delta_softplus)
  x = u.astype(dtype)
  keep = None
  if segment_ids is not None:
    fresh = reference.fresh_tokens(segment_ids, reverse=reverse)
    keep = fit(~fresh, 1, 1, 1, value=1)
  A = jnp.swapaxes(A.astype(dtype).reshape(*split, size), 1, 2)
  if initial_state is None:
    state = jnp.zeros((batch, groups, size, split[1]), dtype)
  else:
    state = initial_state.astype(dtype).reshape(batch, *split, size)
    state = jnp.swapaxes(state, 2, 3)
  operands = manual_axes.alike(
    fit(x, *split),
    fit(step, *split),
    A,
    fit(B, groups, size),
    fit(C, groups, size),
    state,
    keep,
  )
  y, state = _scan(plan, *operands)
  y = back(y)
  if D is not None:
    y = y + D.astype(dtype) * x
  if z is not None:
    y = y * jax.nn.silu(z.astype(dtype))
  state = jnp.swapaxes(state, 2, 3).reshape(batch, channels, size)
  return y.astype(u.dtype), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan, u, delta, A, B, C, state, keep):
  """The scan for T = plan.length.

  Args:
    plan: how T is cut.
    u: [loops, q, n, G, R].
    delta: [loops, q, n, G, R], final.
    A: [G, M, R].
    B: [loops, q, n, G, M].
    C: [loops, q, n, G, M].
    state: [b, G, M, R], before the first token.
    keep: [loops, q, n, 1, 1, 1], 0 where a segment starts and else 1; or None.

  Returns:
    y like u, and the state after the last token.
  """
  return _forward(plan, u, delta, A, B, C, state, keep)[0]


def _forward(plan, u, delta, A, B, C, state, keep):
  def loop(state, now):
    u, delta, B, C, keep = now
    starts, final = _starts(plan, u, delta, A, B, state, keep)

    def token(h, now):
      u, delta, B, C, keep = now
      h = _advance(h, u, delta, A, B, keep)
      return h, _over_states(plan, C, h)

    end, y = lax.scan(token, starts, (u, delta, B, C, keep))
    return (end if final is None else final), (y, starts)

  final, (y, starts) = lax.scan(loop, state, (u, delta, B, C, keep))
  return (y, final), (u, delta, A, B, C, starts, keep)


def _backward(plan, residuals, gradients):
  u, delta, A, B, C, starts, keep = residuals
  dy, d_final = gradients

  def loop(carry, now):
    d_state, d_A = carry
    u, delta, B, C, keep, start, dy = now

    def recompute(h, now):
      return _advance(h, *now[:2], A, *now[2:]), h

    _, before = lax.scan(recompute, start, (u, delta, B, keep))
    d_ends, d_start = _ends(plan, delta, A, C, dy, d_state, keep)

    def token(carry, now):
      d_next, d_A = carry
      u, delta, B, C, keep, h, dy = now
      decay = _decay(delta, A, keep)
      drive = delta * u
      kept = decay * h
      d_C = _over_channels(plan, kept + _outer(B, drive), dy)
      d_h = d_next + _outer(C, dy)
      d_B = _over_channels(plan, d_h, drive)
      d_drive = _over_states(plan, B, d_h)
      d_log = d_h * kept  # The gradient of delta A.
      ones = jnp.ones_like(B)
      d_delta = _over_states(plan, ones, d_log * A) + d_drive * u
      d_A += d_log * delta[..., None, :]
      return (decay * d_h, d_A), (d_drive * delta, d_delta, d_B, d_C)

    inputs = (u, delta, B, C, keep, before, dy)
    (first, d_A), d_inputs = lax.scan(
      token, (d_ends, d_A), inputs, reverse=True
    )
    return (first if d_start is None else d_start, d_A), d_inputs

  d_A = manual_axes.zeros(starts.shape[1:], A.dtype, starts)
  (d_state, d_A), (d_u, d_delta, d_B, d_C) = lax.scan(
    loop, (d_final, d_A), (u, delta, B, C, keep, starts, dy), reverse=True
  )
  return d_u, d_delta, jnp.sum(d_A, 0), d_B, d_C, d_state, None


_scan.defvjp(_forward, _backward)


def _decay(delta, A, keep):
  """exp(delta A), zero where a segment starts [n, G, M, R]."""
  decay = jnp.exp(delta[..., None, :] * A)
  return decay if keep is None else decay * keep


def _advance(h, u, delta, A, B, keep):
  """One token of the recurrence."""
  return _decay(delta, A, keep) * h + _outer(B, delta * u)


def _starts(plan, u, delta, A, B, state, keep):
  """The state that enters each lane, and the last one, from the row's first.

  Returns:
    [n, G, M, R] and [b, G, M, R]; None for the latter where a chunk is alone
    in its row, since the loop over its tokens finds it.
  """
  if plan.chunks == 1:
    return state, None

  def token(h, now):
    return _advance(h, *now[:2], A, *now[2:]), None

  zero = manual_axes.zeros(_lanes(plan, state), state.dtype, state)
  added, _ = lax.scan(token, zero, (u, delta, B, keep))
  return _hand_over(plan, _whole_decay(delta, A, keep), added, state)


def _ends(plan, delta, A, C, dy, d_state, keep):
  """As `_starts` for the gradient, which runs from the last chunk down."""
  if plan.chunks == 1:
    return d_state, None

  def token(d_next, now):
    delta, C, dy, keep = now
    return _decay(delta, A, keep) * (d_next + _outer(C, dy)), None

  zero = manual_axes.zeros(_lanes(plan, d_state), d_state.dtype, d_state)
  added, _ = lax.scan(token, zero, (delta, C, dy, keep), reverse=True)
  decay = _whole_decay(delta, A, keep)
  return _hand_over(plan, decay, added, d_state, reverse=True)


def _whole_decay(delta, A, keep):
  """The product of a lane's decays [n, G, M, R]."""
  if keep is not None:
    keep = jnp.min(keep, axis=0)
  return _decay(jnp.sum(delta, axis=0), A, keep)


def _hand_over(plan, decay, added, state, *, reverse=False):
  """Passes a state from chunk to chunk: next = decay * state + added."""
  shape = (-1, plan.chunks, *state.shape[1:])

  def chunk(state, now):
    decay, added = now
    return decay * state + added, state

  decay, added = (jnp.moveaxis(v.reshape(shape), 1, 0) for v in (decay, added))
  last, met = lax.scan(chunk, state, (decay, added), reverse=reverse)
  return jnp.moveaxis(met, 0, 1).reshape(-1, *state.shape[1:]), last


def _lanes(plan, state):
  return (state.shape[0] * plan.chunks, *state.shape[1:])


def _outer(m, r):
  """[n, G, M] and [n, G, R] -> [n, G, M, R]."""
  return m[..., None] * r[..., None, :]


def _over_states(plan, m, h):
  """[n, G, M] and [n, G, M, R] -> [n, G, R], summed over M."""
  if plan.cpu:
    return _dot(m, h, 2, 2)
  return jnp.sum(m[..., None] * h, axis=2)


def _over_channels(plan, h, r):
  """[n, G, M, R] and [n, G, R] -> [n, G, M], summed over R."""
  if plan.cpu:
    return _dot(h, r, 3, 2)
  return jnp.sum(h * r[..., None, :], axis=3)


def _dot(a, b, contract_a, contract_b):
  batch = ((0, 1), (0, 1))
  return lax.dot_general(
    a,
    b,
    (((contract_a,), (contract_b,)), batch),
    precision=lax.Precision.HIGHEST,
  )
