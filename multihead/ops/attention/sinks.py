"""Sinks: a logit per head that takes its share of the softmax, without a value.

The rest of the row is attention without it, so it is applied afterwards to the
output and lse of any implementation that differentiates both.
"""

import jax
import jax.numpy as jnp


def check(sinks: jax.Array, heads: int) -> jax.Array:
  """Sinks as an array; raises if they are not floating [N]."""
  sinks = jnp.asarray(sinks)
  if not jnp.issubdtype(sinks.dtype, jnp.floating):
    raise TypeError(f"sinks must be floating, got {sinks.dtype}")
  if sinks.shape != (heads,):
    raise ValueError(
      f"sinks must have shape [N] = [{heads}], one logit per query head; got "
      f"{list(sinks.shape)}"
    )
  return sinks


def add(
  out: jax.Array, lse: jax.Array, sinks: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Output [B, T, N, Hv] and lse [B, N, T] once each row has its sink [N].

  In a row without keys the sink is all there is: zeros, and lse = sink.
  """
  sinks = sinks.astype(lse.dtype)[:, None]
  empty = lse == -jnp.inf
  # Else the gradient of a difference of infinities: no key, a sink of -inf.
  some = jnp.where(empty, 0, lse)
  share = jax.nn.sigmoid(some - sinks).swapaxes(1, 2)[..., None]
  total = jnp.where(empty, sinks, jnp.logaddexp(some, sinks))
  return (out.astype(lse.dtype) * share).astype(out.dtype), total
