"""Attention for NVIDIA Hopper, in Pallas on Mosaic GPU.

`forward`, `backward`, `key_values`, `fused_backward` and `bias_gradient` hold
the kernels, `visibility` and `limits` what of the matrix they visit, `extras`
what else they may take, `blocks` and `tables` how they cut it; `calls` joins
them and says what `vmap` and derivatives of them are.
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


def confirmed(args: dict[str, Any]) -> bool:
  """Whether calls with these options were compared with others on a GPU.

  The rest was compared in the interpreter only: it runs if it is named.
  """
  arrays = "bias", "mask", "q_segment_ids", "kv_lengths", "dropout_words"
  return isinstance(args["q_offset"], int) and all(
    args[name] is None for name in arrays
  )


def _option_limit(args: dict[str, Any]) -> str | None:
  wide = max(args["q"].shape[3], args["v"].shape[3])
  for name in ("bias", "mask"):
    if args[name] is not None and wide > 128:
      return (
        f"has {name} for head dims up to 128 only, got {wide}; xla has it for "
        "all"
      )
  bias = args["bias"]
  if bias is not None and bias.dtype == "float64":
    return "takes no bias of dtype float64; xla does"
  if args["scale"] <= 0:
    return f"needs a positive scale, got {args['scale']}; xla takes any"
  return manual_axes.refusal()


def run(**args: Any) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `calls.run`."""
  from multihead.ops.attention.mosaic_gpu import calls

  return calls.run(**args)
