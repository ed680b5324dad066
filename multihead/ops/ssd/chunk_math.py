"""The mathematics of consecutive chunks of SSD, forward and backward.

Section 6 of arXiv 2405.21060. With cum_l the sum of a = dt A from the start of
a chunk to token l, within a chunk

  y_l = sum_{s<l} exp(cum_l - cum_s) (C_l . B_s) dt_s x_s      inside
      + exp(cum_l) S C_l                                        across
      + (dt_l (C_l . B_l) + D) x_l                              diagonal

and S, the state that enters the chunk, follows a recurrence over chunks.

Letters in shapes: b batch, c chunk, g group, r head of a group, l and s tokens
of a chunk, Q their number, h head dim, m state size. States are [b, g, m, r, h]
here, which makes every product with them one plain matrix product per group.

`cpu` chooses between forms of the same sums: XLA fuses a product and the sum
over it into one scalar loop on CPU, where a dot is vectorised.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Up to this many chunks the recurrence over chunks is written out.
UNROLL = 8


class Masks(NamedTuple):
  """Which tokens of a chunk share a segment.

  Attributes:
    start: [b, c, 1, 1, Q], with the state that enters the chunk.
    end: [b, c, 1, 1, Q], with the chunk's last token.
    pair: [b, c, 1, 1, Q, Q], with one another; [.., l, s] in `forward` and
      [.., s, l] in `backward`, False unless s < l.
  """

  start: jax.Array
  end: jax.Array
  pair: jax.Array


@dataclasses.dataclass(frozen=True)
class Decays:
  """Decays of a chunk [b, c, g, r, Q], zero across a segment's border.

  Attributes:
    coarse: sums of the logarithms from the chunk's start, multiples of 2^-9.
    fine: what is missing in `coarse`.
    start: from the chunk's start to each token.
    end: from each token to the chunk's end.
    total: [b, c, g, r], over the chunk.
  """

  coarse: jax.Array
  fine: jax.Array
  start: jax.Array
  end: jax.Array
  total: jax.Array


def _decays(a, masks):
  # A factor below the smallest number is zero: this bounds the sums. The sum
  # of the rounded part is then exact, so that the difference of two sums has
  # the accuracy of its own size however much the state has decayed before.
  a = jnp.maximum(a, 1.02 * math.log(jnp.finfo(a.dtype).smallest_subnormal))
  rounded = jnp.round(a * 512) / 512
  coarse, fine = sums(jnp.stack([rounded, a - rounded]), "inclusive")
  start = jnp.exp(coarse + fine)
  end = jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
  if masks is not None:
    start = jnp.where(masks.start, start, 0)
    end = jnp.where(masks.end, end, 0)
  return Decays(coarse, fine, start, end, start[..., -1])


def number_runs(segment_ids):
  """Numbers the runs of equal ids [b, T], so that an id may come back later."""
  change = segment_ids[:, 1:] != segment_ids[:, :-1]
  return jnp.cumsum(jnp.pad(change, ((0, 0), (1, 0))), 1, dtype=jnp.int32)


def earlier(size, *, transpose):
  """Whether s < l: [l, s], or [s, l] if transpose."""
  mask = np.tri(size, k=-1, dtype=bool)
  return mask.T if transpose else mask


def _between(decays, masks, *, transpose):
  """Decays [b, c, g, r, l, s] from s to a later l, else zero.

  Masks the exponents, not the exponentials: those of earlier l overflow.
  """
  coarse, fine = decays.coarse, decays.fine
  if transpose:  # [..., s, l]
    log = coarse[..., None, :] - coarse[..., :, None]
    log += fine[..., None, :] - fine[..., :, None]
  else:
    log = coarse[..., :, None] - coarse[..., None, :]
    log += fine[..., :, None] - fine[..., None, :]
  if masks is None:
    mask = earlier(coarse.shape[-1], transpose=transpose)
  else:
    mask = masks.pair
  return jnp.exp(jnp.where(mask, log, -jnp.inf))


def forward(cpu, x, dt, a, B, C, masks, D, state):
  """Outputs and final state of consecutive chunks.

  Args:
    cpu: whether to write sums as products, which a CPU vectorises.
    x: [b, c, g, Q, r, h].
    dt: [b, c, g, r, Q].
    a: [b, c, g, r, Q].
    B: [b, c, g, Q, m].
    C: [b, c, g, Q, m].
    masks: of segments, or None.
    D: [g, r] or None.
    state: [b, g, m, r, h].

  Returns:
    y [b, c, g, Q, r, h], state [b, g, m, r, h].
  """
  low = x.dtype
  decays = _decays(a, masks)
  # Inside: [Q, Q] times [Q, h] per head.
  weights = _between(decays, masks, transpose=False)
  weights *= _dot(C, B, (4,), (4,))[:, :, :, None]
  scaled = _by_head((x * _by_token(dt)).astype(low))
  inside = _dot(weights.astype(low), scaled, (5,), (4,), batch=4)
  # Across: [m, Q] times [Q, r h], then [Q, m] times [m, r h] per group.
  leaving = (x * _by_token(dt * decays.end)).astype(low)
  added = _dot(B, leaving, (3,), (3,))
  states, final = _recur(decays.total, added, state)
  across = _dot(C, states.astype(low), (4,), (3,))
  diagonal = _inner(cpu, B, C)[:, :, :, None] * dt
  if D is not None:
    diagonal += D[:, :, None]
  y = _by_head(inside) + _by_token(decays.start) * across
  return y + _by_token(diagonal) * x, final


def backward(cpu, x, dt, a, B, C, masks, D, state, dy, d_final):
  """Gradients of `forward` for the cotangents dy and d_final.

  The arrays inside are [.., s, l], the transpose of the forward ones, so that
  the products are of row-major arrays. The gradient of a_t is the sum over all
  paths from a token before t to t or a later one, each path's share being its
  weight times the gradient of that. Only such paths are added up: the sum of
  all to later tokens minus the sum of all from later ones is the same number,
  but leaves rounding noise where a state dies, and dt or A multiplies it.

  Returns:
    Gradients of (x, dt, a, B, C), with the heads' tokens on axis 3, then of D
    and of the state.
  """
  low = x.dtype
  decays = _decays(a, masks)
  start, end = _by_token(decays.start), _by_token(decays.end)
  dt_token = _by_token(dt)

  # The states that enter chunks, and the gradients of those that leave them.
  leaving = (x * _by_token(dt * decays.end)).astype(low)
  reading = (dy * start).astype(low)
  states, _ = _recur(decays.total, _dot(B, leaving, (3,), (3,)), state)
  d_states, d_state = _recur(
    decays.total, _dot(C, reading, (3,), (3,)), d_final, reverse=True
  )
  through = decays.total * jnp.sum(states * d_states, axis=(3, 5))
  states, d_states = states.astype(low), d_states.astype(low)

  # Inside.
  scaled = _by_head((x * dt_token).astype(low))
  dy_head = _by_head(dy)
  between = _between(decays, masks, transpose=True)
  weights = between * _dot(B, C, (4,), (4,))[:, :, :, None]
  weights = weights.astype(low)
  d_scaled = _dot(weights, dy_head, (5,), (4,), batch=4)
  d_weights = _dot(scaled, dy_head, (5,), (5,), batch=4)
  crossing = _crossing(cpu, (weights * d_weights).astype(low))
  d_BC = _sum_heads(cpu, between * d_weights).astype(low)
  x_d_scaled = _inner(cpu, _by_head(x), d_scaled)  # [b, c, g, r, s]

  # Across.
  read = _inner(cpu, dy, _dot(C, states, (4,), (3,)))  # [b, c, g, l, r]
  d_leaving = _dot(B, d_states, (4,), (3,))
  left = _inner(cpu, x, d_leaving)  # [b, c, g, s, r]
  d_C = _dot(d_BC, B, (3,), (3,)) + _dot(reading, states, (4, 5), (4, 5))
  d_B = _dot(d_BC, C, (4,), (3,)) + _dot(leaving, d_states, (4, 5), (4, 5))

  # The diagonal.
  BC = _inner(cpu, B, C)[..., None]
  dt_heads = _swap(dt)
  d_diagonal = _inner(cpu, dy, x)  # [b, c, g, l, r]
  d_BC_same = jnp.sum(d_diagonal * dt_heads, axis=-1)[..., None]
  d_C += d_BC_same * B
  d_B += d_BC_same * C
  diagonal = BC * dt_heads
  if D is not None:
    diagonal += D[:, None]

  d_x = diagonal[..., None] * dy
  d_x += dt_token * (_by_head(d_scaled) + end * d_leaving)
  left = _swap(left) * decays.end
  d_dt = _swap(BC * d_diagonal) + x_d_scaled + left
  d_a = through[..., None] + crossing
  d_a += sums(decays.start * _swap(read), "suffix")
  d_a += sums(dt * left, "exclusive")
  d_D = None if D is None else jnp.sum(d_diagonal, axis=(0, 1, 3))
  return (d_x, _swap(d_dt), _swap(d_a), d_B, d_C), d_D, d_state


def _recur(decay, added, state, *, reverse=False):
  """S_{c+1} = decay_c S_c + added_c, or the same from the last chunk down.

  Args:
    decay: [b, c, g, r].
    added: [b, c, g, m, r, h].
    state: [b, g, m, r, h], the first S (the last, if reverse).
    reverse: S_c = decay_c S_{c+1} + added_c instead.

  Returns:
    The S that each chunk meets [b, c, g, m, r, h], and the one that is left.
  """
  chunks = added.shape[1]
  decay = decay[:, :, :, None, :, None]
  if chunks <= UNROLL:
    order = range(chunks)
    met = [state] * chunks
    for i in reversed(order) if reverse else order:
      met[i] = state
      state = decay[:, i] * state + added[:, i]
    return jnp.stack(met, axis=1), state
  edge = -1 if reverse else 0
  added = added.at[:, edge].add(decay[:, edge] * state)

  def combine(first, then):
    return first[0] * then[0], first[1] * then[0] + then[1]

  _, met = lax.associative_scan(
    combine, (decay, added), axis=1, reverse=reverse
  )
  if reverse:
    return jnp.concatenate([met[:, 1:], state[:, None]], 1), met[:, 0]
  return jnp.concatenate([state[:, None], met[:, :-1]], 1), met[:, -1]


def _dot(a, b, contract_a, contract_b, *, batch=3):
  """[batch.., free of a.., free of b..], summed in float32 at least.

  An einsum would exchange the operands where it sees fit, and pay transposes.
  """
  axes = tuple(range(batch))
  return lax.dot_general(
    a,
    b,
    ((contract_a, contract_b), (axes, axes)),
    preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
  )


def _inner(cpu, a, b):
  """Sum of a * b over the last axis, in float32 at least."""
  if cpu and a.dtype == b.dtype:
    axis = a.ndim - 1
    return _dot(a, b, (axis,), (axis,), batch=axis)
  dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
  return jnp.sum(a.astype(dtype) * b.astype(dtype), axis=-1)


def _sum_heads(cpu, v):
  """Sum over r of [b, c, g, r, s, l]."""
  if not cpu:
    return jnp.sum(v, axis=3)
  while v.shape[3] > 1:
    half, odd = divmod(v.shape[3], 2)
    pairs = v[:, :, :, :half] + v[:, :, :, half : 2 * half]
    v = jnp.concatenate([pairs, v[:, :, :, -1:]], 3) if odd else pairs
  return v[:, :, :, 0]


def _crossing(cpu, v):
  """Sum of v [b, c, g, r, s, l] over s < t <= l, for every t."""
  size = v.shape[-1]
  later = jnp.asarray(np.tri(size, dtype=bool), v.dtype)  # l >= t
  v = _dot(v, later, (5,), (0,), batch=0)
  v = jnp.where(earlier(size, transpose=True), v, 0)  # s < t
  if cpu:
    return _dot(v, jnp.ones((size,), v.dtype), (4,), (0,), batch=0)
  return jnp.sum(v, axis=4)


def sums(v, kind):
  """Running sums over the last axis, as one product with a triangle."""
  size = v.shape[-1]
  source, target = np.ogrid[:size, :size]
  triangle = {
    "inclusive": source <= target,
    "exclusive": source < target,
    "suffix": source >= target,
  }[kind]
  return lax.dot_general(
    v,
    jnp.asarray(triangle, v.dtype),
    (((v.ndim - 1,), (0,)), ((), ())),
    precision=lax.Precision.HIGHEST,
  )


def _swap(v):
  return jnp.swapaxes(v, -1, -2)


def _by_token(v):
  """[b, c, g, r, Q] -> [b, c, g, Q, r, 1]."""
  return _swap(v)[..., None]


def _by_head(v):
  """[b, c, g, Q, r, h] <-> [b, c, g, r, Q, h]."""
  return jnp.swapaxes(v, 3, 4)
