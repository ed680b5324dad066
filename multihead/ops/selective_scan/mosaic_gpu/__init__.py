"""The selective scan on Hopper GPUs: one loop over tokens per 32 channels.

States stay in registers (`tile`), tokens arrive through shared memory a chunk
ahead (`forward`), and the backward pass computes the states anew from those
between chunks (`backward`). Exponentials bound the speed, which is why states
are computed no more often than that. `calls` cuts T into parts where channels
are few, and joins the two passes.
"""

from typing import Any

import jax

from multihead.ops import manual_axes

_LARGEST = 64  # states of a channel that fit into registers
_FEWEST = 16  # channels that are worth a program, which has room for 32
_DTYPES = ("float32", "bfloat16", "float16")


def supports(args: dict[str, Any]) -> str | None:
  """Returns the reason why the kernels cannot serve a call, or None."""
  if (backend := jax.default_backend()) != "gpu":
    return f"needs a Hopper GPU, the default backend is {backend!r}"
  # Not every platform that jax runs on has the module behind this one.
  from multihead.ops import pallas_compat

  if (reason := pallas_compat.refusal()) is not None:
    return reason
  for name in ("u", "delta", "B", "C"):
    dtype = args[name].dtype
    if dtype not in _DTYPES:
      return f"takes arrays of {', '.join(_DTYPES)}; {name} is {dtype}"
  size = args["A"].shape[1]
  if size > _LARGEST:
    return f"keeps at most {_LARGEST} states a channel in registers, got {size}"
  groups = args["B"].shape[2]
  per_group = args["u"].shape[2] // groups
  if groups > 1 and per_group < _FEWEST:
    return (
      f"needs at least {_FEWEST} channels for each group of B and C, got "
      f"{per_group}"
    )
  return manual_axes.refusal()


def run(*args: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
  """See `calls.run`."""
  from multihead.ops.selective_scan.mosaic_gpu import calls

  return calls.run(*args, **options)
