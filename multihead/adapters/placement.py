"""Where low-rank parameters live on a mesh.

Of a weight split over `tensor`, on its output (column-parallel) or its input
(row-parallel):

  | | column: W [D, F/n] | row: W [D/n, F] |
  |---|---|---|
  | par down [D, R] | whole | split on D |
  | par up [R, F] | split on F | whole |
  | seq down [F, R], up [R, F] | both split on F | whole |
  | pre down [D, R], up [R, D] | whole | both split on D |

So a branch adds a sum over devices of R numbers a token at most, and neither x
nor the output is gathered. Over `fsdp` the low-rank parts are whole: they are
small.
"""

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from multihead.adapters.linear_maps import LinearMap, flatten

AXIS = "tensor"


def _split_flat(entries: tuple[Any, ...], sizes: tuple[int, ...]) -> str | None:
  """The mesh axis of several axes flattened: that of the first that counts."""
  for entry, size in zip(entries, sizes, strict=True):
    if entry == AXIS or (isinstance(entry, tuple) and AXIS in entry):
      return AXIS
    if size > 1:
      return None
  return None


def shardings(
  shapes: Any,
  targets: Mapping[str, LinearMap],
  kernels: Mapping[str, NamedSharding],
) -> Any:
  """A NamedSharding for each leaf of an adapter's tree.

  Args:
    shapes: the adapter's tree of shapes.
    targets: path -> map.
    kernels: path -> where the frozen kernel lives.
  """
  placed = {}
  for leaf_path, shape in flatten(shapes).items():
    path = max((p for p in targets if leaf_path.startswith(f"{p}/")), key=len)
    target, where = targets[path], kernels[path]
    stack = len(target.stack)
    axes = stack + len(target.inputs) + len(target.features)
    spec = (*where.spec, *(None,) * (axes - len(where.spec)))[stack:]
    inputs = len(target.inputs)
    tensor_in = _split_flat(spec[:inputs], target.inputs)
    tensor_out = _split_flat(spec[inputs:], target.features)
    branch, *side = leaf_path[len(path) + 1 :].split("/")
    before = {"pre": tensor_in, "par": tensor_in, "seq": tensor_out}[branch]
    after = {"pre": tensor_in, "par": tensor_out, "seq": tensor_out}[branch]
    own = {
      ("scale",): (),
      ("down", "kernel"): (before, None),
      ("down", "bias"): (None,),
      ("up", "kernel"): (None, after),
      ("up", "bias"): (after,),
    }[tuple(side)]
    full = PartitionSpec(*(None,) * (len(shape) - len(own)), *own)
    placed[leaf_path] = NamedSharding(where.mesh, full)
  return flax.traverse_util.unflatten_dict(placed, sep="/")
