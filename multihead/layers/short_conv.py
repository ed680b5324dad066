"""The short causal convolution in front of a state-space scan."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from multihead.layers.linear import Initializer
from multihead.parallel import sharded_conv


class ShortConv(nn.Module):
  """Depthwise causal convolution over trailing channel axes, then SiLU.

  Attributes:
    width: taps.
    axis_names: logical names of the channel axes.
    use_bias: whether there is a bias.
    dtype: of the result.
    param_dtype: of the parameters.
  """

  width: int
  axis_names: tuple[str | None, ...]
  use_bias: bool
  dtype: jnp.dtype
  param_dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    x: Array,
    *,
    segment_ids: Array | None,
    state: Array | None,
    return_state: bool,
  ) -> tuple[Array, Array | None]:
    """Convolves x over time.

    Args:
      x: [B, T, ...].
      segment_ids: [B, T]; the convolution starts anew at each segment.
      state: [B, W-1, ...], the inputs before x; zeros if None.
      return_state: whether to return the last W-1 inputs too.

    Returns:
      The output like x, and the state or None.
    """
    channels = x.shape[2:]
    bound = self.width**-0.5

    def uniform(key, shape, dtype):
      return jax.random.uniform(key, shape, dtype, -bound, bound)

    def param(name: str, init: Initializer, lead: tuple, names: tuple) -> Array:
      init = nn.with_logical_partitioning(init, names + self.axis_names)
      value = self.param(name, init, lead + channels, self.param_dtype)
      return value.astype(self.dtype)

    kernel = param("kernel", uniform, (self.width,), ("conv",))
    bias = param("bias", uniform, (), ()) if self.use_bias else None

    out = sharded_conv.causal_conv1d(
      x,
      kernel,
      bias,
      axis_names=self.axis_names,
      activation="silu",
      initial_state=state,
      segment_ids=segment_ids,
      return_final_state=return_state,
    )
    return out if return_state else (out, None)


def past_padding(state: Array, x: Array, mask: Array) -> tuple[Array, Array]:
  """Moves the last inputs of a cache next to the first real token of a row.

  Padding on the left of x would otherwise stand between the two, and the
  convolution would read it in place of what came before.

  Args:
    state: [B, W-1, ...], the inputs before x.
    x: [B, T, ...], zero where the mask is False.
    mask: [B, T].

  Returns:
    state and x as one sequence of W-1+T, split again at W-1: first zeros for
    the padding, then the state, then the real tokens at their old places.
  """
  past, length = state.shape[1], x.shape[1]
  joined = jnp.concatenate([state, x], axis=1)
  padding = jnp.where(mask.any(axis=1), mask.argmax(axis=1), length)[:, None]
  slot = jnp.arange(past + length)
  source = jnp.where(slot < padding + past, slot - padding, slot)
  source = jnp.where(slot < padding, past, source)
  source = source.reshape(source.shape + (1,) * (x.ndim - 2))
  joined = jnp.take_along_axis(joined, source, axis=1)
  return joined[:, :past], joined[:, past:]
