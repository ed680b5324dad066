"""What the backward kernels need of every row, beside the arrays themselves."""

import math

import jax
import jax.numpy as jnp


def row_terms(
  out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Two numbers of every row, both [B, N, T] in float32.

  Args:
    out: [B, T, N, Hv].
    lse: [B, N, T].
    d_out: gradient of out.
    d_lse: gradient of lse.

  Returns:
    lse in base 2, +inf for a row that sees nothing, so that its weights are 0;
    and what each weight's gradient is less than d_out . v.
  """
  f32 = jnp.float32
  delta = jnp.sum(out.astype(f32) * d_out.astype(f32), axis=-1)
  delta = delta.transpose(0, 2, 1) - d_lse
  empty = lse == -jnp.inf
  return (
    jnp.where(empty, jnp.inf, lse * math.log2(math.e)),
    jnp.where(empty, 0.0, delta),
  )
