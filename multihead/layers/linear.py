"""Linear projections over several axes at once, and token embeddings."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from multihead.parallel.sharding import context_axes, gather_for_use

Initializer = Callable[..., jax.Array]


def _product(
  x: Float[Array, "... D"], matrix: Float[Array, "D F"], dtype: Any
) -> Float[Array, "... F"]:
  """x times the matrix, accumulated and returned in `dtype`."""
  batch = x.shape[:-1]
  if not context_axes():
    # Over several row axes, XLA's CPU backend takes six times as long for the
    # gradient of the matrix. On a mesh each of them may be split: there they
    # stay apart.
    x = x.reshape(-1, x.shape[-1])
  y = lax.dot_general(
    x,
    matrix,
    (((x.ndim - 1,), (0,)), ((), ())),
    preferred_element_type=dtype,
  )
  return y.reshape(*batch, -1)


class Linear(nn.Module):
  """y = x W (+ b), contracting the last axes of x with the first of W.

  A projection to heads keeps its axes, [.., D] -> [.., N, H], so that a mesh
  axis can split the heads by name.

  Attributes:
    features: output axes.
    axis_names: logical names of the kernel's axes, inputs first.
    inputs: how many trailing axes of x are contracted.
    use_bias: whether to add a bias of shape `features`.
    dtype: of the multiplication and the result.
    param_dtype: of the parameters.
    kernel_init: initialiser, called with the kernel's shape.
    bias_init: initialiser of the bias.
    result_dtype: of the result, if not `dtype` (float32 for logits).
  """

  features: Sequence[int]
  axis_names: tuple[str | None, ...]
  inputs: int = 1
  use_bias: bool = False
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  kernel_init: Initializer = nn.initializers.normal(0.02)
  bias_init: Initializer = nn.initializers.zeros
  result_dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    features = tuple(self.features)
    contracted = x.shape[x.ndim - self.inputs :]
    kernel = self.param(
      "kernel",
      nn.with_logical_partitioning(self.kernel_init, self.axis_names),
      contracted + features,
      self.param_dtype,
    )
    kernel = gather_for_use(kernel.astype(self.dtype), self.axis_names)
    # One plain matrix product, whatever the axes.
    batch = x.shape[: x.ndim - self.inputs]
    y = _product(
      x.astype(self.dtype).reshape(*batch, -1),
      kernel.reshape(math.prod(contracted), -1),
      self.result_dtype,
    ).reshape(batch + features)
    if self.use_bias:
      bias = self.param(
        "bias",
        nn.with_logical_partitioning(
          self.bias_init, self.axis_names[self.inputs :]
        ),
        features,
        self.param_dtype,
      )
      y = y + bias.astype(y.dtype)
    return y


class Embedding(nn.Module):
  """A table of V rows of width D, to look tokens up and to score them.

  Attributes:
    vocab_size: V.
    features: D.
    dtype: of the result of the look-up.
    param_dtype: of the table.
    embedding_init: initialiser of the table.
  """

  vocab_size: int
  features: int
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  embedding_init: Initializer = nn.initializers.normal(0.02)

  def setup(self) -> None:
    self.embedding = self.param(
      "embedding",
      nn.with_logical_partitioning(self.embedding_init, ("vocab", "embed")),
      (self.vocab_size, self.features),
      self.param_dtype,
    )

  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of the table; an id outside [0, V) is the caller's error."""
    return jnp.take(self._table(), tokens, axis=0)

  def _table(self) -> Float[Array, "V D"]:
    table = self.embedding.astype(self.dtype)
    return gather_for_use(table, ("vocab", "embed"))

  def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Scores of all tokens, in float32."""
    return _product(x.astype(self.dtype), self._table().T, jnp.float32)
