"""The forward kernel, and the one that finds only where a scan ends."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from multihead.ops import pallas_compat
from multihead.ops.selective_scan.mosaic_gpu import chunks, tile

_F32 = jnp.float32


def scan(
  u, delta, A2, B, C, D, bias, keep, initial, options, *, keep_states: bool
):
  """The scan itself.

  Args:
    u: [b, T, E] of 16 or 32 bits, like delta, B and C; 32 G divides E.
    delta: [b, T, E].
    A2: [E, M] float32, A log2(e); M is 8 or a multiple of 16.
    B: [b, T, G, M].
    C: [b, T, G, M].
    D: [E] float32 or None.
    bias: [E] float32 or None, added to delta.
    keep: [b, chunks, at least chunk and 32] float32, which multiplies the
      decays, or None.
    initial: [b, E, M] float32 or None.
    options: chunks.Options.
    keep_states: whether to return the state before each chunk.

  Returns:
    y like u, states [b, chunks, E, M] (garbage unless `keep_states`) and the
    last state [b, E, M] in float32.
  """
  batch, length, channels = u.shape
  groups, size = B.shape[2:]
  cut = chunks.Chunks(options, length, size)
  chunk = cut.size
  unroll = min(options.unroll, chunk)
  interpret = options.interpret
  optional = [x for x in (D, bias, keep, initial) if x is not None]

  def body(u_in, delta_in, A_in, B_in, C_in, *refs):
    refs = iter(refs)
    D_in, bias_in, keep_in, initial_in = (
      None if x is None else next(refs) for x in (D, bias, keep, initial)
    )
    y_out, states_out, final_out = next(refs), next(refs), next(refs)
    u_raw, delta_raw, B_raw, C_raw, keeps, barrier = (
      next(refs) for _ in range(6)
    )
    deltas, drives, Bs, Cs, ys, y_raw = refs
    e, b = lax.axis_index("e"), lax.axis_index("b")
    channel = pl.ds(e * tile.CHANNELS, tile.CHANNELS)
    warps = pl.ds(e * tile.WARPS, tile.WARPS)
    group = lax.div(e * tile.CHANNELS, jnp.int32(channels // groups))
    decay = tile.load(A_in.at[warps], cut.layout)
    direct = cut.per_channel(D_in, channel)
    shift = cut.per_channel(bias_in, channel)

    def fetch(i):
      tokens, slot = cut.tokens(i), lax.rem(i, jnp.int32(2))
      copies = [
        (u_in.at[b, tokens, channel], u_raw.at[slot]),
        (delta_in.at[b, tokens, channel], delta_raw),
        (B_in.at[b, tokens, group], B_raw),
        (C_in.at[b, tokens, group], C_raw),
      ]
      if keep is not None:
        copies.append((keep_in.at[b, cut.place(i)], keeps.at[slot]))
      for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, barrier.at[0])

    def one_chunk(i, h):
      slot = lax.rem(i, jnp.int32(2))
      plgpu.barrier_wait(barrier.at[0])
      for row in cut.rows:
        d = cut.delta(cut.read(delta_raw, row), shift, row, i)
        deltas[pl.ds(row, 8)] = d
        drives[pl.ds(row, 8)] = d * cut.read(u_raw.at[slot], row)
      Bs[...] = B_raw[...].astype(_F32)
      Cs[...] = C_raw[...].astype(_F32)
      plgpu.commit_smem()

      @pl.when(i + 1 < cut.count)
      def _():
        fetch(i + 1)

      if keep_states:
        states_out.at[b, cut.place(i), warps][...] = h

      def block(k, h):
        tokens = [cut.token(k * unroll + s) for s in range(unroll)]
        loads = [
          (
            cut.channel_row(deltas, t),
            cut.channel_row(drives, t),
            cut.state_row(Bs, t),
            cut.state_row(Cs, t),
          )
          for t in tokens
        ]
        out = []
        factor = None if keep is None else keeps.at[slot]
        for t, (d, drive, b_t, c_t) in zip(tokens, loads, strict=True):
          h = cut.decay(d, decay, factor, t) * h + drive * b_t
          out.append(h * c_t)
        if not options.exchange:
          sums = [x.sum(axis=2) for x in out]
          for t, x in zip(tokens, sums, strict=True):
            cut.put_channel_row(ys, t, x)
          return h
        pairs = []
        for s in range(0, unroll, tile.STEPS):
          four = out[s : s + tile.STEPS]
          first = tokens[s + tile.STEPS - 1 if options.reverse else s]
          four = four[::-1] if options.reverse else four
          pairs.append((ys.at[pl.ds(first, tile.STEPS)], tuple(four)))
        tile.put_state_sums(pairs, interpret)
        return h

      h = lax.fori_loop(0, chunk // unroll, block, h)
      plgpu.commit_smem()
      # The copy of the chunk before must have left.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for row in cut.rows:
        y = cut.read(ys, row)
        if direct is not None:
          y = y + cut.by_token(direct) * cut.read(u_raw.at[slot], row)
        y_raw[pl.ds(row, 8)] = y.astype(u.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(y_raw, y_out.at[b, cut.tokens(i), channel])
      return h

    fetch(jnp.int32(0))
    h = cut.zeros()
    if initial is not None:
      h = tile.load_state(initial_in.at[b, warps], cut.layout)
    h = lax.fori_loop(0, cut.count, one_chunk, h)
    final_out.at[b, warps][...] = h
    plgpu.wait_smem_to_gmem(0)

  shared = pallas_compat.shared
  wide, narrow = (chunk, tile.CHANNELS), (chunk, size)
  split = (channels // tile.LANES, tile.LANES, size)
  kept = cut.count if keep_states else 1
  y, states, final = pallas_compat.kernel(
    body,
    out=[
      jax.ShapeDtypeStruct(u.shape, u.dtype),
      jax.ShapeDtypeStruct((batch, kept, *split), _F32),
      jax.ShapeDtypeStruct((batch, *split), _F32),
    ],
    scratch=[
      shared((2, *wide), u.dtype),
      shared(wide, delta.dtype),
      shared(narrow, B.dtype),
      shared(narrow, C.dtype),
      shared((2, max(chunk, 32)), _F32),
      pallas_compat.barriers(1, 4 + (keep is not None)),
      shared(wide, _F32),
      shared(wide, _F32),
      shared(narrow, _F32),
      shared(narrow, _F32),
      shared(wide, _F32),
      shared(wide, u.dtype),
    ],
    grid={"e": channels // tile.CHANNELS, "b": batch},
    auto_barriers=False,
    interpret=interpret,
  )(u, delta, chunks.split_channels(A2), B, C, *_split_last(optional, initial))
  return y, chunks.join_channels(states), chunks.join_channels(final)


def ends(x, delta, A2, B, bias, keep, options, *, adjoint: bool):
  """Where a scan from zero ends, and what it multiplies a first state by.

  The scan is h = a h + delta x B; with `adjoint` it is h = a (h + x B), which
  the gradient of the states follows, for x the gradient of y and C as B, in
  the other direction.

  Args:
    x: [b, T, E].
    delta: [b, T, E].
    A2: [E, M] float32, A log2(e).
    B: [b, T, G, M].
    bias: [E] float32 or None.
    keep: as in `scan`.
    options: chunks.Options.
    adjoint: which of the two.

  Returns:
    The last state [b, E, M] and the sum of delta [b, E], in float32.
  """
  batch, length, channels = x.shape
  groups, size = B.shape[2:]
  cut = chunks.Chunks(options, length, size)
  chunk = cut.size
  unroll = min(options.unroll, chunk)
  optional = [v for v in (bias, keep) if v is not None]

  def body(x_in, delta_in, A_in, B_in, *refs):
    refs = iter(refs)
    bias_in, keep_in = (None if v is None else next(refs) for v in (bias, keep))
    final_out, sum_out = next(refs), next(refs)
    x_raw, delta_raw, B_raw, keeps, barrier, deltas, drives, Bs = refs
    e, b = lax.axis_index("e"), lax.axis_index("b")
    channel = pl.ds(e * tile.CHANNELS, tile.CHANNELS)
    warps = pl.ds(e * tile.WARPS, tile.WARPS)
    group = lax.div(e * tile.CHANNELS, jnp.int32(channels // groups))
    decay = tile.load(A_in.at[warps], cut.layout)
    shift = cut.per_channel(bias_in, channel)

    def fetch(i):
      tokens, slot = cut.tokens(i), lax.rem(i, jnp.int32(2))
      copies = [
        (x_in.at[b, tokens, channel], x_raw),
        (delta_in.at[b, tokens, channel], delta_raw),
        (B_in.at[b, tokens, group], B_raw),
      ]
      if keep is not None:
        copies.append((keep_in.at[b, cut.place(i)], keeps.at[slot]))
      for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, barrier.at[0])

    def one_chunk(i, carry):
      h, total = carry
      slot = lax.rem(i, jnp.int32(2))
      plgpu.barrier_wait(barrier.at[0])
      for row in cut.rows:
        d = cut.delta(cut.read(delta_raw, row), shift, row, i)
        deltas[pl.ds(row, 8)] = d
        value = cut.read(x_raw, row)
        drives[pl.ds(row, 8)] = value if adjoint else d * value
        total = total + d
      Bs[...] = B_raw[...].astype(_F32)
      plgpu.commit_smem()

      @pl.when(i + 1 < cut.count)
      def _():
        fetch(i + 1)

      def block(k, h):
        tokens = [cut.token(k * unroll + s) for s in range(unroll)]
        loads = [
          (
            cut.channel_row(deltas, t),
            cut.channel_row(drives, t),
            cut.state_row(Bs, t),
          )
          for t in tokens
        ]
        factor = None if keep is None else keeps.at[slot]
        for t, (d, drive, b_t) in zip(tokens, loads, strict=True):
          a = cut.decay(d, decay, factor, t)
          h = a * (h + drive * b_t) if adjoint else a * h + drive * b_t
        return h

      h = lax.fori_loop(0, chunk // unroll, block, h)
      # The next chunk overwrites what was read here.
      plgpu.commit_smem()
      return h, total

    fetch(jnp.int32(0))
    total = pallas_compat.register_full(
      (8, tile.CHANNELS), 0.0, _F32, cut.token_layout
    )
    h, total = lax.fori_loop(0, cut.count, one_chunk, (cut.zeros(), total))
    final_out.at[b, warps][...] = h
    sum_out.at[b, :, channel][...] = total

  shared = pallas_compat.shared
  wide, narrow = (chunk, tile.CHANNELS), (chunk, size)
  split = (channels // tile.LANES, tile.LANES, size)
  final, total = pallas_compat.kernel(
    body,
    out=[
      jax.ShapeDtypeStruct((batch, *split), _F32),
      jax.ShapeDtypeStruct((batch, 8, channels), _F32),
    ],
    scratch=[
      shared(wide, x.dtype),
      shared(wide, delta.dtype),
      shared(narrow, B.dtype),
      shared((2, max(chunk, 32)), _F32),
      pallas_compat.barriers(1, 3 + (keep is not None)),
      shared(wide, _F32),
      shared(wide, _F32),
      shared(narrow, _F32),
    ],
    grid={"e": channels // tile.CHANNELS, "b": batch},
    auto_barriers=False,
    interpret=options.interpret,
  )(x, delta, chunks.split_channels(A2), B, *optional)
  return chunks.join_channels(final), jnp.sum(total, axis=1)


def _split_last(optional, initial):
  """The optional arrays, with the channels of the first state split."""
  if initial is None:
    return optional
  return [*optional[:-1], chunks.split_channels(initial)]
