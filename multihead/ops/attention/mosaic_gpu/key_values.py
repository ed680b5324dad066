"""The backward kernel for the gradients of keys and values; see backward.py."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from multihead.ops import pallas_compat as pc
from multihead.ops.attention.mosaic_gpu import blocks, visibility
from multihead.ops.attention.mosaic_gpu.backward import (
  drain,
  loops,
  pad_rows,
  tile_weights,
)
from multihead.ops.attention.mosaic_gpu.extras import Extras
from multihead.ops.attention.mosaic_gpu.forward import order, padded, ring_slot
from multihead.ops.attention.mosaic_gpu.limits import Limits, used_rows


def key_value_gradients(
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
) -> tuple[jax.Array, jax.Array]:
  """The gradients of k [B, S, K, H] and v [B, S, K, Hv]; arguments as above.

  Tiles stand transposed, [keys, queries], so that weights and their gradients
  go from registers into the products. The query heads that share a key head
  are summed here: none is repeated in memory. Wide heads take one kernel for
  each gradient, since both sums together do not fit in the registers.
  """
  one = lambda *wanted: _key_value_kernel(
    (q, k, v, d_out, lse, delta),
    limits,
    wanted,
    scale=scale,
    softcap=softcap,
    see=see,
    config=config,
    dropout=dropout,
    interpret=interpret,
  )
  if max(blocks.padded_width(x.shape[3]) for x in (k, v)) > 128:
    return *one("k"), *one("v")
  return one("k", "v")


def _key_value_kernel(
  arrays: tuple[jax.Array, ...],
  limits: Limits | None,
  wanted: tuple[str, ...],
  *,
  scale: float,
  softcap: float | None,
  see: visibility.Visibility,
  config: blocks.Backward,
  dropout: float,
  interpret: Any,
) -> tuple[jax.Array, ...]:
  """The gradients of those of k and v that are wanted; arrays as above."""
  q, k, v, d_out, lse, delta = arrays
  want_k, want_v = "k" in wanted, "v" in wanted
  (_, T, N, H), (B, S, K, Hv) = q.shape, v.shape
  q, k, v, d_out = (padded(x) for x in (q, k, v, d_out))
  width, v_width = q.shape[3], v.shape[3]
  dtype, f32, i32 = q.dtype, jnp.float32, jnp.int32
  W, rows, columns = config.consumers, config.rows, config.columns
  stages, block = config.stages, config.consumers * config.rows
  group = N // K
  lse = pad_rows(lse, columns, jnp.inf)
  delta = pad_rows(delta, columns, 0.0)
  # A row over the end has no weight: nothing needs to be masked there.
  sees = see.transposed(columns)
  extras = Extras(sees, limits, B, config, transposed=True)
  plan = order(
    B,
    K,
    1,
    -(-S // block),
    T * group * (width + v_width) * 2,
    see.full and not extras.moving,
    pc.cores() if config.persistent else None,
  )
  edges = (False, sees.right is not None, sees.left is not None)
  if extras.segments:
    edges = (False, True, True)
  # Values come first: they are what the accumulators are in order.
  widths = [v_width] * want_v + [width] * want_k

  def span(program, turn, more):
    item, head, row = plan.tile(program, turn)
    if see.right is not None:
      # The first keys are seen by most rows.
      row = plan.row_tiles - 1 - row
    first = row * block
    return item, head, first, extras.bounds(more, item, row, first)

  def body(q_g, k_g, v_g, o_g, l_g, d_g, *rest):
    more, rest = extras.split(rest)
    outputs, rest = rest[: len(wanted)], rest[len(wanted) :]
    k_s, v_s, q_s, o_s, l_s, d_s, *rest = rest
    more, rest = extras.split_scratch(rest, more)
    rows_full, rows_empty, q_full, o_full, empty = rest
    program, w = lax.axis_index("cta"), lax.axis_index("wg")
    tiles = plan.count(program)

    def consume(turn, start):
      item, head, first, bounds = span(program, turn, more)
      first = first + w * rows
      low, _, _, high = bounds.tiles
      count = high - low
      shape = (rows, columns)
      plgpu.barrier_wait(rows_full.at[w])

      def one_head(g, sums):
        begin = start + g * count

        def step(masked):
          def run(i, sums):
            slot = ring_slot(begin + i, stages)
            tile = high - 1 - i
            bias = None
            if extras.biased:
              bias = lambda s: extras.biased_logits(s, more, w, slot)
            column = lambda ref: pc.widen_rows(
              pc.load(ref.at[slot], layout=pc.WGMMA.reduce(0), optimized=False),
              shape,
            )

            def weights(s):
              keep = None
              if masked:
                keep = extras.visible(more, w, slot, first, tile, bounds)
              return tile_weights(s, column(l_s), keep, scale, softcap, bias)

            def kept():
              return extras.kept(dropout, more, w, slot, first, tile)

            def dropped(p):
              return jnp.where(kept(), p, 0.0) if dropout else p

            def gradient(p, slope, d_p):
              if dropout:
                d_p = dropped(d_p * (1 / (1 - dropout)))
              d_x = p * (d_p - column(d_s))
              d_x = d_x if slope is None else d_x * slope
              return narrow(d_x)

            def narrow(p):
              return lax.optimization_barrier(p.astype(dtype))

            plgpu.barrier_wait(q_full.at[slot])

            def scores(s_acc, p_acc=None):
              plgpu.wgmma(s_acc, k_s.at[w], pc.transposed(q_s.at[slot]))
              plgpu.barrier_wait(o_full.at[slot])
              if want_k:
                plgpu.wgmma(p_acc, v_s.at[w], pc.transposed(o_s.at[slot]))

            tiles_acc = [plgpu.ACC(shape, f32)] * (1 + want_k)
            if masked or dropout or interpret is not None:

              def both(s_acc, p_acc=None):
                scores(s_acc, p_acc)
                p, slope = weights(s_acc[...])
                out = [narrow(dropped(p))] if want_v else []
                return out + (
                  [gradient(p, slope, p_acc[...])] if want_k else []
                )

              lefts = pl.run_scoped(both, *tiles_acc)
              rights = [o_s] * want_v + [q_s] * want_k
              sums = [
                pc.product(total, left, right.at[slot], interpret)
                for total, left, right in zip(sums, lefts, rights, strict=True)
              ]
            else:

              def all_products(*accs):
                tile, accs = accs[: 1 + want_k], list(accs[1 + want_k :])
                for acc, value in zip(accs, sums, strict=True):
                  acc[...] = value
                scores(*tile)
                p, slope = weights(
                  plgpu.wgmma_accumulator_load(tile[0], wait_n=int(want_k))
                )
                d_p = tile[1][...] if want_k else None
                if want_v:
                  plgpu.wgmma(accs[0], narrow(dropped(p)), o_s.at[slot])
                if want_k:
                  plgpu.wgmma(accs[-1], gradient(p, slope, d_p), q_s.at[slot])
                return [acc[...] for acc in accs]

              sums = pl.run_scoped(
                all_products,
                *tiles_acc,
                *[plgpu.ACC((rows, n), f32) for n in widths],
              )
            plgpu.barrier_arrive(empty.at[slot])
            return sums

          return run

        return loops(bounds.tiles, sees, edges, step, sums)

      sums = [pc.register_full((rows, n), 0, f32, pc.WGMMA) for n in widths]
      sums = lax.fori_loop(i32(0), i32(group), one_head, sums)
      if want_k:
        sums = [*sums[:-1], sums[-1] * scale]
      if dropout and want_v:
        sums = [sums[0] * (1 / (1 - dropout)), *sums[1:]]
      if extras.lengths:
        # Keys past the length, which may be NaN, are in these rows alone.
        used = used_rows(first, rows, bounds.length)
        sums = [jnp.where(pc.widen(used, x.shape), x, 0.0) for x in sums]
      staged = [v_s] * want_v + [k_s] * want_k
      for total, s in zip(sums, staged, strict=True):
        s[w] = total.astype(dtype)
      plgpu.commit_smem()
      for s, g in zip(staged, outputs, strict=True):
        plgpu.copy_smem_to_gmem(s.at[w], g.at[item, pl.ds(first, rows), head])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.barrier_arrive(rows_empty.at[w])
      return start + count * group

    def produce(turn, start):
      item, head, first, bounds = span(program, turn, more)
      low, _, _, high = bounds.tiles
      count = high - low
      for i in range(W):
        here = pl.ds(first + i * rows, rows)
        pl.when(turn > 0)(lambda i=i: plgpu.barrier_wait(rows_empty.at[i]))
        for g, s in ((k_g, k_s), (v_g, v_s)):
          plgpu.copy_gmem_to_smem(
            g.at[item, here, head], s.at[i], rows_full.at[i]
          )
        extras.load_rows(
          more, i, (item, head, first + i * rows), rows_full.at[i]
        )

      def one_head(g, _):
        q_head = head * group + g

        def load(i, _):
          index = start + g * count + i
          slot = ring_slot(index, stages)
          here = pl.ds((high - 1 - i) * columns, columns)
          pl.when(index >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
          for source, s, full in (
            (q_g.at[item, here, q_head], q_s, q_full),
            (l_g.at[item, q_head, here], l_s, q_full),
            (o_g.at[item, here, q_head], o_s, o_full),
            (d_g.at[item, q_head, here], d_s, o_full),
          ):
            plgpu.copy_gmem_to_smem(source, s.at[slot], full.at[slot])
          extras.load_columns(
            more,
            slot,
            (item, q_head, first),
            (high - 1 - i) * columns,
            q_full.at[slot],
          )
          return ()

        return lax.fori_loop(i32(0), count, load, ())

      lax.fori_loop(i32(0), i32(group), one_head, ())
      return start + count * group

    pc.roles(
      w,
      W,
      lambda: lax.fori_loop(i32(0), tiles, consume, i32(0)),
      lambda: drain(
        lax.fori_loop(i32(0), tiles, produce, i32(0)),
        stages,
        (empty,),
        [rows_empty.at[i] for i in range(W)],
      ),
    )

  outputs = [v] * want_v + [k] * want_k
  results = pc.kernel(
    body,
    out=[jax.ShapeDtypeStruct(x.shape, dtype) for x in outputs],
    scratch=[
      pc.tiled((W, rows, width), dtype),
      pc.tiled((W, rows, v_width), dtype),
      pc.tiled((stages, columns, width), dtype),
      pc.tiled((stages, columns, v_width), dtype),
      pc.shared((stages, columns), f32),
      pc.shared((stages, columns), f32),
      *extras.scratch.values(),
      pc.barriers(W, 2 + extras.row_copies),
      pc.barriers(W),
      pc.barriers(stages, 2 + extras.column_copies),
      pc.barriers(stages, 2),
      pc.barriers(stages, W),
    ],
    grid={"cta": plan.programs},
    warpgroups=W + 1,
    interpret=interpret,
  )(q, k, v, d_out, lse, delta, *extras.inputs.values())
  dv = [results[0][:, :S, :, :Hv]] * want_v
  return *[results[-1][:, :S, :, :H]] * want_k, *dv
