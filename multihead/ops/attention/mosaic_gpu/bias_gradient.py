"""The kernel for the gradient of a bias, beside the other two of the backward.

A program holds one tile of the bias and walks over all that was added to: the
batch items and heads that share it, and the rows or columns of a bias that has
one for all. So the gradient is as large as the bias, whatever it is broadcast
to, and is summed in one order. It computes the weights once more.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from multihead.ops import pallas_compat as pc
from multihead.ops.attention.mosaic_gpu import blocks, visibility
from multihead.ops.attention.mosaic_gpu.backward import pad_rows, tile_weights
from multihead.ops.attention.mosaic_gpu.extras import Extras
from multihead.ops.attention.mosaic_gpu.forward import padded
from multihead.ops.attention.mosaic_gpu.limits import Limits

# One warpgroup: other programs compute while this one loads.
_TILE = blocks.Backward(rows=64, columns=64, consumers=1, stages=1)


def bias_gradient(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  d_out: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  limits: Limits,
  *,
  scale: float,
  softcap: float | None,
  see: visibility.Visibility,
  dropout: float = 0.0,
  interpret: Any = None,
) -> jax.Array:
  """The gradient of `limits.bias`; arguments as `backward.query_gradient`."""
  (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
  bias = limits.bias
  items, heads, t, s = bias.shape
  q, k, v, d_out = (padded(x) for x in (q, k, v, d_out))
  f32, i32, dtype = jnp.float32, jnp.int32, q.dtype
  rows, columns = _TILE.rows, _TILE.columns
  row_tiles, column_tiles = -(-T // rows), -(-S // columns)
  lse, delta = pad_rows(lse, rows, jnp.inf), pad_rows(delta, rows, 0.0)
  extras = Extras(see, limits, B, _TILE, keys=(k, v))
  # What tiles there are of the bias, and what each of them was added to.
  one_row, one_column = t == 1, s == 1
  places = (
    items,
    heads,
    1 if one_row else row_tiles,
    1 if one_column else column_tiles,
  )
  shared = (
    B // items,
    N // heads,
    row_tiles if one_row else 1,
    column_tiles if one_column else 1,
  )
  out_dtype = f32 if one_row or one_column else bias.dtype

  def body(q_g, k_g, v_g, o_g, l_g, d_g, *rest):
    more, rest = extras.split(rest)
    db_g, q_s, o_s, k_s, v_s, l_s, d_s, db_s, *rest = rest
    more, (full, done) = extras.split_scratch(rest, more)
    at = _unravel(lax.axis_index("cta"), places)

    def step(i, total):
      ahead = _unravel(i, shared)
      item, head, row, tile = (
        a if n == 1 else b if m == 1 else a * n + b
        for a, m, b, n in zip(at, places, ahead, shared, strict=True)
      )
      kv_head = lax.div(head, i32(N // K))
      first = row * rows
      here, there = pl.ds(first, rows), pl.ds(tile * columns, columns)
      bounds = extras.bounds(more, item, row, first)
      barrier = full.at[0]
      for g, s in (
        (q_g.at[item, here, head], q_s),
        (o_g.at[item, here, head], o_s),
        (l_g.at[item, head, here], l_s),
        (d_g.at[item, head, here], d_s),
      ):
        plgpu.copy_gmem_to_smem(g, s, barrier)
      for name, g, s in (("k", k_g, k_s), ("v", v_g, v_s)):
        extras.load_tail(
          more,
          name,
          g.at[item, there, kv_head],
          (item, kv_head),
          s,
          barrier,
          extras.ends(bounds, tile),
        )
      place = item, head, first
      extras.load_rows(more, 0, place, barrier)
      extras.load_columns(more, i32(0), place, tile * columns, barrier)
      plgpu.barrier_wait(barrier)
      shape = rows, columns
      wide = lambda ref: pc.widen(
        pc.load(ref, layout=pc.WGMMA.reduce(1)), shape
      )

      def both(s_acc, p_acc):
        plgpu.wgmma(s_acc, q_s, pc.transposed(k_s))
        plgpu.wgmma(p_acc, o_s, pc.transposed(v_s))
        keep = extras.visible(more, 0, i32(0), first, tile, bounds)
        p, _ = tile_weights(
          plgpu.wgmma_accumulator_load(s_acc, wait_n=1),
          wide(l_s),
          keep,
          scale,
          softcap,
          lambda x: extras.biased_logits(x, more, 0, i32(0)),
        )
        d_p = p_acc[...]
        if dropout:
          kept = extras.kept(dropout, more, 0, i32(0), first, tile)
          d_p = jnp.where(kept, d_p * (1 / (1 - dropout)), 0.0)
        return p * (d_p - wide(d_s))

      d_x = pl.run_scoped(both, *[plgpu.ACC(shape, f32)] * 2)
      # All have read what the next copies overwrite.
      plgpu.barrier_arrive(done.at[0])
      plgpu.barrier_wait(done.at[0])
      return total + d_x

    count = i32(math.prod(shared))
    if shared[2:] == (1, 1) and (not extras.moving or items == B):
      # The tile is visible to all it was added to, or to none.
      first = at[2] * rows
      bounds = extras.bounds(more, at[0] * (B // items), at[2], first)
      low, _, _, high = bounds.tiles
      count = jnp.where((at[3] >= low) & (at[3] < high), count, 0)
    total = pc.register_full((rows, columns), 0, f32, pc.WGMMA)
    total = lax.fori_loop(i32(0), count, step, total)
    db_s[...] = total.astype(out_dtype)
    plgpu.commit_smem()
    here = pl.ds(at[2] * rows, rows), pl.ds(at[3] * columns, columns)
    plgpu.copy_smem_to_gmem(db_s, db_g.at[at[0], at[1], *here])
    plgpu.wait_smem_to_gmem(0)

  tiled = lambda rows, width: pc.tiled((rows, width), dtype)
  out_shape = items, heads, places[2] * rows, places[3] * columns
  (total,) = pc.kernel(
    body,
    out=[jax.ShapeDtypeStruct(out_shape, out_dtype)],
    scratch=[
      tiled(rows, q.shape[3]),
      tiled(rows, v.shape[3]),
      tiled(columns, q.shape[3]),
      tiled(columns, v.shape[3]),
      pc.shared((rows,), f32),
      pc.shared((rows,), f32),
      pc.tiled((rows, columns), out_dtype),
      *extras.scratch.values(),
      pc.barriers(1, 6 + extras.row_copies + extras.column_copies),
      pc.barriers(1),
    ],
    grid={"cta": math.prod(places)},
    interpret=interpret,
  )(q, k, v, d_out, lse, delta, *extras.inputs.values())
  for axis, size in ((2, t), (3, s)):
    if size == 1:
      total = total.sum(axis=axis, keepdims=True)
  return total[:, :, :t, :s].astype(bias.dtype)


def _unravel(index: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
  """The place in an array of these sizes, the last axis first."""
  place = []
  for size in reversed(sizes):
    place.append(lax.rem(index, jnp.int32(size)))
    index = lax.div(index, jnp.int32(size))
  return place[::-1]
