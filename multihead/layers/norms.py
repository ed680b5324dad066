"""Layer normalisation and root mean square normalisation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class LayerNorm(nn.Module):
  """y = scale * (x - mean) / sqrt(variance + epsilon) + bias (Ba et al., 2016).

  Mean and (biased) variance are over the last axis; all arithmetic is in
  float32.

  Attributes:
    epsilon: added to the variance.
    dtype: of the result.
    param_dtype: of the scale and the bias.
  """

  epsilon: float = 1e-6
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    def vector(name: str, init: nn.initializers.Initializer) -> Array:
      init = nn.with_logical_partitioning(init, ("embed",))
      value = self.param(name, init, x.shape[-1:], self.param_dtype)
      return value.astype(jnp.float32)

    scale = vector("scale", nn.initializers.ones)
    bias = vector("bias", nn.initializers.zeros)
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
    return (x * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
  """y = scale * x / sqrt(mean(x^2) + epsilon) over the last axis.

  The mean and the division are in float32; the scale multiplies after the cast
  back to `dtype` (Zhang and Sennrich, 2019, in the order Llama made standard).

  Attributes:
    epsilon: added to the mean square.
    dtype: of the result.
    param_dtype: of the scale.
  """

  epsilon: float = 1e-5
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    scale = self.param(
      "scale",
      nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
      x.shape[-1:],
      self.param_dtype,
    )
    x = x.astype(jnp.float32)
    x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
    return x.astype(self.dtype) * scale.astype(self.dtype)


class GatedRMSNorm(nn.Module):
  """RMSNorm over groups of heads, multiplied by silu(gate) (Mamba-2).

  Attributes:
    groups: G; each run of N // G heads is normalised together.
    norm_before_gate: y = norm(x) * silu(gate) if True, else
      y = norm(x * silu(gate)).
    epsilon: added to the mean square.
    dtype: of the result; all arithmetic is in float32.
    param_dtype: of the scale.
  """

  groups: int = 1
  norm_before_gate: bool = False
  epsilon: float = 1e-5
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T N H"], gate: Float[Array, "B T N H"]
  ) -> Float[Array, "B T N H"]:
    scale = self.param(
      "scale",
      nn.with_logical_partitioning(
        nn.initializers.ones, ("ssm_heads", "head_dim")
      ),
      x.shape[-2:],
      self.param_dtype,
    )
    x = x.astype(jnp.float32)
    gate = jax.nn.silu(gate.astype(jnp.float32))
    if not self.norm_before_gate:
      x = x * gate
    *lead, heads, width = x.shape
    grouped = x.reshape(*lead, self.groups, heads // self.groups, width)
    square = jnp.mean(grouped * grouped, axis=(-2, -1), keepdims=True)
    x = (grouped * lax.rsqrt(square + self.epsilon)).reshape(x.shape)
    x = x * scale.astype(jnp.float32)
    if self.norm_before_gate:
      x = x * gate
    return x.astype(self.dtype)
