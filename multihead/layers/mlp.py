"""Feed-forward layers: gated (SwiGLU) and plain."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from multihead.errors import nearest
from multihead.layers.linear import Initializer, Linear
from multihead.parallel.sharding import BATCH_AXES, constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
  """The function of that name; ValueError for an unknown one."""
  if name not in ACTIVATIONS:
    raise ValueError(
      f"unknown activation {name!r}{nearest(name, ACTIVATIONS)}; allowed are "
      f"{', '.join(ACTIVATIONS)}"
    )
  return ACTIVATIONS[name]


class GatedMLP(nn.Module):
  """y = W_down((W_up x) * silu(s_gate W_gate x)) * s_down (Shazeer, 2020).

  Attributes:
    hidden: F, the inner width.
    gate_multiplier: s_gate, a fixed factor on the gate.
    down_multiplier: s_down, a fixed factor on the output.
    use_bias: biases on all three projections.
    dtype: of the arithmetic.
    param_dtype: of the parameters.
    kernel_init: initialiser of the kernels.
  """

  hidden: int
  gate_multiplier: float = 1.0
  down_multiplier: float = 1.0
  use_bias: bool = False
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  kernel_init: Initializer = nn.initializers.normal(0.02)

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    def linear(features: int, names: tuple[str, str], name: str) -> Linear:
      return Linear(
        (features,),
        names,
        use_bias=self.use_bias,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        kernel_init=self.kernel_init,
        name=name,
      )

    gate = linear(self.hidden, ("embed", "mlp"), "gate")(x)
    up = linear(self.hidden, ("embed", "mlp"), "up")(x)
    inner = up * jax.nn.silu(gate * self.gate_multiplier)
    inner = constrain(inner, BATCH_AXES, "sequence", "tensor")
    down = linear(x.shape[-1], ("mlp", "embed"), "down")(inner)
    return down * self.down_multiplier


class MLP(nn.Module):
  """y = W_down act(W_up x + b_up) + b_down.

  Attributes:
    hidden: F, the inner width.
    act: a key of ACTIVATIONS.
    use_bias: biases on both projections.
    inner_dropout: rate of dropout on the inner values.
    dtype: of the arithmetic.
    param_dtype: of the parameters.
    kernel_init: initialiser of the kernels.
  """

  hidden: int
  act: str = "gelu"
  use_bias: bool = True
  inner_dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  kernel_init: Initializer = nn.initializers.normal(0.02)

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], *, deterministic: bool = True
  ) -> Float[Array, "B T D"]:
    def linear(features: int, names: tuple[str, str], name: str) -> Linear:
      return Linear(
        (features,),
        names,
        use_bias=self.use_bias,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        kernel_init=self.kernel_init,
        name=name,
      )

    inner = linear(self.hidden, ("embed", "mlp"), "up")(x)
    inner = activation(self.act)(inner)
    inner = constrain(inner, BATCH_AXES, "sequence", "tensor")
    inner = nn.Dropout(self.inner_dropout)(inner, deterministic=deterministic)
    return linear(x.shape[-1], ("mlp", "embed"), "down")(inner)
