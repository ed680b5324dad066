"""Attention whose memory is linear in T and S, on any device.

The attention matrix is computed in tiles (see tiles.py) with a running maximum
and sum per row, and again in the backward pass, which keeps q, k, v, the output
and one number per row: arXiv 2307.08691, algorithms 1 and 2. A loop over row
blocks goes around a loop over the column blocks that they can see by position,
length and the range of their segment ids: tiles outside are not computed, also
where offset, lengths and ids are traced. What is small is one tile without a
loop, and so is decoding, where keys and values are read as they lie.

Reverse mode only: the backward pass is not itself differentiable.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from multihead.ops import manual_axes
from multihead.ops.attention import positions, running, tiles
from multihead.ops.attention.tiles import Operands, Range, Spec

# Query rows times heads up to which keys are read as they lie.
_FEW_ROWS = 128
# Bytes of keys and values from which a device's branch costs less than a copy.
_COPY = 2**26


def supports(args: dict[str, Any]) -> str | None:
  """Always None: everything, everywhere."""
  del args
  return None


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  bias: jax.Array | None,
  mask: jax.Array | None,
  causal: bool,
  q_offset: int | jax.Array,
  scale: float,
  window: tuple[int | None, int | None],
  softcap: float | None,
  q_segment_ids: jax.Array | None,
  kv_segment_ids: jax.Array | None,
  kv_lengths: jax.Array | None,
  dropout_rate: float,
  dropout_words: jax.Array | None,
  deterministic: bool,
  return_lse: bool,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `multihead.ops.attention`; arguments are checked there."""
  del deterministic  # It always is.
  T, S = q.shape[1], k.shape[1]
  left, right = positions.bounds(causal, window, q_offset, T, S)
  positional = left is not None or right is not None
  if not positional:
    q_offset = 0  # Nothing depends on it.
  static = isinstance(q_offset, int)
  spec = Spec(
    scale=scale,
    softcap=softcap,
    left=left,
    right=right,
    offset=q_offset if static else None,
    restricted=positional
    or any(x is not None for x in (mask, q_segment_ids, kv_lengths)),
    dtype=jnp.promote_types(q.dtype, jnp.float32).name,
    dropout=dropout_rate,
  )
  q, k, v, *rest = manual_axes.alike(
    q,
    k,
    v,
    bias,
    mask,
    None if static else q_offset,
    q_segment_ids,
    kv_segment_ids,
    kv_lengths,
    dropout_words,
  )
  out, lse = _attention(spec, q, k, v, *rest)
  return (out, lse) if return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
  spec: Spec,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *rest: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Output [B, T, N, Hv] and lse [B, N, T]; rest as in `tiles.operands`."""
  B, T, N, _ = q.shape
  if T * N <= _FEW_ROWS:
    out, lse = _few_rows(spec, q, k, v, *rest)
    return tiles.join_rows(out.astype(q.dtype)), lse.reshape(B, N, T)
  poison = None
  if spec.restricted:
    # 0 * NaN is NaN: a weight of zero would not hide such a value.
    poison = tiles.poison(spec, v)
    v = tiles.clean(v)
  if not _is_one_tile(B * N, T, k.shape[1]):
    return _forward_loop(spec, poison, q, k, v, *rest)
  ops = tiles.operands(q, k, v, *rest)
  out, lse = _one_tile(spec, ops, poison)
  return tiles.join_rows(out.astype(q.dtype)), lse.reshape(B, N, T)


def _forward(spec: Spec, *arrays: jax.Array | None) -> tuple[Any, Any]:
  out, lse = _attention(spec, *arrays)
  # So that a rematerialisation policy can keep these two by name.
  out = checkpoint_name(out, "attention_out")
  lse = checkpoint_name(lse, "attention_lse")
  return (out, lse), (arrays, out, lse)


def _backward(
  spec: Spec, residuals: Any, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
  (q, k, v, bias, *rest), out, lse = residuals
  B, T, N, _ = q.shape
  S = k.shape[1]
  if spec.restricted:
    q, k, v = tiles.clean(q), tiles.clean(k), tiles.clean(v)
  rows = _row_terms(spec, k.shape[2], out, lse, *cotangents)
  if _is_one_tile(B * N, T, S):
    ops = tiles.operands(q, k, v, bias, *rest)
    sums = _zero_sums(spec, ops)
    d_q, sums = _add_tile(spec, ops, rows, (0, T), (0, S), sums)
    d_q = tiles.join_rows(d_q.astype(q.dtype))
  else:
    d_q, sums = _backward_loop(spec, rows, q, k, v, bias, *rest)
  d_k, d_v, d_bias = sums
  d_k = (spec.scale * d_k[:, :, :S]).transpose(0, 2, 1, 3).astype(k.dtype)
  d_v = d_v[:, :, :S].transpose(0, 2, 1, 3).astype(v.dtype)
  if d_bias is not None:
    d_bias = d_bias.reshape(d_bias.shape[0], -1, *d_bias.shape[3:])
    d_bias = d_bias[:, :, : bias.shape[2], : bias.shape[3]].astype(bias.dtype)
  return d_q, d_k, d_v, d_bias, *(None for _ in rest)


_attention.defvjp(_forward, _backward)


def _on_cpu() -> bool:
  return jax.default_backend() == "cpu"


def _is_one_tile(heads: int, T: int, S: int) -> bool:
  """Whether the whole matrix of a call is small.

  Args:
    heads: batch items times query heads.
    T: number of rows.
    S: number of columns.
  """
  # So few rows take no more memory than the keys.
  return T <= 16 or heads * T * S <= (2**19 if _on_cpu() else 2**24)


def _loop_sizes(heads: int, T: int, S: int) -> tuple[int, int]:
  """Rows and columns of the tiles of the loops; arguments as above."""
  if _on_cpu():
    # All heads of a tile stay in the cache together: about 1 MB.
    area = 2**18 // heads
    s = 128 if area < 2**16 else 256
    t = min(max(area // s, 64), 256)
  else:
    # A step of a loop waits for the host: few and large ones.
    area = 2**25 // heads
    s = 1024 if area < 2**20 else 2048
    t = min(max(area // s, 128), 1024)
  # Equal blocks: the last one is not mostly padding.
  return tuple(8 * _ceil(n, 8 * _ceil(n, x)) for n, x in ((T, t), (S, s)))


def _few_rows(
  spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """One tile for a decoding step: reads keys and values once, as they lie.

  Copying them without NaN would cost several times the work. So the step first
  runs on them as they are: a leak shows as NaN in the output, and only then is
  it run again on clean copies.
  """

  def careless():
    ops = tiles.operands(q, k, v, *rest, heads_first=False)
    return _one_tile(spec, ops, None)

  # A branch gets the arrays in the shape in which a decode cache holds them:
  # with a reshape in between, XLA would copy the cache in every step.
  shapes = k.shape, v.shape
  flat_k, flat_v = (x.reshape(*x.shape[:2], -1) for x in (k, v))

  def careful():
    k, v = flat_k.reshape(shapes[0]), flat_v.reshape(shapes[1])
    ops = tiles.operands(
      q, tiles.clean(k), tiles.clean(v), *rest, heads_first=False
    )
    return _one_tile(spec, ops, tiles.poison(spec, k, v))

  if not spec.restricted and k.shape[2] == 1:
    return careless()
  if not _on_cpu() and k.nbytes + v.nbytes < _COPY:
    # There a branch waits for the host.
    return careful()
  out, lse = careless()
  return lax.cond(jnp.all(jnp.isfinite(out)), lambda: (out, lse), careful)


def _one_tile(
  spec: Spec, ops: Operands, poison: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Output [B, K, G, T, Hv] and lse [B, K, G, T], without a loop."""
  rows, columns = (0, ops.q.shape[3]), (0, ops.length)
  x = _hidden_logits(spec, ops, poison, rows, columns)
  top = running.finite(jnp.max(x, axis=-1, keepdims=True))
  p = jnp.exp(x - top)
  total = jnp.sum(p, axis=-1, keepdims=True)
  # The sum is of all weights: dropout comes after the softmax.
  p = tiles.dropped(spec, ops, p, rows, columns)
  return running.normalise(tiles.mix(spec, ops, p, columns), total, top)


def _hidden_logits(
  spec: Spec,
  ops: Operands,
  poison: jax.Array | None,
  rows: Range,
  columns: Range,
) -> jax.Array:
  """Logits of a tile, -inf where hidden."""
  x, _ = tiles.logits(spec, ops, rows, columns)
  if poison is not None:
    x = x + tiles.take(poison, 2, columns)[:, :, None, None]
  keep = tiles.visible(spec, ops, rows, columns)
  return x if keep is None else jnp.where(keep, x, -jnp.inf)


def _offsets(
  spec: Spec, ops: Operands
) -> tuple[int | jax.Array, int | jax.Array]:
  """Smallest and largest offset in the batch."""
  if spec.offset is not None:
    return spec.offset, spec.offset
  return jnp.min(ops.offset), jnp.max(ops.offset)


def _column_blocks(
  spec: Spec, ops: Operands, i: jax.Array, t: int, s: int
) -> tuple[int | jax.Array, int | jax.Array]:
  """First block of s columns that rows i..i+t-1 see, and the one after."""
  start, stop = positions.column_range(
    spec.left, spec.right, i, i + t - 1, _offsets(spec, ops), ops.length
  )
  if ops.lengths is not None:
    stop = jnp.minimum(stop, jnp.max(ops.lengths))
  start, stop = start // s, _ceil(stop, s)
  if ops.q_ids is None:
    return start, stop
  # Documents that are packed one after the other have a band of blocks.
  near = _near_blocks(ops, i, t, s)
  blocks = jnp.arange(near.size, dtype=jnp.int32)
  first = jnp.min(jnp.where(near, blocks, near.size))
  last = jnp.max(jnp.where(near, blocks, -1))
  return jnp.maximum(start, first), jnp.minimum(stop, last + 1)


def _near_blocks(ops: Operands, i: jax.Array, t: int, s: int) -> jax.Array:
  """bool [S // s]: blocks of keys whose range of ids meets that of the rows."""
  q_ids = lax.dynamic_slice_in_dim(ops.q_ids, i, t, axis=1)
  kv_ids = ops.kv_ids.reshape(ops.kv_ids.shape[0], -1, s)
  low, high = (f(q_ids, axis=1)[:, None] for f in (jnp.min, jnp.max))
  near = (jnp.min(kv_ids, axis=2) <= high) & (jnp.max(kv_ids, axis=2) >= low)
  return jnp.any(near, axis=0)


def _forward_loop(
  spec: Spec,
  poison: jax.Array | None,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *rest: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """As `_attention`: row blocks around column blocks."""
  B, T, N, _ = q.shape
  S = k.shape[1]
  t, s = _loop_sizes(B * N, T, S)
  ops = tiles.operands(q, k, v, *rest, padding=(-T % t, -S % s))
  if poison is not None:
    poison = tiles.pad(poison, 2, -S % s)
  shape = (*ops.q.shape[:3], t)

  def row_block(i):
    rows = (i, t)

    def column_block(j, state):
      columns = (j * s, s)
      x = _hidden_logits(spec, ops, poison, rows, columns)
      drop = lambda p: tiles.dropped(spec, ops, p, rows, columns)
      mix = lambda p: tiles.mix(spec, ops, drop(p), columns)
      return running.merge(state, x, mix)

    state = running.start(shape, v.shape[-1], spec.dtype, ops.q)
    start, stop = _column_blocks(spec, ops, i, t, s)
    state = lax.fori_loop(start, stop, column_block, state)
    out, lse = running.finish(state)
    return out.astype(q.dtype), lse

  starts = t * jnp.arange(_ceil(T, t), dtype=jnp.int32)
  out, lse = lax.map(row_block, starts)
  # [blocks, B, K, G, t, ...] to [B, K, G, T, ...]
  return _join_blocks(out, T), jnp.moveaxis(lse, 0, 3).reshape(B, N, -1)[
    ..., :T
  ]


def _join_blocks(x: jax.Array, T: int) -> jax.Array:
  """[blocks, B, K, G, t, H] to [B, T, N, H]."""
  blocks, B, _, _, t, H = x.shape
  return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, blocks * t, -1, H)[:, :T]


def _row_terms(
  spec: Spec,
  groups: int,
  out: jax.Array,
  lse: jax.Array,
  d_out: jax.Array,
  d_lse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What the backward pass needs of every row, split into groups.

  Returns:
    d_out [B, K, G, T, Hv]; lse [B, K, G, T], +inf for an empty row, so that
    exp(logit - lse) is 0, and NaN for a row whose gradient is NaN, so that
    only what it sees becomes NaN; and what each weight's gradient is less than
    d_out . v: [B, K, G, T].
  """
  delta = jnp.sum(out.astype(spec.dtype) * d_out.astype(spec.dtype), axis=-1)
  delta = delta.transpose(0, 2, 1) - d_lse
  empty = lse == -jnp.inf
  if spec.restricted:
    bad = ~jnp.isfinite(delta)
    lse = jnp.where(bad, jnp.nan, lse)
    delta = jnp.where(bad, 0, delta)
    d_out = tiles.clean(d_out)
  lse = jnp.where(empty, jnp.inf, lse)
  delta = jnp.where(empty, 0, delta)
  B, N, T = lse.shape
  shape = (B, groups, N // groups, T)
  d_out = tiles.split_rows(d_out, groups)
  return d_out, lse.reshape(shape), delta.reshape(shape)


Sums = tuple[jax.Array, jax.Array, jax.Array | None]


def _zero_sums(spec: Spec, ops: Operands) -> Sums:
  """Gradients of k (without scale), v and bias, which tiles add to.

  The compiler drops the one of a bias whose gradient nobody asks for.
  """
  zeros = lambda x: manual_axes.zeros(x.shape, spec.dtype, ops.q)
  bias = None if ops.bias is None else zeros(ops.bias)
  return zeros(ops.k), zeros(ops.v), bias


def _add_tile(
  spec: Spec,
  ops: Operands,
  terms: tuple[jax.Array, jax.Array, jax.Array],
  rows: Range,
  columns: Range,
  sums: Sums,
) -> tuple[jax.Array, Sums]:
  """The gradient of q from one tile, and `sums` with the tile's part added."""
  q = tiles.take(ops.q, 3, rows)
  k, v = (tiles.take(x, 2, columns) for x in (ops.k, ops.v))
  d_out, lse, delta = (tiles.take(x, 3, rows) for x in terms)
  x, slope = tiles.logits(spec, ops, rows, columns)
  p = jnp.exp(x - lse[..., None])
  keep = tiles.visible(spec, ops, rows, columns)
  if keep is not None:
    p = jnp.where(keep, p, 0)
  d_p = tiles.dot("bkgth,bksh->bkgts", d_out, v, spec)
  d_p = tiles.dropped(spec, ops, d_p, rows, columns)
  d_x = p * (d_p - delta[..., None])
  d_k, d_v, d_bias = sums
  if d_bias is not None:
    axes = [a for a in range(5) if d_bias.shape[a] == 1]
    part = jnp.sum(d_x, axis=axes, keepdims=True)
    d_bias = tiles.add(d_bias, part, {3: rows[0], 4: columns[0]})
  if slope is not None:
    d_x = d_x * slope
  p = tiles.dropped(spec, ops, p, rows, columns).astype(q.dtype)
  d_x = d_x.astype(q.dtype)
  d_q = spec.scale * tiles.dot("bkgts,bksh->bkgth", d_x, k, spec)
  part = tiles.dot("bkgts,bkgth->bksh", d_x, q, spec)
  d_k = tiles.add(d_k, part, {2: columns[0]})
  part = tiles.dot("bkgts,bkgth->bksh", p, d_out, spec)
  d_v = tiles.add(d_v, part, {2: columns[0]})
  return d_q, (d_k, d_v, d_bias)


def _backward_loop(
  spec: Spec,
  terms: tuple[jax.Array, jax.Array, jax.Array],
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array | None,
  *rest: jax.Array | None,
) -> tuple[jax.Array, Sums]:
  """The gradient of q [B, T, N, H], and the sums, padded."""
  B, T, N, _ = q.shape
  S = k.shape[1]
  t, s = _loop_sizes(B * N, T, S)
  ops = tiles.operands(q, k, v, bias, *rest, padding=(-T % t, -S % s))
  # A padded row has a d_out of 0 and adds nothing.
  terms = tuple(tiles.pad(x, 3, -T % t) for x in terms)

  def row_block(sums, i):
    def column_block(j, carry):
      d_q, sums = carry
      part, sums = _add_tile(spec, ops, terms, (i, t), (j * s, s), sums)
      return d_q + part, sums

    shape = (*ops.q.shape[:3], t, ops.q.shape[-1])
    d_q = manual_axes.zeros(shape, spec.dtype, ops.q)
    start, stop = _column_blocks(spec, ops, i, t, s)
    d_q, sums = lax.fori_loop(start, stop, column_block, (d_q, sums))
    return sums, d_q.astype(q.dtype)

  starts = t * jnp.arange(_ceil(T, t), dtype=jnp.int32)
  sums, d_q = lax.scan(row_block, _zero_sums(spec, ops), starts)
  return _join_blocks(d_q, T), sums


def _ceil(a: int | jax.Array, b: int) -> int | jax.Array:
  return -(-a // b)
