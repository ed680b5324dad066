"""State space duality in chunks: matrix products inside, a recurrence across.

Section 6 of arXiv 2405.21060, forward and backward. Tokens are cut into chunks
of Q. With cum_l the sum of a = dt A from the start of a chunk to token l,
within a chunk

  y_l = sum_{s<l} exp(cum_l - cum_s) (C_l . B_s) dt_s x_s      inside
      + exp(cum_l) S C_l                                        across
      + (dt_l (C_l . B_l) + D) x_l                              diagonal

and S, the state that enters the chunk, follows a recurrence over chunks. The
backward pass is written out (`_chunks_backward`): it recomputes everything from
the inputs, so that a call keeps its inputs and a few states, and it takes the
gradient of the decays from products whose row and column sums cancel exactly.

A loop handles a few chunks at a time: as many as keep the working arrays in
cache on a CPU, hundreds of megabytes of them elsewhere. Memory is linear in T.

Letters in shapes: b batch, c chunk of a step, g group, r head of a group, l and
s tokens of a chunk, h head dim, m state size. States are [b, g, m, r, h] here,
which makes every product with them one plain matrix product per group.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from multihead.ops import manual_axes
from multihead.ops.ssd import reference

# Elements of the working arrays [b, c, g, r, Q, Q + H M / Q] of one step: what
# stays in the cache of a CPU core, and what keeps a large GPU busy.
_STEP_ELEMENTS_CPU = 2**16
_STEP_ELEMENTS = 2**25
# Up to this many chunks the recurrence over chunks is written out.
_UNROLL = 8


def supports(args: dict[str, Any]) -> str | None:
  """Returns None: plain array arithmetic serves every call on every device."""
  del args
  return None


@dataclasses.dataclass(frozen=True)
class _Plan:
  """How T is cut: `steps` of a loop, each of `chunks` of `size` tokens.

  `cpu` picks between forms of the same sums: XLA fuses a product and its sum
  into one scalar loop on CPU, where a dot is vectorised.
  """

  steps: int
  chunks: int
  size: int
  cpu: bool

  @property
  def step(self) -> int:
    return self.chunks * self.size

  @property
  def length(self) -> int:
    return self.steps * self.step


def _on_cpu() -> bool:
  return jax.default_backend() == "cpu"


def _plan(x: jax.Array, state_size: int, chunk_size: int) -> _Plan:
  batch, length, heads, width = x.shape
  cpu = _on_cpu()
  limit = min(chunk_size, length)
  if cpu:
    # Larger triangles cost more than the states that they save.
    limit = min(limit, 32 << sum(width * state_size > n**2 for n in (32, 64)))
  per_token = batch * heads * (limit + width * state_size // limit)
  budget = _STEP_ELEMENTS_CPU if cpu else _STEP_ELEMENTS
  chunks = max(1, budget // (per_token * limit))
  chunks = min(chunks, _UNROLL) if cpu else chunks
  total = math.ceil(length / limit)
  steps = math.ceil(total / chunks)
  # A few more steps that share the chunks evenly need no padding.
  even = (n for n in range(steps, 2 * steps) if total % n == 0)
  steps = next(even, steps)
  chunks = math.ceil(total / steps)
  # Chunks a little shorter than the limit may need less padding.
  size = math.ceil(length / (steps * chunks))
  if length > 8:
    size = min(math.ceil(size / 8) * 8, limit)
  steps = math.ceil(length / (chunks * size))
  return _Plan(steps, chunks, size, cpu)


def run(
  x: jax.Array,
  dt: jax.Array,
  A: jax.Array,
  B: jax.Array,
  C: jax.Array,
  D: jax.Array | None,
  *,
  dt_bias: jax.Array | None,
  dt_softplus: bool,
  dt_limit: tuple[float, float],
  chunk_size: int,
  initial_state: jax.Array | None,
  segment_ids: jax.Array | None,
  return_final_state: bool,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `multihead.ops.ssd`."""
  batch, length, heads, width = x.shape
  groups, size = B.shape[2:]
  per_group = heads // groups
  out_dtype = x.dtype
  low = jnp.result_type(x, B, C)
  dtype = jnp.promote_types(low, jnp.float32)
  plan = _plan(x, size, chunk_size)
  if plan.cpu:
    low = dtype  # Low precision is no faster there, and not always possible.
  x, B, C = (v.astype(low) for v in (x, B, C))
  dt = reference.effective_dt(dt, dt_bias, dt_softplus, dt_limit).astype(dtype)
  decay = dt * A.astype(dtype)
  if D is not None:
    D = D.astype(dtype).reshape(groups, per_group)
  if initial_state is None:
    state = jnp.zeros((batch, groups, size, per_group, width), dtype)
  else:
    state = initial_state.astype(dtype)
    state = state.reshape(batch, groups, per_group, width, size)
    state = jnp.moveaxis(state, 4, 2)
  runs = None
  if segment_ids is not None:
    # Numbers the runs of equal ids, so that an id may come back later.
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    runs = jnp.cumsum(jnp.pad(change, ((0, 0), (1, 0))), 1, dtype=jnp.int32)

  # With dt = 0 a token neither decays the state nor enters it.
  past = plan.length - length

  def fit(v, *trailing):
    if past:
      v = jnp.pad(v, [(0, 0), (0, past)] + [(0, 0)] * (v.ndim - 2))
    return v.reshape(batch, plan.length, groups, *trailing)

  if runs is not None:
    runs = jnp.pad(runs, ((0, 0), (0, past)), mode="edge")
  x = fit(x, per_group, width)
  dt, decay = fit(dt, per_group), fit(decay, per_group)
  B, C = fit(B, size), fit(C, size)
  y, state = _ssd(
    plan, *manual_axes.alike(x, dt, decay, B, C, D, state, runs)
  )
  y = y[:, :length].reshape(batch, length, heads, width).astype(out_dtype)
  if not return_final_state:
    return y
  state = jnp.moveaxis(state, 2, 4).reshape(batch, heads, width, size)
  return y, state


# --- The loop over steps, and its derivative ---------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(plan, x, dt, a, B, C, D, state, runs):
  """The scan for T = plan.length.

  Args:
    plan: how T is cut.
    x: [b, T, g, r, h]; its dtype is that of the products.
    dt: [b, T, g, r], final.
    a: [b, T, g, r], the logarithm of the decays.
    B: [b, T, g, m].
    C: [b, T, g, m].
    D: [g, r] or None.
    state: [b, g, m, r, h], before the first token.
    runs: [b, T] number of the segment, or None.

  Returns:
    y like x, and the state after the last token.
  """
  return _forward(plan, x, dt, a, B, C, D, state, runs)[0]


def _forward(plan, x, dt, a, B, C, D, state, runs):
  if plan.steps == 1:
    chunked = _step_inputs(plan, 0, x, dt, a, B, C, runs)
    y, final = _chunks_forward(plan, *chunked, D, state)
    y, starts = _unchunk(y, x), state[None]
  else:

    def body(carry, i):
      y, state = carry
      chunked = _step_inputs(plan, i, x, dt, a, B, C, runs)
      part, new = _chunks_forward(plan, *chunked, D, state)
      y = _put(plan, i, y, _unchunk(part, x))
      return (y, new), state

    carry = (manual_axes.zeros(x.shape, x.dtype, x), state)
    (y, final), starts = lax.scan(body, carry, jnp.arange(plan.steps))
  return (y, final), (x, dt, a, B, C, D, starts, runs)


def _backward(plan, residuals, gradients):
  x, dt, a, B, C, D, starts, runs = residuals
  dy, d_state = gradients
  like = (x, dt, a, B, C)

  def step(i, state, d_state):
    chunked = _step_inputs(plan, i, x, dt, a, B, C, runs)
    dy_part = _chunk(plan, i, dy)
    parts, d_D, d_state = _chunks_backward(
      plan, *chunked, D, state, dy_part, d_state
    )
    return [_unchunk(p, v) for p, v in zip(parts, like)], d_D, d_state

  if plan.steps == 1:
    d_inputs, d_D, d_state = step(0, starts[0], d_state)
  else:

    def body(carry, now):
      d_inputs, d_D, d_state = carry
      parts, d_D_part, d_state = step(*now, d_state)
      d_inputs = [_put(plan, now[0], d, p) for d, p in zip(d_inputs, parts)]
      d_D = None if D is None else d_D + d_D_part
      return (d_inputs, d_D, d_state), None

    d_inputs = [manual_axes.zeros(v.shape, v.dtype, v) for v in like]
    d_D = None if D is None else manual_axes.zeros(D.shape, D.dtype, D)
    (d_inputs, d_D, d_state), _ = lax.scan(
      body,
      (d_inputs, d_D, d_state),
      (jnp.arange(plan.steps), starts),
      reverse=True,
    )
  return (*d_inputs, d_D, d_state, None)


_ssd.defvjp(_forward, _backward)


def _cut(plan, i, v):
  """[b, T, ...] -> [b, c, Q, ...] for step i."""
  if plan.steps > 1:
    v = lax.dynamic_slice_in_dim(v, i * plan.step, plan.step, axis=1)
  return v.reshape(v.shape[0], plan.chunks, plan.size, *v.shape[2:])


def _chunk(plan, i, v):
  """[b, T, g, ...] -> [b, c, g, Q, ...] for step i."""
  return jnp.swapaxes(_cut(plan, i, v), 2, 3)


def _unchunk(v, like):
  """[b, c, g, Q, ...] -> [b, c Q, g, ...] in the dtype of `like`."""
  v = jnp.swapaxes(v, 2, 3).astype(like.dtype)
  return v.reshape(v.shape[0], v.shape[1] * v.shape[2], *v.shape[3:])


def _put(plan, i, v, part):
  return lax.dynamic_update_slice_in_dim(v, part, i * plan.step, axis=1)


def _step_inputs(plan, i, x, dt, a, B, C, runs):
  """What `_chunks_forward` takes of step i."""
  dt, a = (jnp.swapaxes(_chunk(plan, i, v), 3, 4) for v in (dt, a))
  masks = None
  if runs is not None:
    now = _cut(plan, i, runs)
    # The run of the token before each chunk; the initial state is of run 0.
    before = jnp.pad(runs, ((0, 0), (1, 0)))[:, :-1]
    before = _cut(plan, i, before)[:, :, :1]
    masks = _Masks(
      start=(now == before)[:, :, None, None],
      end=(now == now[:, :, -1:])[:, :, None, None],
      pair=(now[..., :, None] == now[..., None, :])[:, :, None, None],
    )
  x, B, C = (_chunk(plan, i, v) for v in (x, B, C))
  return x, dt, a, B, C, masks


# --- The mathematics of a few chunks -----------------------------------------


@dataclasses.dataclass(frozen=True)
class _Masks:
  """Which tokens of a chunk share a segment.

  Attributes:
    start: [b, c, 1, 1, Q], with the state that enters the chunk.
    end: [b, c, 1, 1, Q], with the chunk's last token.
    pair: [b, c, 1, 1, Q, Q], with one another.
  """

  start: jax.Array
  end: jax.Array
  pair: jax.Array


@dataclasses.dataclass(frozen=True)
class _Decays:
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
  coarse, fine = _sums(jnp.stack([rounded, a - rounded]), "inclusive")
  start = jnp.exp(coarse + fine)
  end = jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
  if masks is not None:
    start = jnp.where(masks.start, start, 0)
    end = jnp.where(masks.end, end, 0)
  return _Decays(coarse, fine, start, end, start[..., -1])


def _between(decays, masks, *, transpose):
  """Decays [b, c, g, r, l, s] from s to a later l, else zero.

  Masks the exponents, not the exponentials: those of earlier l overflow.
  """
  coarse, fine = decays.coarse, decays.fine
  size = coarse.shape[-1]
  later = np.tri(size, k=-1, dtype=bool)
  if transpose:  # [..., s, l]
    log = coarse[..., None, :] - coarse[..., :, None]
    log += fine[..., None, :] - fine[..., :, None]
    later = later.T
  else:
    log = coarse[..., :, None] - coarse[..., None, :]
    log += fine[..., :, None] - fine[..., None, :]
  mask = jnp.asarray(later)
  if masks is not None:
    mask = mask & masks.pair
  return jnp.exp(jnp.where(mask, log, -jnp.inf))


def _chunks_forward(plan, x, dt, a, B, C, masks, D, state):
  """Outputs and final state of consecutive chunks.

  Args:
    plan: see `_Plan`.
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
  states, final = _recur(plan, decays.total, added, state)
  across = _dot(C, states.astype(low), (4,), (3,))
  diagonal = _inner(plan, B, C)[:, :, :, None] * dt
  if D is not None:
    diagonal += D[:, :, None]
  y = _by_head(inside) + _by_token(decays.start) * across
  return y + _by_token(diagonal) * x, final


def _chunks_backward(plan, x, dt, a, B, C, masks, D, state, dy, d_final):
  """Gradients of `_chunks_forward` for the cotangents dy and d_final.

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
  states, _ = _recur(plan, decays.total, _dot(B, leaving, (3,), (3,)), state)
  d_states, d_state = _recur(
    plan, decays.total, _dot(C, reading, (3,), (3,)), d_final, reverse=True
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
  crossing = _crossing(plan, (weights * d_weights).astype(low))
  d_BC = _sum_heads(plan, between * d_weights).astype(low)
  x_d_scaled = _inner(plan, _by_head(x), d_scaled)  # [b, c, g, r, s]

  # Across.
  read = _inner(plan, dy, _dot(C, states, (4,), (3,)))  # [b, c, g, l, r]
  d_leaving = _dot(B, d_states, (4,), (3,))
  left = _inner(plan, x, d_leaving)  # [b, c, g, s, r]
  d_C = _dot(d_BC, B, (3,), (3,)) + _dot(reading, states, (4, 5), (4, 5))
  d_B = _dot(d_BC, C, (4,), (3,)) + _dot(leaving, d_states, (4, 5), (4, 5))

  # The diagonal.
  BC = _inner(plan, B, C)[..., None]
  dt_heads = _swap(dt)
  d_diagonal = _inner(plan, dy, x)  # [b, c, g, l, r]
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
  d_a += _sums(decays.start * _swap(read), "suffix")
  d_a += _sums(dt * left, "exclusive")
  d_D = None if D is None else jnp.sum(d_diagonal, axis=(0, 1, 3))
  return (d_x, _swap(d_dt), _swap(d_a), d_B, d_C), d_D, d_state


def _recur(plan, decay, added, state, *, reverse=False):
  """S_{c+1} = decay_c S_c + added_c, or the same from the last chunk down.

  Args:
    plan: see `_Plan`.
    decay: [b, c, g, r].
    added: [b, c, g, m, r, h].
    state: [b, g, m, r, h], the first S (the last, if reverse).
    reverse: S_c = decay_c S_{c+1} + added_c instead.

  Returns:
    The S that each chunk meets [b, c, g, m, r, h], and the one that is left.
  """
  chunks = added.shape[1]
  decay = decay[:, :, :, None, :, None]
  if chunks <= _UNROLL:
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


# --- Array helpers ------------------------------------------------------------


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


def _inner(plan, a, b):
  """Sum of a * b over the last axis, in float32 at least."""
  if plan.cpu and a.dtype == b.dtype:
    axis = a.ndim - 1
    return _dot(a, b, (axis,), (axis,), batch=axis)
  dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
  return jnp.sum(a.astype(dtype) * b.astype(dtype), axis=-1)


def _sum_heads(plan, v):
  """Sum over r of [b, c, g, r, s, l]."""
  if not plan.cpu:
    return jnp.sum(v, axis=3)
  while v.shape[3] > 1:
    half, odd = divmod(v.shape[3], 2)
    pairs = v[:, :, :, :half] + v[:, :, :, half : 2 * half]
    v = jnp.concatenate([pairs, v[:, :, :, -1:]], 3) if odd else pairs
  return v[:, :, :, 0]


def _crossing(plan, v):
  """Sum of v [b, c, g, r, s, l] over s < t <= l, for every t."""
  size = v.shape[-1]
  later = jnp.asarray(np.tri(size, dtype=bool), v.dtype)  # l >= t
  v = _dot(v, later, (5,), (0,), batch=0)
  v = jnp.where(np.tri(size, k=-1, dtype=bool).T, v, 0)  # s < t
  if plan.cpu:
    return _dot(v, jnp.ones((size,), v.dtype), (4,), (0,), batch=0)
  return jnp.sum(v, axis=4)


def _sums(v, kind):
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
