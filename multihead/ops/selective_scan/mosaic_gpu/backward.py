"""The backward kernel: states are computed anew from those between chunks.

A program goes through the chunks of its 32 channels from the last to the first.
Of each it first runs the scan forward and keeps the state before every four
steps, then takes four steps at a time from the last: forward once more, with
the four states and decays in registers, and back. With lam_t the gradient of
the state after step t and g that of y,

  lam_t = C_t g_t + a_{t+1} lam_{t+1}
  dC_t = sum_e g_t h_t;  dB_t = sum_e delta_t u_t lam_t
  du_t = D g_t + delta_t sum_m lam_t B_t
  ddelta_t = sum_m lam_t (a_t h_{t-1} A + u_t B_t)
  dA = sum_t delta_t lam_t a_t h_{t-1}
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from multihead.ops import pallas_compat
from multihead.ops.selective_scan.mosaic_gpu import chunks, tile

_F32 = jnp.float32
_LN2 = math.log(2)


def gradients(u, delta, A2, B, C, D, bias, keep, states, dy, d_final, options):
  """Gradients of `forward.scan`.

  Args:
    u: as in `forward.scan`, and so on.
    delta: [b, T, E].
    A2: [E, M].
    B: [b, T, G, M].
    C: [b, T, G, M].
    D: [E] or None.
    bias: [E] or None.
    keep: as there, or None.
    states: [b, chunks, E, M], which it returned.
    dy: [b, T, E], of 16 or 32 bits.
    d_final: [b, E, M] float32 or None.
    options: chunks.Options, the same.

  Returns:
    Gradients of u and delta in their dtypes, and in float32 of A [E, M] (not of
    A2), B, C, D and bias [E] (sums of no meaning where those are None) and of
    the first state [b, E, M].
  """
  batch, length, channels = u.shape
  groups, size = B.shape[2:]
  cut = chunks.Chunks(options, length, size)
  chunk, steps = cut.size, tile.STEPS
  blocks = chunk // steps
  interpret = options.interpret
  optional = [x for x in (D, bias, keep, d_final) if x is not None]

  def body(u_in, delta_in, dy_in, A_in, B_in, C_in, states_in, *refs):
    refs = iter(refs)
    D_in, bias_in, keep_in, d_final_in = (
      None if x is None else next(refs) for x in (D, bias, keep, d_final)
    )
    du_out, ddelta_out, dA_out, dB_out, dC_out = (next(refs) for _ in range(5))
    dD_out, dbias_out, d_first_out = (next(refs) for _ in range(3))
    u_raw, delta_raw, dy_raw, B_raw, C_raw, keeps, barrier = (
      next(refs) for _ in range(7)
    )
    deltas, drives, dys, Bs, Cs, starts, sums, du_raw, ddelta_raw = refs
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
        (delta_in.at[b, tokens, channel], delta_raw.at[slot]),
        (dy_in.at[b, tokens, channel], dy_raw.at[slot]),
        (B_in.at[b, tokens, group], B_raw),
        (C_in.at[b, tokens, group], C_raw),
      ]
      if keep is not None:
        copies.append((keep_in.at[b, cut.place(i)], keeps.at[slot]))
      for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, barrier.at[0])

    def one_chunk(k, carry):
      lam, dA, dD, dbias = carry
      i = cut.count - 1 - k
      slot = lax.rem(i, jnp.int32(2))
      factor = None if keep is None else keeps.at[slot]
      h = tile.load_state(states_in.at[b, cut.place(i), warps], cut.layout)
      plgpu.barrier_wait(barrier.at[0])
      for row in cut.rows:
        d = cut.delta(cut.read(delta_raw.at[slot], row), shift, row, i)
        deltas[pl.ds(row, 8)] = d
        drives[pl.ds(row, 8)] = d * cut.read(u_raw.at[slot], row)
        dys[pl.ds(row, 8)] = cut.read(dy_raw.at[slot], row)
      Bs[...] = B_raw[...].astype(_F32)
      Cs[...] = C_raw[...].astype(_F32)
      plgpu.commit_smem()

      @pl.when(i > 0)
      def _():
        fetch(i - 1)

      starts[0] = h

      def ahead(j, h):
        tokens = [cut.token(j * steps + s) for s in range(steps)]
        loads = [
          (
            cut.channel_row(deltas, t),
            cut.channel_row(drives, t),
            cut.state_row(Bs, t),
          )
          for t in tokens
        ]
        for t, (d, drive, b_t) in zip(tokens, loads, strict=True):
          h = cut.decay(d, decay, factor, t) * h + drive * b_t
        starts[j + 1] = h
        return h

      lax.fori_loop(0, blocks - 1, ahead, h)

      def back(k, carry):
        lam, dA = carry
        j = blocks - 1 - k
        tokens = [cut.token(j * steps + s) for s in range(steps)]
        loads = [
          (
            cut.channel_row(deltas, t),
            cut.channel_row(drives, t),
            cut.channel_row(dys, t),
            cut.state_row(Bs, t),
            cut.state_row(Cs, t),
          )
          for t in tokens
        ]
        # Each lane reads back what it wrote.
        h = tile.load(starts.at[j], cut.layout)
        decays, olds, news = [], [], []
        for t, (d, drive, _, b_t, _) in zip(tokens, loads, strict=True):
          a = cut.decay(d, decay, factor, t)
          old = a * h
          h = old + drive * b_t
          decays.append(a)
          olds.append(old)
          news.append(h)
        by_b, by_a, dBs, dCs = ([None] * steps for _ in range(4))
        for s in reversed(range(steps)):
          d, drive, g, b_t, c_t = loads[s]
          lam = g * c_t + lam
          dCs[s] = g * news[s]
          dBs[s] = drive * lam
          by_b[s] = lam * b_t
          path = lam * olds[s]
          by_a[s] = path * decay
          dA = dA + d * path
          lam = decays[s] * lam
        first = tokens[-1] if options.reverse else tokens[0]
        place = lax.div(first, jnp.int32(steps))
        order = slice(None, None, -1 if options.reverse else 1)
        both = (*dBs[order], *dCs[order])
        sums[place] = tile.channel_sums(both, interpret)
        rows = pl.ds(first, steps)
        # Nobody else reads these rows of drives and dys any more: each warp
        # reads and writes its own channels.
        by_b, by_a = tuple(by_b[order]), tuple(by_a[order])
        pairs = [(drives.at[rows], by_b), (dys.at[rows], by_a)]
        tile.put_state_sums(pairs, interpret)
        return lam, dA

      lam, dA = lax.fori_loop(0, blocks, back, (lam, dA))
      plgpu.commit_smem()
      # The copies of the chunk before must have left.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for row in cut.rows:
        raw = cut.read(delta_raw.at[slot], row)
        if shift is not None:
          raw = raw + cut.by_token(shift)
        u_t, g = cut.read(u_raw.at[slot], row), cut.read(dy_raw.at[slot], row)
        through_b, through_a = cut.read(drives, row), cut.read(dys, row)
        du = cut.read(deltas, row) * through_b
        ddelta = through_a * _LN2 + u_t * through_b
        if options.delta_softplus:
          ddelta = ddelta / (1 + jnp.exp(-raw))
        ddelta = cut.real(ddelta, row, i)
        if direct is not None:
          du = du + cut.by_token(direct) * g
          dD = dD + u_t * g
        dbias = dbias + ddelta
        du_raw[pl.ds(row, 8)] = du.astype(u.dtype)
        ddelta_raw[pl.ds(row, 8)] = ddelta.astype(delta.dtype)
      place = cut.place(i)
      layout = tile.sums_layout(size)
      for half, out in enumerate((dB_out, dC_out)):
        total = None
        for warp in range(tile.WARPS):
          part = sums.at[:, warp, pl.ds(half * steps, steps)]
          part = tile.load(part, layout)
          total = part if total is None else total + part
        out.at[b, e, pl.ds(place * blocks, blocks)][...] = total
      plgpu.commit_smem()
      tokens = cut.tokens(i)
      plgpu.copy_smem_to_gmem(du_raw, du_out.at[b, tokens, channel])
      plgpu.copy_smem_to_gmem(ddelta_raw, ddelta_out.at[b, tokens, channel])
      return lam, dA, dD, dbias

    fetch(jnp.int32(cut.count - 1))
    lam = cut.zeros()
    if d_final is not None:
      lam = tile.load_state(d_final_in.at[b, warps], cut.layout)
    zeros = pallas_compat.register_full(
      (8, tile.CHANNELS), 0.0, _F32, cut.token_layout
    )
    carry = (lam, cut.zeros(), zeros, zeros)
    lam, dA, dD, dbias = lax.fori_loop(0, cut.count, one_chunk, carry)
    dA_out.at[b, warps][...] = dA
    d_first_out.at[b, warps][...] = lam
    dD_out.at[b, :, channel][...] = dD
    dbias_out.at[b, :, channel][...] = dbias
    plgpu.wait_smem_to_gmem(0)

  shared, struct = pallas_compat.shared, jax.ShapeDtypeStruct
  wide, narrow = (chunk, tile.CHANNELS), (chunk, size)
  split = (channels // tile.LANES, tile.LANES, size)
  programs = channels // tile.CHANNELS
  part = struct((batch, programs, cut.count * blocks, steps, size), _F32)
  du, ddelta, dA, dB, dC, dD, dbias, d_first = pallas_compat.kernel(
    body,
    out=[
      struct(u.shape, u.dtype),
      struct(delta.shape, delta.dtype),
      struct((batch, *split), _F32),
      part,
      part,
      struct((batch, 8, channels), _F32),
      struct((batch, 8, channels), _F32),
      struct((batch, *split), _F32),
    ],
    scratch=[
      shared((2, *wide), u.dtype),
      shared((2, *wide), delta.dtype),
      shared((2, *wide), dy.dtype),
      shared(narrow, B.dtype),
      shared(narrow, C.dtype),
      shared((2, max(chunk, 32)), _F32),
      pallas_compat.barriers(1, 5 + (keep is not None)),
      shared(wide, _F32),
      shared(wide, _F32),
      shared(wide, _F32),
      shared(narrow, _F32),
      shared(narrow, _F32),
      shared((blocks, *cut.shape), _F32),
      shared((blocks, *cut.shape), _F32),
      shared(wide, u.dtype),
      shared(wide, delta.dtype),
    ],
    grid={"e": programs, "b": batch},
    auto_barriers=False,
    interpret=interpret,
  )(
    u,
    delta,
    dy,
    chunks.split_channels(A2),
    B,
    C,
    chunks.split_channels(states),
    *(chunks.split_channels(x) if x is d_final else x for x in optional),
  )

  def over_group(x):
    x = x.reshape(batch, groups, programs // groups, -1, size)
    return jnp.moveaxis(jnp.sum(x[:, :, :, :length], axis=2), 1, 2)

  return (
    du,
    ddelta,
    jnp.sum(chunks.join_channels(dA), axis=0),
    over_group(dB),
    over_group(dC),
    jnp.sum(dD, axis=(0, 1)),
    jnp.sum(dbias, axis=(0, 1)),
    chunks.join_channels(d_first),
  )
