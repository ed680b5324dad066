"""Rotary position embedding (Su et al., 2021), half-split convention."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def apply_rope(
  x: Float[Array, "B T N H"],
  positions: Int[Array, "B T"],
  *,
  theta: float = 10000.0,
) -> Float[Array, "B T N H"]:
  """Rotates the pairs (x_i, x_{i + H/2}) by positions * theta^(-2i/H).

  Args:
    x: queries or keys; H is even.
    positions: of each token; only differences matter to attention.
    theta: the base of the geometric series of frequencies.

  Returns:
    The rotated x, in its dtype. Angles are computed in float32.

  Raises:
    ValueError: H is odd.
  """
  half, odd = divmod(x.shape[-1], 2)
  if odd:
    raise ValueError(f"rope needs an even head dimension, got {x.shape[-1]}")
  exponent = jnp.arange(half, dtype=jnp.float32) / half
  frequency = theta**-exponent
  angle = positions[..., None].astype(jnp.float32) * frequency  # [B, T, H/2]
  cos = jnp.cos(angle)[:, :, None].astype(x.dtype)
  sin = jnp.sin(angle)[:, :, None].astype(x.dtype)
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
