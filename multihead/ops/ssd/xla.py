"""State space duality in chunks: matrix products inside, a recurrence across.

Tokens are cut into chunks (`chunk_math`), and a loop handles a few chunks at a
time: as many as keep the working arrays in cache on a CPU, hundreds of
megabytes of them elsewhere. The backward pass is written out: it recomputes
everything from the inputs, so that a call keeps its inputs and one state a
step. Memory is linear in T.

Letters in shapes: b batch, g group, r head of a group, h head dim, m state
size, c chunk of a step, Q tokens of a chunk. States are [b, g, m, r, h] here.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from multihead.ops import manual_axes
from multihead.ops.ssd import chunk_math, reference

# Elements of the working arrays [b, c, g, r, Q, Q + H M / Q] of one step: what
# stays in the cache of a CPU core, and what keeps a large GPU busy.
_STEP_ELEMENTS_CPU = 2**16
_STEP_ELEMENTS = 2**27


def supports(args: dict[str, Any]) -> str | None:
  """Returns None: plain array arithmetic serves every call on every device."""
  del args
  return None


@dataclasses.dataclass(frozen=True)
class _Plan:
  """How T is cut: `steps` of a loop, each of `chunks` of `size` tokens.

  `cpu` chooses between forms of the same sums, see `chunk_math`.
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
  chunks = min(chunks, chunk_math.UNROLL) if cpu else chunks
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
    runs = chunk_math.number_runs(segment_ids)

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
  y, state = _ssd(plan, *manual_axes.alike(x, dt, decay, B, C, D, state, runs))
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
  masks = _masks(plan, runs, transpose=False)
  if plan.steps == 1:
    chunked = _step_inputs(plan, 0, x, dt, a, B, C, masks)
    y, final = chunk_math.forward(plan.cpu, *chunked, D, state)
    y, starts = _unchunk(y, x), state[None]
  else:

    def body(carry, i):
      y, state = carry
      chunked = _step_inputs(plan, i, x, dt, a, B, C, masks)
      part, new = chunk_math.forward(plan.cpu, *chunked, D, state)
      y = _put(plan, i, y, _unchunk(part, x))
      return (y, new), state

    carry = (manual_axes.zeros(x.shape, x.dtype, x), state)
    (y, final), starts = lax.scan(body, carry, jnp.arange(plan.steps))
  return (y, final), (x, dt, a, B, C, D, starts, runs)


def _backward(plan, residuals, gradients):
  x, dt, a, B, C, D, starts, runs = residuals
  dy, d_state = gradients
  like = (x, dt, a, B, C)
  masks = _masks(plan, runs, transpose=True)

  def step(i, state, d_state):
    chunked = _step_inputs(plan, i, x, dt, a, B, C, masks)
    dy_part = _chunk(plan, i, dy)
    parts, d_D, d_state = chunk_math.backward(
      plan.cpu, *chunked, D, state, dy_part, d_state
    )
    parts = [_unchunk(p, v) for p, v in zip(parts, like, strict=True)]
    return parts, d_D, d_state

  if plan.steps == 1:
    d_inputs, d_D, d_state = step(0, starts[0], d_state)
  else:

    def body(carry, now):
      d_inputs, d_D, d_state = carry
      parts, d_D_part, d_state = step(*now, d_state)
      pairs = zip(d_inputs, parts, strict=True)
      d_inputs = [_put(plan, now[0], d, part) for d, part in pairs]
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


def _step_inputs(plan, i, x, dt, a, B, C, masks):
  """What `chunk_math.forward` takes of step i."""
  dt, a = (jnp.swapaxes(_chunk(plan, i, v), 3, 4) for v in (dt, a))
  if masks is not None and plan.steps > 1:
    start, chunks = i * plan.chunks, plan.chunks
    masks = chunk_math.Masks(
      *(lax.dynamic_slice_in_dim(m, start, chunks, axis=1) for m in masks)
    )
  x, B, C = (_chunk(plan, i, v) for v in (x, B, C))
  return x, dt, a, B, C, masks


def _masks(plan, runs, *, transpose):
  """The masks of all chunks, or None.

  They are made before the loop, where they cost a byte for each of T Q pairs:
  inside it a CPU would compare segments anew for every head, one by one.
  """
  if runs is None:
    return None
  # The run of the token before each chunk; the initial state is of run 0.
  before = jnp.pad(runs, ((0, 0), (1, 0)))[:, :-1]
  shape = (runs.shape[0], plan.steps * plan.chunks, plan.size)
  runs, before = runs.reshape(shape), before.reshape(shape)
  pair = runs[..., :, None] == runs[..., None, :]
  pair &= chunk_math.earlier(plan.size, transpose=transpose)
  return chunk_math.Masks(
    start=(runs == before[..., :1])[:, :, None, None],
    end=(runs == runs[..., -1:])[:, :, None, None],
    pair=pair[:, :, None, None],
  )
