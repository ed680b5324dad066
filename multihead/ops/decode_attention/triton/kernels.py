"""The Triton kernels of decoding: the parts of a cache, and their merge.

`attend` gives a program to each part of the keys of each item and key head (or
of a few neighbouring key heads). Its rows are the queries of all heads that
share the key head, R = N // K * T of them in the order of (head, query), so
keys and values are read once for all. `merge` weighs the parts of a row.

How an item is cut depends on its length, which the device alone knows: `parts`
in all are shared out over the batch in proportion to the keys in use (that a
window leaves). So parts are about as long, whether items are or not, and none
is cut for keys that are not there. Both kernels find the parts by the same rule
(`_share`). A slot is a part's number in the batch: those of item 0 come first.

Arrays in memory: q [B, T, N, H]; k, v [B, S, K, H or Hv], or pools [P, page, K,
H or Hv]; lengths [B]; table [B, pages]; of the parts outs [slots, K, R, Hv] and
lses [slots, K, R], in base 2; out [B, T, N, Hv]; lse [B, N, T]. Sums, outs and
both lse are float32. `o` is an `options.Options`.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _share(lengths, o: tl.constexpr):
  """Of all items: number, first and past the last visible key, parts."""
  item = tl.arange(0, o.items)
  stop = tl.load(lengths + item, mask=item < o.B, other=0)
  first = tl.zeros_like(stop)
  if o.left is not None:
    first = tl.maximum(stop - o.T - o.left, 0)
  count = (stop - first).to(tl.int64)
  total = tl.maximum(tl.sum(count, axis=0), 1)
  parts = tl.maximum(count * o.parts // total, 1).to(tl.int32)
  return item, first, stop, tl.where(item < o.B, parts, 0)


@triton.jit
def _pick(values, where):
  """The one of `values` where `where` is true; or their sum."""
  return tl.sum(tl.where(where, values, 0), axis=0)


@triton.jit
def _finite(x):
  return tl.abs(x) < float("inf")


@triton.jit
def _tile(
  x,
  table,
  item,
  head,
  start,
  stop,
  width: tl.constexpr,
  columns: tl.constexpr,
  edge: tl.constexpr,
  o: tl.constexpr,
):
  """Keys or values [o.keys, columns] from `start` on, zeros if past `stop`.

  The second result says which [o.keys] lie in a page that exists.
  """
  key = start + tl.arange(0, o.keys)
  column = tl.arange(0, columns)[None, :]
  real = key >= 0
  if o.page > 0:
    entries = table + item * o.pages + key // o.page
    if edge:
      number = tl.load(entries, mask=key < stop, other=0)
    else:
      number = tl.load(entries)
    real = (number >= 0) & (number < o.pool)
    row = tl.where(real, number, 0).to(tl.int64) * o.page + key % o.page
    pointers = x + head * width + row[:, None] * (o.K * width) + column
  else:
    # Only where the tile begins may need 64 bits.
    x += ((item * o.S + start) * o.K + head) * width
    pointers = x + (key - start)[:, None] * (o.K * width) + column
  mask = real[:, None]
  if edge:
    mask = mask & (key < stop)[:, None]
  if columns > o.together * width:
    mask = mask & (column < width)
  if edge or o.page > 0 or columns > o.together * width:
    return tl.load(pointers, mask=mask, other=0.0), real
  else:
    return tl.load(pointers), real


@triton.jit
def _attend(
  sums,
  top,
  total,
  q,
  k,
  v,
  table,
  item,
  head,
  position,
  start,
  stop,
  edge: tl.constexpr,
  o: tl.constexpr,
):
  """`sums`, `top` and `total` of a part after one more tile.

  `edge`: whether there may be a key that a row does not see.
  """
  ks, real = _tile(k, table, item, head, start, stop, o.H, o.columns, edge, o)
  vs, _ = _tile(v, table, item, head, start, stop, o.Hv, o.v_columns, edge, o)
  x = tl.dot(q, tl.trans(ks), input_precision=o.precision)
  # A bad number in a key makes its products NaN or infinite, and the row NaN.
  x = tl.where(_finite(x), x, float("nan"))
  if o.softcap is None:
    x *= o.scale * LOG2_E
  else:
    # tanh(y) = 1 - 2 / (1 + exp(2 y))
    bent = 1 - 2 / (1 + tl.exp2(x * (2 * LOG2_E * o.scale / o.softcap)))
    x = bent * (o.softcap * LOG2_E)
  if o.page > 0:
    x = tl.where(real[None, :], x, float("nan"))
  if edge:
    # 0 * NaN is NaN: a weight of zero would not hide a bad value.
    good = _finite(vs.to(tl.float32))
    bad = tl.max(tl.where(good, 0, 1), axis=1) > 0
    x = tl.where(bad[None, :], float("nan"), x)
    vs = tl.where(good, vs, 0.0)
    key = start + tl.arange(0, o.keys)[None, :]
    seen = (key <= position[:, None]) & (key < stop)
    if o.left is not None:
      seen = seen & (key >= position[:, None] - o.left)
    x = tl.where(seen, x, float("-inf"))
  higher = tl.maximum(top, tl.max(x, axis=1))
  # Of a row that has seen nothing yet: -inf - -inf would be NaN.
  base = tl.where(higher == float("-inf"), 0.0, higher)
  weights = tl.exp2(x - base[:, None])
  shrink = tl.exp2(top - base)
  total = total * shrink + tl.sum(weights, axis=1)
  sums *= shrink[:, None]
  weights = weights.to(vs.dtype)
  sums = tl.dot(weights, vs, acc=sums, input_precision=o.precision)
  return sums, higher, total


@triton.jit
def _own_columns(
  own, width: tl.constexpr, columns: tl.constexpr, o: tl.constexpr
):
  """Which of `columns` [1, columns] belong to a row's own key head `own`."""
  column = tl.arange(0, columns)[None, :]
  if o.together == 1:
    return column, column < width
  else:
    return column, column // width == own[:, None]


@triton.jit
def attend(q, k, v, lengths, table, outs, lses, o: tl.constexpr):
  """Writes outs and lses; an out whose lse is -inf stays as it is."""
  each: tl.constexpr = o.N // o.K * o.T
  groups: tl.constexpr = o.K // o.together
  slot = tl.program_id(1)
  items, first, stop, parts = _share(lengths, o)
  before = tl.cumsum(parts, axis=0) <= slot
  item = tl.sum(before.to(tl.int32), axis=0)
  if item >= o.B:
    return
  part = slot - _pick(parts, before)
  first = _pick(first, items == item)
  stop = _pick(stop, items == item)
  parts = _pick(parts, items == item)
  item = item.to(tl.int64)

  head = tl.program_id(0) % groups * o.together
  row = tl.program_id(0) // groups * o.rows + tl.arange(0, o.rows)
  valid = row < each * o.together
  own = row // each
  query = row % o.T
  position = stop - o.T + query
  q_head = head * (o.N // o.K) + row // o.T
  column, mask = _own_columns(own, o.H, o.columns, o)
  at = ((item * o.T + query) * o.N + q_head) * o.H
  q_pointers = q + at[:, None] + column - own[:, None] * o.H
  qs = tl.load(q_pointers, mask=valid[:, None] & mask, other=0.0)
  sums = tl.full((o.rows, o.v_columns), 0.0, tl.float32)
  top = tl.full((o.rows,), float("-inf"), tl.float32)
  total = tl.full((o.rows,), 0.0, tl.float32)

  everywhere = stop - o.T + 1  # Every query sees the keys below.
  size = tl.cdiv(tl.cdiv(stop - first, parts), o.keys) * o.keys
  start = first + part * size
  stop = tl.minimum(stop, start + size)
  middle = start
  # Where a window begins, too, queries differ, if there are any others.
  if o.left is None or o.T == 1:
    free = tl.maximum(tl.minimum(stop, everywhere) - start, 0)
    middle = start + free // o.keys * o.keys
    for at in range(start, middle, o.keys):
      sums, top, total = _attend(
        *(sums, top, total, qs, k, v, table),
        *(item, head, position, at, stop, False, o),
      )
  for at in range(middle, stop, o.keys):
    sums, top, total = _attend(
      *(sums, top, total, qs, k, v, table),
      *(item, head, position, at, stop, True, o),
    )

  place = (slot.to(tl.int64) * o.K + head) * each + row
  empty = total == 0
  lse = tl.where(empty, float("-inf"), top + tl.log2(total))
  tl.store(lses + place, lse, mask=valid)
  sums /= tl.where(empty, 1.0, total)[:, None]
  column, mask = _own_columns(own, o.Hv, o.v_columns, o)
  pointers = outs + place[:, None] * o.Hv + column - own[:, None] * o.Hv
  tl.store(pointers, sums, mask=mask & (valid & ~empty)[:, None])


@triton.jit
def merge(outs, lses, lengths, out, lse, o: tl.constexpr):
  """Writes a row of out, and its lse."""
  row = tl.program_id(0)  # of an item, in the order of (head, query)
  item = tl.program_id(1)
  items, _, _, parts = _share(lengths, o)
  slot = _pick(parts, items < item).to(tl.int64)
  parts = _pick(parts, items == item)
  rows: tl.constexpr = o.N * o.T
  every = tl.arange(0, o.most)
  pointers = lses + (slot + every) * rows + row
  logs = tl.load(pointers, mask=every < parts, other=float("-inf"))
  top = tl.max(logs, axis=0)
  top = tl.where(top == float("-inf"), 0.0, top)
  total = tl.sum(tl.exp2(logs - top), axis=0)
  column = tl.arange(0, o.v_columns // o.together)
  sums = tl.full((o.v_columns // o.together,), 0.0, tl.float32)
  for begin in range(0, parts, o.step):
    part = begin + tl.arange(0, o.step)
    place = (slot + part) * rows + row
    log = tl.load(lses + place, mask=part < parts, other=float("-inf"))
    mask = (log != float("-inf"))[:, None] & (column < o.Hv)[None, :]
    values = tl.load(
      outs + place[:, None] * o.Hv + column[None, :], mask=mask, other=0.0
    )
    sums += tl.sum(values * tl.exp2(log - top)[:, None], axis=0)
  sums /= tl.where(total == 0, 1.0, total)
  whole = tl.where(total == 0, float("-inf"), (top + tl.log2(total)) * LN_2)
  # A bad value reaches its own column; what saw it is the row.
  bad = tl.max(tl.where(_finite(sums), 0, 1), axis=0) > 0
  sums = tl.where(bad, float("nan"), sums)
  whole = tl.where(bad, float("nan"), whole)
  item = item.to(tl.int64)
  tl.store(lse + item * rows + row, whole)
  at = ((item * o.T + row % o.T) * o.N + row // o.T) * o.Hv
  sums = sums.to(out.dtype.element_ty)
  tl.store(out + at + column, sums, mask=column < o.Hv)
