"""The Triton kernels of the causal convolution: tokens pass through registers.

A program owns `columns` channels and `rows` runs of `span` tokens that follow
one another. It walks along its runs side by side and keeps the last taps of
each in registers, so that an input comes from memory once, but for the few in
front of a run. `ahead` tokens are loaded before the first of them is used.

Where a segment begins, the taps in registers become zeros: whatever comes later
cannot see across. Nothing else is needed for ids that come back.

Arrays in memory: x, y, dy, dx [B, length, channels]; kernel [width, channels];
bias [channels]; state, d_state [B, width - 1, channels]; ids [B, length];
sums [B * pieces, width + 1, channels], a row for each program of a channel:
the gradients of the taps, then that of the bias. Arithmetic is float32.
"""

import triton
import triton.language as tl


@triton.jit
def _place(
  length: tl.constexpr,
  channels: tl.constexpr,
  rows: tl.constexpr,
  span: tl.constexpr,
  columns: tl.constexpr,
):
  """Row of the batch, number of the piece of tokens, channels [1, columns]."""
  blocks: tl.constexpr = (channels + columns - 1) // columns
  pieces: tl.constexpr = (length + rows * span - 1) // (rows * span)
  # Programs that start together read what is together in memory.
  program = tl.program_id(0)
  column = program % blocks * columns + tl.arange(0, columns)[None, :]
  piece = program // blocks
  return (piece // pieces).to(tl.int64), piece % pieces, column


@triton.jit
def _runs(rows: tl.constexpr, span: tl.constexpr):
  """The first token of each run, counted from the program's: [rows, 1].

  A scalar if there is one run: then its ids are loaded once for all channels.
  """
  if rows == 1:
    return 0
  else:
    return tl.arange(0, rows)[:, None] * span


@triton.jit
def _parameters(
  kernel, bias, column, channels, width: tl.constexpr, has_bias: tl.constexpr
):
  """The weights of the taps, width times [1, columns], and the bias."""
  inside = column < channels
  weights = ()
  for i in tl.static_range(width):
    weight = tl.load(kernel + (i * channels + column), mask=inside, other=0.0)
    weights = weights + (weight.to(tl.float32),)
  offset = tl.full(column.shape, 0, tl.float32)
  if has_bias:
    offset = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
  return weights, offset


@triton.jit
def _past(
  x,
  state,
  ids,
  batch,
  first,
  column,
  length: tl.constexpr,
  channels: tl.constexpr,
  width: tl.constexpr,
  has_state: tl.constexpr,
  has_ids: tl.constexpr,
):
  """The inputs before the first tokens, which may be the first of all."""
  inside = column < channels
  taps = ()
  for i in tl.static_range(width - 1):
    token = first + (i - (width - 1))
    if has_ids:
      taps = _hide(taps, _begins(ids, batch, token, length))
    at = (batch * length + token) * channels + column
    mask = inside & (token >= 0) & (token < length)
    tap = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if has_state:
      at = (batch * (width - 1) + (token + width - 1)) * channels + column
      mask = inside & (token < 0)
      tap += tl.load(state + at, mask=mask, other=0.0).to(tl.float32)
    taps = taps + (tap,)
  return taps


@triton.jit
def _begins(ids, batch, token, length: tl.constexpr):
  """Whether a segment begins at the token, with another one before it."""
  pointer = ids + (batch * length + token)
  mask = (token > 0) & (token < length)
  now = tl.load(pointer, mask=mask, other=0)
  return now != tl.load(pointer - 1, mask=mask, other=0)


@triton.jit
def _hide(values, where):
  hidden = ()
  for i in tl.static_range(len(values)):
    hidden = hidden + (tl.where(where, 0.0, values[i]),)
  return hidden


@triton.jit
def _total(taps, weights, offset, width: tl.constexpr):
  total = offset
  for i in tl.static_range(width):
    total += weights[i] * taps[i]
  return total


@triton.jit
def forward(
  x,
  kernel,
  bias,
  state,
  ids,
  y,
  length: tl.constexpr,
  channels: tl.constexpr,
  width: tl.constexpr,
  silu: tl.constexpr,
  has_bias: tl.constexpr,
  has_state: tl.constexpr,
  has_ids: tl.constexpr,
  rows: tl.constexpr,
  span: tl.constexpr,
  ahead: tl.constexpr,
  columns: tl.constexpr,
):
  """Writes y."""
  batch, piece, column = _place(length, channels, rows, span, columns)
  inside = column < channels
  first = piece * (rows * span)
  runs = _runs(rows, span)
  whole: tl.constexpr = length % (rows * span) == 0
  weights, offset = _parameters(kernel, bias, column, channels, width, has_bias)
  taps = _past(
    x,
    state,
    ids,
    batch,
    first + runs,
    column,
    length,
    channels,
    width,
    has_state,
    has_ids,
  )
  origin = (batch * length + first) * channels
  for start in range(0, span, ahead):
    loaded = ()
    for i in tl.static_range(ahead):
      token = runs + (start + i)
      mask = inside & (whole | (first + token < length))
      pointer = x + origin + (token * channels + column)
      loaded = loaded + (tl.load(pointer, mask=mask, other=0.0),)
    for i in tl.static_range(ahead):
      token = runs + (start + i)
      if has_ids:
        taps = _hide(taps, _begins(ids, batch, first + token, length))
      taps = taps + (loaded[i].to(tl.float32),)
      total = _total(taps, weights, offset, width)
      if silu:
        total = total / (1 + tl.exp(-total))
      mask = inside & (whole | (first + token < length))
      pointer = y + origin + (token * channels + column)
      tl.store(pointer, total.to(y.dtype.element_ty), mask=mask)
      taps = taps[1:]


@triton.jit
def _add(a, b):
  return a + b


@triton.jit
def _slope(dy, total, silu: tl.constexpr):
  """The gradient before the activation."""
  dy = dy.to(tl.float32)
  if silu:
    gate = 1 / (1 + tl.exp(-total))
    dy = dy * (gate + total * gate * (1 - gate))
  return dy


@triton.jit
def _still(live, begins):
  """Nothing before the beginning of a segment is visible any more."""
  still = ()
  for i in tl.static_range(len(live)):
    still = still + (live[i] & (begins == 0),)
  return still


@triton.jit
def _spread(
  pending, live, weights, d_total, width: tl.constexpr, has_ids: tl.constexpr
):
  """Adds a token's gradient to those of the inputs that it sees."""
  spread = ()
  for i in tl.static_range(width - 1):
    part = weights[i] * d_total
    if has_ids:
      part = tl.where(live[i], part, 0.0)
    spread = spread + (pending[i] + part,)
  return spread + (weights[width - 1] * d_total,)


@triton.jit
def backward(
  x,
  kernel,
  bias,
  state,
  ids,
  dy,
  dx,
  d_state,
  sums,
  length: tl.constexpr,
  channels: tl.constexpr,
  width: tl.constexpr,
  silu: tl.constexpr,
  has_bias: tl.constexpr,
  has_state: tl.constexpr,
  has_ids: tl.constexpr,
  rows: tl.constexpr,
  span: tl.constexpr,
  ahead: tl.constexpr,
  columns: tl.constexpr,
):
  """Writes dx, d_state, and sums.

  A run's inputs also reach the width - 1 outputs behind it, whose gradients are
  computed again; the sums count them once, in the run that they belong to. The
  gradient of an input leaves the registers width - 1 tokens later, complete.
  """
  batch, piece, column = _place(length, channels, rows, span, columns)
  inside = column < channels
  first = piece * (rows * span)
  runs = _runs(rows, span)
  whole: tl.constexpr = length % (rows * span) == 0
  past: tl.constexpr = width - 1
  weights, offset = _parameters(kernel, bias, column, channels, width, has_bias)
  taps = _past(
    x,
    state,
    ids,
    batch,
    first + runs,
    column,
    length,
    channels,
    width,
    has_state,
    has_ids,
  )
  zeros = tl.full((rows, columns), 0, tl.float32)
  pending = ()  # gradients of the taps so far
  live = ()  # whether the taps are visible from here
  totals = (zeros,)  # of the gradients of the weights and the bias
  for _ in tl.static_range(past):
    pending = pending + (zeros,)
    live = live + (first + runs >= 0,)
  for _ in tl.static_range(width):
    totals = totals + (zeros,)
  origin = (batch * length + first) * channels

  for start in range(0, span, ahead):
    loaded = ()
    for i in tl.static_range(ahead):
      token = runs + (start + i)
      mask = inside & (whole | (first + token < length))
      at = origin + (token * channels + column)
      tap = tl.load(x + at, mask=mask, other=0.0)
      loaded = loaded + ((tap, tl.load(dy + at, mask=mask, other=0.0)),)
    for i in tl.static_range(ahead):
      token = runs + (start + i)
      if has_ids:
        begins = _begins(ids, batch, first + token, length)
        taps = _hide(taps, begins)
        live = _still(live, begins)
      taps = taps + (loaded[i][0].to(tl.float32),)
      total = _total(taps, weights, offset, width)
      d_total = _slope(loaded[i][1], total, silu)
      added = ()
      for j in tl.static_range(width):
        added = added + (totals[j] + d_total * taps[j],)
      totals = added + (totals[width] + d_total,)
      pending = _spread(pending, live, weights, d_total, width, has_ids)
      at = token - past
      mask = inside & (whole | (first + at < length))
      if i < past:
        mask = mask & (start + i >= past)
        if has_state:
          # The first run's input `past` tokens ago: a token of the state.
          at_state = (batch * past + first + token) * channels + column
          before = inside & (first + runs == 0) & (start + i < past)
          value = pending[0].to(d_state.dtype.element_ty)
          tl.store(d_state + at_state, value, mask=before)
      pointer = dx + origin + (at * channels + column)
      tl.store(pointer, pending[0].to(dx.dtype.element_ty), mask=mask)
      taps, pending = taps[1:], pending[1:]
      live = live[1:] + (first + runs >= 0,)

  for i in tl.static_range(past):
    token = runs + (span + i)
    if has_ids:
      begins = _begins(ids, batch, first + token, length)
      taps = _hide(taps, begins)
      live = _still(live, begins)
    mask = inside & (first + token < length)
    at = origin + (token * channels + column)
    tap = tl.load(x + at, mask=mask, other=0.0)
    taps = taps + (tap.to(tl.float32),)
    total = _total(taps, weights, offset, width)
    d_total = _slope(tl.load(dy + at, mask=mask, other=0.0), total, silu)
    pending = _spread(pending, live, weights, d_total, width, has_ids)
    at = token - past
    mask = inside & (whole | (first + at < length))
    pointer = dx + origin + (at * channels + column)
    tl.store(pointer, pending[0].to(dx.dtype.element_ty), mask=mask)
    taps, pending = taps[1:], pending[1:]
    live = live[1:] + (first + runs >= 0,)

  pieces: tl.constexpr = (length + rows * span - 1) // (rows * span)
  row = (batch * pieces + piece) * (width + 1)
  for i in tl.static_range(width + 1):
    value = tl.reduce(totals[i], 0, _add, keep_dims=True)
    tl.store(sums + ((row + i) * channels + column), value, mask=inside)
