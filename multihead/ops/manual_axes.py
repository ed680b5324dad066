"""Keeps operations usable inside `jax.shard_map` with its type checks on.

Inside shard_map an array has, beside shape and dtype, the set of mesh axes over
which its shards may differ. A loop's carry must enter with the set it leaves
with, and a hand-written backward pass must return a gradient with the set of
its input. `alike` gives every operand of an operation the union of their sets,
and `zeros` makes the carries with that union. Outside shard_map both do
nothing. Autodiff sees `alike`, so the gradient of an operand that was the same
on every shard is summed over the shards.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

_EMPTY = frozenset()


def varying(*arrays: jax.Array | None) -> frozenset[str]:
  """The mesh axes over which any of `arrays` may differ (None: no array)."""
  axes = _EMPTY
  for array in arrays:
    if array is not None:
      axes |= _axes(array)
  return axes


def cast(array: jax.Array, axes: frozenset[str]) -> jax.Array:
  """Marks `array` as one that may differ over `axes`."""
  missing = axes - _axes(array)
  if not missing:
    return array
  return lax.pcast(array, tuple(sorted(missing)), to="varying")


def alike(*arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
  """Gives all `arrays` the union of the axes over which they may differ."""
  axes = varying(*arrays)
  return tuple(a if a is None else cast(a, axes) for a in arrays)


def full(
  shape: Sequence[int],
  value: float,
  dtype: jax.typing.DTypeLike,
  like: jax.Array,
) -> jax.Array:
  """An array of one value that may differ where `like` may: a loop's carry."""
  return cast(jnp.full(shape, value, dtype), _axes(like))


def zeros(
  shape: Sequence[int], dtype: jax.typing.DTypeLike, like: jax.Array
) -> jax.Array:
  """As `full`, with zeros."""
  return full(shape, 0, dtype, like)


def refusal() -> str | None:
  """Why a custom kernel cannot run under the current mesh, or None.

  Under plain `jit` the compiler would gather its operands to every device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  automatic = [name for name in mesh.auto_axes if mesh.shape[name] > 1]
  if not automatic:
    return None
  return (
    "the compiler cannot split a kernel over the mesh axes "
    f"{', '.join(automatic)} and would gather the operands: call it in a "
    "shard_map, as multihead.parallel does"
  )


def _axes(array: jax.Array) -> frozenset[str]:
  kind = jax.typeof(array)
  # The attribute's name differs between releases of jax.
  manual = getattr(kind, "mat", None)
  if manual is not None:
    return frozenset(manual.varying)
  return frozenset(getattr(kind, "vma", _EMPTY))
