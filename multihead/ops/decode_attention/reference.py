"""Decoding as its definition reads: the reference of `attention`, causal.

Gathers all pages and computes every logit at once, [B, N, T, S].
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from multihead.ops.attention import reference
from multihead.ops.decode_attention import pages


def supports(args: dict[str, Any]) -> str | None:
  """Always None: everything, everywhere, as far as memory goes."""
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
  S = pages.length(k, page_table)
  if page_table is not None:
    everything = (0, page_table.shape[1])
    k, v = (pages.take(x, page_table, everything) for x in (k, v))
  return reference.run(
    q,
    k,
    v,
    bias=None,
    mask=None,
    causal=True,
    q_offset=jnp.asarray(S if kv_lengths is None else kv_lengths) - q.shape[1],
    scale=scale,
    window=window,
    softcap=softcap,
    q_segment_ids=None,
    kv_segment_ids=None,
    return_lse=return_lse,
  )


def derivative(
  primals: tuple[jax.Array | None, ...],
  tangents: tuple[jax.Array | None, ...],
  *,
  scale: float,
  left: int | None,
  softcap: float | None,
) -> tuple[Any, Any]:
  """Output and lse, and their tangents: the `jvp` of other implementations.

  Args:
    primals: q, k, v, kv_lengths, page_table.
    tangents: of the first three.
    scale: of the logits.
    left: of the window.
    softcap: of the logits.
  """
  *arrays, kv_lengths, page_table = primals
  definition = functools.partial(
    run,
    kv_lengths=kv_lengths,
    scale=scale,
    window=(left, None),
    softcap=softcap,
    page_table=page_table,
    return_lse=True,
  )
  return jax.jvp(definition, tuple(arrays), tuple(tangents[:3]))
