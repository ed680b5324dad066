"""The backward kernels for Hopper: arXiv 2307.08691, algorithm 2, in two parts.

One kernel, here, holds queries and streams keys and values by, for the gradient
of the queries; the other (key_values.py) holds keys and values and streams
queries by. Each gradient is summed in one place and in one order, so results
repeat bit for bit. Both recompute the weights from the saved lse.
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
from multihead.ops.attention.mosaic_gpu.extras import Extras
from multihead.ops.attention.mosaic_gpu.forward import order, padded, ring_slot
from multihead.ops.attention.mosaic_gpu.limits import Limits

_LOG2E = math.log2(math.e)


def pad_rows(x: jax.Array, rows: int, value: float) -> jax.Array:
  """Fills row terms [B, N, T] to a multiple of `rows`."""
  more = -x.shape[2] % rows
  return jnp.pad(x, ((0, 0), (0, 0), (0, more)), constant_values=value)


def loops(bounds, see, edges, step, carry):
  """Runs `step(masked)(i, carry)` over the tiles from the right to the left."""
  low, free_low, free_high, high = bounds
  first, more, left = edges
  begin = jnp.int32(0)
  if first or more:
    carry = lax.fori_loop(begin, high - free_high, step(True), carry)
    begin = high - free_high
  end = high - free_low if left else high - low
  carry = lax.fori_loop(begin, end, step(False), carry)
  if left:
    carry = lax.fori_loop(end, high - low, step(True), carry)
  return carry


def tile_weights(s, lse, keep, scale, softcap, bias=None):
  """Weights of a tile, and the slope of softcap or None.

  `bias`, a function or None, adds what is added to the logits in base 2.
  """
  slope = None
  if softcap is not None:
    s = jnp.tanh(s * (scale / softcap))
    slope = 1.0 - s * s
  factor = _LOG2E * (scale if softcap is None else softcap)
  s = s * factor
  if bias is not None:
    s = bias(s)
  p = jnp.exp2(s - lse)
  if keep is not None:
    p = jnp.where(keep, p, 0.0)
  return p, slope


def drain(total, stages, ring, once):
  """Waits for every phase nobody waited for: the last turn of each ring."""
  for i in range(stages):
    for empty in ring:
      pl.when(total > i)(
        lambda i=i, empty=empty: plgpu.barrier_wait(
          empty.at[ring_slot(total - 1 - i, stages)]
        )
      )
  for barrier in once:
    plgpu.barrier_wait(barrier)


def query_gradient(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  d_out: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  limits: Limits | None = None,
  *,
  scale: float,
  softcap: float | None,
  see: visibility.Visibility,
  config: blocks.Backward,
  dropout: float = 0.0,
  interpret: Any = None,
) -> jax.Array:
  """The gradient of q [B, T, N, H].

  Args:
    q: [B, T, N, H].
    k: [B, S, K, H].
    v: [B, S, K, Hv].
    d_out: [B, T, N, Hv].
    lse: [B, N, T], as `row_terms` gives it.
    delta: [B, N, T], likewise.
    limits: what else decides over weights.
    scale: of the products, positive.
    softcap: bound of the logits or None.
    see: the visible part of the matrix.
    config: block sizes.
    dropout: share of the weights that was dropped.
    interpret: None, or `pallas_compat.interpreter()`.
  """
  (B, T, N, H), K = q.shape, k.shape[2]
  q, k, v, d_out = (padded(x) for x in (q, k, v, d_out))
  S, width, v_width = k.shape[1], q.shape[3], v.shape[3]
  dtype, f32, i32 = q.dtype, jnp.float32, jnp.int32
  W, rows, columns = config.consumers, config.rows, config.columns
  stages, block = config.stages, config.consumers * config.rows
  row_tiles = -(-T // block)
  lse = pad_rows(lse, block, jnp.inf)
  delta = pad_rows(delta, block, 0.0)
  extras = Extras(see, limits, B, config, keys=(k, v))
  plan = order(
    B,
    N,
    N // K,
    row_tiles,
    S * (width + v_width) * 2,
    see.full and not extras.moving,
    pc.cores() if config.persistent else None,
  )
  edges = extras.edges
  edges = edges[0], True, edges[2]
  if not extras.moving and see.full and see.S % columns == 0:
    edges = (False, False, False)

  def span(program, turn, more):
    item, head, row = plan.tile(program, turn)
    first = row * block
    return item, head, first, extras.bounds(more, item, row, first)

  def body(q_g, k_g, v_g, o_g, l_g, d_g, *rest):
    more, rest = extras.split(rest)
    dq_g, q_s, o_s, k_s, v_s, l_s, d_s, *rest = rest
    more, rest = extras.split_scratch(rest, more)
    rows_full, rows_empty, k_full, k_empty, v_full, v_empty = rest
    program, w = lax.axis_index("cta"), lax.axis_index("wg")
    tiles = plan.count(program)

    def consume(turn, start):
      item, head, first, bounds = span(program, turn, more)
      first = first + w * rows
      plgpu.barrier_wait(rows_full.at[w])
      row = lambda ref: pc.load(ref.at[w], layout=pc.WGMMA.reduce(1))
      shape = (rows, columns)
      lse, delta = row(l_s), row(d_s)
      low, _, _, high = bounds.tiles

      def step(masked):
        def run(i, dq):
          slot = ring_slot(start + i, stages)
          k_now, v_now = k_s.at[slot], v_s.at[slot]
          tile = high - 1 - i
          bias = None
          if extras.biased:
            bias = lambda s: extras.biased_logits(s, more, w, slot)

          def weights(s):
            keep = None
            if masked:
              keep = extras.visible(more, w, slot, first, tile, bounds)
            return tile_weights(
              s, pc.widen(lse, shape), keep, scale, softcap, bias
            )

          def gradient(p, slope, d_p):
            if dropout:
              keep = extras.kept(dropout, more, w, slot, first, tile)
              d_p = jnp.where(keep, d_p * (1 / (1 - dropout)), 0.0)
            d_s = p * (d_p - pc.widen(delta, shape))
            d_s = d_s if slope is None else d_s * slope
            return lax.optimization_barrier(d_s.astype(dtype))

          plgpu.barrier_wait(k_full.at[slot])

          def both(s_acc, p_acc):
            plgpu.wgmma(s_acc, q_s.at[w], pc.transposed(k_now))
            plgpu.barrier_wait(v_full.at[slot])
            plgpu.wgmma(p_acc, o_s.at[w], pc.transposed(v_now))
            p, slope = weights(plgpu.wgmma_accumulator_load(s_acc, wait_n=1))
            return gradient(p, slope, p_acc[...])

          d_s = pl.run_scoped(both, *[plgpu.ACC(shape, f32)] * 2)
          plgpu.barrier_arrive(v_empty.at[slot])
          dq = pc.product(dq, d_s, k_now, interpret)
          plgpu.barrier_arrive(k_empty.at[slot])
          return dq

        return run

      dq = pc.register_full((rows, width), 0, f32, pc.WGMMA)
      dq = loops(bounds.tiles, see, edges, step, dq)
      q_s[w] = (dq * scale).astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        q_s.at[w], dq_g.at[item, pl.ds(first, rows), head]
      )
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.barrier_arrive(rows_empty.at[w])
      return start + (high - low)

    def produce(turn, start):
      item, head, first, bounds = span(program, turn, more)
      low, _, _, high = bounds.tiles
      kv_head = lax.div(head, i32(N // K))
      for i in range(W):
        here = pl.ds(first + i * rows, rows)
        pl.when(turn > 0)(lambda i=i: plgpu.barrier_wait(rows_empty.at[i]))
        for g, s in (
          (q_g.at[item, here, head], q_s),
          (o_g.at[item, here, head], o_s),
          (l_g.at[item, head, here], l_s),
          (d_g.at[item, head, here], d_s),
        ):
          plgpu.copy_gmem_to_smem(g, s.at[i], rows_full.at[i])
        extras.load_rows(
          more, i, (item, head, first + i * rows), rows_full.at[i]
        )

      def load(i, _):
        slot = ring_slot(start + i, stages)
        here = pl.ds((high - 1 - i) * columns, columns)
        tile = high - 1 - i
        for name, g, s, full, empty in (
          ("k", k_g, k_s, k_full, k_empty),
          ("v", v_g, v_s, v_full, v_empty),
        ):
          pl.when(start + i >= stages)(
            lambda empty=empty: plgpu.barrier_wait(empty.at[slot])
          )
          extras.load_tail(
            more,
            name,
            g.at[item, here, kv_head],
            (item, kv_head),
            s.at[slot],
            full.at[slot],
            extras.ends(bounds, tile),
          )
        extras.load_columns(
          more, slot, (item, head, first), tile * columns, k_full.at[slot]
        )
        return ()

      lax.fori_loop(i32(0), high - low, load, ())
      return start + high - low

    pc.roles(
      w,
      W,
      lambda: lax.fori_loop(i32(0), tiles, consume, i32(0)),
      lambda: drain(
        lax.fori_loop(i32(0), tiles, produce, i32(0)),
        stages,
        (k_empty, v_empty),
        [rows_empty.at[i] for i in range(W)],
      ),
    )

  (dq,) = pc.kernel(
    body,
    out=[jax.ShapeDtypeStruct(q.shape, dtype)],
    scratch=[
      pc.tiled((W, rows, width), dtype),
      pc.tiled((W, rows, v_width), dtype),
      pc.tiled((stages, columns, width), dtype),
      pc.tiled((stages, columns, v_width), dtype),
      pc.shared((W, rows), f32),
      pc.shared((W, rows), f32),
      *extras.scratch.values(),
      pc.barriers(W, 4 + extras.row_copies),
      pc.barriers(W),
      pc.barriers(stages, 1 + extras.column_copies),
      pc.barriers(stages, W),
      pc.barriers(stages),
      pc.barriers(stages, W),
    ],
    grid={"cta": plan.programs},
    warpgroups=W + 1,
    interpret=interpret,
  )(q, k, v, d_out, lse, delta, *extras.inputs.values())
  return dq[:, :T, :, :H]
