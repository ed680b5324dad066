"""The Triton kernels of attention: forward, and gradients in owned sums.

A program of `forward` and of `query_gradient` holds a tile of query rows and
goes over tiles of keys; one of `key_value_gradients` holds a tile of keys and
goes over the rows of all query heads that share its key head; one of
`bias_gradient` holds a tile of the bias and goes over what it was broadcast to.
Every sum has one owner and one order: results repeat bit for bit.

Which tiles a program visits, and which of them lie wholly in sight, it reads
from `bounds` (visits.py). Logits are in base 2. Arrays are those of
`multihead.ops.attention`, contiguous; lse, rows (lse in base 2, +inf for an
empty row) and delta are [B, N, T] in float32. An array that a call does not
have is any other one. Names are those of parts.py.
"""

import triton
import triton.language as tl

from multihead.ops.attention.triton import parts

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
  out,
  top,
  total,
  q,
  k,
  v,
  bias,
  mask,
  i0,
  j0,
  q_ids,
  kv_ids,
  seeds,
  b,
  offset,
  length,
  edge: tl.constexpr,
  o: tl.constexpr,
):
  """Sums of a tile of rows with one more tile of columns."""
  i = tl.arange(0, o.rows)[:, None]
  j = tl.arange(0, o.columns)
  ks = parts.tile(k, j0, length, o.K * o.H, o.columns, o.H, o.HT, edge)
  x = tl.dot(q, tl.trans(ks), input_precision=o.precision)
  ids = parts.ids(kv_ids, b, j0, j, o.S, o)
  x, _ = parts.logits(
    *(x, bias, mask, i0, j0, i, j[None, :]),
    *(q_ids[:, None], ids[None, :], offset, length, edge, o),
  )
  new = tl.maximum(top, tl.max(x, axis=1) * o.factor)
  base = new
  if edge or o.has_bias:
    base = tl.where(new == float("-inf"), 0.0, new)
  p = tl.exp2(x * o.factor - base[:, None])
  shrink = tl.exp2(top - base)
  total = total * shrink + tl.sum(p, axis=1)
  if o.dropped > 0:
    p = tl.where(parts.kept(seeds[:, None], (j0 + j)[None, :], o), p, 0.0)
  out = out * shrink[:, None]
  vs = parts.tile(v, j0, length, o.K * o.V, o.columns, o.V, o.VT, edge)
  p = p.to(v.dtype.element_ty)
  out = tl.dot(p, vs, acc=out, input_precision=o.precision)
  return out, new, total


@triton.jit
def forward(
  q,
  k,
  v,
  bias,
  mask,
  offsets,
  lengths,
  q_ids,
  kv_ids,
  words,
  items,
  bounds,
  out,
  lse,
  o: tl.constexpr,
):
  """The output [B, T, N, V] and the natural lse [B, N, T]."""
  tiles: tl.constexpr = (o.T + o.rows - 1) // o.rows
  tile = tiles - 1 - tl.program_id(0) % tiles
  row = (tl.program_id(0) // tiles).to(tl.int64)
  b, n = row // o.N, row % o.N
  kn = n // (o.N // o.K)
  i0 = tile * o.rows
  i = tl.arange(0, o.rows)
  q += (b * o.T * o.N + n) * o.H
  k += (b * o.S * o.K + kn) * o.H
  v += (b * o.S * o.K + kn) * o.V
  bias += b * o.bias_b + n * o.bias_n
  mask += b * o.mask_b + n * o.mask_n
  offset, length = parts.item(offsets, lengths, b, o)
  limits = parts.bounds(bounds, b, n, tile, tiles, o)
  first, free, free_stop, stop = limits
  qs = parts.tile(q, i0, o.T, o.N * o.H, o.rows, o.H, o.HT, True)
  q_ids = parts.ids(q_ids, b, i0, i, o.T, o)
  seeds = parts.row_seeds(words, items, b, n, i0 + i, o)
  top = tl.full((o.rows,), float("-inf"), tl.float32)
  total = tl.full((o.rows,), 0.0, tl.float32)
  sums = tl.full((o.rows, o.VT), 0.0, tl.float32)
  if o.masked:
    for w in range(stop - first - free_stop + free):
      j0 = parts.masked_tile(w, limits) * o.columns
      sums, top, total = _attend(
        *(sums, top, total, qs, k, v, bias, mask, i0, j0, q_ids, kv_ids),
        *(seeds, b, offset, length, True, o),
      )
  if o.free:
    for w in range(free_stop - free):
      j0 = (free + w) * o.columns
      sums, top, total = _attend(
        *(sums, top, total, qs, k, v, bias, mask, i0, j0, q_ids, kv_ids),
        *(seeds, b, offset, length, False, o),
      )
  # Zeros and -inf for a row that sees nothing.
  sums *= (o.kept_scale / tl.where(total == 0, 1.0, total))[:, None]
  out += (b * o.T * o.N + n) * o.V
  parts.store(out, sums, i0, o.T, o.N * o.V, o.rows, o.V, o.VT)
  top = tl.where(top == float("-inf"), 0.0, top)
  lse += row * o.T + i0
  tl.store(lse + i, (top + tl.log2(total)) * LN_2, mask=i < o.T - i0)


@triton.jit
def _add_query_gradient(
  d_q,
  q,
  d_out,
  terms,
  k,
  v,
  bias,
  mask,
  i0,
  j0,
  q_ids,
  kv_ids,
  seeds,
  b,
  offset,
  length,
  edge: tl.constexpr,
  o: tl.constexpr,
):
  i = tl.arange(0, o.rows)[:, None]
  j = tl.arange(0, o.columns)
  ks = parts.tile(k, j0, length, o.K * o.H, o.columns, o.H, o.HT, edge)
  vs = parts.tile(v, j0, length, o.K * o.V, o.columns, o.V, o.VT, edge)
  x = tl.dot(q, tl.trans(ks), input_precision=o.precision)
  d_p = tl.dot(d_out, tl.trans(vs), input_precision=o.precision)
  ids = parts.ids(kv_ids, b, j0, j, o.S, o)
  x, slope = parts.logits(
    *(x, bias, mask, i0, j0, i, j[None, :]),
    *(q_ids[:, None], ids[None, :], offset, length, edge, o),
  )
  rows, delta = terms
  p = tl.exp2(x * o.factor - rows[:, None])
  kept = x
  if o.dropped > 0:
    kept = parts.kept(seeds[:, None], (j0 + j)[None, :], o)
  d_x = parts.logit_gradient(p, d_p, x, delta[:, None], kept, edge, o)
  if o.softcap > 0:
    d_x *= slope
  d_x = d_x.to(k.dtype.element_ty)
  return tl.dot(d_x, ks, acc=d_q, input_precision=o.precision)


@triton.jit
def query_gradient(
  q,
  k,
  v,
  bias,
  mask,
  offsets,
  lengths,
  q_ids,
  kv_ids,
  words,
  items,
  bounds,
  rows,
  delta,
  d_out,
  d_q,
  o: tl.constexpr,
):
  """The gradient of queries."""
  tiles: tl.constexpr = (o.T + o.rows - 1) // o.rows
  tile = tiles - 1 - tl.program_id(0) % tiles
  row = (tl.program_id(0) // tiles).to(tl.int64)
  b, n = row // o.N, row % o.N
  kn = n // (o.N // o.K)
  i0 = tile * o.rows
  i = tl.arange(0, o.rows)
  q += (b * o.T * o.N + n) * o.H
  d_out += (b * o.T * o.N + n) * o.V
  k += (b * o.S * o.K + kn) * o.H
  v += (b * o.S * o.K + kn) * o.V
  bias += b * o.bias_b + n * o.bias_n
  mask += b * o.mask_b + n * o.mask_n
  offset, length = parts.item(offsets, lengths, b, o)
  limits = parts.bounds(bounds, b, n, tile, tiles, o)
  first, free, free_stop, stop = limits
  qs = parts.tile(q, i0, o.T, o.N * o.H, o.rows, o.H, o.HT, True)
  d_outs = parts.tile(d_out, i0, o.T, o.N * o.V, o.rows, o.V, o.VT, True)
  terms = parts.row_terms(rows + row * o.T, delta + row * o.T, i0, i, o)
  q_ids = parts.ids(q_ids, b, i0, i, o.T, o)
  seeds = parts.row_seeds(words, items, b, n, i0 + i, o)
  sums = tl.full((o.rows, o.HT), 0.0, tl.float32)
  if o.masked:
    for w in range(stop - first - free_stop + free):
      j0 = parts.masked_tile(w, limits) * o.columns
      sums = _add_query_gradient(
        *(sums, qs, d_outs, terms, k, v, bias, mask, i0, j0, q_ids, kv_ids),
        *(seeds, b, offset, length, True, o),
      )
  if o.free:
    for w in range(free_stop - free):
      j0 = (free + w) * o.columns
      sums = _add_query_gradient(
        *(sums, qs, d_outs, terms, k, v, bias, mask, i0, j0, q_ids, kv_ids),
        *(seeds, b, offset, length, False, o),
      )
  sums *= o.scale
  d_q += (b * o.T * o.N + n) * o.H
  parts.store(d_q, sums, i0, o.T, o.N * o.H, o.rows, o.H, o.HT)


@triton.jit
def _add_key_value_gradients(
  d_k,
  d_v,
  k,
  v,
  q,
  d_out,
  rows,
  delta,
  bias,
  mask,
  i0,
  j0,
  q_ids,
  kv_ids,
  words,
  items,
  b,
  n,
  offset,
  length,
  edge: tl.constexpr,
  o: tl.constexpr,
):
  """As `_add_query_gradient`, with tiles of columns times rows."""
  i = tl.arange(0, o.rows)
  j = tl.arange(0, o.columns)[:, None]
  qs = parts.tile(q, i0, o.T, o.N * o.H, o.rows, o.H, o.HT, edge)
  x = tl.dot(k, tl.trans(qs), input_precision=o.precision)
  here, delta = parts.row_terms(rows, delta, i0, i, o)
  ids = parts.ids(q_ids, b, i0, i, o.T, o)
  x, slope = parts.logits(
    *(x, bias, mask, i0, j0, i[None, :], j),
    *(ids[None, :], kv_ids[:, None], offset, length, edge, o),
  )
  p = tl.exp2(x * o.factor - here[None, :])
  d_outs = parts.tile(d_out, i0, o.T, o.N * o.V, o.rows, o.V, o.VT, edge)
  kept = x
  weights = p
  if o.dropped > 0:
    seeds = parts.row_seeds(words, items, b, n, i0 + i, o)
    kept = parts.kept(seeds[None, :], j0 + j, o)
    weights = tl.where(kept, p, 0.0)
  weights = weights.to(v.dtype)
  d_v = tl.dot(weights, d_outs, acc=d_v, input_precision=o.precision)
  d_p = tl.dot(v, tl.trans(d_outs), input_precision=o.precision)
  d_x = parts.logit_gradient(p, d_p, x, delta[None, :], kept, edge, o)
  if o.softcap > 0:
    d_x *= slope
  d_k = tl.dot(d_x.to(k.dtype), qs, acc=d_k, input_precision=o.precision)
  return d_k, d_v


@triton.jit
def key_value_gradients(
  q,
  k,
  v,
  bias,
  mask,
  offsets,
  lengths,
  q_ids,
  kv_ids,
  words,
  items,
  bounds,
  rows,
  delta,
  d_out,
  d_k,
  d_v,
  o: tl.constexpr,
):
  """The gradients of keys and values."""
  tiles: tl.constexpr = (o.S + o.columns - 1) // o.columns
  tile = tl.program_id(0) % tiles
  row = (tl.program_id(0) // tiles).to(tl.int64)
  b, kn = row // o.K, row % o.K
  j0 = tile * o.columns
  j = tl.arange(0, o.columns)
  kv = b * o.S * o.K + kn
  offset, length = parts.item(offsets, lengths, b, o)
  ks = parts.tile(
    k + kv * o.H, j0, length, o.K * o.H, o.columns, o.H, o.HT, True
  )
  vs = parts.tile(
    v + kv * o.V, j0, length, o.K * o.V, o.columns, o.V, o.VT, True
  )
  kv_ids = parts.ids(kv_ids, b, j0, j, o.S, o)
  d_ks = tl.full((o.columns, o.HT), 0.0, tl.float32)
  d_vs = tl.full((o.columns, o.VT), 0.0, tl.float32)
  for g in range(o.N // o.K):
    n = kn * (o.N // o.K) + g
    limits = parts.bounds(bounds, b, n, tile, tiles, o)
    first, free, free_stop, stop = limits
    head = b * o.T * o.N + n
    line = (b * o.N + n) * o.T
    q_n, d_out_n = q + head * o.H, d_out + head * o.V
    bias_n = bias + b * o.bias_b + n * o.bias_n
    mask_n = mask + b * o.mask_b + n * o.mask_n
    if o.masked:
      for w in range(stop - first - free_stop + free):
        i0 = parts.masked_tile(w, limits) * o.rows
        d_ks, d_vs = _add_key_value_gradients(
          *(d_ks, d_vs, ks, vs, q_n, d_out_n, rows + line, delta + line),
          *(bias_n, mask_n, i0, j0, q_ids, kv_ids, words, items, b, n),
          *(offset, length, True, o),
        )
    if o.free:
      for w in range(free_stop - free):
        i0 = (free + w) * o.rows
        d_ks, d_vs = _add_key_value_gradients(
          *(d_ks, d_vs, ks, vs, q_n, d_out_n, rows + line, delta + line),
          *(bias_n, mask_n, i0, j0, q_ids, kv_ids, words, items, b, n),
          *(offset, length, False, o),
        )
  d_ks *= o.scale
  d_vs *= o.kept_scale
  parts.store(d_k + kv * o.H, d_ks, j0, o.S, o.K * o.H, o.columns, o.H, o.HT)
  parts.store(d_v + kv * o.V, d_vs, j0, o.S, o.K * o.V, o.columns, o.V, o.VT)


@triton.jit
def bias_gradient(
  q,
  k,
  v,
  bias,
  mask,
  offsets,
  lengths,
  q_ids,
  kv_ids,
  words,
  items,
  bounds,
  rows,
  delta,
  d_out,
  d_bias,
  o: tl.constexpr,
  B: tl.constexpr,
  share: tl.constexpr,
):
  """Partial sums [parts, #B, #N, #T, #S] of the gradient of the bias.

  A part sums `share` of the tiles that an element was broadcast to.
  """
  tiles_i: tl.constexpr = (o.T + o.rows - 1) // o.rows
  tiles_j: tl.constexpr = (o.S + o.columns - 1) // o.columns
  # Tiles of the bias along each axis, and tiles that each of them is used in.
  own_j: tl.constexpr = tiles_j if o.bias_s else 1
  own_i: tl.constexpr = tiles_i if o.bias_t else 1
  own_n: tl.constexpr = o.N if o.bias_n else 1
  own_b: tl.constexpr = B if o.bias_b else 1
  used_j: tl.constexpr = tiles_j // own_j
  used_i: tl.constexpr = tiles_i // own_i
  used_n: tl.constexpr = o.N // own_n
  used: tl.constexpr = B // own_b * used_n * used_i * used_j
  place = tl.program_id(0)
  bias_j, place = place % own_j, place // own_j
  bias_i, place = place % own_i, place // own_i
  bias_n, place = place % own_n, place // own_n
  bias_b, part = place % own_b, place // own_b
  i = tl.arange(0, o.rows)
  j = tl.arange(0, o.columns)
  sums = tl.full((o.rows, o.columns), 0.0, tl.float32)
  for w in range(part * share, tl.minimum((part + 1) * share, used)):
    tile_j = bias_j + w % used_j
    tile_i = bias_i + w // used_j % used_i
    n = bias_n + w // (used_j * used_i) % used_n
    b = (bias_b + w // (used_j * used_i * used_n)).to(tl.int64)
    limits = parts.bounds(bounds, b, n, tile_i, tiles_i, o)
    if (tile_j >= limits[0]) & (tile_j < limits[3]):
      i0, j0 = tile_i * o.rows, tile_j * o.columns
      kn = n // (o.N // o.K)
      head, kv = b * o.T * o.N + n, b * o.S * o.K + kn
      line = (b * o.N + n) * o.T
      offset, length = parts.item(offsets, lengths, b, o)
      qs = parts.tile(
        q + head * o.H, i0, o.T, o.N * o.H, o.rows, o.H, o.HT, True
      )
      ks = parts.tile(
        k + kv * o.H, j0, length, o.K * o.H, o.columns, o.H, o.HT, True
      )
      x = tl.dot(qs, tl.trans(ks), input_precision=o.precision)
      x, _ = parts.logits(
        *(x, bias + b * o.bias_b + n * o.bias_n),
        *(mask + b * o.mask_b + n * o.mask_n, i0, j0, i[:, None], j[None, :]),
        parts.ids(q_ids, b, i0, i, o.T, o)[:, None],
        parts.ids(kv_ids, b, j0, j, o.S, o)[None, :],
        *(offset, length, True, o),
      )
      here, deltas = parts.row_terms(rows + line, delta + line, i0, i, o)
      p = tl.exp2(x * o.factor - here[:, None])
      d_outs = parts.tile(
        d_out + head * o.V, i0, o.T, o.N * o.V, o.rows, o.V, o.VT, True
      )
      vs = parts.tile(
        v + kv * o.V, j0, length, o.K * o.V, o.columns, o.V, o.VT, True
      )
      d_p = tl.dot(d_outs, tl.trans(vs), input_precision=o.precision)
      kept = x
      if o.dropped > 0:
        seeds = parts.row_seeds(words, items, b, n, i0 + i, o)
        kept = parts.kept(seeds[:, None], (j0 + j)[None, :], o)
      sums += parts.logit_gradient(p, d_p, x, deltas[:, None], kept, True, o)
  d_bias += (part * own_b + bias_b).to(tl.int64) * (
    own_n * (o.T if o.bias_t else 1) * (o.S if o.bias_s else 1)
  )
  d_bias += bias_n.to(tl.int64) * (
    (o.T if o.bias_t else 1) * (o.S if o.bias_s else 1)
  )
  width: tl.constexpr = o.S if o.bias_s else 1
  i, j = bias_i * o.rows + i, bias_j * o.columns + j
  if o.bias_t and o.bias_s:
    here = (i < o.T)[:, None] & (j < o.S)[None, :]
    places = d_bias + i.to(tl.int64)[:, None] * width + j[None, :]
    tl.store(places, sums, mask=here)
  elif o.bias_t:
    tl.store(d_bias + i, tl.sum(sums, axis=1), mask=i < o.T)
  elif o.bias_s:
    tl.store(d_bias + j, tl.sum(sums, axis=0), mask=j < o.S)
  else:
    tl.store(d_bias, tl.sum(tl.sum(sums, axis=1), axis=0))
