"""Folds the branches of a linear map into its weight, and takes them out.

With W [D, F] and b of the base and the letters of `branches`,

  W' = W + s AB + s W C D + s E F W
  b' = b + s (b C) D + s (a B + b_up) + s (c D + e) + s (g F + h) W

(Hydra, section 3.3). All of it is in float32, one rounding to the dtype of the
weights at the end.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Branch = Mapping[str, Any]
_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _float(x: Array) -> Array:
  return jnp.asarray(x, jnp.float32)


def _factors(branch: Branch) -> tuple[Array, Array]:
  """The down projection times the scale, and the up projection."""
  down, up = (_float(branch[side]["kernel"]) for side in ("down", "up"))
  return down * _float(branch["scale"])[..., None, None], up


def _shift(branch: Branch) -> Array:
  """What the branch's own biases give: s (down bias) up + s (up bias)."""
  down, up = _factors(branch)
  shift = jnp.zeros(up.shape[:-2] + up.shape[-1:], jnp.float32)
  scale = _float(branch["scale"])[..., None]
  if "bias" in branch["down"]:
    bias = _float(branch["down"]["bias"]) * scale
    shift = shift + _row(bias, up)
  if "bias" in branch["up"]:
    shift = shift + scale * _float(branch["up"]["bias"])
  return shift


def _row(vector: Array, matrix: Array) -> Array:
  return _dot(vector[..., None, :], matrix)[..., 0, :]


def has_bias(branches: Mapping[str, Branch]) -> bool:
  """Whether any branch has a bias of its own."""
  return any(
    "bias" in branch[side]
    for branch in branches.values()
    for side in ("down", "up")
  )


@jax.jit
def as_lora(
  kernel: Float[Array, "... D F"],
  bias: Float[Array, "... F"] | None,
  branches: Mapping[str, Branch],
) -> tuple[Array, Array, Array]:
  """All branches as one product on the input: x -> (x down) up + shift.

  The rank is the sum of the ranks: s AB + s (WC) D + s E (FW) side by side.
  This is why every such adapter is a LoRA of that rank.

  Args:
    kernel: W, with the axes of a stack in front.
    bias: b.
    branches: "pre", "par" and "seq", those that there are.

  Returns:
    down [..., D, R], up [..., R, F] and shift [..., F], all float32.
  """
  kernel = _float(kernel)
  downs, ups = [], []
  shift = jnp.zeros(kernel.shape[:-2] + kernel.shape[-1:], jnp.float32)
  for name, branch in branches.items():
    down, up = _factors(branch)
    own = _shift(branch)
    if name == "par":
      shift = shift + own
    elif name == "seq":
      shift = shift + own
      if bias is not None:
        shift = shift + _row(_row(_float(bias), down), up)
      down = _dot(kernel, down)
    else:
      shift = shift + _row(own, kernel)
      up = _dot(up, kernel)
    downs.append(down)
    ups.append(up)
  return (
    jnp.concatenate(downs, axis=-1),
    jnp.concatenate(ups, axis=-2),
    shift,
  )


@jax.jit
def merge(
  kernel: Float[Array, "... D F"],
  bias: Float[Array, "... F"] | None,
  branches: Mapping[str, Branch],
) -> tuple[Array, Array | None]:
  """W' and b' in float32, before they are rounded to the base's dtype."""
  down, up, shift = as_lora(kernel, bias, branches)
  merged = _float(kernel) + _dot(down, up)
  return merged, None if bias is None else _float(bias) + shift


@jax.jit
def unmerge(
  kernel: Float[Array, "... D F"],
  bias: Float[Array, "... F"] | None,
  branches: Mapping[str, Branch],
) -> tuple[Array, Array | None]:
  """W and b from W' and b', by solving systems of the size of the ranks.

  With P = s C D and Q = s E F, W' - s AB = W + W P + Q W =: Z, and so
  W = (I + Q)^-1 (Z - (W C) s D) (Woodbury). Y = W C solves
  Y (I + s DC) = Z C - s E (F Y), where F Y is a matrix of ranks only.

  Args:
    kernel: W', with the axes of a stack in front.
    bias: b'.
    branches: those that were merged.

  Returns:
    W and b in float32, as exact as s DC and s FE are far from -I.
  """
  z = _float(kernel)
  if "par" in branches:
    z = z - _dot(*_factors(branches["par"]))
  pre, seq = branches.get("pre"), branches.get("seq")
  if seq is not None:
    c, d = _factors(seq)  # c holds the scale
    zc = _dot(z, c)
    inner = _eye(d) + _dot(d, c)
    if pre is not None:
      e, f = _factors(pre)
      fy = _sylvester(_dot(f, e), inner, _dot(f, zc))
      zc = zc - _dot(e, fy)
    z = z - _dot(_right_solve(inner, zc), d)
  if pre is not None:
    e, f = _factors(pre)
    z = z - _dot(e, jnp.linalg.solve(_eye(f) + _dot(f, e), _dot(f, z)))
  if bias is None:
    return z, None
  b = _float(bias)
  for name, branch in branches.items():
    own = _shift(branch)
    b = b - (_row(own, z) if name == "pre" else own)
  if seq is not None:
    c, d = _factors(seq)
    row = _row(b, c)[..., None, :]
    b = b - _dot(_right_solve(_eye(d) + _dot(d, c), row), d)[..., 0, :]
  return z, b


def _eye(matrix: Array) -> Array:
  """The identity on the low-rank side of an up projection [R, F]."""
  return jnp.eye(matrix.shape[-2], dtype=jnp.float32)


def _right_solve(matrix: Array, rows: Array) -> Array:
  """X with X matrix = rows."""
  swap = functools.partial(jnp.swapaxes, axis1=-1, axis2=-2)
  return swap(jnp.linalg.solve(swap(matrix), swap(rows)))


def _sylvester(left: Array, right: Array, rows: Array) -> Array:
  """X [m, n] with left X + X right = rows, for small m and n."""
  m, n = left.shape[-1], right.shape[-1]

  def one(left: Array, right: Array, rows: Array) -> Array:
    system = jnp.kron(left, jnp.eye(n)) + jnp.kron(jnp.eye(m), right.T)
    return jnp.linalg.solve(system, rows.reshape(-1)).reshape(m, n)

  for _ in range(rows.ndim - 2):
    one = jax.vmap(one)
  return one(left, right, rows)
