"""Which modules of a model are linear maps, and between which axes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from multihead.layers import Linear

# A module of one of these names holds its layers stacked on a first axis.
STACKS = ("layers", "blocks")
KERNEL, BIAS = "kernel", "bias"


@dataclasses.dataclass(frozen=True)
class LinearMap:
  """One linear map of a model, y = x W (+ b), by the path of its module.

  Attributes:
    path: names from the root, joined by "/".
    inputs: the axes of x that W contracts.
    features: the axes of y that take their place.
    stack: axes in front of both: layers that are scanned over.
    use_bias: whether there is a b.
  """

  path: str
  inputs: tuple[int, ...]
  features: tuple[int, ...]
  stack: tuple[int, ...] = ()
  use_bias: bool = False

  @property
  def d_in(self) -> int:
    """Width of the input, its axes flattened."""
    return math.prod(self.inputs)

  @property
  def d_out(self) -> int:
    """Width of the output, its axes flattened."""
    return math.prod(self.features)

  @property
  def copies(self) -> int:
    """How many maps are stacked here."""
    return math.prod(self.stack)


def split_axes(
  module: nn.Module, x: Any
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """The axes of x that a module contracts and those it makes of them.

  Args:
    module: any linen module.
    x: what it is called with.

  Returns:
    (inputs, features); None for a module that is no linear map known here.
  """
  if isinstance(module, Linear):
    count, features = module.inputs, module.features
  elif isinstance(module, nn.Dense):
    count, features = 1, (module.features,)
  elif isinstance(module, nn.DenseGeneral):
    axis, features = module.axis, module.features
    axis = (axis,) if isinstance(axis, int) else tuple(axis)
    count = len(axis)
    trailing = sorted(a % x.ndim for a in axis)
    in_order = [a % x.ndim for a in axis] == trailing
    if (
      module.batch_dims
      or not in_order
      or trailing != list(range(x.ndim - count, x.ndim))
    ):
      return None
    features = (features,) if isinstance(features, int) else features
  else:
    return None
  return tuple(x.shape[x.ndim - count :]), tuple(features)


def flatten(params: Any) -> dict[str, Any]:
  """A tree of nested dicts by paths, joined with "/"."""
  return flax.traverse_util.flatten_dict(params, sep="/")


def module_paths(params: Any) -> dict[str, dict[str, Any]]:
  """The modules that hold parameters themselves: path -> name -> leaf."""
  modules: dict[str, dict[str, Any]] = {}
  for path, leaf in flatten(params).items():
    parent, _, name = path.rpartition("/")
    modules.setdefault(parent, {})[name] = leaf
  return modules


def linear_maps(
  model: nn.Module, *args: Any, **kwargs: Any
) -> dict[str, LinearMap]:
  """Finds the linear maps of a model by tracing it; computes nothing.

  Kernels of any number of axes are understood, since the modules themselves
  say which of them are inputs.

  Args:
    model: any linen module.
    *args: example inputs of a call, arrays or ShapeDtypeStructs; without any,
      those of the model's `init_inputs`, or tokens [1, 1].
    **kwargs: further ones by name.

  Returns:
    Path -> map, for every Linear, Dense and DenseGeneral that ran.
  """
  seen: dict[str, tuple] = {}
  if not args and not kwargs:
    if hasattr(model, "init_inputs"):
      args = tuple(model.init_inputs())
    else:
      args = (jax.ShapeDtypeStruct((1, 1), np.int32),)

  def note(next_fun, call_args, call_kwargs, context):
    if context.method_name == "__call__" and call_args:
      axes = split_axes(context.module, call_args[0])
      if axes is not None:
        seen["/".join(context.module.path)] = axes
    return next_fun(*call_args, **call_kwargs)

  def init(args, kwargs):
    with nn.intercept_methods(note):
      return nn.meta.unbox(model.init(jax.random.key(0), *args, **kwargs))

  params = jax.eval_shape(init, args, kwargs)["params"]
  modules = module_paths(params)
  maps = {}
  for path, (inputs, features) in seen.items():
    leaves = modules[path]
    shape = tuple(leaves[KERNEL].shape)
    stack = shape[: len(shape) - len(inputs) - len(features)]
    if shape != stack + inputs + features:
      continue  # a module that wraps its kernel in a way of its own
    maps[path] = LinearMap(path, inputs, features, stack, BIAS in leaves)
  return maps


def maps_from_shapes(params: Any) -> dict[str, LinearMap | str]:
  """What can be said of each module without the model, by shapes alone.

  A kernel of two axes is a linear map; of three, where the module lies in a
  stack of layers. More may be heads, or a convolution.

  Args:
    params: the parameter tree, arrays or shapes.

  Returns:
    Path -> its map, or in words why it is none or not known to be one.
  """
  modules = module_paths(params)
  found: dict[str, LinearMap | str] = {}
  for path, leaves in modules.items():
    if KERNEL not in leaves or leaves.keys() - {KERNEL, BIAS}:
      found[path] = f"it holds {', '.join(sorted(leaves))}"
      continue
    shape = tuple(np.shape(leaves[KERNEL]))
    axes = int(_in_stack(path, modules, shape[0]))
    if len(shape) != axes + 2:
      found[path] = (
        f"its kernel {list(shape)} may be one of several heads, or a "
        "convolution; pass maps=adapters.linear_maps(model, *inputs)"
      )
      continue
    stack, (d_in, d_out) = shape[:axes], shape[axes:]
    found[path] = LinearMap(path, (d_in,), (d_out,), stack, BIAS in leaves)
  return found


def _in_stack(
  path: str, modules: Mapping[str, Mapping[str, Any]], size: int
) -> bool:
  """Whether all that lies beside a module in a stack has the stack's axis."""
  parts = path.split("/")
  for depth, part in enumerate(parts):
    if part in STACKS:
      prefix = "/".join(parts[: depth + 1]) + "/"
      shapes = [
        np.shape(leaf)
        for other, leaves in modules.items()
        if other.startswith(prefix)
        for leaf in leaves.values()
      ]
      return all(shape[:1] == (size,) for shape in shapes)
  return False
