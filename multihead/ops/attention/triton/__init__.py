"""Attention on NVIDIA GPUs since Ampere, in Triton through jax-triton.

`kernels` holds the kernels, `visits` which tiles they visit, `blocks` how they
cut the work and `options` what they are compiled for; `launches` launches them,
`mapping` says what `vmap` of that is, and `calls` what derivatives are.
"""

from typing import Any

import jax

from multihead.ops import manual_axes, triton_compat

_DTYPES = ("bfloat16", "float16", "float32")
_WIDEST = 256


def supports(args: dict[str, Any]) -> str | None:
  """None if the kernels compute this call, else the first limit it hits."""
  if (reason := triton_compat.refusal()) is not None:
    return reason
  q, v = args["q"], args["v"]
  if q.dtype.name not in _DTYPES:
    return (
      f"computes in {', '.join(_DTYPES)}, the inputs are {q.dtype}; xla takes "
      "all"
    )
  for name, width in (("H", q.shape[3]), ("Hv", v.shape[3])):
    if width > _WIDEST:
      return (
        f"needs head dims of at most {_WIDEST}, got {name}={width}; xla takes "
        "any"
      )
  return manual_axes.refusal()


def run(**args: Any) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `calls.run`."""
  from multihead.ops.attention.triton import calls

  return calls.run(**args)
