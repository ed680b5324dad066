"""All gradients in one kernel for Hopper, five products a tile.

Weights and their gradients are computed once. A program holds keys and values
and streams queries by, as the kernel for the gradients of keys and values does.
What its keys give to the gradient of the queries is added to float32 sums in
memory, by the warpgroups in turn: one does so for all keys of a program while
the other goes on with the next queries. Programs add in the order in which they
come, so sums differ from run to run in their last bits: this serves calls that
need not repeat bit for bit.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from multihead.ops import manual_axes
from multihead.ops import pallas_compat as pc
from multihead.ops.attention.mosaic_gpu import backward, blocks, visibility
from multihead.ops.attention.mosaic_gpu.forward import (
  _divmod,
  order,
  padded,
  ring_slot,
)

# Warpgroups that compute, the keys of each, and the queries of a tile.
_CONSUMERS = 2
_ROWS = 64
_COLUMNS = 64
# The least length that was timed.
_SHORTEST = 2048


def choose(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  see: visibility.Visibility,
  softcap: float | None,
) -> blocks.Fused | None:
  """Block sizes for a call of the kind compared on a GPU, else None.

  The kernel computes more than that, as its tests in the interpreter show:
  grouped heads, any length, windows, softcap, float16, head dims of 64.

  Args:
    q: [B, T, N, H].
    k: [B, S, K, H].
    v: [B, S, K, Hv].
    see: the visible part of the matrix.
    softcap: bound of the logits or None.
  """
  # The first that lets a kernel add to its input.
  if pc.VERSION < (0, 11):
    return None
  causal = see.left is None and see.right == 0 and see.offset == 0
  if not (
    q.dtype == jnp.bfloat16
    and q.shape == k.shape
    and see.T % (_CONSUMERS * _ROWS) == 0
    and see.T >= _SHORTEST
    and (see.full or causal)
    and softcap is None
  ):
    return None
  return blocks.fused(q.shape[3], v.shape[3], see.full)


def gradients(
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
  config: blocks.Fused,
  interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The gradients of q [B, T, N, H], k [B, S, K, H] and v [B, S, K, Hv].

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
    config: block sizes, those of `blocks.fused`.
    interpret: None, or `pallas_compat.interpreter()`.
  """
  (B, T, N, H), (_, S, K, Hv) = q.shape, v.shape
  q, k, v, d_out = (padded(x) for x in (q, k, v, d_out))
  width, v_width = q.shape[3], v.shape[3]
  dtype, f32, i32 = q.dtype, jnp.float32, jnp.int32
  W, rows, columns, stages = _CONSUMERS, _ROWS, _COLUMNS, config.stages
  block, group = W * rows, N // K
  lse = backward.pad_rows(lse, columns, jnp.inf)
  delta = backward.pad_rows(delta, columns, 0.0)
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
  tail = S % block != 0
  edges = (False, tail or sees.right is not None, sees.left is not None)

  def span(program, turn):
    item, head, row = plan.tile(program, turn)
    if see.right is not None:
      # The first keys are seen by most rows.
      row = plan.row_tiles - 1 - row
    first = row * block
    bounds = visibility.column_tiles(sees, first, block, columns)
    low, free_low, free_high, high = (jnp.asarray(x, i32) for x in bounds)
    if tail:
      # Keys past the end: no tile is free of masks.
      over = first + block > S
      free_low = jnp.where(over, low, free_low)
      free_high = jnp.where(over, low, free_high)
    return item, head, first, (low, free_low, free_high, high)

  def body(q_g, k_g, v_g, o_g, l_g, d_g, sum_g, dk_g, dv_g, *scratch):
    k_s, v_s, q_s, o_s, l_s, d_s, x_s, *rest = scratch
    rows_full, rows_empty, q_full, o_full, empty, x_full, x_empty, met = rest
    program, me = lax.axis_index("cta"), lax.axis_index("wg")
    tiles = plan.count(program)

    def consume(turn, start):
      item, head, first, bounds = span(program, turn)
      first = first + me * rows
      count = bounds[3] - bounds[0]
      shape = (rows, columns)
      plgpu.barrier_wait(rows_full.at[me])

      def step(masked, g, products):
        begin = start + g * count

        def run(i, carry):
          index = begin + i
          slot = ring_slot(index, stages)
          tile = bounds[3] - 1 - i
          # Whose turn it is with the gradient of the queries, and its buffer.
          turn = ring_slot(index, W)
          # Opaque to the compiler. It would else keep the addresses of all
          # operands over the loop, in more registers than there are.
          w, zero = lax.optimization_barrier((me, i32(0)))
          column = lambda ref: pc.widen_rows(
            pc.load(ref.at[slot], layout=pc.WGMMA.reduce(0), optimized=False),
            shape,
          )

          def narrow(x):
            return lax.optimization_barrier(x.astype(dtype))

          def both(s_acc, p_acc):
            plgpu.barrier_wait(q_full.at[slot])
            plgpu.wgmma(s_acc, k_s.at[w], pc.transposed(q_s.at[slot]))
            plgpu.barrier_wait(o_full.at[slot])
            plgpu.wgmma(p_acc, v_s.at[w], pc.transposed(o_s.at[slot]))
            s, keep = products.load(s_acc, after=1), None
            if masked:
              keep = _visible(sees, first, tile * columns, shape, tail)
            p, slope = backward.tile_weights(
              s, column(l_s), keep, scale, softcap
            )
            new = products.add(carry, 0, narrow(p), o_s.at[slot])
            d_x = p * (products.load(p_acc, after=1) - column(d_s))
            return narrow(d_x if slope is None else d_x * slope), new

          d_x, carry = pl.run_scoped(both, *[plgpu.ACC(shape, f32)] * 2)
          # Who takes a buffer must have read what stood there.
          pl.when((index >= W) & (w != turn))(
            lambda: plgpu.barrier_wait(x_empty.at[turn])
          )
          x_s[turn * W + w] = d_x
          plgpu.commit_smem()
          # From shared memory: with the left operand in registers these
          # products and those below would wait for one another.
          carry = products.add(carry, 1, x_s.at[turn * W + w], q_s.at[slot])
          pl.when(w != turn)(lambda: plgpu.barrier_arrive(x_full.at[turn]))

          @pl.when(w == turn)
          def _():
            plgpu.barrier_wait(x_full.at[turn])

            def queries(acc):
              for other in range(W):
                plgpu.wgmma(
                  acc,
                  pc.transposed(x_s.at[turn * W + zero + other]),
                  k_s.at[zero + other],
                )
              place = sum_g.at[item, head * group + g, tile]
              _add(place, acc[...], interpret)

            pl.run_scoped(queries, plgpu.ACC((columns, width), f32))
            plgpu.barrier_arrive(x_empty.at[turn])

          products.wait()
          plgpu.barrier_arrive(empty.at[slot])
          return carry

        return run

      def all_heads(products, carry):
        return lax.fori_loop(
          i32(0),
          i32(group),
          lambda g, carry: backward.loops(
            bounds, sees, edges, lambda masked: step(masked, g, products), carry
          ),
          carry,
        )

      kind = _Products if interpret is None else _Interpreted
      dv, dk = kind.run(all_heads, ((rows, v_width), (rows, width)))
      # Nobody reads these keys any more.
      plgpu.barrier_arrive(met.at[0])
      plgpu.barrier_wait(met.at[0])
      v_s[me] = dv.astype(dtype)
      k_s[me] = (dk * scale).astype(dtype)
      plgpu.commit_smem()
      here = pl.ds(first, rows)
      plgpu.copy_smem_to_gmem(v_s.at[me], dv_g.at[item, here, head])
      plgpu.copy_smem_to_gmem(k_s.at[me], dk_g.at[item, here, head])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.barrier_arrive(rows_empty.at[me])
      return start + count * group

    def consumer():
      total = lax.fori_loop(i32(0), tiles, consume, i32(0))
      # Nobody may leave a barrier behind whose phase nobody waited for.
      pl.when(total > 1 - me)(lambda: plgpu.barrier_wait(x_empty.at[1 - me]))

    def produce(turn, start):
      item, head, first, (low, _, _, high) = span(program, turn)
      count = high - low
      for i in range(W):
        here = pl.ds(first + i * rows, rows)
        pl.when(turn > 0)(lambda i=i: plgpu.barrier_wait(rows_empty.at[i]))
        for source, s in ((k_g, k_s), (v_g, v_s)):
          plgpu.copy_gmem_to_smem(
            source.at[item, here, head], s.at[i], rows_full.at[i]
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
      me,
      W,
      consumer,
      lambda: backward.drain(
        lax.fori_loop(i32(0), tiles, produce, i32(0)),
        stages,
        (empty,),
        [rows_empty.at[i] for i in range(W)],
      ),
    )

  tiles = B, N, -(-T // columns), columns * width
  # Inside shard_map they do differ between shards, as `cast` says below: a
  # kernel takes no reference that is said to.
  sums = jax.new_ref(jnp.zeros(tiles, f32))
  dk, dv = pc.kernel(
    body,
    out=[jax.ShapeDtypeStruct(x.shape, dtype) for x in (k, v)],
    scratch=[
      pc.tiled((W, rows, width), dtype),
      pc.tiled((W, rows, v_width), dtype),
      pc.tiled((stages, columns, width), dtype),
      pc.tiled((stages, columns, v_width), dtype),
      pc.shared((stages, columns), f32),
      pc.shared((stages, columns), f32),
      pc.tiled((W * W, rows, columns), dtype),
      pc.barriers(W, 2),
      pc.barriers(W),
      pc.barriers(stages, 2),
      pc.barriers(stages, 2),
      pc.barriers(stages, W),
      pc.barriers(W),
      pc.barriers(W),
      pc.barriers(1, W),
    ],
    grid={"cta": plan.programs},
    warpgroups=W + 1,
    interpret=interpret,
  )(q, k, v, d_out, lse, delta, sums)
  sums = manual_axes.cast(jax.freeze(sums), manual_axes.varying(dk))
  dq = _scaled(sums, q.shape, scale, dtype, interpret)
  return dq[:, :T, :, :H], dk[:, :S, :, :H], dv[:, :S, :, :Hv]


def _visible(sees, first, column, shape, tail):
  """Which elements of a tile [keys, queries] are visible.

  With `tail` some keys of the tile may not exist.
  """
  keep = visibility.visible(sees, first, column, *shape)
  if not tail:
    return keep
  row = plgpu.broadcasted_iota(
    jnp.int32, shape[:1], 0, layout=pc.WGMMA.reduce(1)
  )
  exists = pc.widen(row < sees.T - first, shape)
  return exists if keep is None else keep & exists


class _Products:
  """Sums that stay in the accumulators of products over all steps.

  A carry goes through the loops around them; here it is empty.
  """

  def __init__(self, sums):
    self._sums = sums

  @classmethod
  def run(cls, body, shapes):
    """The sums, of shapes `shapes`, at the end of `body(products, carry)`."""

    def scoped(*sums):
      body(cls(sums), ())
      return [acc[...] for acc in sums]

    return pl.run_scoped(scoped, *[plgpu.ACC(x, jnp.float32) for x in shapes])

  def add(self, carry, i, left, right):
    """Adds left @ right to the i-th sum."""
    plgpu.wgmma(self._sums[i], left, right)
    return carry

  def load(self, acc, after):
    """What an accumulator holds; `after` products issued later may run on."""
    return plgpu.wgmma_accumulator_load(acc, wait_n=after)

  def wait(self):
    """Waits for all products."""
    plgpu.wgmma_wait(0)


class _Interpreted:
  """The same on a CPU: the carry holds the sums."""

  @classmethod
  def run(cls, body, shapes):
    zero = lambda x: pc.register_full(x, 0, jnp.float32, pc.WGMMA)
    return body(cls(), tuple(map(zero, shapes)))

  def add(self, carry, i, left, right):
    new = pc.product(carry[i], left[...], right, "interpreted")
    return *carry[:i], new, *carry[i + 1 :]

  def load(self, acc, after):
    del after
    return acc[...]

  def wait(self):
    pass


# Where the first 16 bytes of a thread stand, from the start of a block.
_ADDRESS = (
  "{{ .reg .u32 t; .reg .u64 a; mov.u32 t, %tid.x; and.b32 t, t, 127; "
  "cvta.to.global.u64 a, ${}; mad.wide.u32 a, t, 16, a; "
)


def _add(place, x, interpret):
  """Adds a block [64, width] in registers to as many numbers in memory.

  They stand in the order in which threads hold them, so that each thread adds
  16 bytes at a time and a warp 512 in a row. See `_unfold`.
  """
  if interpret is not None:
    place[...] = place[...] + _fold(x)
    return

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), pc.WGMMA))
  def emit(ctx, place, x):
    del ctx
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    at = lambda e: utils.c(e, ir.IntegerType.get_signless(32))
    pairs = [
      [llvm.extractelement(pair, at(e)) for e in range(2)]
      for pair in x.registers.flat
    ]
    adds, numbers = [], []
    for i in range(0, len(pairs), 4):
      for r in range(2):
        # Columns 4 i + (0, 1, 8, 9) of row r of the two of this thread.
        numbers += [*pairs[i + r], *pairs[i + 2 + r]]
        names = ", ".join(f"${len(numbers) - 3 + j}" for j in range(4))
        adds.append(
          f"red.global.add.v4.f32 [a+{2048 * len(adds)}], {{{names}}};"
        )
    llvm.inline_asm(
      ir.Type.parse("!llvm.void"),
      [utils.memref_ptr(place), *numbers],
      _ADDRESS.format(0) + " ".join(adds) + " }",
      "l" + ",f" * len(numbers),
      has_side_effects=True,
    )

  emit(place, x)


# How threads hold a block: row 16 warp + 8 r + lane, column 16 i + 8 j +
# 2 pair + e stands at i, r, warp, lane, pair, j, e.
_AS_HELD = (3, 1, 0, 2, 5, 4, 6)


def _axes(width: int) -> tuple[int, ...]:
  """Sizes of warp, r, lane and of i, j, pair, e."""
  return 4, 2, 8, width // 16, 2, 4, 2


def _fold(x: jax.Array) -> jax.Array:
  """A block [64, width] as its threads hold it, flat."""
  return x.reshape(_axes(x.shape[1])).transpose(_AS_HELD).reshape(-1)


def _unfold(x: jax.Array) -> jax.Array:
  """What `_fold` has made flat."""
  sizes = _axes(x.size // _COLUMNS)
  x = x.reshape([sizes[i] for i in _AS_HELD])
  x = x.transpose([_AS_HELD.index(i) for i in range(7)])
  return x.reshape(_COLUMNS, -1)


def _scaled(sums, shape, scale, dtype, interpret):
  """The gradient of the queries, of `shape`, from blocks [B, N, tiles, -1]."""
  B, N, tiles, _ = sums.shape
  width = shape[3]

  def body(sum_g, out_g, out_s):
    rest, tile = _divmod(lax.axis_index("cta"), tiles)
    item, head = _divmod(rest, N)
    x = _load(sum_g.at[item, head, tile], width, interpret)
    out_s[...] = (x * scale).astype(dtype)
    plgpu.commit_smem()
    here = pl.ds(tile * _COLUMNS, _COLUMNS)
    plgpu.copy_smem_to_gmem(out_s, out_g.at[item, here, head])
    plgpu.wait_smem_to_gmem(0)

  (out,) = pc.kernel(
    body,
    out=[jax.ShapeDtypeStruct(shape, dtype)],
    scratch=[pc.tiled((_COLUMNS, width), dtype)],
    grid={"cta": B * N * tiles},
    interpret=interpret,
  )(sums)
  return out


def _load(place, width, interpret):
  """The block [64, width] that `_add` has summed at a place, in registers."""
  if interpret is not None:
    return _unfold(place[...])

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),),
    return_type=plgpu.ShapeDtypeStruct(
      (_COLUMNS, width), jnp.float32, layout=pc.WGMMA
    ),
  )
  def emit(ctx, place):
    del ctx
    from jax.experimental.mosaic.gpu import fragmented_array, utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm, vector

    f32 = ir.F32Type.get()
    count = width // 2
    loads = [
      f"ld.global.v4.f32 {{{', '.join(f'${4 * i + j}' for j in range(4))}}}, "
      f"[a+{2048 * i}];"
      for i in range(count // 4)
    ]
    held = llvm.inline_asm(
      llvm.StructType.get_literal([f32] * count),
      [utils.memref_ptr(place)],
      _ADDRESS.format(count) + " ".join(loads) + " }",
      "=f," * count + "l",
      has_side_effects=True,
    )
    held = [llvm.extractvalue(f32, held, [i]) for i in range(count)]
    pairs = []
    for i in range(0, count, 8):
      # Pairs of both rows in one group of 8 columns, then in the next.
      for first in (i, i + 4, i + 2, i + 6):
        pair = ir.VectorType.get((2,), f32)
        pairs.append(vector.from_elements(pair, held[first : first + 2]))
    layout = fragmented_array.WGMMA_LAYOUT
    registers = np.array(pairs, object)
    return fragmented_array.FragmentedArray(
      _registers=registers.reshape(layout.registers_shape((_COLUMNS, width))),
      _layout=layout,
      _is_signed=None,
    )

  return emit(place)
