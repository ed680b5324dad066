"""The public function of this package: `decode_attention`."""

import numbers

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from multihead.ops import dispatch
from multihead.ops.attention import checks
from multihead.ops.attention import sinks as sinks_
from multihead.ops.decode_attention import pages, reference, triton, xla

_IMPLEMENTATIONS = {"triton": triton, "xla": xla, "reference": reference}
# The others run by name: the reference holds [B, N, T, S] arrays, and what
# triton gives has not been compared on a GPU.
_PREFERENCE = ("xla",)


def decode_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"] | Float[Array, "P page K H"],
  v: Float[Array, "B S K Hv"] | Float[Array, "P page K Hv"],
  *,
  kv_lengths: int | Int[Array, "#B"] | None = None,
  scale: float | None = None,
  window: tuple[int | None, int | None] | None = None,
  softcap: float | None = None,
  sinks: Float[Array, "N"] | None = None,
  page_table: Int[Array, "B pages"] | None = None,
  return_lse: bool = False,
  implementation: dispatch.Implementation = None,
) -> (
  Float[Array, "B T N Hv"]
  | tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]
):
  """Causal attention of the T newest tokens to a cache that holds them too.

  Key j stands at position j, query t at kv_lengths - T + t: the last query at
  the last key in use. A query sees the keys up to its own position, and so
  none at or past kv_lengths; what lies there, NaN included, changes nothing.
  Everything else is as in `ops.attention`, which gives the same for
  k[:, :length] and v[:, :length] with causal=True: query head n reads key head
  n // (N // K), a row that sees nothing (one at a negative position) gives
  zeros and lse = -inf, and a NaN or Inf in a key or value reaches the rows
  that see it (whole, as NaN) and no other.

  Softmax, sums and lse are computed in float32 (float64 for float64 inputs),
  matrix products in the dtype of q with that accumulation.

  Args:
    q: [B, T, N, H] queries, of dtype float16, bfloat16, float32 or float64.
    k: [B, S, K, H] keys of the same dtype, K divides N; with page_table a pool
      [P, page, K, H] of P pages with `page` keys each.
    v: [B, S, K, Hv] values of the same dtype; with page_table a pool
      [P, page, K, Hv].
    kv_lengths: keys in use, the new ones included: an int, or an integer array
      with one per batch item. None is all S. An array's values outside of
      0..S count as the nearest of these.
    scale: of the products q . k; None is H**-0.5.
    window: (left, right) keeps keys from `left` before a query's position;
      None is no bound. `right` never binds, as no query sees ahead.
    softcap: bound of the logits, softcap * tanh(x / softcap); positive.
    sinks: [N], one more logit per query head, without a value, as in
      `ops.attention`.
    page_table: [B, pages] integers. Keys i * page to (i + 1) * page - 1 of item
      b lie in page page_table[b, i] of both pools, and S = pages * page. Slots
      at or past kv_lengths may hold any number. In a slot in use, a number
      outside of 0..P-1 makes the rows that see it NaN.
    return_lse: whether to return also the natural log of the sum of the
      exponentials of each row's logits.
    implementation: "xla" (parts of the keys in turn, anywhere), "triton" (parts
      at the same time, NVIDIA GPUs), "reference" (holds [B, N, T, S]), a
      sequence of these, or None for xla.

  Returns:
    [B, T, N, Hv] in q's dtype; with return_lse a pair of it and [B, N, T] in
    float32 (float64 for float64 inputs). Both can be differentiated in every
    mode, in the memory of the reference.

  Raises:
    ValueError: shapes that do not fit together, a value out of its range, or
      an unknown implementation.
    TypeError: a dtype that is not allowed.
    NotImplementedError: the named implementation does not support this.

  References:
    arXiv 2307.08691 (section 3.1: softmax over parts); 2309.06180 (pages).
  """
  q, k, v = (jnp.asarray(x) for x in (q, k, v))
  checks.qkv("decode_attention", q, k, v, paged=page_table is not None)
  B, T, N, H = q.shape
  page_table = _page_table(page_table, B)
  S = pages.length(k, page_table)
  if sinks is not None:
    sinks = sinks_.check(sinks, N)
  args = {
    "q": q,
    "k": k,
    "v": v,
    "kv_lengths": _lengths(kv_lengths, B, S),
    "scale": checks.number("scale", H**-0.5 if scale is None else scale),
    "window": checks.window(window),
    "softcap": checks.softcap(softcap),
    "page_table": page_table,
    "return_lse": bool(return_lse) or sinks is not None,
  }
  module = dispatch.select(
    "decode_attention", _IMPLEMENTATIONS, _PREFERENCE, implementation, args
  )
  if 0 in (B, T, S):
    # No key or no query: every row is empty.
    out = jnp.zeros((B, T, N, v.shape[-1]), q.dtype)
    lse = jnp.full((B, N, T), -jnp.inf, jnp.promote_types(q.dtype, "float32"))
    result = (out, lse) if args["return_lse"] else out
  else:
    result = module.run(**args)
  if sinks is None:
    return result
  out, lse = sinks_.add(*result, sinks)
  return (out, lse) if return_lse else out


def _page_table(table: jax.Array | None, batch: int) -> jax.Array | None:
  if table is None:
    return None
  table = jnp.asarray(table)
  if not jnp.issubdtype(table.dtype, jnp.integer):
    raise TypeError(f"page_table must be integers, got {table.dtype}")
  if table.ndim != 2 or table.shape[0] != batch:
    raise ValueError(
      f"page_table must have shape [B, pages] = [{batch}, pages], got "
      f"{list(table.shape)}"
    )
  return table.astype(jnp.int32)


def _lengths(
  lengths: int | jax.Array | None, batch: int, S: int
) -> jax.Array | None:
  """int32 [B], each in 0..S; or None for S."""
  if lengths is None:
    return None
  lengths = checks.per_item("kv_lengths", lengths, batch, S)
  if isinstance(lengths, numbers.Integral) and not 0 <= lengths <= S:
    raise ValueError(f"kv_lengths must be in 0..S = 0..{S}, got {lengths}")
  return jnp.broadcast_to(jnp.clip(jnp.int32(lengths), 0, S), (batch,))
