"""Where parameters, batches and activations live on the mesh.

Parameters carry logical axis names; the table below maps each name to a mesh
axis. A mesh axis that does not divide a dimension leaves it replicated.
"""

import functools
import logging
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")

# Logical name of a parameter's dimension -> mesh axis.
RULES: dict[str, str | None] = {
  "embed": "fsdp",
  "vocab": "tensor",
  "mlp": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "ssm_heads": "tensor",
  "ssm_channels": "tensor",
  "groups": "tensor",
  "head_dim": None,
  "state": None,
  "conv": None,
  "layers": None,
}

_warned: set[tuple[str, int, int]] = set()


def partition_spec(
  shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh
) -> PartitionSpec:
  """Maps logical names to mesh axes, leaving out what does not divide.

  Args:
    shape: the array's shape.
    names: one logical name (a key of RULES) or None per dimension.
    mesh: the mesh.

  Returns:
    The partition spec; a mesh axis appears at most once.

  Raises:
    ValueError: a name is not in RULES, or there is not one per dimension.
  """
  if len(shape) != len(names):
    raise ValueError(f"{len(names)} axis names {names} for shape {shape}")
  spec, used = [], set()
  for size, name in zip(shape, names, strict=True):
    if name is not None and name not in RULES:
      raise ValueError(f"unknown logical axis {name!r}; known: {list(RULES)}")
    axis = RULES[name] if name is not None else None
    ways = mesh.shape.get(axis, 1) if axis else 1
    if ways == 1 or axis in used:
      spec.append(None)
    elif size % ways:
      spec.append(None)
      if (name, size, ways) not in _warned:
        _warned.add((name, size, ways))
        logging.warning(
          "%s=%d does not divide by %s=%d: replicated", name, size, axis, ways
        )
    else:
      spec.append(axis)
      used.add(axis)
  return PartitionSpec(*spec)


def _init(model: nn.Module, rng: jax.Array) -> Any:
  """Parameters still boxed with their logical axis names."""
  if hasattr(model, "init_inputs"):
    inputs = model.init_inputs()
  else:
    inputs = (jnp.zeros((1, 1), jnp.int32),)
  return model.init(rng, *inputs)["params"]


@functools.lru_cache(maxsize=8)
def _abstract_boxed(model: nn.Module) -> Any:
  return jax.eval_shape(lambda: _init(model, jax.random.key(0)))


def abstract_params(model: nn.Module) -> Any:
  """Shapes and dtypes of the model's parameters; allocates nothing."""
  return nn.meta.unbox(_abstract_boxed(model))


def param_shardings(model: nn.Module, mesh: Mesh) -> Any:
  """A NamedSharding for each parameter of the model, as its tree."""

  def place(leaf):
    if isinstance(leaf, nn.meta.AxisMetadata):
      spec = partition_spec(leaf.value.shape, leaf.names, mesh)
    else:
      spec = PartitionSpec()
    return NamedSharding(mesh, spec)

  return jax.tree.map(
    place,
    _abstract_boxed(model),
    is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata),
  )


def init_params(
  model: nn.Module, rng: jax.Array, mesh: Mesh | None = None
) -> Any:
  """Initialises the parameters, each created on its own shard.

  The values do not depend on the mesh.

  Args:
    model: a model that initialises from tokens [1, 1], or from what its method
      `init_inputs` returns.
    rng: a key.
    mesh: where they shall live; None leaves them on the default device.

  Returns:
    The plain parameter tree, without metadata boxes.
  """
  shardings = None if mesh is None else param_shardings(model, mesh)
  init = jax.jit(
    lambda rng: nn.meta.unbox(_init(model, rng)), out_shardings=shardings
  )
  return init(rng)


def param_count(params: Any) -> int:
  """Number of parameters in a tree of arrays or of shapes."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of a value that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of [B, T] batches: B over data and fsdp, T over sequence."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence"))


def context_axes() -> dict[str, int]:
  """Sizes of the mesh axes in force here that the compiler places (Auto).

  Empty outside `jax.set_mesh`, and inside a shard_map over all axes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return {}
  return {
    name: size
    for name, size, kind in zip(
      mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True
    )
    if kind == AxisType.Auto and size > 1
  }


def split(
  size: int, axes: str | tuple[str, ...], sizes: dict[str, int]
) -> tuple[str, ...] | None:
  """The leading ones of `axes` that are in force and divide `size`, or None."""
  axes = (axes,) if isinstance(axes, str) else axes
  taken: tuple[str, ...] = ()
  ways = 1
  for axis in axes:
    if axis in sizes and size % (ways * sizes[axis]) == 0:
      ways *= sizes[axis]
      taken += (axis,)
  return taken or None


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
  """Pins an activation's placement; a no-op without a mesh.

  Args:
    x: any array.
    *axes: per dimension, the mesh axis (or axes) to split it over, or None.

  Returns:
    x, with a sharding constraint where the axes exist and divide.
  """
  sizes = context_axes()
  if not sizes:
    return x
  spec = PartitionSpec(
    *(
      None if axis is None else split(size, axis, sizes)
      for size, axis in zip(x.shape, axes, strict=True)
    )
  )
  return jax.lax.with_sharding_constraint(x, spec)


def gather_for_use(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
  """A parameter as a product reads it: whole over fsdp, split over tensor.

  Cast before, so that the gather moves the compute dtype. Left to itself, the
  compiler may split a contraction instead, and reduce activations.

  Args:
    x: a parameter.
    names: the logical names of its axes.

  Returns:
    x, with a sharding constraint where a mesh is in force.
  """
  axes = (RULES[name] if name else None for name in names)
  return constrain(x, *(None if axis == "fsdp" else axis for axis in axes))
