"""The public function of this package: `causal_conv1d`."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from multihead.ops import dispatch
from multihead.ops.causal_conv1d import reference, triton, xla

_IMPLEMENTATIONS = {"triton": triton, "xla": xla, "reference": reference}
_PREFERENCE = ("triton", "xla", "reference")
# With fewer tokens, a decoder's, the compiler fuses the few products with what
# stands around them, which a kernel of their own cannot.
_PREFERENCE_FEW = ("xla", "triton", "reference")
_FEW_TOKENS = 16


def causal_conv1d(
  x: Float[Array, "B T C"],
  kernel: Float[Array, "W C"],
  bias: Float[Array, "C"] | None = None,
  *,
  activation: Literal["silu"] | None = None,
  initial_state: Float[Array, "B W-1 C"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  return_final_state: bool = False,
  implementation: dispatch.Implementation = None,
) -> (
  Float[Array, "B T C"] | tuple[Float[Array, "B T C"], Float[Array, "B W-1 C"]]
):
  """Depthwise convolution over time that sees no future token.

    y_t = activation(bias + sum_i kernel[i] x_{t - (W - 1) + i})

  so kernel[W - 1] multiplies the current token.

  Args:
    x: [B, T, C] inputs.
    kernel: [W, C].
    bias: [C].
    activation: None or "silu".
    initial_state: [B, W - 1, C], the inputs before the first token; zeros if
      None.
    segment_ids: [B, T]. Where the id changes from one token to the next, a new
      segment begins; a tap that reaches into another segment sees zeros.
      `initial_state` belongs to the first segment.
    return_final_state: whether to return the last inputs too.
    implementation: "triton" (one pass over x on an NVIDIA GPU), "xla" (shifted
      products), "reference" (token by token), a sequence of names, or None for
      the best.

  Returns:
    y [B, T, C] in the dtype of x; sums and activation are in float32 (float64
    if x is). With `return_final_state`, also the last W - 1 inputs
    [B, W - 1, C] in the dtype of x, those of `initial_state` included where
    T < W - 1. Inputs of an earlier segment than the last token's are zeros
    there, so that giving it as the next call's `initial_state` continues the
    last segment exactly.

  Raises:
    ValueError: shapes that do not fit together, an unknown activation or
      implementation.
    TypeError: arrays of a wrong kind.
  """
  for name, array in dict(
    x=x, kernel=kernel, bias=bias, initial_state=initial_state
  ).items():
    if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
      raise TypeError(
        f"causal_conv1d: {name} must be a real floating point array, got "
        f"{array.dtype}"
      )
  if x.ndim != 3 or x.shape[1] == 0:
    raise ValueError(
      f"causal_conv1d: x must be [B, T, C] with T >= 1, got shape {x.shape}"
    )
  batch, length, channels = x.shape
  if kernel.ndim != 2 or kernel.shape[0] < 1 or kernel.shape[1] != channels:
    raise ValueError(
      f"causal_conv1d: kernel must be [W, C = {channels}] to go with x "
      f"{x.shape}, got {kernel.shape}"
    )
  width = kernel.shape[0]
  if bias is not None and bias.shape != (channels,):
    raise ValueError(
      f"causal_conv1d: bias must be [C] = {(channels,)} to go with x {x.shape},"
      f" got {bias.shape}"
    )
  if initial_state is not None:
    shape = (batch, width - 1, channels)
    if initial_state.shape != shape:
      raise ValueError(
        f"causal_conv1d: initial_state must be [B, W - 1, C] = {shape} to go "
        f"with x {x.shape} and kernel {kernel.shape}, got {initial_state.shape}"
      )
  if segment_ids is not None:
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
      raise TypeError(
        f"causal_conv1d: segment_ids must be integers, got {segment_ids.dtype}"
      )
    if segment_ids.shape != (batch, length):
      raise ValueError(
        f"causal_conv1d: segment_ids must be [B, T] = {(batch, length)} to go "
        f"with x {x.shape}, got {segment_ids.shape}"
      )
  if activation not in (None, "silu"):
    raise ValueError(
      f"causal_conv1d: activation must be None or 'silu', got {activation!r}"
    )
  args = dict(
    x=x,
    kernel=kernel,
    bias=bias,
    activation=activation,
    initial_state=initial_state,
    segment_ids=segment_ids,
    return_final_state=return_final_state,
  )
  preference = _PREFERENCE_FEW if length < _FEW_TOKENS else _PREFERENCE
  module = dispatch.select(
    "causal_conv1d", _IMPLEMENTATIONS, preference, implementation, args
  )
  return module.run(**args)
