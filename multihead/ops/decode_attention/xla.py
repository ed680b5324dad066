"""Decoding in parts of the keys, on any device.

Keys and values are read part by part, and only from the first key that a window
leaves to the longest length of the batch. A part is taken out of the cache, or
gathered from its pages, and merged in float32 into what the parts before gave
(attention/running.py); nothing as large as a long cache is made.

Derivatives are those of the reference: with few queries its logits are small
beside the cache.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from multihead.ops import manual_axes
from multihead.ops.attention import positions, running, tiles
from multihead.ops.attention.tiles import Spec
from multihead.ops.decode_attention import pages, reference

# Query rows times heads up to which all heads of a key share one product.
_FEW_ROWS = 128


def supports(args: dict[str, Any]) -> str | None:
  """Always None: everything, everywhere."""
  del args
  return None


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  kv_lengths: jax.Array | None,
  scale: float,
  window: tuple[int | None, int | None],
  softcap: float | None,
  page_table: jax.Array | None,
  return_lse: bool,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `multihead.ops.decode_attention`; arguments are checked there."""
  if kv_lengths is None:
    kv_lengths = jnp.full(q.shape[0], pages.length(k, page_table), jnp.int32)
  spec = Spec(
    scale=scale,
    softcap=softcap,
    left=window[0],
    right=0,
    offset=None,
    restricted=True,
    dtype=jnp.promote_types(q.dtype, jnp.float32).name,
  )
  arrays = manual_axes.alike(q, k, v, kv_lengths, page_table)
  out, lse = _decode(spec, *arrays)
  return (out, lse) if return_lse else out


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _decode(
  spec: Spec,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  kv_lengths: jax.Array,
  page_table: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Output [B, T, N, Hv] and lse [B, N, T]."""
  B, T, N, _ = q.shape
  K, width = v.shape[2:]
  S = pages.length(k, page_table)
  # What the cache is cut at: pages or keys.
  page = 1 if page_table is None else k.shape[1]
  count = min(max(_part_length(q, k, v) // page, 1), S // page)
  size = count * page
  offset = kv_lengths - T
  rows = (0, T)

  def add_part(i, state):
    # The last part may begin in the one before, whose keys it then hides.
    start = 0 if size == S else jnp.minimum(i * count, S // page - count)
    k_part, v_part = (pages.take(x, page_table, (start, count)) for x in (k, v))
    ops = tiles.operands(
      q,
      # 0 * NaN is NaN: a weight of zero would not hide such a value.
      tiles.clean(k_part),
      tiles.clean(v_part),
      *(None, None, offset, None, None),
      heads_first=T * N > _FEW_ROWS,
    )
    x, _ = tiles.logits(spec, ops, rows, (0, size))
    x = x + tiles.poison(spec, k_part, v_part)[:, :, None, None]
    keep = tiles.visible(spec, ops, rows, (start * page, size))
    if size < S:
      keep &= start * page + jnp.arange(size) >= i * size
    x = jnp.where(keep, x, -jnp.inf)
    mix = lambda p: tiles.mix(spec, ops, p, (0, size))
    return running.merge(state, x, mix)

  state = running.start((B, K, N // K, T), width, spec.dtype, q)
  if size == S:
    state = add_part(0, state)
  else:
    ends = (jnp.min(offset), jnp.max(offset))
    first, stop = positions.column_range(
      spec.left, spec.right, 0, T - 1, ends, S
    )
    state = lax.fori_loop(
      first // size, (stop + size - 1) // size, add_part, state
    )
  out, lse = running.finish(state)
  return tiles.join_rows(out.astype(q.dtype)), lse.reshape(B, N, T)


@_decode.defjvp
def _derivative(spec: Spec, primals: Any, tangents: Any) -> Any:
  return reference.derivative(
    primals,
    tangents,
    scale=spec.scale,
    left=spec.left,
    softcap=spec.softcap,
  )


def _part_length(q: jax.Array, k: jax.Array, v: jax.Array) -> int:
  """Keys in a part, before it is cut at pages."""
  B, T, N, _ = q.shape
  # Numbers in a part for each of its keys: keys and values, or logits.
  numbers = B * max(k.shape[2] * (k.shape[3] + v.shape[3]), N * T)
  # On a CPU a part stays in the cache; elsewhere a step waits for the host.
  area = 2**19 if jax.default_backend() == "cpu" else 2**26
  return max(area // numbers, 8)
