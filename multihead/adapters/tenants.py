"""Several adapters over one base, a different one for each example of a batch.

Batched low-rank products take the place of a loop: each example's projections
are gathered, [B, D, R], and multiplied with its own tokens alone.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from multihead.errors import UserError


def stack_adapters(adapter_params: Sequence[Any]) -> Any:
  """Trees of one adapter's parameters as one, with a new first axis.

  For an example that shall see the base alone, add `adapter.init(...)`: new
  branches add nothing.

  Args:
    adapter_params: trees of equal shapes.

  Returns:
    The tree for `Hydra.apply(..., adapter_ids=ids)`.

  Raises:
    UserError: none are given, or their shapes differ.
  """
  trees = list(adapter_params)
  shapes = [jax.tree.map(jnp.shape, tree) for tree in trees]
  if not trees:
    raise UserError("stack_adapters: no adapters are given")
  for number, shape in enumerate(shapes):
    if shape != shapes[0]:
      raise UserError(
        f"stack_adapters: adapter {number} has other targets, ranks or shapes "
        "than adapter 0; only parameters of the same settings share a batch"
      )
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def gather(branch: Any, ids: Int[Array, "B"], stack_axes: int) -> Any:
  """The branch of each example, its axis behind those of the layers.

  Args:
    branch: leaves [adapters, layers..., ...].
    ids: the adapter of each example; as everywhere in JAX, an id outside the
      range is not an error here but takes the nearest.
    stack_axes: number of layer axes.

  Returns:
    Leaves [layers..., B, ...].
  """
  return jax.tree.map(
    lambda leaf: jnp.moveaxis(
      jnp.take(leaf, ids, axis=0, mode="clip"), 0, stack_axes
    ),
    branch,
  )
