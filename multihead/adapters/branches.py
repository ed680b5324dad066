"""The low-rank branches of one linear map, and how a model is made to run them.

With f0 = x W + b frozen, and per branch a down and an up projection,

  par(x)  = s ((drop(x A + a)) B + b)       reads the input,
  seq(f0) = s ((drop(f0 C + c)) D + e)      reads the frozen output,
  pre(x)  = s ((drop(x E + g)) F + h) W     goes through the frozen weight,

and y = f0 + par(x) + seq(f0) + pre(x) (Hydra, arXiv 2309.06922, section 3, plus
the branch on the input side). None reads another's output.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from multihead.adapters.linear_maps import KERNEL, split_axes
from multihead.parallel.sharding import context_axes

BRANCHES = ("pre", "par", "seq")
# Beside a module's kernel, the branches that it runs stand under this name:
# transformations over parameters (scan over layers, recomputation) then treat
# them as they treat the kernel.
SLOT = "hydra"


def product(
  x: Float[Array, "... D"], matrix: Float[Array, "... D F"]
) -> Float[Array, "... F"]:
  """x times a matrix of its dtype, or times one matrix per row of its batch.

  Args:
    x: [B, ..., D].
    matrix: [D, F], or [B, D, F] for a different one per example.
  """
  if matrix.ndim == 3:
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    y = jnp.einsum("bti,bif->btf", rows, matrix)
    return y.reshape(*x.shape[:-1], -1)
  batch = x.shape[:-1]
  if not context_axes():
    # Over several row axes, XLA's CPU backend is far slower in the gradient.
    x = x.reshape(-1, x.shape[-1])
  y = lax.dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())))
  return y.reshape(*batch, -1)


def low_rank(
  x: Float[Array, "... D"],
  branch: Mapping[str, Any],
  key: Array | None = None,
  rate: Array | None = None,
) -> Float[Array, "... F"]:
  """s ((drop(x down + bias)) up + bias).

  Args:
    x: the branch's input, axes flattened; its dtype is that of the products.
    branch: {"down": {"kernel", "bias"}, "up": likewise, "scale"}; the biases
      may be missing. Leaves with a leading axis hold one adapter per example.
    key: data of a key for dropout; None: no dropout.
    rate: share of the low-rank activations that dropout sets to zero.
  """
  hidden = product(x, branch["down"]["kernel"].astype(x.dtype))
  if "bias" in branch["down"]:
    hidden = hidden + _per_row(branch["down"]["bias"], x)
  if key is not None:
    keep = 1.0 - rate
    mask = jax.random.bernoulli(
      jax.random.wrap_key_data(key), keep, hidden.shape
    )
    hidden = jnp.where(mask, hidden / keep.astype(x.dtype), 0)
  # The scale multiplies the narrow side: R numbers a token, not F.
  scale = _per_row(branch["scale"][..., None], x)
  y = product(hidden * scale, branch["up"]["kernel"].astype(x.dtype))
  if "bias" in branch["up"]:
    y = y + scale * _per_row(branch["up"]["bias"], x)
  return y


def _per_row(vector: Array, x: Array) -> Array:
  """A vector [R], or one per example [B, R], that broadcasts over x's rows."""
  vector = vector.astype(x.dtype)
  if vector.ndim == 1:
    return vector
  middle = (1,) * (x.ndim - 2)
  return vector.reshape(vector.shape[0], *middle, vector.shape[-1])


def delta(
  x: Float[Array, "... D"],
  f0: Float[Array, "... F"],
  kernel: Float[Array, "D F"],
  slot: Mapping[str, Any],
) -> Float[Array, "... F"]:
  """What all branches add to the frozen output f0.

  Args:
    x: the input, its contracted axes flattened.
    f0: the frozen output, likewise; its dtype is that of the result.
    kernel: the frozen W; only the input-side branch reads it.
    slot: what `Hydra.insert` puts beside the kernel.
  """
  key, rate = slot.get("key"), slot.get("rate")
  x = x.astype(f0.dtype)

  def key_of(name: str) -> Array | None:
    return None if key is None else key[BRANCHES.index(name)]

  total = jnp.zeros((), f0.dtype)
  if "par" in slot:
    total = total + low_rank(x, slot["par"], key_of("par"), rate)
  if "seq" in slot:
    total = total + low_rank(f0, slot["seq"], key_of("seq"), rate)
  if "pre" in slot:
    # F W has R rows: the second product with W costs R tokens, not all.
    pre, w = dict(slot["pre"]), kernel.astype(f0.dtype)
    up = {name: value.astype(f0.dtype) for name, value in pre["up"].items()}
    pre["up"] = {name: value @ w for name, value in up.items()}
    total = total + low_rank(x, pre, key_of("pre"), rate)
  return total


def _run(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
  """Intercepts the call of a module that has branches beside its kernel."""
  module = context.module
  scope = module.scope
  slot = None
  if scope is not None and scope.has_variable("params", SLOT):
    slot = scope.get_variable("params", SLOT)
  if slot is None:
    return next_fun(*args, **kwargs)
  path = "/".join(module.path)
  if context.method_name != "__call__" or len(args) != 1:
    raise NotImplementedError(
      f"{path!r} is adapted, but the model calls {context.method_name} of it "
      f"with {len(args)} arguments; only __call__(x) of a linear map can carry "
      "branches. Leave it out of the targets"
    )
  (x,) = args
  axes = split_axes(module, x)
  if axes is None:
    raise ValueError(
      f"{path!r} is not a linear map but a {type(module).__name__}; leave it "
      "out of the targets"
    )
  inputs, features = axes
  d_in, d_out = math.prod(inputs), math.prod(features)
  _check(path, slot, d_in, d_out)
  f0 = next_fun(x, **kwargs)
  batch = x.shape[: x.ndim - len(inputs)]
  kernel = scope.get_variable("params", KERNEL).reshape(d_in, d_out)
  added = delta(
    x.reshape(*batch, d_in), f0.reshape(*batch, d_out), kernel, slot
  )
  return f0 + added.reshape(f0.shape)


def _check(path: str, slot: Mapping[str, Any], d_in: int, d_out: int) -> None:
  widths = {"pre": (d_in, d_in), "par": (d_in, d_out), "seq": (d_out, d_out)}
  for name, expected in widths.items():
    if name in slot:
      down, up = (slot[name][side]["kernel"] for side in ("down", "up"))
      found = (down.shape[-2], up.shape[-1])
      if found != expected:
        raise ValueError(
          f"{path!r}: its {name} branch maps {found[0]} to {found[1]}, but the "
          f"module {d_in} to {d_out}; make the adapter with "
          "maps=adapters.linear_maps(model, *inputs)"
        )


@contextlib.contextmanager
def running() -> Iterator[None]:
  """Within it, modules run the branches that stand beside their kernels."""
  with nn.intercept_methods(_run):
    yield
