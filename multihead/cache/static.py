"""A decode cache of fixed size, whose shapes never change as the text grows.

{"index": int32 [], slots used; "length": int32 [B], real tokens so far;
 "valid": bool [B, S], slots that hold real tokens; "layers": what each layer
 keeps, stacked on a leading axis or as a tuple}
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from multihead.parallel.sharding import BATCH_AXES, constrain

Cache = dict[str, Any]


def empty(batch_size: int, max_length: int, layers: Any) -> Cache:
  """A cache with no tokens.

  Args:
    batch_size: B.
    max_length: S, the most slots it will ever hold.
    layers: what the model's layers keep, zeros of their final shapes.

  Returns:
    The cache.
  """
  return {
    "index": jnp.zeros((), jnp.int32),
    "length": jnp.zeros((batch_size,), jnp.int32),
    "valid": jnp.zeros((batch_size, max_length), bool),
    "layers": layers,
  }


def advance(
  cache: Cache, mask: Bool[Array, "B T"]
) -> tuple[Cache, Int[Array, "B T"]]:
  """Counts T new slots in; their contents are the layers' business.

  Args:
    cache: before the T tokens.
    mask: which of them are real; the others (padding) take a slot that is
      never attended to, and no position.

  Returns:
    The cache with index, length and valid moved on, and the position of each
    new token: how many real tokens precede it.
  """
  counts = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
  positions = cache["length"][:, None] + jnp.maximum(counts - 1, 0)
  moved = {
    **cache,
    "index": cache["index"] + mask.shape[1],
    "length": cache["length"] + counts[:, -1],
    "valid": lax.dynamic_update_slice_in_dim(
      cache["valid"], mask, cache["index"], axis=1
    ),
  }
  return moved, positions


def place(
  cache: Cache,
  axes: Mapping[str, Sequence[str | tuple[str, ...] | None]],
  heads: Mapping[str, int],
) -> Cache:
  """Pins a cache to the mesh in force, so that every call leaves it there.

  Args:
    cache: any cache whose layers are dicts of arrays [B, ...].
    axes: for each array of a layer, the mesh axis (or axes) that splits each
      of its dimensions; see `parallel.sharding.constrain`.
    heads: for arrays whose last axis is heads times their width, the number of
      heads: the axis is split between heads, or not at all.

  Returns:
    The cache.
  """

  def layer(arrays: dict[str, Array], lead: tuple[None, ...]) -> Any:
    placed = {}
    for name, x in arrays.items():
      spec = (*lead, *axes[name])
      if name in heads:
        split = x.reshape(*x.shape[:-1], heads[name], -1)
        placed[name] = constrain(split, *spec, None).reshape(x.shape)
      else:
        placed[name] = constrain(x, *spec)
    return placed

  layers = cache["layers"]
  if isinstance(layers, dict):
    layers = layer(layers, (None,))
  else:
    layers = tuple(layer(arrays, ()) for arrays in layers)
  return {
    **cache,
    "length": constrain(cache["length"], BATCH_AXES),
    "valid": constrain(cache["valid"], BATCH_AXES, None),
    "layers": layers,
  }


def nbytes(cache: Cache) -> int:
  """Bytes that the cache (or its shapes) takes."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
