"""What rows see by position, causal and window in one form.

Key j is visible from row i if -left <= j - (i + offset) <= right, where None
is no bound; causal makes right at most 0.
"""

import jax
import jax.numpy as jnp


def bounds(
  causal: bool,
  window: tuple[int | None, int | None],
  offset: int | jax.Array,
  T: int,
  S: int,
) -> tuple[int | None, int | None]:
  """left and right; None also for a bound that no pair of positions meets."""
  left, right = window
  if causal:
    right = 0 if right is None else min(right, 0)
  if isinstance(offset, int):
    if left is not None and left >= T - 1 + offset:
      left = None
    if right is not None and right >= S - 1 - offset:
      right = None
  return left, right


def column_range(
  left: int | None,
  right: int | None,
  first: jax.Array,
  last: jax.Array,
  offset: tuple[int | jax.Array, int | jax.Array],
  length: int,
) -> tuple[int | jax.Array, int | jax.Array]:
  """Start and stop of the columns that rows first..last can see.

  Args:
    left: see above.
    right: see above.
    first: first row.
    last: last row.
    offset: smallest and largest offset in the batch.
    length: number of columns.
  """
  start, stop = 0, length
  if left is None and right is None:
    return start, stop  # Ints: a loop of known length.
  if left is not None:
    start = first + offset[0] - left
  if right is not None:
    stop = last + offset[1] + right + 1
  start = jnp.clip(start, 0, length)
  return start, jnp.clip(stop, start, length)
