"""The recurrence of ops.selective_scan, one token at a time, as it reads."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from multihead.ops import manual_axes


def supports(args: dict[str, Any]) -> str | None:
  """Returns None: the recurrence serves every argument on every device."""
  del args
  return None


def effective_delta(
  delta: jax.Array, delta_bias: jax.Array | None, delta_softplus: bool
) -> jax.Array:
  """Returns softplus(delta + delta_bias), in float32 at least."""
  delta = delta.astype(jnp.promote_types(delta.dtype, jnp.float32))
  if delta_bias is not None:
    delta = delta + delta_bias.astype(delta.dtype)
  return jax.nn.softplus(delta) if delta_softplus else delta


def fresh_tokens(segment_ids: jax.Array, *, reverse: bool) -> jax.Array:
  """Whether a segment starts at each token [B, T], in the order of the scan."""
  change = segment_ids[:, 1:] != segment_ids[:, :-1]
  # The first token in that order may continue what came before.
  return jnp.pad(change, ((0, 0), (0, 1) if reverse else (1, 0)))


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
  batch, _, channels = u.shape
  groups, size = B.shape[2:]
  dtype = jnp.promote_types(u.dtype, jnp.float32)
  if initial_state is None:
    initial_state = jnp.zeros((batch, channels, size), dtype)
  if segment_ids is None:
    segment_ids = jnp.zeros(u.shape[:2], jnp.int32)
  fresh = fresh_tokens(segment_ids, reverse=reverse)
  delta = effective_delta(delta, delta_bias, delta_softplus).astype(dtype)
  inputs = [v.astype(dtype) for v in (u, delta, B, C)]
  state, A = initial_state.astype(dtype), A.astype(dtype)
  state, A, fresh, *inputs = manual_axes.alike(state, A, fresh, *inputs)

  def step(state, now):
    u, delta, B, C, fresh = now
    B, C = (jnp.repeat(v, channels // groups, axis=1) for v in (B, C))
    state = jnp.where(fresh[:, None, None], 0, state)
    state = jnp.exp(delta[..., None] * A) * state
    state = state + (delta * u)[..., None] * B
    return state, jnp.sum(state * C, axis=-1)

  now = [jnp.moveaxis(v, 1, 0) for v in (*inputs, fresh)]
  state, y = lax.scan(step, state, now, reverse=reverse)
  y = jnp.moveaxis(y, 0, 1)
  if D is not None:
    y = y + D.astype(dtype) * inputs[0]
  if z is not None:
    y = y * jax.nn.silu(z.astype(dtype))
  return y.astype(u.dtype), state
