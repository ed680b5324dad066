"""Attention for NVIDIA Hopper, in Pallas on Mosaic GPU.

`forward` and `backward` hold the kernels, `visibility` what of the matrix they
visit, `blocks` how they cut it, and `calls` joins them and says what `vmap` and
derivatives of them are.
"""

from typing import Any

import jax

from multihead.ops import manual_axes


def supports(args: dict[str, Any]) -> str | None:
  """None if the kernels compute exactly this call, else the first limit."""
  if (backend := jax.default_backend()) != "gpu":
    return f"needs a Hopper GPU, the default backend is {backend!r}"
  # Not every platform that jax runs on has the module behind this one.
  from multihead.ops import pallas_compat

  if (reason := pallas_compat.refusal()) is not None:
    return reason
  q, v = args["q"], args["v"]
  if q.dtype.name not in ("bfloat16", "float16"):
    return (
      f"computes in bfloat16 and float16 only, the inputs are {q.dtype}; xla "
      "takes all"
    )
  for name, width in (("H", q.shape[3]), ("Hv", v.shape[3])):
    if width % 8 or width > 256:
      return (
        "needs head dims that are multiples of 8 and at most 256, got "
        f"{name}={width}; xla takes any"
      )
  return _option_limit(args)


def _option_limit(args: dict[str, Any]) -> str | None:
  if args["bias"] is not None:
    return "has no bias; cudnn and xla have it"
  if args["mask"] is not None:
    return "has no mask; xla has it"
  if args["q_segment_ids"] is not None:
    return "has no segment ids; xla has them"
  if args["kv_lengths"] is not None:
    return "has no kv_lengths per batch item; xla has them"
  if args["dropout_rate"]:
    return "has no dropout; xla has it"
  if not isinstance(args["q_offset"], int):
    return (
      "needs q_offset to be known while tracing, got an array; xla takes one"
    )
  if args["scale"] <= 0:
    return f"needs a positive scale, got {args['scale']}; xla takes any"
  return manual_axes.refusal()


def run(**args: Any) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `calls.run`."""
  from multihead.ops.attention.mosaic_gpu import calls

  return calls.run(**args)
