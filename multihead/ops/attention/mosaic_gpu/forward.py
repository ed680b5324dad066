"""The forward kernel for Hopper: arXiv 2307.08691, laid out as 2407.08608.

A program holds one tile of queries for each of its consumer warpgroups. One
more warpgroup loads: it streams the tiles of keys and values that the queries
see through a ring in shared memory. While a consumer turns scores into weights,
the tensor cores work on another consumer's products (`turns`) and on its own
sum of the values before (`overlap`).
"""

import dataclasses
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
from multihead.ops.attention.mosaic_gpu.limits import Limits

_LOG2E = math.log2(math.e)
# Keys and values that programs running together should find in the L2 cache.
_CACHE = 24 * 2**20


@dataclasses.dataclass(frozen=True)
class Order:
  """The order of tiles: sections of `pairs` heads, in each the last rows first.

  With causal masks the last rows see most: who starts them last waits longest.

  Attributes:
    heads: N.
    pairs: pairs of batch item and head in a section.
    row_tiles: tiles of rows in a head.
    total: number of tiles.
    programs: number of programs that share them.
  """

  heads: int
  pairs: int
  row_tiles: int
  total: int
  programs: int

  def count(self, program: jax.Array) -> jax.Array:
    """How many tiles `program` gets."""
    whole, left = divmod(self.total, self.programs)
    place = self._place(program, jnp.int32(whole))
    return whole + (place < left).astype(jnp.int32)

  def tile(
    self, program: jax.Array, turn: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(batch item, head, tile of rows) of a program's tile number `turn`."""
    index = turn * self.programs + self._place(program, turn)
    section, rest = _divmod(index, self.pairs * self.row_tiles)
    row, pair = _divmod(rest, self.pairs)
    item, head = _divmod(section * self.pairs + pair, self.heads)
    return item, head, self.row_tiles - 1 - row

  def _place(self, program: jax.Array, turn: jax.Array) -> jax.Array:
    # Back and forth, so that nobody always gets the heavier one.
    odd = lax.rem(turn, jnp.int32(2)) == 1
    return jnp.where(odd, self.programs - 1 - program, program)


def _divmod(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
  whole = lax.div(a, jnp.int32(b))
  return whole, a - whole * b


def order(
  batch: int,
  heads: int,
  group: int,
  row_tiles: int,
  head_bytes: int,
  full: bool,
  programs: int | None,
) -> Order:
  """The order of all tiles.

  Args:
    batch: B.
    heads: N.
    group: query heads that share a key head.
    row_tiles: tiles of rows in a head.
    head_bytes: of keys and values of one key head.
    full: whether rows see all keys; then all tiles are equal.
    programs: how many walk over the tiles, None for one a tile.
  """
  pairs = batch * heads
  total = pairs * row_tiles
  fit = max(_CACHE // head_bytes, 1) * group
  if full:
    # Equal tiles of one head would all read the same keys at the same moment.
    fit = group if 2 * row_tiles <= pc.cores() else max(group, 2)
  sizes = [n for n in range(1, pairs + 1) if pairs % n == 0 and n <= fit]
  programs = total if programs is None else min(programs, total)
  return Order(heads, max(sizes), row_tiles, total, programs)


def _take_turn() -> None:
  """Waits until it is this warpgroup's turn to issue products."""
  _asm(
    "{ .reg .u32 w; mov.u32 w, %tid.x; shr.u32 w, w, 7; add.u32 w, w, 8; "
    "bar.sync w, 256; }"
  )


def _pass_turn(consumers: int) -> None:
  """Gives the turn to the next warpgroup."""
  _asm(
    "{ .reg .u32 w; .reg .pred p; mov.u32 w, %tid.x; shr.u32 w, w, 7; "
    f"add.u32 w, w, 1; setp.eq.u32 p, w, {consumers}; selp.u32 w, 0, w, p; "
    "add.u32 w, w, 8; bar.arrive w, 256; }"
  )


def _finish(row: jax.Array) -> None:
  """Keeps what `row` depends on in front of the next wait for products.

  The assembler would else move the whole softmax behind that wait, where it
  runs under nothing. A store that never happens (the grid has one axis) needs
  the value, and no wait passes it.
  """

  @plgpu.inline_mgpu(arg_types=(pc.WGMMA.reduce(1),))
  def emit(ctx, row):
    del ctx
    _inline_ptx(
      "{ .reg .b32 z; .reg .pred p; mov.u32 z, %ctaid.z; "
      "setp.ne.u32 p, z, 0; @p st.volatile.shared.v2.f32 [z], {$0, $1}; }",
      list(row.registers.flat),
      "f,f",
    )

  emit(row)


def _asm(text: str) -> None:
  """Emits PTX; a named barrier is cheaper than one in shared memory."""

  @plgpu.inline_mgpu()
  def emit(ctx):
    del ctx
    _inline_ptx(text, [], "")

  emit()


def _inline_ptx(text: str, operands: list[Any], constraints: str) -> None:
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import llvm

  llvm.inline_asm(
    ir.Type.parse("!llvm.void"),
    operands,
    text,
    constraints,
    has_side_effects=True,
  )


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  limits: Limits | None = None,
  *,
  scale: float,
  softcap: float | None,
  see: visibility.Visibility,
  config: blocks.Forward,
  dropout: float = 0.0,
  interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
  """Output [B, T, N, Hv], and the natural log of the sums [B, N, T] in float32.

  A row that sees nothing gives zeros and -inf.

  Args:
    q: [B, T, N, H].
    k: [B, S, K, H].
    v: [B, S, K, Hv].
    limits: what else decides over weights.
    scale: of the products, positive.
    softcap: bound of the logits or None.
    see: the visible part of the matrix.
    config: block sizes.
    dropout: share of the weights to drop; goes with `limits.states`.
    interpret: None, or `pallas_compat.interpreter()`.
  """
  (B, T, N, _), K, Hv = q.shape, k.shape[2], v.shape[3]
  q, k, v = (padded(x) for x in (q, k, v))
  S = k.shape[1]
  dtype, f32, i32 = q.dtype, jnp.float32, jnp.int32
  W, rows, columns = config.consumers, config.rows, config.columns
  stages = config.stages
  width, v_width = q.shape[3], v.shape[3]
  block = W * rows
  row_tiles = -(-T // block)
  size = jnp.dtype(dtype).itemsize
  turns = config.turns and W > 1
  extras = Extras(see, limits, B, config, keys=(k, v))
  plan = order(
    B,
    N,
    N // K,
    row_tiles,
    S * (width + v_width) * size,
    see.full and not extras.moving,
    pc.cores() if config.persistent else None,
  )
  _, shared_output = blocks.forward_bytes(config, width, v_width, dtype)
  edge_first, edge_more, edge_left = extras.edges
  # In base 2: one multiplication and one exponential an element.
  factor = _LOG2E * (scale if softcap is None else softcap)

  def span(program, turn, more):
    """What one tile of rows does: where it is, and which columns it visits."""
    item, head, row = plan.tile(program, turn)
    first = row * block
    bounds = extras.bounds(more, item, row, first)
    return item, head, first, bounds

  def body(q_g, k_g, v_g, *rest):
    more, rest = extras.split(rest)
    o_g, l_g, q_s, k_s, v_s, l_s, *rest = rest
    more, rest = extras.split_scratch(rest, more)
    o_s = q_s if shared_output else rest.pop(0)
    q_full, q_empty, k_full, k_empty, v_full, v_empty = rest
    program, w = lax.axis_index("cta"), lax.axis_index("wg")
    tiles = plan.count(program)

    def full_row(value):
      return pc.register_full((rows,), value, f32, pc.WGMMA.reduce(1))

    def scores(slot):
      def run(acc):
        plgpu.wgmma(acc, q_s.at[w], pc.transposed(k_s.at[slot]))
        if turns:
          _pass_turn(W)
        return acc[...]

      return pl.run_scoped(run, plgpu.ACC((rows, columns), f32))

    def scaled(s):
      return s if extras.biased else s * factor

    def weights(s, top, total, masked, slot, first, tile, bounds):
      """Weights of a tile, and the running maximum and sum of every row."""
      if softcap is not None:
        s = jnp.tanh(s * (scale / softcap))
      if extras.biased:
        s = extras.biased_logits(s * factor, more, w, slot)
      if masked:
        keep = extras.visible(more, w, slot, first, tile, bounds)
        s = jnp.where(keep, s, -jnp.inf)
      new = jnp.maximum(top, scaled(s.max(axis=1)))
      # -inf - -inf would be NaN.
      empty = masked or extras.biased
      base = jnp.where(new == -jnp.inf, 0.0, new) if empty else new
      shrink = jnp.exp2(top - base)
      p = jnp.exp2(scaled(s) - pc.widen(base, s.shape))
      total = total * shrink + p.sum(axis=1)
      if dropout:
        keep = extras.kept(dropout, more, w, slot, first, tile)
        p = jnp.where(keep, p, 0.0)
      return p, new, total, shrink

    def narrow(p):
      # Without the barrier the compiler carries p as float32 into the next
      # step, in twice the registers. And p may change only when the products
      # that read it are done, or ptxas serialises them.
      return lax.optimization_barrier(p.astype(dtype))

    def consume(turn, start):
      item, head, first, bounds = span(program, turn, more)
      low, free_low, free_high, high = bounds.tiles
      first = first + w * rows
      plgpu.barrier_wait(q_full.at[w])

      slot = lambda i: ring_slot(start + i, stages)

      # The first tile: its weights meet their values in the next step.
      plgpu.barrier_wait(k_full.at[slot(0)])
      if turns:
        _take_turn()
      s = scores(slot(0))
      late = extras.read_late(edge_first)
      if not late:
        plgpu.barrier_arrive(k_empty.at[slot(0)])
      p, top, total, _ = weights(
        s,
        full_row(-jnp.inf),
        full_row(0.0),
        edge_first,
        slot(0),
        first,
        high - 1,
        bounds,
      )
      if late:
        plgpu.barrier_arrive(k_empty.at[slot(0)])
      p = narrow(p)
      o = pc.register_full((rows, v_width), 0, f32, pc.WGMMA)

      def step(masked):
        def run(i, carry):
          o, top, total, p = carry
          now, before = slot(i), slot(i - 1)
          plgpu.barrier_wait(k_full.at[now])
          if turns:
            _take_turn()
          arguments = (masked, now, first, high - 1 - i, bounds)
          late = extras.read_late(masked)
          # With a mask, both together need more registers than there are.
          if config.overlap and not masked and not late and interpret is None:

            def both(s_acc, o_acc):
              o_acc[...] = o
              plgpu.wgmma(s_acc, q_s.at[w], pc.transposed(k_s.at[now]))
              plgpu.barrier_wait(v_full.at[before])
              plgpu.wgmma(o_acc, p, v_s.at[before])
              if turns:
                _pass_turn(W)
              s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
              plgpu.barrier_arrive(k_empty.at[now])
              new = weights(s, top, total, *arguments)
              _finish(new[2])
              return o_acc[...], *new

            o, p, top, total, shrink = pl.run_scoped(
              both,
              plgpu.ACC((rows, columns), f32),
              plgpu.ACC((rows, v_width), f32),
            )
            plgpu.barrier_arrive(v_empty.at[before])
            o = o * pc.widen(shrink, o.shape)
          else:
            plgpu.barrier_wait(v_full.at[before])
            o = pc.product(o, p, v_s.at[before], interpret)
            plgpu.barrier_arrive(v_empty.at[before])
            s = scores(now)
            if not late:
              plgpu.barrier_arrive(k_empty.at[now])
            p, top, total, shrink = weights(s, top, total, *arguments)
            if late:
              plgpu.barrier_arrive(k_empty.at[now])
            o = o * pc.widen(shrink, o.shape)
          return o, top, total, narrow(p)

        return run

      carry = (o, top, total, p)
      begin = i32(1)
      if edge_more:
        end = lax.max(begin, high - free_high)
        carry = lax.fori_loop(begin, end, step(True), carry)
        begin = end
      end = lax.max(begin, high - free_low) if edge_left else high - low
      carry = lax.fori_loop(begin, end, step(False), carry)
      if edge_left:
        carry = lax.fori_loop(end, high - low, step(True), carry)
      o, top, total, p = carry
      # All scores are computed: the next queries may come.
      if not shared_output:
        plgpu.barrier_arrive(q_empty.at[w])
      last = slot(high - low - 1)
      plgpu.barrier_wait(v_full.at[last])
      o = pc.product(o, p, v_s.at[last], interpret)
      plgpu.barrier_arrive(v_empty.at[last])
      scale_out = 1.0 / jnp.where(total == 0.0, 1.0, total)
      if dropout:
        scale_out = scale_out * (1 / (1 - dropout))
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      o_s[w] = (o * pc.widen(scale_out, o.shape)).astype(dtype)
      l_s[w] = (top + jnp.log2(total)) * (1 / _LOG2E)
      plgpu.commit_smem()
      here = pl.ds(first, rows)
      plgpu.copy_smem_to_gmem(o_s.at[w], o_g.at[item, here, head])
      plgpu.copy_smem_to_gmem(l_s.at[w], l_g.at[item, head, here])
      if shared_output:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(q_empty.at[w])
      return start + (high - low)

    def consumer():
      if turns:
        pl.when(w == W - 1)(lambda: _pass_turn(W))
      lax.fori_loop(i32(0), tiles, consume, i32(0))

    def producer():
      def row_tile(turn, start):
        item, head, first, bounds = span(program, turn, more)
        low, _, _, high = bounds.tiles
        kv_head = lax.div(head, i32(N // K))
        count = high - low

        def load(name, g, s, full, empty):
          def at(i):
            slot = ring_slot(start + i, stages)
            pl.when(start + i >= stages)(
              lambda: plgpu.barrier_wait(empty.at[slot])
            )
            here = pl.ds((high - 1 - i) * columns, columns)
            tile = high - 1 - i
            extras.load_tail(
              more,
              name,
              g.at[item, here, kv_head],
              (item, kv_head),
              s.at[slot],
              full.at[slot],
              extras.ends(bounds, tile),
            )
            if name == "k":
              extras.load_columns(
                more,
                slot,
                (item, head, first),
                tile * columns,
                full.at[slot],
              )

          return at

        load_k = load("k", k_g, k_s, k_full, k_empty)
        load_v = load("v", v_g, v_s, v_full, v_empty)
        for i in range(W):
          pl.when(turn > 0)(lambda i=i: plgpu.barrier_wait(q_empty.at[i]))
          here = pl.ds(first + i * rows, rows)
          plgpu.copy_gmem_to_smem(
            q_g.at[item, here, head], q_s.at[i], q_full.at[i]
          )
          extras.load_rows(
            more, i, (item, head, first + i * rows), q_full.at[i]
          )
        load_k(i32(0))

        def both(i, _):
          load_k(i)
          load_v(i - 1)
          return ()

        lax.fori_loop(i32(1), count, both, ())
        load_v(count - 1)
        return start + count

      total = lax.fori_loop(i32(0), tiles, row_tile, i32(0))
      # Nobody may leave a barrier behind whose phase nobody waited for.
      for i in range(stages):
        for empty in (k_empty, v_empty):
          pl.when(total > i)(
            lambda i=i, empty=empty: plgpu.barrier_wait(
              empty.at[ring_slot(total - 1 - i, stages)]
            )
          )
      for i in range(W):
        plgpu.barrier_wait(q_empty.at[i])

    pc.roles(w, W, consumer, producer)

  padded_rows = row_tiles * block
  out, lse = pc.kernel(
    body,
    out=[
      jax.ShapeDtypeStruct((B, q.shape[1], N, v_width), dtype),
      jax.ShapeDtypeStruct((B, N, padded_rows), f32),
    ],
    scratch=[
      pc.tiled((W, rows, width), dtype),
      pc.tiled((stages, columns, width), dtype),
      pc.tiled((stages, columns, v_width), dtype),
      pc.shared((W, rows), f32),
      *extras.scratch.values(),
      *([] if shared_output else [pc.tiled((W, rows, v_width), dtype)]),
      pc.barriers(W, 1 + extras.row_copies),
      pc.barriers(W),
      pc.barriers(stages, 1 + extras.column_copies),
      pc.barriers(stages, W),
      pc.barriers(stages),
      pc.barriers(stages, W),
    ],
    grid={"cta": plan.programs},
    warpgroups=W + 1,
    interpret=interpret,
  )(q, k, v, *extras.inputs.values())
  return out[:, :T, :, :Hv], lse[:, :, :T]


def ring_slot(i: jax.Array, stages: int) -> jax.Array:
  """The place in the ring of the i-th tile."""
  if stages & (stages - 1) == 0:
    return i & (stages - 1)
  return lax.rem(i, jnp.int32(stages))


def padded(x: jax.Array) -> jax.Array:
  """Fills the length to a multiple of 8, and the head dim to one of 32.

  A copy in memory, unless both are already.
  """
  length, width = x.shape[1], x.shape[3]
  more = -length % 8, blocks.padded_width(width) - width
  if more == (0, 0):
    return x
  return jnp.pad(x, ((0, 0), (0, more[0]), (0, 0), (0, more[1])))
