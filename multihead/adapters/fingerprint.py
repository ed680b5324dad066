"""A short name for the exact values of a parameter tree."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

_GOLDEN = np.uint32(0x9E3779B9)


def is_concrete(params: Any) -> bool:
  """Whether the leaves hold values: no tracers, no mere shapes."""
  return all(
    isinstance(leaf, jax.Array | np.ndarray)
    and not isinstance(leaf, jax.core.Tracer)
    for leaf in jax.tree.leaves(params)
  )


def _mixed(bits: Array) -> Array:
  """Spreads every bit of a uint32 over all 32 (multiply, shift, xor)."""
  bits = (bits ^ (bits >> 16)) * np.uint32(0x7FEB352D)
  bits = (bits ^ (bits >> 15)) * np.uint32(0x846CA68B)
  return bits ^ (bits >> 16)


def _sums(leaf: Array) -> UInt32[Array, "2"]:
  """Two sums over the bits of a leaf, each mixed with its position.

  Sums modulo 2^32 come out the same in any order, so on any sharding.
  """
  width = leaf.dtype.itemsize
  if width not in (1, 2, 4):  # 8 bytes need jax_enable_x64
    leaf = leaf.astype(jnp.float32)
    width = 4
  if leaf.dtype == jnp.bool_:
    bits = leaf.astype(jnp.uint32)
  else:
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
    bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
  position = jnp.zeros(leaf.shape, jnp.uint32)
  for axis, size in enumerate(leaf.shape):
    index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    position = position * np.uint32(size) + index
  first = _mixed(bits + position * _GOLDEN)
  second = _mixed(first ^ _GOLDEN)
  return jnp.stack([jnp.sum(s, dtype=jnp.uint32) for s in (first, second)])


@jax.jit
def _all_sums(leaves: list[Array]) -> list[Array]:
  return [_sums(leaf) for leaf in leaves]


def fingerprint(params: Any) -> str:
  """32 hexadecimal digits that another base does not have.

  Every bit of every leaf counts, and its path, shape and dtype; how the leaves
  are spread over devices does not. It finds mistakes; it is no defence against
  forgery.

  Args:
    params: a tree of arrays with values.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  sums = jax.device_get(_all_sums([leaf for _, leaf in leaves]))
  digest = hashlib.sha256()
  for (path, leaf), pair in zip(leaves, sums, strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    digest.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
    digest.update(np.asarray(pair, "<u4").tobytes())
  return digest.hexdigest()[:32]
