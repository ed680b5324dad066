"""The backward kernels for Hopper: arXiv 2307.08691, algorithm 2, in two parts.

One kernel holds queries and streams keys and values by, for the gradient of the
queries; the other holds keys and values and streams queries by. Each gradient
is summed in one place and in one order, so results repeat bit for bit. Both
recompute the weights from the saved lse.
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
from multihead.ops.attention.mosaic_gpu.forward import order, padded, ring_slot

_LOG2E = math.log2(math.e)


def row_terms(
  out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """What the kernels need of every row, both [B, N, T] in float32.

  Returns:
    lse in base 2, +inf for a row that sees nothing, so that its weights are 0;
    and what each weight's gradient is less than d_out . v.
  """
  f32 = jnp.float32
  delta = jnp.sum(out.astype(f32) * d_out.astype(f32), axis=-1)
  delta = delta.transpose(0, 2, 1) - d_lse
  empty = lse == -jnp.inf
  return (
    jnp.where(empty, jnp.inf, lse * _LOG2E),
    jnp.where(empty, 0.0, delta),
  )


def _pad_rows(x: jax.Array, rows: int, value: float) -> jax.Array:
  more = -x.shape[2] % rows
  return jnp.pad(x, ((0, 0), (0, 0), (0, more)), constant_values=value)


def _loops(bounds, see, edges, step, carry):
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


def _weights(s, lse, keep, scale, softcap):
  """Weights of a tile, and the slope of softcap or None."""
  slope = None
  if softcap is not None:
    s = jnp.tanh(s * (scale / softcap))
    slope = 1.0 - s * s
  factor = _LOG2E * (scale if softcap is None else softcap)
  p = jnp.exp2(s * factor - lse)
  if keep is not None:
    p = jnp.where(keep, p, 0.0)
  return p, slope


def query_gradient(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  d_out: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  *,
  scale: float,
  softcap: float | None,
  see: visibility.Visibility,
  config: blocks.Backward,
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
    scale: of the products, positive.
    softcap: bound of the logits or None.
    see: the visible part of the matrix.
    config: block sizes.
    interpret: None, or `pallas_compat.interpreter()`.
  """
  (B, T, N, H), K = q.shape, k.shape[2]
  q, k, v, d_out = (padded(x) for x in (q, k, v, d_out))
  S, width, v_width = k.shape[1], q.shape[3], v.shape[3]
  dtype, f32, i32 = q.dtype, jnp.float32, jnp.int32
  W, rows, columns = config.consumers, config.rows, config.columns
  stages, block = config.stages, config.consumers * config.rows
  row_tiles = -(-T // block)
  lse = _pad_rows(lse, block, jnp.inf)
  delta = _pad_rows(delta, block, 0.0)
  plan = order(
    B,
    N,
    N // K,
    row_tiles,
    S * (width + v_width) * 2,
    see.full,
    pc.cores() if config.persistent else None,
  )
  edges = visibility.edges(see, block, columns)
  edges = edges[0], True, edges[2]
  if see.full and see.S % columns == 0:
    edges = (False, False, False)

  def span(program, turn):
    item, head, row = plan.tile(program, turn)
    first = row * block
    bounds = visibility.column_tiles(see, first, block, columns)
    return item, head, first, [jnp.asarray(x, i32) for x in bounds]

  def body(q_g, k_g, v_g, o_g, l_g, d_g, dq_g, *scratch):
    q_s, o_s, k_s, v_s, l_s, d_s, *rest = scratch
    rows_full, rows_empty, k_full, k_empty, v_full, v_empty = rest
    program, w = lax.axis_index("cta"), lax.axis_index("wg")
    tiles = plan.count(program)

    def consume(turn, start):
      item, head, first, bounds = span(program, turn)
      first = first + w * rows
      plgpu.barrier_wait(rows_full.at[w])
      row = lambda ref: pc.load(ref.at[w], layout=pc.WGMMA.reduce(1))
      shape = (rows, columns)
      lse, delta = row(l_s), row(d_s)

      def step(masked):
        def run(i, dq):
          slot = ring_slot(start + i, stages)
          k_now, v_now = k_s.at[slot], v_s.at[slot]

          def weights(s):
            keep = None
            if masked:
              tile = bounds[3] - 1 - i
              keep = visibility.visible(
                see, first, tile * columns, rows, columns
              )
            return _weights(s, pc.widen(lse, shape), keep, scale, softcap)

          def gradient(p, slope, d_p):
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
      dq = _loops(bounds, see, edges, step, dq)
      q_s[w] = (dq * scale).astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        q_s.at[w], dq_g.at[item, pl.ds(first, rows), head]
      )
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.barrier_arrive(rows_empty.at[w])
      return start + (bounds[3] - bounds[0])

    def produce(turn, start):
      item, head, first, (low, _, _, high) = span(program, turn)
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

      def load(i, _):
        slot = ring_slot(start + i, stages)
        here = pl.ds((high - 1 - i) * columns, columns)
        for g, s, full, empty in (
          (k_g, k_s, k_full, k_empty),
          (v_g, v_s, v_full, v_empty),
        ):
          pl.when(start + i >= stages)(
            lambda empty=empty: plgpu.barrier_wait(empty.at[slot])
          )
          plgpu.copy_gmem_to_smem(
            g.at[item, here, kv_head], s.at[slot], full.at[slot]
          )
        return ()

      lax.fori_loop(i32(0), high - low, load, ())
      return start + high - low

    pc.roles(
      w,
      W,
      lambda: lax.fori_loop(i32(0), tiles, consume, i32(0)),
      lambda: _drain(
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
      pc.barriers(W, 4),
      pc.barriers(W),
      pc.barriers(stages),
      pc.barriers(stages, W),
      pc.barriers(stages),
      pc.barriers(stages, W),
    ],
    grid={"cta": plan.programs},
    warpgroups=W + 1,
    interpret=interpret,
  )(q, k, v, d_out, lse, delta)
  return dq[:, :T, :, :H]


def _drain(total, stages, ring, once):
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


def key_value_gradients(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  d_out: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  *,
  scale: float,
  softcap: float | None,
  see: visibility.Visibility,
  config: blocks.Backward,
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
    wanted,
    scale=scale,
    softcap=softcap,
    see=see,
    config=config,
    interpret=interpret,
  )
  if max(blocks.padded_width(x.shape[3]) for x in (k, v)) > 128:
    return *one("k"), *one("v")
  return one("k", "v")


def _key_value_kernel(
  arrays: tuple[jax.Array, ...],
  wanted: tuple[str, ...],
  *,
  scale: float,
  softcap: float | None,
  see: visibility.Visibility,
  config: blocks.Backward,
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
  lse = _pad_rows(lse, columns, jnp.inf)
  delta = _pad_rows(delta, columns, 0.0)
  # A row over the end has no weight: nothing needs to be masked there.
  sees = see.transposed(columns)
  plan = order(
    B,
    K,
    1,
    -(-S // block),
    T * group * (width + v_width) * 2,
    see.full,
    pc.cores() if config.persistent else None,
  )
  edges = (False, sees.right is not None, sees.left is not None)
  # Values come first: they are what the accumulators are in order.
  widths = [v_width] * want_v + [width] * want_k

  def span(program, turn):
    item, head, row = plan.tile(program, turn)
    if see.right is not None:
      # The first keys are seen by most rows.
      row = plan.row_tiles - 1 - row
    first = row * block
    bounds = visibility.column_tiles(sees, first, block, columns)
    return item, head, first, [jnp.asarray(x, i32) for x in bounds]

  def body(q_g, k_g, v_g, o_g, l_g, d_g, *rest):
    outputs, scratch = rest[: len(wanted)], rest[len(wanted) :]
    k_s, v_s, q_s, o_s, l_s, d_s, *rest = scratch
    rows_full, rows_empty, q_full, o_full, empty = rest
    program, w = lax.axis_index("cta"), lax.axis_index("wg")
    tiles = plan.count(program)

    def consume(turn, start):
      item, head, first, bounds = span(program, turn)
      first = first + w * rows
      count = bounds[3] - bounds[0]
      shape = (rows, columns)
      plgpu.barrier_wait(rows_full.at[w])

      def one_head(g, sums):
        begin = start + g * count

        def step(masked):
          def run(i, sums):
            slot = ring_slot(begin + i, stages)
            column = lambda ref: pc.widen_rows(
              pc.load(ref.at[slot], layout=pc.WGMMA.reduce(0), optimized=False),
              shape,
            )

            def weights(s):
              keep = None
              if masked:
                tile = bounds[3] - 1 - i
                keep = visibility.visible(
                  sees, first, tile * columns, rows, columns
                )
              return _weights(s, column(l_s), keep, scale, softcap)

            def gradient(p, slope, d_p):
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
            if masked or interpret is not None:

              def both(s_acc, p_acc=None):
                scores(s_acc, p_acc)
                p, slope = weights(s_acc[...])
                out = [narrow(p)] if want_v else []
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
                  plgpu.wgmma(accs[0], narrow(p), o_s.at[slot])
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

        return _loops(bounds, sees, edges, step, sums)

      sums = [pc.register_full((rows, n), 0, f32, pc.WGMMA) for n in widths]
      sums = lax.fori_loop(i32(0), i32(group), one_head, sums)
      if want_k:
        sums = [*sums[:-1], sums[-1] * scale]
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
      item, head, first, (low, _, _, high) = span(program, turn)
      count = high - low
      for i in range(W):
        here = pl.ds(first + i * rows, rows)
        pl.when(turn > 0)(lambda i=i: plgpu.barrier_wait(rows_empty.at[i]))
        for g, s in ((k_g, k_s), (v_g, v_s)):
          plgpu.copy_gmem_to_smem(
            g.at[item, here, head], s.at[i], rows_full.at[i]
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
          return ()

        return lax.fori_loop(i32(0), count, load, ())

      lax.fori_loop(i32(0), i32(group), one_head, ())
      return start + count * group

    pc.roles(
      w,
      W,
      lambda: lax.fori_loop(i32(0), tiles, consume, i32(0)),
      lambda: _drain(
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
      pc.barriers(W, 2),
      pc.barriers(W),
      pc.barriers(stages, 2),
      pc.barriers(stages, 2),
      pc.barriers(stages, W),
    ],
    grid={"cta": plan.programs},
    warpgroups=W + 1,
    interpret=interpret,
  )(q, k, v, d_out, lse, delta)
  dv = [results[0][:, :S, :, :Hv]] * want_v
  return *[results[-1][:, :S, :, :H]] * want_k, *dv
