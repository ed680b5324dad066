"""Where the keys and values of a cache lie: by item, or in pages of a pool."""

import jax
import jax.numpy as jnp
from jax import lax

from multihead.ops.attention import tiles


def length(x: jax.Array, page_table: jax.Array | None) -> int:
  """S: keys that there is room for in one item."""
  if page_table is None:
    return x.shape[1]
  return page_table.shape[1] * x.shape[1]


def take(
  x: jax.Array, page_table: jax.Array | None, of: tiles.Range
) -> jax.Array:
  """A range of keys of every item (with a table: of pages), in order.

  Args:
    x: [B, S, K, H], or a pool [P, page, K, H].
    page_table: [B, pages] int32 or None. A number that is no page reads as
      NaN: plain to see where it is in use, and hidden elsewhere.
    of: start and size, in keys or pages.

  Returns:
    [B, keys, K, H].
  """
  dtype = x.dtype
  in_loop = not isinstance(of[0], int)
  if in_loop and dtype.itemsize == 2 and jax.default_backend() == "cpu":
    # XLA for CPUs would make a float32 copy of all of x ahead of the loop. It
    # copies no integers, if the barrier keeps it from viewing x as such there.
    x, start = lax.optimization_barrier((x, of[0]))
    x, of = lax.bitcast_convert_type(x, jnp.uint16), (start, of[1])
  if page_table is None:
    return _as(tiles.take(x, 1, of), dtype)
  ids = tiles.take(page_table, 1, of)
  real = (ids >= 0) & (ids < x.shape[0])
  found = _as(x[jnp.clip(ids, 0, x.shape[0] - 1)], dtype)
  found = jnp.where(real[:, :, None, None, None], found, jnp.nan)
  return found.reshape(ids.shape[0], -1, *x.shape[2:])


def _as(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """x, whose bits may have been taken for integers."""
  return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)
