"""Equal layers, scanned over or one by one, and their parameters likewise."""

from typing import Any

import jax
import jax.numpy as jnp

# What a backward pass keeps of a layer, beside its input.
REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def unstack(params: dict[str, Any], name: str, count: int) -> dict[str, Any]:
  """Replaces the subtree `name`, stacked, by `name_0`, `name_1`, ...

  Args:
    params: parameters of a model that scans its layers.
    name: the top-level key of the stack.
    count: L, the length of the leading axis.
  """
  rest = {key: value for key, value in params.items() if key != name}
  layers = {
    f"{name}_{i}": jax.tree.map(lambda x, i=i: x[i], params[name])
    for i in range(count)
  }
  return {**rest, **layers}


def stack(params: dict[str, Any], name: str, count: int) -> dict[str, Any]:
  """The inverse of `unstack`."""
  names = [f"{name}_{i}" for i in range(count)]
  rest = {key: value for key, value in params.items() if key not in names}
  layers = jax.tree.map(lambda *x: jnp.stack(x), *(params[n] for n in names))
  return {**rest, name: layers}
