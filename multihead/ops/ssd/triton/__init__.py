"""SSD on NVIDIA GPUs, in Triton through jax-triton.

One program goes through the chunks of one head with its state in registers
(`kernels`); `calls` prepares decays and joins the two passes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from multihead.ops import manual_axes, triton_compat

_DTYPES = ("bfloat16", "float16")
_LARGEST_WIDTH = 128  # H
_LARGEST_STATE = 128 * 256  # H M, what the registers of a program hold


def supports(args: dict[str, Any]) -> str | None:
  """Returns the reason why the kernels cannot serve a call, or None."""
  if (backend := jax.default_backend()) != "gpu":
    return f"needs an NVIDIA GPU, the default backend is {backend!r}"
  x, B, C = args["x"], args["B"], args["C"]
  dtype = jnp.result_type(x, B, C)
  if dtype not in _DTYPES:
    return (
      f"takes products in {' or '.join(_DTYPES)}; those of x {x.dtype}, B "
      f"{B.dtype} and C {C.dtype} are in {dtype}"
    )
  width, size = x.shape[3], B.shape[3]
  if width > _LARGEST_WIDTH or width * size > _LARGEST_STATE:
    return (
      f"holds states up to H = {_LARGEST_WIDTH} and H M = {_LARGEST_STATE}, "
      f"got H = {width} and M = {size}"
    )
  if x.shape[1] * max(x.shape[2] * width, B.shape[2] * size) >= 2**31:
    return f"addresses a row of the batch in 32 bits, too few for x {x.shape}"
  if (reason := manual_axes.refusal()) is not None:
    return reason
  return triton_compat.refusal()


def run(*args: Any, **options: Any) -> Any:
  """See `calls.run`."""
  from multihead.ops.ssd.triton import calls

  return calls.run(*args, **options)
