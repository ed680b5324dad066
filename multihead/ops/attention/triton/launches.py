"""One launch of each kernel."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from multihead.ops import triton_compat
from multihead.ops.attention import dropout
from multihead.ops.attention.triton import blocks, options, visits

# Programs of the kernel for the gradient of the bias that fill a GPU.
_MANY_PROGRAMS = 512
_F32 = jnp.float32


class Static(NamedTuple):
  """What is static in a call."""

  scale: float
  softcap: float | None
  left: int | None
  right: int | None
  offset: int | None
  dropout_rate: float
  blocks: blocks.Blocks


class Arrays(NamedTuple):
  """Arrays of a call but q, k and v; None for what it does not have.

  Attributes:
    bias: [#B, #N, #T, #S].
    mask: likewise.
    offset: [B].
    lengths: [B] keys in use.
    q_ids: [B, T].
    kv_ids: [B, S].
    items: [B] which item of the batch dropout takes each for.
    words: [2] the key of dropout.
  """

  bias: jax.Array | None
  mask: jax.Array | None
  offset: jax.Array | None
  lengths: jax.Array | None
  q_ids: jax.Array | None
  kv_ids: jax.Array | None
  items: jax.Array | None
  words: jax.Array | None


Own = tuple[jax.Array, ...]


def forward(
  static: Static, own: Own, arrays: Arrays
) -> tuple[jax.Array, jax.Array]:
  """The output [B, T, N, Hv] and lse [B, N, T] for q, k and v."""
  from multihead.ops.attention.triton import kernels

  q, k, v = own
  (B, T, N, _), V = q.shape, v.shape[3]
  launch = static.blocks.forward
  bounds = visits.row_bounds(_sight(static, own, arrays), *_tile(launch))
  return triton_compat.call(
    kernels.forward,
    *_operands(own, arrays, bounds),
    out=[_like(q, (B, T, N, V)), _like(q, (B, N, T), _F32)],
    grid=(B * N * -(-T // launch.rows),),
    **_constants(static, launch, own, arrays, bounds),
  )


def gradients(
  static: Static, own: Own, arrays: Arrays
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The gradients of q, k and v for q, k, v, lse, delta and d_out."""
  from multihead.ops.attention.triton import kernels

  q, k, v, *rows = own
  (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
  sight = _sight(static, own, arrays)
  launch = static.blocks.queries
  bounds = visits.row_bounds(sight, *_tile(launch))
  (d_q,) = triton_compat.call(
    kernels.query_gradient,
    *_operands(own, arrays, bounds),
    *rows,
    out=[_like(q)],
    grid=(B * N * -(-T // launch.rows),),
    **_constants(static, launch, own, arrays, bounds),
  )
  launch = static.blocks.keys
  bounds = visits.column_bounds(sight, *_tile(launch))
  d_k, d_v = triton_compat.call(
    kernels.key_value_gradients,
    *_operands(own, arrays, bounds),
    *rows,
    out=[_like(k), _like(v)],
    grid=(B * K * -(-S // launch.columns),),
    **_constants(static, launch, own, arrays, bounds),
  )
  return d_q, d_k, d_v


def bias_gradient(static: Static, own: Own, arrays: Arrays) -> jax.Array:
  """The gradient of the bias; arguments as above."""
  from multihead.ops.attention.triton import kernels

  q, k, _, *rows = own
  shape, full = arrays.bias.shape, (*q.shape[:1], q.shape[2])
  launch = static.blocks.bias
  bounds = visits.row_bounds(_sight(static, own, arrays), *_tile(launch))
  tiles = -(-q.shape[1] // launch.rows), -(-k.shape[1] // launch.columns)
  programs, used = 1, 1
  for size, count in zip(shape, (*full, *tiles), strict=True):
    if size > 1:
      programs *= count
    else:
      used *= count
  share = -(-used // min(used, max(1, _MANY_PROGRAMS // programs)))
  parts = -(-used // share)
  (sums,) = triton_compat.call(
    kernels.bias_gradient,
    *_operands(own, arrays, bounds),
    *rows,
    out=[_like(q, (parts, *shape), _F32)],
    grid=(programs * parts,),
    B=q.shape[0],
    share=share,
    **_constants(static, launch, own, arrays, bounds),
  )
  return jnp.sum(sums, axis=0).astype(arrays.bias.dtype)


def _like(
  x: jax.Array,
  shape: tuple[int, ...] | None = None,
  dtype: jax.typing.DTypeLike | None = None,
) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype)


def _tile(launch: blocks.Launch) -> tuple[int, int]:
  return launch.rows, launch.columns


def _sight(static: Static, own: Own, arrays: Arrays) -> visits.Sight:
  return visits.Sight(
    own[0].shape[1],
    own[1].shape[1],
    static.left,
    static.right,
    arrays.offset if static.offset is None else static.offset,
    arrays.lengths,
    arrays.q_ids,
    arrays.kv_ids,
    arrays.mask,
  )


def _operands(
  own: Own, arrays: Arrays, bounds: visits.Bounds
) -> tuple[jax.Array, ...]:
  """What all kernels begin with; an array for every parameter."""
  some = [own[0] if x is None else x for x in arrays]
  bias, mask, offset, lengths, q_ids, kv_ids, items, words = some
  return (
    *own[:3],
    *(bias, mask, offset, lengths, q_ids, kv_ids, words, items),
    jnp.asarray(bounds),
  )


def _constants(
  static: Static,
  launch: blocks.Launch,
  own: Own,
  arrays: Arrays,
  bounds: visits.Bounds,
) -> dict[str, Any]:
  """Options of a kernel, and how it is launched."""
  q, k, v = own[:3]
  (_, T, N, H), (S, K, V) = q.shape, v.shape[1:]
  folded, factor = options.folding(
    static.scale, static.softcap, arrays.bias is not None
  )
  strides = lambda x: options.strides(None if x is None else x.shape)
  bound = lambda x: -1 if x is None else x
  masked, free = visits.loops(bounds)
  made = options.Options(
    *_tile(launch),
    *(T, S, N, K, H, V),
    HT=options.padded(H),
    VT=options.padded(V),
    precision="tf32x3" if q.dtype == _F32 else "tf32",
    scale=static.scale,
    softcap=static.softcap or 0.0,
    folded=folded,
    factor=factor,
    left=bound(static.left),
    right=bound(static.right),
    offset=static.offset or 0,
    has_offset=static.offset is None,
    has_lengths=arrays.lengths is not None,
    has_ids=arrays.q_ids is not None,
    has_bias=arrays.bias is not None,
    **dict(zip(_names("bias"), strides(arrays.bias), strict=True)),
    has_mask=arrays.mask is not None,
    **dict(zip(_names("mask"), strides(arrays.mask), strict=True)),
    bounds_b=bounds.shape[1] if bounds.shape[0] > 1 else 0,
    bounds_n=1 if bounds.shape[1] > 1 else 0,
    masked=masked,
    free=free,
    dropped=dropout.threshold(static.dropout_rate),
    kept_scale=1 / (1 - static.dropout_rate),
  )
  return dict(o=made, num_warps=launch.warps, num_stages=launch.stages)


def _names(array: str) -> list[str]:
  return [f"{array}_{axis}" for axis in "bnts"]
