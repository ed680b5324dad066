"""What the Triton kernels of attention have in common.

`start`, `i0` and `j0` are the first row or column of a tile; `i` and `j` count
rows and columns from there, along different axes of the tile. Options are those
of options.py.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile(
  pointer,
  start,
  stop,
  stride: tl.constexpr,
  rows: tl.constexpr,
  width: tl.constexpr,
  size: tl.constexpr,
  edge: tl.constexpr,
):
  """[rows, size] from row `start` on, zero from row `stop` on at an edge."""
  row = tl.arange(0, rows)
  column = tl.arange(0, size)
  pointer += start.to(tl.int64) * stride
  places = pointer + row[:, None] * stride + column[None, :]
  if edge:
    keep = (row < stop - start)[:, None] & (column < width)[None, :]
    tile = tl.load(places, mask=keep, other=0.0)
  elif width < size:
    tile = tl.load(places, mask=(column < width)[None, :], other=0.0)
  else:
    tile = tl.load(places)
  return tile


@triton.jit
def store(
  pointer,
  tile,
  start,
  stop,
  stride: tl.constexpr,
  rows: tl.constexpr,
  width: tl.constexpr,
  size: tl.constexpr,
):
  """Writes what `_tile` would read."""
  row = tl.arange(0, rows)
  column = tl.arange(0, size)
  pointer += start.to(tl.int64) * stride
  places = pointer + row[:, None] * stride + column[None, :]
  keep = (row < stop - start)[:, None] & (column < width)[None, :]
  tl.store(places, tile.to(pointer.dtype.element_ty), mask=keep)


@triton.jit
def item(offsets, lengths, b, o: tl.constexpr):
  """Position of row 0 and number of keys in use of a batch item."""
  offset = tl.full((), o.offset, tl.int32)
  if o.has_offset:
    offset = tl.load(offsets + b)
  length = tl.full((), o.S, tl.int32)
  if o.has_lengths:
    length = tl.load(lengths + b)
  return offset, length


@triton.jit
def ids(pointer, b, start, at, length: tl.constexpr, o: tl.constexpr):
  """Segments of rows or columns from `start` on; -1 past the end."""
  found = at
  if o.has_ids:
    keep = start + at < length
    found = tl.load(pointer + b * length + start + at, mask=keep, other=-1)
  return found


@triton.jit
def bounds(bounds, b, n, tile, tiles: tl.constexpr, o: tl.constexpr):
  """First tile, first and last plus one of the free ones, last plus one."""
  row = b * o.bounds_b + n * o.bounds_n
  place = bounds + (row * tiles + tile) * 4
  return (
    tl.load(place),
    tl.load(place + 1),
    tl.load(place + 2),
    tl.load(place + 3),
  )


@triton.jit
def masked_tile(w, bounds):
  """Number w of the visited tiles that are not free."""
  first, free, free_stop, _ = bounds
  return tl.where(w < free - first, first + w, free_stop + w - (free - first))


@triton.jit
def logits(
  x,
  bias,
  mask,
  i0,
  j0,
  i,
  j,
  q_ids,
  kv_ids,
  offset,
  length,
  edge: tl.constexpr,
  o: tl.constexpr,
):
  """Logits over `o.factor` from products, -inf if hidden; softcap's slope.

  `bias` and `mask` point to those of one head.
  """
  slope = x
  if o.softcap > 0:
    # tanh, of what keeps the exponential small.
    x *= o.scale / o.softcap
    small = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    bent = (1 - small) / (1 + small)
    slope = 1 - bent * bent
    x = tl.where(x < 0, -bent, bent) * (o.softcap * LOG2_E)
  elif not o.folded:
    x *= o.scale * LOG2_E
  if o.has_bias:
    bias += i0.to(tl.int64) * o.bias_t + j0.to(tl.int64) * o.bias_s
    place = bias + i * o.bias_t + j * o.bias_s
    if edge:
      here = (i < o.T - i0) & (j < length - j0)
      more = tl.load(place, mask=here, other=0.0)
    else:
      more = tl.load(place)
    x += more.to(tl.float32) * LOG2_E
  if edge:
    keep = (j < length - j0) & (i < o.T - i0)
    if o.left >= 0:
      keep = keep & (j - i >= i0 + offset - j0 - o.left)
    if o.right >= 0:
      keep = keep & (j - i <= i0 + offset - j0 + o.right)
    if o.has_ids:
      keep = keep & (q_ids == kv_ids)
    if o.has_mask:
      mask += i0.to(tl.int64) * o.mask_t + j0.to(tl.int64) * o.mask_s
      place = mask + i * o.mask_t + j * o.mask_s
      keep = keep & (tl.load(place, mask=keep, other=0) != 0)
    x = tl.where(keep, x, float("-inf"))
  return x, slope


@triton.jit
def mix(x):
  """Stirs the bits of uint32."""
  x ^= x >> 16
  x *= 0x85EBCA6B
  x ^= x >> 13
  x *= 0xC2B2AE35
  return x ^ (x >> 16)


@triton.jit
def row_seeds(words, items, b, n, i, o: tl.constexpr):
  """What dropout knows of rows; see ../dropout.py."""
  seeds = i
  if o.dropped > 0:
    item = tl.load(items + b).to(tl.uint32)
    row = item * (o.N * o.T) + (n * o.T + i).to(tl.uint32)
    seeds = mix(mix(tl.load(words) ^ row) + tl.load(words + 1))
  return seeds


@triton.jit
def kept(seeds, j, o: tl.constexpr):
  """Whether dropout keeps the weights of columns j."""
  bits = mix(seeds + j.to(tl.uint32) * 0x9E3779B9)
  return bits >= o.dropped


@triton.jit
def row_terms(rows, delta, i0, i, o: tl.constexpr):
  """lse in base 2 and delta of rows i0 + i; past the end as of empty rows."""
  here = i < o.T - i0
  return (
    tl.load(rows + i0 + i, mask=here, other=float("inf")),
    tl.load(delta + i0 + i, mask=here, other=0.0),
  )


@triton.jit
def logit_gradient(p, d_p, x, delta, kept, edge: tl.constexpr, o: tl.constexpr):
  """Gradient of the logits, from that of the weights."""
  if o.dropped > 0:
    d_p = tl.where(kept, d_p * o.kept_scale, 0.0)
  d_x = p * (d_p - delta)
  if edge:
    # A weight of zero would not hide what is no number.
    d_x = tl.where(x == float("-inf"), 0.0, d_x)
  return d_x
