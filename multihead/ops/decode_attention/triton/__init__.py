"""Decoding in Triton: parts of the keys at the same time, then their merge.

Every part of every sequence is a program of its own (`kernels`), so that a
single query keeps the whole GPU busy; `calls` cuts the parts, launches the
kernels, and says what derivatives and `vmap` are.
"""

from typing import Any

import jax

from multihead.ops import manual_axes, triton_compat

_DTYPES = ("bfloat16", "float16", "float32")
_WIDEST = 256  # head dim of which a tile of keys fits into shared memory
_MOST_QUERIES = 64


def supports(args: dict[str, Any]) -> str | None:
  """Returns the reason why the kernels cannot serve a call, or None."""
  if (reason := triton_compat.refusal()) is not None:
    return reason
  q, v = args["q"], args["v"]
  if q.dtype not in _DTYPES:
    return f"takes {', '.join(_DTYPES)}, got {q.dtype}; xla takes any"
  for name, width in (("H", q.shape[3]), ("Hv", v.shape[3])):
    if width > _WIDEST:
      return f"holds head dims up to {_WIDEST}, got {name}={width}; xla any"
  if q.shape[1] > _MOST_QUERIES:
    return (
      f"takes up to {_MOST_QUERIES} new queries, as the keys are read for few "
      f"of them at a time, got T={q.shape[1]}; xla takes any"
    )
  return manual_axes.refusal()


def run(**args: Any) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `calls.run`."""
  from multihead.ops.decode_attention.triton import calls

  return calls.run(**args)
