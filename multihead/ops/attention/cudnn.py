"""Attention by NVIDIA's cuDNN, through `jax.nn.dot_product_attention`.

The limits below are those of that function and of cuDNN against the semantics
of `multihead.ops.attention`, each with the reason why it is refused:

  * its causal mask and window count query 0 as position 0, and a window must
    end at the diagonal: one that does not is silently taken for unbounded;
  * it adds masks as a large negative number, so that an empty row gives the
    mean of the values instead of zeros;
  * its backward pass takes even lengths only, and whether there will be one is
    not known when the forward pass is chosen;
  * it returns lse rounded to the inputs' dtype and drops the gradient of it.
"""

from typing import Any

import jax

from multihead.ops import manual_axes
from multihead.ops.attention import positions


def supports(args: dict[str, Any]) -> str | None:
  """None if cuDNN computes exactly this call, else the first limit it hits."""
  q = args["q"]
  if jax.default_backend() != "gpu":
    return f"needs an NVIDIA GPU; the default backend is {_backend()}"
  device = jax.devices()[0]
  if "cuda" not in device.client.platform_version:
    return f"needs an NVIDIA GPU, this one is {device.device_kind}"
  if q.dtype.name not in ("bfloat16", "float16"):
    return f"computes in bfloat16 and float16 only, the inputs are {q.dtype}"
  capability = tuple(map(int, device.compute_capability.split(".")))
  return _head_limit(args, capability) or _option_limit(args)


def _backend() -> str:
  return repr(jax.default_backend())


def _head_limit(
  args: dict[str, Any], capability: tuple[int, ...]
) -> str | None:
  width, v_width = args["q"].shape[-1], args["v"].shape[-1]
  if capability < (8, 0):
    found = ".".join(map(str, capability))
    return f"needs compute capability 8.0 or higher, this GPU has {found}"
  if width != v_width:
    return (
      f"needs values as wide as keys, got head dims H={width} and Hv={v_width}"
    )
  largest = 256 if capability >= (9, 0) else 128
  if width % 8 or width > largest:
    return (
      f"needs a head dim that is a multiple of 8 and at most {largest} on this "
      f"GPU, got {width}"
    )
  return None


def _option_limit(args: dict[str, Any]) -> str | None:
  T, S = args["q"].shape[1], args["k"].shape[1]
  if T % 2 or S % 2:
    return f"has a gradient for even lengths only, got T={T} and S={S}"
  if args["return_lse"]:
    return (
      "returns lse, which sinks need too, in the inputs' dtype and without its "
      "gradient"
    )
  if args["deterministic"]:
    return "does not promise the same bits in every run"
  if args["dropout_rate"]:
    return "draws the weights that dropout keeps in a way of its own"
  if args["kv_lengths"] is not None:
    return "does not promise zeros for a sequence without keys"
  if args["softcap"] is not None:
    return "has no softcap"
  if args["q_segment_ids"] is not None:
    return "has no segment ids"
  if args["mask"] is not None:
    return "gives a row that a mask empties the mean of the values, not zeros"
  return _bias_limit(args) or _position_limit(args)


def _bias_limit(args: dict[str, Any]) -> str | None:
  bias, q = args["bias"], args["q"]
  if bias is None:
    return None
  T, S = q.shape[1], args["k"].shape[1]
  if bias.dtype != q.dtype:
    return (
      f"adds a bias in the inputs' dtype {q.dtype}, this one is {bias.dtype}"
    )
  if bias.shape[2:] != (T, S):
    return (
      f"needs a bias with full axes T and S, [., ., {T}, {S}], got "
      f"{list(bias.shape)}"
    )
  return None


def _position_limit(args: dict[str, Any]) -> str | None:
  left, right = _sides(args)
  if left is None and right is None:
    return None
  T, S = args["q"].shape[1], args["k"].shape[1]
  offset = args["q_offset"]
  if right != 0:
    return (
      "has windows only together with causal or a right side of 0, got window "
      f"{args['window']} and causal={args['causal']}"
    )
  if not isinstance(offset, int):
    return "needs q_offset to be known while tracing, got an array"
  if offset != 0:
    return (
      f"aligns causal masks and windows at q_offset 0 only, this call has "
      f"{offset} (the default is S - T)"
    )
  if left is not None and args["bias"] is not None:
    return "has no bias together with a window"
  if left is not None and T > S:
    return f"needs T <= S for a window, got T={T} and S={S}"
  return None


def _sides(args: dict[str, Any]) -> tuple[int | None, int | None]:
  T, S = args["q"].shape[1], args["k"].shape[1]
  return positions.bounds(
    args["causal"], args["window"], args["q_offset"], T, S
  )


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  bias: jax.Array | None,
  scale: float,
  **rest: Any,
) -> jax.Array:
  """See `multihead.ops.attention`; for arguments that `supports` accepts."""
  left, right = _sides({"q": q, "k": k, "v": v, **rest})
  q, k, v, bias = manual_axes.alike(q, k, v, bias)
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    bias=bias,
    scale=scale,
    # Not only the window: without causal the keys after a row stay visible.
    is_causal=right == 0,
    local_window_size=None if left is None else (left, 0),
    implementation="cudnn",
  )
