"""Causal depthwise convolution, every token's window written out."""

from typing import Any

import jax
import jax.numpy as jnp


def supports(args: dict[str, Any]) -> str | None:
  """Returns None: gathers serve every call on every device."""
  del args
  return None


def run(
  x: jax.Array,
  kernel: jax.Array,
  bias: jax.Array | None,
  *,
  activation: str | None,
  initial_state: jax.Array | None,
  segment_ids: jax.Array | None,
  return_final_state: bool,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `multihead.ops.causal_conv1d`. Holds W copies of x."""
  batch, length, channels = x.shape
  width = kernel.shape[0]
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  if initial_state is None:
    initial_state = jnp.zeros((batch, width - 1, channels), x.dtype)
  if segment_ids is None:
    segment_ids = jnp.zeros((batch, length), jnp.int32)
  inputs = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)
  first = jnp.repeat(segment_ids[:, :1], width - 1, axis=1)
  ids = jnp.concatenate([first, segment_ids], axis=1)

  at = jnp.arange(length)[:, None] + jnp.arange(width)
  # A tap counts if every token from it to the current one has one id.
  same = (ids[:, at] == ids[:, at[:, -1:]]).astype(jnp.int32)
  same = jnp.flip(jnp.cumprod(jnp.flip(same, 2), axis=2), 2).astype(bool)
  windows = jnp.where(same[..., None], inputs[:, at], 0)
  y = jnp.einsum(
    "btwc,wc->btc",
    windows.astype(dtype),
    kernel.astype(dtype),
    precision="highest",
  )
  if bias is not None:
    y = y + bias.astype(dtype)
  if activation == "silu":
    y = y * jax.nn.sigmoid(y)
  y = y.astype(x.dtype)
  return (y, windows[:, -1, 1:]) if return_final_state else y
