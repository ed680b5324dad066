"""The Mamba mixer (Gu and Dao, 2023): a gated selective scan.

Section 3.4 of arXiv 2312.00752. The fused input projection of the published
checkpoints (x | z) is kept as two, so that a mesh axis splits the channels.
What steers the scan comes from all channels, through a projection to few
numbers: that one sum is all that crosses the axis.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from multihead import ops
from multihead.layers.linear import Initializer, Linear
from multihead.layers.mamba import log_uniform_dt_bias
from multihead.layers.short_conv import ShortConv, past_padding
from multihead.parallel import sharded_ops
from multihead.parallel.sharding import BATCH_AXES, constrain

# Its softplus is zero in float32, whatever bias is added.
_NO_STEP = -1e4


def s4d_real_A(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """A_log = log(1), log(2), .., log(M) in every channel (section 3.6)."""
  del key
  rates = jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)
  return jnp.broadcast_to(jnp.log(rates), shape).astype(dtype)


class Mamba(nn.Module):
  """E channels, each with a state of M that its inputs steer.

  Attributes:
    channels: E; twice the width of the input in the paper.
    state_size: M.
    dt_rank: R, of the projection to the step sizes; None for ceil(D / 16).
    conv_width: W, taps of the causal convolution.
    conv_bias, use_bias: whether the convolution, and the projections in and
      out, have biases.
    dt_range: at the start the step sizes are log-uniform in this range.
    dt_scale: at the start the projection to them is uniform within this times
      R^-1/2.
    dtype: of the projections; step sizes, decays and states are float32.
    param_dtype: of the parameters.
    kernel_init: initialiser of the other projections.
    implementation: of `ops.selective_scan`.
  """

  channels: int
  state_size: int = 16
  dt_rank: int | None = None
  conv_width: int = 4
  conv_bias: bool = True
  use_bias: bool = False
  dt_range: tuple[float, float] = (1e-3, 0.1)
  dt_scale: float = 1.0
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  kernel_init: Initializer = nn.initializers.normal(0.02)
  implementation: Any = None

  @nn.compact
  def __call__(
    self,
    u: Float[Array, "B T D"],
    *,
    mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: dict[str, Array] | None = None,
    prefill: bool = False,
  ) -> tuple[Float[Array, "B T D"], dict[str, Array] | None]:
    """Mixes u over time.

    Args:
      u: inputs.
      mask: True for real tokens; the others change neither the state nor the
        output at real tokens (their own outputs mean nothing). With a cache
        that is not empty, padding stands on the left of u.
      segment_ids: state and convolution start anew at each segment.
      cache: {"conv" [B, W-1, E], "ssm" [B, E, M] float32}: what the tokens
        before u left; see `empty_cache`.
      prefill: promises that the cache is empty, so that it is not read.

    Returns:
      The output, and the cache after u.
    """
    rank = self.dt_rank or math.ceil(u.shape[-1] / 16)
    size = self.state_size

    def linear(features: int, names: tuple, name: str, **options) -> Linear:
      options = dict(kernel_init=self.kernel_init) | options
      return Linear(
        (features,),
        names,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
        **options,
      )

    def param(name: str, init: Initializer, *trailing: int) -> Array:
      names = ("ssm_channels", *("state" for _ in trailing))
      init = nn.with_logical_partitioning(init, names)
      shape = (self.channels, *trailing)
      value = self.param(name, init, shape, self.param_dtype)
      return value.astype(jnp.float32)

    def hide(x: Array, value: float = 0.0) -> Array:
      return x if mask is None else jnp.where(mask[..., None], x, value)

    biased = dict(use_bias=self.use_bias)
    inward = ("embed", "ssm_channels")
    x = linear(self.channels, inward, "x", **biased)(u)
    z = linear(self.channels, inward, "z", **biased)(u)

    # The convolution must not read padding, whatever the projection's bias;
    # the scan does not, its steps being zero there.
    x = hide(x)
    returning = cache is not None
    reading = returning and not prefill
    past = None
    if reading:
      past = cache["conv"].astype(x.dtype)
      if mask is not None:
        past, x = past_padding(past, x, mask)
    x, conv = ShortConv(
      width=self.conv_width,
      axis_names=("ssm_channels",),
      use_bias=self.conv_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="conv",
    )(x, segment_ids=segment_ids, state=past, return_state=returning)
    x = constrain(x, BATCH_AXES, "sequence", "tensor")

    steering = linear(rank + 2 * size, ("ssm_channels", None), "steering")(x)
    steering = constrain(steering, BATCH_AXES, "sequence", None)
    low, B, C = jnp.split(steering, [rank, rank + size], axis=-1)
    bound = self.dt_scale * rank**-0.5

    def uniform(key, shape, dtype):
      return jax.random.uniform(key, shape, dtype, -bound, bound)

    delta = linear(
      self.channels, (None, "ssm_channels"), "dt", kernel_init=uniform
    )(low)
    arrays = dict(
      u=x,
      # A step of zero leaves the state as it is.
      delta=hide(delta, _NO_STEP),
      A=-jnp.exp(param("A_log", s4d_real_A, size)),
      B=B[:, :, None],
      C=C[:, :, None],
      D=param("D", nn.initializers.ones),
      z=z,
      delta_bias=param("dt_bias", log_uniform_dt_bias(*self.dt_range)),
    )
    if reading and u.shape[1] == 1:
      now = {
        name: v[:, 0] if name in ("u", "delta", "B", "C", "z") else v
        for name, v in arrays.items()
      }
      y, state = ops.selective_scan_step(
        cache["ssm"], **now, delta_softplus=True
      )
      y = y[:, None]
    else:
      out = sharded_ops.selective_scan(
        **arrays,
        delta_softplus=True,
        initial_state=cache["ssm"] if reading else None,
        segment_ids=segment_ids,
        return_final_state=returning,
        implementation=self.implementation,
      )
      y, state = out if returning else (out, None)
    y = linear(u.shape[-1], ("ssm_channels", "embed"), "out", **biased)(y)
    if not returning:
      return y, None
    new = {"conv": conv, "ssm": state}
    return y, {name: v.astype(cache[name].dtype) for name, v in new.items()}

  def empty_cache(self, batch: int) -> dict[str, Array]:
    """The cache before the first token, for `batch` rows."""
    shape = (batch, self.channels)
    return {
      "conv": jnp.zeros((batch, self.conv_width - 1, shape[1]), self.dtype),
      "ssm": jnp.zeros((*shape, self.state_size), jnp.float32),
    }
