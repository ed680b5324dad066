"""Linear attention in chunks: matrix products within, one state between.

Within a chunk the causal sum is a masked [C, C] product; what came before
enters through the state at the chunk's start. The backward pass computes a
chunk again from that state, so the memory kept per token is H * Hv / chunk_size
numbers, and no state per token ever exists.
"""

import math
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
  q, k, v, log_decay, initial_state, segment_ids = manual_axes.alike(
    q, k, v, log_decay, initial_state, segment_ids
  )
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  B, T, N, H = q.shape
  K = k.shape[2]
  if normalize:
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
  shape = (B, K, N // K, H, v.shape[-1])
  if initial_state is None:
    state = manual_axes.zeros(shape, dtype, q)
  else:
    state = initial_state.astype(dtype).reshape(shape)
  q = q.reshape(B, T, K, N // K, H)
  if causal:
    y, state = _causal(q, k, v, log_decay, segment_ids, state, chunk_size)
  else:
    added = jnp.einsum("bskh,bskv->bkhv", k, v, preferred_element_type=dtype)
    state = state + added[:, :, None]
    y = jnp.einsum("btkgh,bkghv->btkgv", q.astype(dtype), state)
  if normalize:
    y, total = y[..., :-1], y[..., -1:]
    y = jnp.where(total == 0, 0, y / jnp.where(total == 0, 1, total))
  y = (scale * y).astype(q.dtype).reshape(B, T, N, -1)
  return y, state.reshape(B, N, H, -1)


def _causal(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array | None,
  segment_ids: jax.Array | None,
  state: jax.Array,
  chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
  """y [B, T, K, G, Hv] and the last state [B, K, G, H, Hv]."""
  dtype = state.dtype
  B, T, K, G, _ = q.shape
  size = min(chunk_size, T)
  xs = {"q": q, "k": k, "v": v}
  if log_decay is not None:
    xs["log_decay"] = log_decay.astype(dtype).reshape(B, T, K, G)
  # A padded token adds nothing, and it does not decay.
  xs = {name: _chunks(x, size) for name, x in xs.items()}
  if segment_ids is not None:
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    run = jnp.pad(
      jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0))
    )
    before = jnp.pad(run, ((0, 0), (1, 0)))[:, :T:size]
    xs["run"] = _chunks(run, size, "edge")
    xs["run_before"] = before.T  # Number of the segment that the state is of.

  @jax.checkpoint
  def chunk(state, x):
    return _chunk(state, **x)

  state, y = lax.scan(chunk, state, xs)
  y = jnp.moveaxis(y, 0, 1)
  return y.reshape(B, -1, *y.shape[3:])[:, :T], state


def _chunks(x: jax.Array, size: int, mode: str = "constant") -> jax.Array:
  """[B, T, ...] to [T / size, B, size, ...], padded."""
  B, T = x.shape[:2]
  x = jnp.pad(x, [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2), mode=mode)
  return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)


def _chunk(
  state: jax.Array,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array | None = None,
  run: jax.Array | None = None,
  run_before: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """One chunk: the state after it, and its outputs [B, C, K, G, Hv].

  Args:
    state: [B, K, G, H, Hv].
    q: [B, C, K, G, H].
    k: [B, C, K, H].
    v: [B, C, K, Hv].
    log_decay: [B, C, K, G].
    run: [B, C] number of each token's segment.
    run_before: [B] that of the state.
  """
  dtype = state.dtype
  C = q.shape[1]
  weights = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=dtype)
  keep = jnp.tril(jnp.ones((C, C), bool))
  if run is not None:
    keep = keep & (run[:, :, None] == run[:, None, :])[:, None, None]
  # What is left of the old state at token t, of token t at the chunk's end,
  # and of the old state at the end.
  read, write, left = 1.0, 1.0, 1.0
  if log_decay is None:
    weights = jnp.where(keep, weights, 0)
  else:
    sums = _sums_of_decay(log_decay)
    fade = 0
    for part in sums:
      part = jnp.moveaxis(part, 1, -1)  # [B, K, G, C]
      fade = fade + (part[..., :, None] - part[..., None, :])
    # Hidden before exp: above the diagonal it may overflow.
    weights = weights * jnp.exp(jnp.where(keep, fade, -jnp.inf))
    read = jnp.exp(sum(sums))[..., None]
    write = jnp.exp(sum(part[:, -1:] - part for part in sums))[..., None]
    left = read[:, -1, ..., None]
  if run is not None:
    token = lambda x: x[:, :, None, None, None]
    read = jnp.where(token(run == run_before[:, None]), read, 0)
    write = jnp.where(token(run == run[:, -1:]), write, 0)
    same = (run[:, -1] == run_before)[:, None, None, None, None]
    left = jnp.where(same, left, 0)
  y = jnp.einsum(
    "bkgts,bskv->btkgv",
    weights.astype(v.dtype),
    v,
    preferred_element_type=dtype,
  )
  y = y + read * jnp.einsum("btkgh,bkghv->btkgv", q.astype(dtype), state)
  if log_decay is None and run is None:
    added = jnp.einsum("bskh,bskv->bkhv", k, v, preferred_element_type=dtype)
    added = added[:, :, None]
  else:
    written = (k[:, :, :, None] * write).astype(k.dtype)
    added = jnp.einsum(
      "bskgh,bskv->bkghv", written, v, preferred_element_type=dtype
    )
  return left * state + added, y


def _sums_of_decay(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Running sums over axis 1, as two parts whose differences are accurate.

  A difference of two long sums has the rounding error of the sums. The first
  part is therefore a sum of multiples of 1/64, which is exact, and the second
  one of what is left of each, which is small.
  """
  # Beyond this exp is 0; a larger number would only cost digits.
  smallest = jnp.finfo(log_decay.dtype).smallest_subnormal
  lowest = 1.1 * math.log(float(smallest))
  log_decay = jnp.maximum(log_decay, lowest)
  coarse = jnp.round(64 * log_decay) / 64  # Without slope, as rounding is.
  return jnp.cumsum(coarse, axis=1), jnp.cumsum(log_decay - coarse, axis=1)
