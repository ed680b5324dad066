"""The Triton kernels of SSD: one program goes through the chunks of one head.

The state [H, M] stays in registers from chunk to chunk. Of the sums in
`chunk_math`, which names them, nothing of size Q x Q or H x M goes through
device memory, but for the states between chunks that a backward pass will read.

Arrays in memory: x, y [b, T, N, H]; B, C [b, T, G, M]; per token and head, with
T cut into whole chunks, [b, N, T]: dt, cum (sums of dt A from the start of the
chunk), start (decay from there) and end (dt times the decay to the chunk's
end); total [b, N, chunks]; runs [b, T] numbers segments. The last two axes of
every array are contiguous. Sums and states are float32, the operands of
products have the dtype of x.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(pointer, rows, columns, row_stride, row_mask, size: tl.constexpr):
  """[rows, columns] of a matrix, zero outside."""
  offsets = rows[:, None] * row_stride + columns[None, :]
  mask = row_mask[:, None] & (columns < size)[None, :]
  return tl.load(pointer + offsets, mask=mask, other=0.0)


@triton.jit
def forward(
  x,
  B,
  C,
  dt,
  cum,
  start,
  end,
  total,
  D,
  initial,
  runs,
  y,
  states,
  final,
  length: tl.constexpr,
  chunks: tl.constexpr,
  heads: tl.constexpr,
  groups: tl.constexpr,
  width: tl.constexpr,
  size: tl.constexpr,
  has_D: tl.constexpr,
  has_runs: tl.constexpr,
  keep_states: tl.constexpr,
  Q: tl.constexpr,
  HT: tl.constexpr,
  MT: tl.constexpr,
):
  """y, the states before each chunk [b, N, chunks, H, M] and the last one."""
  row = tl.program_id(0).to(tl.int64)
  batch, head = row // heads, row % heads
  group = head // (heads // groups)
  hs = tl.program_id(1) * HT + tl.arange(0, HT)
  ms = tl.arange(0, MT)
  q = tl.arange(0, Q)
  state_mask = (hs < width)[:, None] & (ms < size)[None, :]
  state_offsets = hs[:, None] * size + ms[None, :]
  state = tl.load(
    initial + row * width * size + state_offsets, mask=state_mask, other=0.0
  )
  x += (batch * length * heads + head) * width
  y += (batch * length * heads + head) * width
  B += (batch * length * groups + group) * size
  C += (batch * length * groups + group) * size
  per_token = row * chunks * Q
  if has_D:
    direct = tl.load(D + head)
  for c in range(chunks):
    t = c * Q + q
    here = t < length
    xs = _tile(x, t, hs, heads * width, here, width)
    Bs = _tile(B, t, ms, groups * size, here, size)
    Cs = _tile(C, t, ms, groups * size, here, size)
    cums = tl.load(cum + per_token + t)
    dts = tl.load(dt + per_token + t)
    starts = tl.load(start + per_token + t)
    ends = tl.load(end + per_token + t)
    scores = tl.dot(Cs, tl.trans(Bs))
    seen = q[:, None] >= q[None, :]
    if has_runs:
      run = tl.load(runs + batch * chunks * Q + t)
      seen = seen & (run[:, None] == run[None, :])
    exponents = tl.where(seen, cums[:, None] - cums[None, :], float("-inf"))
    weights = scores * tl.exp2(exponents * LOG2_E) * dts[None, :]
    low = state.to(x.dtype.element_ty)
    out = tl.dot(Cs, tl.trans(low)) * starts[:, None]
    out = tl.dot(weights.to(x.dtype.element_ty), xs, acc=out)
    wide = xs.to(tl.float32)
    if has_D:
      out += direct * wide
    if keep_states:
      place = (row * chunks + c) * width * size
      tl.store(states + place + state_offsets, low, mask=state_mask)
    leaving = (wide * ends[:, None]).to(x.dtype.element_ty)
    state = state * tl.load(total + row * chunks + c)
    state = tl.dot(tl.trans(leaving), Bs, acc=state)
    tl.store(
      y + t[:, None] * (heads * width) + hs[None, :],
      out.to(y.dtype.element_ty),
      mask=here[:, None] & (hs < width)[None, :],
    )
  tl.store(final + row * width * size + state_offsets, state, mask=state_mask)


@triton.jit
def state_pass(
  x,
  B,
  end,
  total,
  initial,
  states,
  final,
  length: tl.constexpr,
  chunks: tl.constexpr,
  heads: tl.constexpr,
  groups: tl.constexpr,
  width: tl.constexpr,
  size: tl.constexpr,
  Q: tl.constexpr,
  HT: tl.constexpr,
  MT: tl.constexpr,
):
  """The states before each chunk [b, N, chunks, H, M] and the last one.

  With `chunk_outputs` this is `forward` in two, for states so large that they
  leave no registers for the rest.
  """
  row = tl.program_id(0).to(tl.int64)
  batch, head = row // heads, row % heads
  group = head // (heads // groups)
  hs = tl.program_id(1) * HT + tl.arange(0, HT)
  ms = tl.arange(0, MT)
  q = tl.arange(0, Q)
  low = x.dtype.element_ty
  state_mask = (hs < width)[:, None] & (ms < size)[None, :]
  state_offsets = hs[:, None] * size + ms[None, :]
  state = tl.load(
    initial + row * width * size + state_offsets, mask=state_mask, other=0.0
  )
  x += (batch * length * heads + head) * width
  B += (batch * length * groups + group) * size
  for c in range(chunks):
    t = c * Q + q
    here = t < length
    xs = _tile(x, t, hs, heads * width, here, width)
    Bs = _tile(B, t, ms, groups * size, here, size)
    ends = tl.load(end + row * chunks * Q + t)
    place = (row * chunks + c) * width * size
    tl.store(states + place + state_offsets, state.to(low), mask=state_mask)
    leaving = (xs.to(tl.float32) * ends[:, None]).to(low)
    state = state * tl.load(total + row * chunks + c)
    state = tl.dot(tl.trans(leaving), Bs, acc=state)
  tl.store(final + row * width * size + state_offsets, state, mask=state_mask)


@triton.jit
def chunk_outputs(
  x,
  B,
  C,
  dt,
  cum,
  start,
  D,
  runs,
  states,
  y,
  length: tl.constexpr,
  chunks: tl.constexpr,
  heads: tl.constexpr,
  groups: tl.constexpr,
  width: tl.constexpr,
  size: tl.constexpr,
  has_D: tl.constexpr,
  has_runs: tl.constexpr,
  Q: tl.constexpr,
  HT: tl.constexpr,
  MT: tl.constexpr,
):
  """y of one chunk of one head, from the state before it."""
  c = tl.program_id(0)
  row = tl.program_id(1).to(tl.int64)
  batch, head = row // heads, row % heads
  group = head // (heads // groups)
  hs = tl.program_id(2) * HT + tl.arange(0, HT)
  ms = tl.arange(0, MT)
  q = tl.arange(0, Q)
  t = c * Q + q
  here = t < length
  low = x.dtype.element_ty
  first = (batch * length * heads + head) * width
  maps = (batch * length * groups + group) * size
  per_token = row * chunks * Q + t
  Bs = _tile(B + maps, t, ms, groups * size, here, size)
  Cs = _tile(C + maps, t, ms, groups * size, here, size)
  xs = _tile(x + first, t, hs, heads * width, here, width)
  state_mask = (hs < width)[:, None] & (ms < size)[None, :]
  place = (row * chunks + c) * width * size
  state = tl.load(
    states + place + hs[:, None] * size + ms[None, :],
    mask=state_mask,
    other=0.0,
  )
  cums = tl.load(cum + per_token)
  scores = tl.dot(Cs, tl.trans(Bs))
  seen = q[:, None] >= q[None, :]
  if has_runs:
    run = tl.load(runs + batch * chunks * Q + t)
    seen = seen & (run[:, None] == run[None, :])
  exponents = tl.where(seen, cums[:, None] - cums[None, :], float("-inf"))
  weights = scores * tl.exp2(exponents * LOG2_E)
  weights *= tl.load(dt + per_token)[None, :]
  out = tl.dot(Cs, tl.trans(state)) * tl.load(start + per_token)[:, None]
  out = tl.dot(weights.to(low), xs, acc=out)
  if has_D:
    out += tl.load(D + head) * xs.to(tl.float32)
  tl.store(
    y + first + t[:, None] * (heads * width) + hs[None, :],
    out.to(low),
    mask=here[:, None] & (hs < width)[None, :],
  )


@triton.jit
def state_gradients(
  C,
  start,
  total,
  states,
  dy,
  d_final,
  d_states,
  d_total,
  d_initial,
  length: tl.constexpr,
  chunks: tl.constexpr,
  heads: tl.constexpr,
  groups: tl.constexpr,
  width: tl.constexpr,
  size: tl.constexpr,
  Q: tl.constexpr,
  HT: tl.constexpr,
  MT: tl.constexpr,
):
  """Gradients of the states after each chunk [b, N, chunks, H, M].

  From the last chunk to the first, which leaves that of the initial state.
  d_total is [parts, b, N, chunks], to be summed.
  """
  row = tl.program_id(0).to(tl.int64)
  batch, head = row // heads, row % heads
  group = head // (heads // groups)
  hs = tl.program_id(1) * HT + tl.arange(0, HT)
  ms = tl.arange(0, MT)
  q = tl.arange(0, Q)
  low = C.dtype.element_ty
  state_mask = (hs < width)[:, None] & (ms < size)[None, :]
  state_offsets = hs[:, None] * size + ms[None, :]
  d_state = tl.load(
    d_final + row * width * size + state_offsets, mask=state_mask, other=0.0
  )
  dy += (batch * length * heads + head) * width
  C += (batch * length * groups + group) * size
  d_total += tl.program_id(1) * tl.num_programs(0) * chunks
  for i in range(chunks):
    c = chunks - 1 - i
    t = c * Q + q
    here = t < length
    Cs = _tile(C, t, ms, groups * size, here, size)
    dys = _tile(dy, t, hs, heads * width, here, width)
    starts = tl.load(start + row * chunks * Q + t)
    place = (row * chunks + c) * width * size
    state = tl.load(states + place + state_offsets, mask=state_mask, other=0.0)
    tl.store(d_states + place + state_offsets, d_state.to(low), mask=state_mask)
    d_factor = tl.sum(d_state * state.to(tl.float32))
    tl.store(d_total + row * chunks + c, d_factor)
    reading = (dys.to(tl.float32) * starts[:, None]).to(low)
    d_state = d_state * tl.load(total + row * chunks + c)
    d_state = tl.dot(tl.trans(reading), Cs, acc=d_state)
  tl.store(
    d_initial + row * width * size + state_offsets, d_state, mask=state_mask
  )


@triton.jit
def chunk_gradients(
  x,
  B,
  C,
  dt,
  cum,
  start,
  end,
  D,
  runs,
  states,
  d_states,
  dy,
  dx,
  dB,
  dC,
  d_dt,
  d_cum,
  d_start,
  d_end,
  d_D,
  length: tl.constexpr,
  chunks: tl.constexpr,
  heads: tl.constexpr,
  groups: tl.constexpr,
  width: tl.constexpr,
  size: tl.constexpr,
  has_D: tl.constexpr,
  has_runs: tl.constexpr,
  Q: tl.constexpr,
  HT: tl.constexpr,
  MT: tl.constexpr,
):
  """What one chunk of one head adds to the gradients.

  The head dim is shared by programs, whose parts of each gradient but that of
  x are to be summed: those of B and C are [b, N, parts, T, M], over the heads
  of a group too, that of D is [parts, b, N, chunks], the others are [parts, b,
  N, T]. Matrices of pairs are [s, l] here, s <= l. Each
  result is stored as soon as it is there, which keeps registers free.
  """
  c = tl.program_id(0)
  row = tl.program_id(1).to(tl.int64)
  batch, head = row // heads, row % heads
  group = head // (heads // groups)
  part = tl.program_id(2)
  hs = part * HT + tl.arange(0, HT)
  ms = tl.arange(0, MT)
  q = tl.arange(0, Q)
  t = c * Q + q
  here = t < length
  low = x.dtype.element_ty
  first = (batch * length * heads + head) * width
  maps = (batch * length * groups + group) * size
  per_token = row * chunks * Q + t
  partial = part * tl.num_programs(1) * chunks * Q + per_token
  xs = _tile(x + first, t, hs, heads * width, here, width)
  dys = _tile(dy + first, t, hs, heads * width, here, width)
  Bs = _tile(B + maps, t, ms, groups * size, here, size)
  Cs = _tile(C + maps, t, ms, groups * size, here, size)
  cums = tl.load(cum + per_token)
  dts = tl.load(dt + per_token)

  # Inside the chunk.
  seen = q[:, None] <= q[None, :]
  if has_runs:
    run = tl.load(runs + batch * chunks * Q + t)
    seen = seen & (run[:, None] == run[None, :])
  exponents = tl.where(seen, cums[None, :] - cums[:, None], float("-inf"))
  decays = tl.exp2(exponents * LOG2_E)
  scores = tl.dot(Bs, tl.trans(Cs))
  weights = (scores * decays * dts[:, None]).to(low)
  d_x = tl.dot(weights, dys)
  decays *= tl.dot(xs, tl.trans(dys))
  d_scores = (decays * dts[:, None]).to(low)
  pairs = scores * decays
  tl.store(d_dt + partial, tl.sum(pairs, axis=1))
  pairs *= dts[:, None]
  tl.store(d_cum + partial, tl.sum(pairs, axis=0) - tl.sum(pairs, axis=1))

  # Through the state after the chunk.
  place = (row * chunks + c) * width * size
  state_mask = (hs < width)[:, None] & (ms < size)[None, :]
  state_offsets = place + hs[:, None] * size + ms[None, :]
  d_state = tl.load(d_states + state_offsets, mask=state_mask, other=0.0)
  ends = tl.load(end + per_token)
  d_leaving = tl.dot(Bs, tl.trans(d_state))
  wide, d_wide = xs.to(tl.float32), dys.to(tl.float32)
  tl.store(d_end + partial, tl.sum(wide * d_leaving, axis=1))
  d_x += ends[:, None] * d_leaving
  if has_D:
    d_x += tl.load(D + head) * d_wide
    place_D = (part * tl.num_programs(1) + row) * chunks + c
    tl.store(d_D + place_D, tl.sum(wide * d_wide))
  tl.store(
    dx + first + t[:, None] * (heads * width) + hs[None, :],
    d_x.to(low),
    mask=here[:, None] & (hs < width)[None, :],
  )
  map_mask = here[:, None] & (ms < size)[None, :]
  first_row = (row * tl.num_programs(2) + part) * length
  map_offsets = (first_row + t[:, None]) * size + ms[None, :]
  d_B = tl.dot((wide * ends[:, None]).to(low), d_state)
  d_B = tl.dot(d_scores, Cs, acc=d_B)
  tl.store(dB + map_offsets, d_B.to(low), mask=map_mask)

  # Through the state before it.
  state = tl.load(states + state_offsets, mask=state_mask, other=0.0)
  starts = tl.load(start + per_token)
  reading = tl.dot(Cs, tl.trans(state))
  tl.store(d_start + partial, tl.sum(d_wide * reading, axis=1))
  d_C = tl.dot((d_wide * starts[:, None]).to(low), state)
  d_C = tl.dot(tl.trans(d_scores), Bs, acc=d_C)
  tl.store(dC + map_offsets, d_C.to(low), mask=map_mask)
