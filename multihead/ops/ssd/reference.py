"""The recurrence of ops.ssd, one token at a time, as its equations read."""

from typing import Any

import jax
import jax.numpy as jnp

from multihead.ops import manual_axes


def supports(args: dict[str, Any]) -> str | None:
  """Returns None: the recurrence serves every argument on every device."""
  del args
  return None


def effective_dt(
  dt: jax.Array,
  dt_bias: jax.Array | None,
  dt_softplus: bool,
  dt_limit: tuple[float, float],
) -> jax.Array:
  """Returns clip(softplus(dt + dt_bias), *dt_limit), at least in float32."""
  dt = dt.astype(jnp.promote_types(dt.dtype, jnp.float32))
  if dt_bias is not None:
    dt = dt + dt_bias.astype(dt.dtype)
  if dt_softplus:
    dt = jax.nn.softplus(dt)
  low, high = dt_limit
  if dt_softplus and low <= 0:
    low = None  # Softplus is positive: no bound to pay for.
  if high == float("inf"):
    high = None
  return dt if low is None and high is None else jnp.clip(dt, low, high)


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
  """See `multihead.ops.ssd`. `chunk_size` has no meaning here."""
  del chunk_size
  batch, _, heads, width = x.shape
  groups, size = B.shape[2:]
  dtype = jnp.promote_types(jnp.result_type(x, B, C), jnp.float32)
  if initial_state is None:
    initial_state = jnp.zeros((batch, heads, width, size), dtype)
  if segment_ids is None:
    segment_ids = jnp.zeros(x.shape[:2], jnp.int32)
  fresh = segment_ids[:, 1:] != segment_ids[:, :-1]
  fresh = jnp.pad(fresh, ((0, 0), (1, 0)))
  dt = effective_dt(dt, dt_bias, dt_softplus, dt_limit).astype(dtype)
  inputs = [v.astype(dtype) for v in (x, B, C)]
  state, A = initial_state.astype(dtype), A.astype(dtype)
  state, A, dt, fresh, *inputs = manual_axes.alike(state, A, dt, fresh, *inputs)

  def step(state, now):
    x, B, C, dt, fresh = now
    B = jnp.repeat(B, heads // groups, axis=1)
    C = jnp.repeat(C, heads // groups, axis=1)
    state = jnp.where(fresh[:, None, None, None], 0, state)
    state = state * jnp.exp(dt * A)[..., None, None]
    state = state + (dt[..., None] * x)[..., None] * B[:, :, None, :]
    return state, jnp.einsum("bnhm,bnm->bnh", state, C, precision="highest")

  now = [jnp.moveaxis(v, 1, 0) for v in (*inputs, dt, fresh)]
  state, y = jax.lax.scan(step, state, now)
  y = jnp.moveaxis(y, 0, 1)
  if D is not None:
    y = y + D.astype(dtype)[:, None] * inputs[0]
  y = y.astype(x.dtype)
  return (y, state) if return_final_state else y
