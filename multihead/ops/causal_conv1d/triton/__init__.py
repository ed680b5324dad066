"""The causal convolution in Triton: one pass over the inputs each way.

The W taps come from registers, not from memory (`kernels`); `calls` launches
the kernels and joins the two passes.
"""

from typing import Any

import jax

from multihead.ops import manual_axes, triton_compat

_WIDEST = 8  # taps of a channel that fit into registers
_DTYPES = ("float32", "bfloat16", "float16")


def supports(args: dict[str, Any]) -> str | None:
  """Returns the reason why the kernels cannot serve a call, or None."""
  if (reason := triton_compat.refusal()) is not None:
    return reason
  x = args["x"]
  if x.dtype not in _DTYPES:
    return f"takes x of {', '.join(_DTYPES)}, got {x.dtype}"
  width = args["kernel"].shape[0]
  if width == 1:
    return "one tap is a product, for which no kernel is needed"
  if width > _WIDEST:
    return f"keeps at most {_WIDEST} taps in registers, got {width}"
  if 0 in x.shape:
    return f"x {x.shape} is empty"
  return manual_axes.refusal()


def run(
  x: jax.Array, kernel: jax.Array, bias: jax.Array | None, **options: Any
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `multihead.ops.causal_conv1d`."""
  from multihead.ops.causal_conv1d.triton import calls

  return calls.run(x, kernel, bias, **options)
