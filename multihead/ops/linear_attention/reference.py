"""Linear attention one token after the other, as its definition reads."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from multihead.ops import manual_axes


def supports(args: dict[str, Any]) -> str | None:
  """Always None: everything, everywhere."""
  del args
  return None


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  causal: bool,
  log_decay: jax.Array | None,
  normalize: bool,
  initial_state: jax.Array | None,
  segment_ids: jax.Array | None,
  chunk_size: int,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """See `multihead.ops.linear_attention`; also returns the final state."""
  del chunk_size
  q, k, v, log_decay, initial_state, segment_ids = manual_axes.alike(
    q, k, v, log_decay, initial_state, segment_ids
  )
  dtype, out_dtype = jnp.promote_types(q.dtype, jnp.float32), q.dtype
  B, T, N, H = q.shape
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
  if normalize:
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
  state = initial_state
  if state is None:
    state = manual_axes.zeros((B, N, H, v.shape[-1]), dtype, q)
  # What is left of the old state when a token comes.
  keep = jnp.ones((B, T, N), dtype)
  if log_decay is not None:
    keep = keep * jnp.exp(log_decay.astype(dtype))
  if segment_ids is not None:
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    changes = jnp.pad(changes, ((0, 0), (1, 0)))
    keep = jnp.where(changes[..., None], 0, keep)

  def token(state, x):
    q, k, v, keep = x
    state = keep[..., None, None] * state + k[..., :, None] * v[..., None, :]
    return state, jnp.sum(q[..., :, None] * state, axis=-2)

  xs = manual_axes.alike(q, k, v, keep)
  xs = tuple(jnp.moveaxis(x, 1, 0) for x in xs)
  state, y = lax.scan(token, state.astype(dtype), xs)
  y = jnp.moveaxis(y, 0, 1)
  if not causal:
    y = jnp.einsum("btnh,bnhv->btnv", q, state, precision=lax.Precision.HIGHEST)
  if normalize:
    y, total = y[..., :-1], y[..., -1:]
    y = jnp.where(total == 0, 0, y / jnp.where(total == 0, 1, total))
  return (scale * y).astype(out_dtype), state
