"""One tile of the attention matrix: its logits, and which of them are visible.

A tile is a range of query rows times a range of key columns; a range is
(start, size) with a static size and a start that is an int or a traced scalar.
Tiles have five axes, [B, K, G, rows, columns]: query heads are split into K key
heads times G = N // K heads that share one, so keys are never repeated in
memory.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from multihead.ops.attention import dropout

Range = tuple[int | jax.Array, int]


@dataclasses.dataclass(frozen=True)
class Spec:
  """What is static in a call.

  Attributes:
    scale: of the products of queries and keys.
    softcap: bound of the logits before the bias, or None.
    left: see positions.py.
    right: likewise.
    offset: position of row 0, None if it is an operand.
    restricted: whether any logit may be hidden.
    dtype: of softmax and accumulation.
    dropout: share of the weights to drop.
  """

  scale: float
  softcap: float | None
  left: int | None
  right: int | None
  offset: int | None
  restricted: bool
  dtype: str
  dropout: float = 0.0


class Operands(NamedTuple):
  """The arrays of a call in the layout of tiles, T and S maybe padded.

  Attributes:
    q: [B, K, G, T, H].
    k: [B, K, S, H], or [B, S, K, H] if not `heads_first`.
    v: [B, K, S, Hv], or [B, S, K, Hv] if not `heads_first`.
    bias: [B, K, G, T, S], any axis may be 1; or None.
    mask: likewise.
    offset: [B] int32 where the spec has none, else None.
    q_ids: [B, T] or None.
    kv_ids: [B, S] or None.
    lengths: [B] int32, keys of each batch item; or None.
    states: [B, K, G, T] uint32, see dropout.py; or None.
    length: number of keys that are no padding.
    heads_first: the order of the axes of k and v.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  bias: jax.Array | None
  mask: jax.Array | None
  offset: jax.Array | None
  q_ids: jax.Array | None
  kv_ids: jax.Array | None
  lengths: jax.Array | None
  states: jax.Array | None
  length: int
  heads_first: bool = True


def operands(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array | None,
  mask: jax.Array | None,
  offset: jax.Array | None,
  q_ids: jax.Array | None,
  kv_ids: jax.Array | None,
  lengths: jax.Array | None = None,
  words: jax.Array | None = None,
  *,
  padding: tuple[int, int] = (0, 0),
  heads_first: bool = True,
) -> Operands:
  """Brings the arguments of `attention` into the layout of tiles.

  Args:
    q: [B, T, N, H].
    k: [B, S, K, H].
    v: [B, S, K, Hv].
    bias: [B, N, T, S], any axis may be 1.
    mask: likewise.
    offset: [B].
    q_ids: [B, T].
    kv_ids: [B, S].
    lengths: [B].
    words: of the key of dropout.
    padding: rows and columns to append.
    heads_first: False leaves k and v as they are, for a tile so thin that
      moving them would cost more than the work itself.
  """
  rows, columns = padding
  (B, T, N, _), groups = q.shape, k.shape[2]
  states = None
  if words is not None:
    states = dropout.all_row_states(words, B, N, T)
    states = pad(states.reshape(B, groups, -1, T), 3, rows)
  # The id next to it: padding does not widen the range of a block's ids.
  ids = lambda x, amount: (
    x if x is None else jnp.pad(x, ((0, 0), (0, amount)), mode="edge")
  )
  grid = lambda x: pad(
    pad(_split_heads(x, 1, groups), 3, rows, broadcast=True),
    4,
    columns,
    broadcast=True,
  )
  return Operands(
    q=pad(split_rows(q, groups), 3, rows),
    k=pad(k.transpose(0, 2, 1, 3), 2, columns) if heads_first else k,
    v=pad(v.transpose(0, 2, 1, 3), 2, columns) if heads_first else v,
    bias=None if bias is None else grid(bias),
    mask=None if mask is None else grid(mask),
    offset=offset,
    q_ids=ids(q_ids, rows),
    kv_ids=ids(kv_ids, columns),
    lengths=lengths,
    states=states,
    length=k.shape[1],
    heads_first=heads_first,
  )


def split_rows(x: jax.Array, groups: int) -> jax.Array:
  """[B, T, N, H] to [B, K, G, T, H]."""
  return jnp.moveaxis(_split_heads(x, 2, groups), 1, 3)


def join_rows(x: jax.Array) -> jax.Array:
  """[B, K, G, T, H] to [B, T, N, H]."""
  x = jnp.moveaxis(x, 3, 1)
  return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _split_heads(x: jax.Array, axis: int, groups: int) -> jax.Array:
  """N to K, G on one axis; 1 to 1, 1."""
  heads = x.shape[axis]
  split = (1, 1) if heads == 1 else (groups, heads // groups)
  return x.reshape(*x.shape[:axis], *split, *x.shape[axis + 1 :])


def pad(
  x: jax.Array,
  axis: int,
  amount: int,
  value: float = 0,
  broadcast: bool = False,
) -> jax.Array:
  """Appends `amount` of `value` to an axis (of size 1: not if broadcast)."""
  if not amount or (broadcast and x.shape[axis] == 1):
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, amount)
  return jnp.pad(x, widths, constant_values=value)


def take(x: jax.Array, axis: int, of: Range) -> jax.Array:
  """The range of an axis; all of an axis of size 1, which broadcasts."""
  start, size = of
  if x.shape[axis] == 1 or (isinstance(start, int) and size == x.shape[axis]):
    return x
  if isinstance(start, int):
    return lax.slice_in_dim(x, start, start + size, axis=axis)
  return lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def add(x: jax.Array, update: jax.Array, starts: dict[int, int | jax.Array]):
  """x with `update` added where it begins at `starts` (axis: start)."""
  if update.shape == x.shape:
    return x + update
  index = [jnp.int32(0)] * x.ndim
  for axis, start in starts.items():
    if x.shape[axis] > 1:
      index[axis] = jnp.int32(start)
  old = lax.dynamic_slice(x, index, update.shape)
  return lax.dynamic_update_slice(x, old + update, index)


def clean(x: jax.Array) -> jax.Array:
  """x with NaN and Inf as 0: they would outlive a product with a zero."""
  return jnp.where(jnp.isfinite(x), x, 0)


def poison(spec: Spec, *arrays: jax.Array) -> jax.Array:
  """[B, K, S]: NaN for a key with NaN or Inf in `arrays` [B, S, K, H], else 0.

  Added to the logits before the hidden ones are dropped, it makes a row NaN
  that can see such a key, and no other.
  """
  good = functools.reduce(
    jnp.logical_and, [jnp.all(jnp.isfinite(x), axis=-1) for x in arrays]
  )
  return jnp.where(good, 0, jnp.nan).astype(spec.dtype).transpose(0, 2, 1)


def logits(
  spec: Spec, ops: Operands, rows: Range, columns: Range
) -> tuple[jax.Array, jax.Array | None]:
  """The logits of a tile, and the slope of the softcap there (or None)."""
  q = take(ops.q, 3, rows)
  if ops.heads_first:
    k = take(ops.k, 2, columns)
    x = dot("bkgth,bksh->bkgts", q, k, spec)
  else:
    B, K, G, T, H = q.shape
    # One product for all heads: a query has zeros for the other key heads.
    # K times the arithmetic, but k is read as it lies.
    wide = jnp.where(_own_head(K), q[:, :, :, :, None], 0)
    wide = wide.reshape(B, K * G * T, K * H)
    x = dot("bnx,bsx->bns", wide, ops.k.reshape(B, -1, K * H), spec)
    x = x.reshape(B, K, G, T, -1)
  x = x * spec.scale
  slope = None
  if spec.softcap is not None:
    bent = jnp.tanh(x / spec.softcap)
    x = spec.softcap * bent
    slope = 1 - bent * bent
  if ops.bias is not None:
    bias = take(take(ops.bias, 3, rows), 4, columns)
    x = x + bias.astype(x.dtype)
  return x, slope


def mix(spec: Spec, ops: Operands, p: jax.Array, columns: Range) -> jax.Array:
  """The sum of the values under weights [B, K, G, rows, columns]."""
  p = p.astype(ops.v.dtype)
  if ops.heads_first:
    return dot("bkgts,bksh->bkgth", p, take(ops.v, 2, columns), spec)
  B, K, G, T, S = p.shape
  p = p.reshape(B, K * G * T, S)
  out = dot("bns,bsx->bnx", p, ops.v.reshape(B, S, -1), spec)
  out = out.reshape(B, K, G, T, K, -1)
  return jnp.sum(jnp.where(_own_head(K), out, 0), axis=4)


def dropped(
  spec: Spec, ops: Operands, x: jax.Array, rows: Range, columns: Range
) -> jax.Array:
  """x, a tile, times what dropout multiplies the weights by."""
  if ops.states is None:
    return x
  states = take(ops.states, 3, rows)[..., None]
  start, size = columns
  j = jnp.uint32(start) + jnp.arange(size, dtype=jnp.uint32)
  return x * dropout.factors(spec.dropout, states, j, spec.dtype)


def _own_head(K: int) -> jax.Array:
  return jnp.eye(K, dtype=bool)[:, None, None, :, None]


def dot(equation: str, a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
  """einsum in the dtype of its operands, accumulated in the spec's."""
  return jnp.einsum(equation, a, b, preferred_element_type=spec.dtype)


def visible(
  spec: Spec, ops: Operands, rows: Range, columns: Range
) -> jax.Array | None:
  """bool, broadcasts to the tile; None if every logit is visible."""
  (i, t), (j, s) = rows, columns
  parts = []
  left, right = spec.left, spec.right
  if left is not None or right is not None:
    # How far column j lies behind the position of row i.
    shape = (t, s)
    ahead = lax.broadcasted_iota(jnp.int32, shape, 1)
    ahead = ahead - lax.broadcasted_iota(jnp.int32, shape, 0)
    if spec.offset is None:
      ahead = ahead + (j - i - ops.offset)[:, None, None, None, None]
    else:
      ahead = ahead + (j - i - spec.offset)
    if left is not None:
      parts.append(ahead >= -left)
    if right is not None:
      parts.append(ahead <= right)
  if ops.k.shape[2 if ops.heads_first else 1] > ops.length:
    parts.append(j + jnp.arange(s, dtype=jnp.int32) < ops.length)
  if ops.lengths is not None:
    lengths = ops.lengths[:, None, None, None, None]
    parts.append(j + jnp.arange(s, dtype=jnp.int32) < lengths)
  if ops.mask is not None:
    parts.append(take(take(ops.mask, 3, rows), 4, columns))
  if ops.q_ids is not None:
    q_ids = take(ops.q_ids, 1, rows)[:, None, None, :, None]
    parts.append(q_ids == take(ops.kv_ids, 1, columns)[:, None, None, None, :])
  return functools.reduce(jnp.logical_and, parts) if parts else None
