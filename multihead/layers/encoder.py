"""The Transformer encoder block, pre-norm (ViT) or post-norm (BERT)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from multihead.layers import stacking
from multihead.layers.attention import MultiHeadAttention
from multihead.layers.linear import Initializer
from multihead.layers.mlp import MLP
from multihead.layers.norms import LayerNorm
from multihead.parallel.sharding import BATCH_AXES, constrain


def drop_path(
  x: Float[Array, "B ..."], rate: float | Float[Array, ""], rng: jax.Array
) -> Float[Array, "B ..."]:
  """Stochastic depth: zeroes whole examples, and scales the others up.

  Args:
    x: a residual branch.
    rate: probability of zero, below 1; may be traced.
    rng: a key.
  """
  keep = 1 - jnp.asarray(rate, jnp.float32)
  shape = x.shape[:1] + (1,) * (x.ndim - 1)
  kept = jax.random.bernoulli(rng, keep, shape)
  return jnp.where(kept, x / keep.astype(x.dtype), 0)


class EncoderBlock(nn.Module):
  """Attention, then an MLP, each with a residual.

  Pre-norm: x += a with a = attention(norm1(x)); x += f with f = mlp(norm2(x)).
  Post-norm: x = norm1(x + attention(x)); x = norm2(x + mlp(x)).
  Layer scale and stochastic depth act on a and f, which are sown, as they are
  added, as `attention_out` and `mlp_out`: in a pre-norm network its output is
  its input plus the sum of them.

  Attributes:
    num_heads: N; the width is split evenly among the heads.
    mlp_dim: F.
    pre_norm: the order above.
    act: activation of the MLP, see `layers.mlp`.
    qkv_bias: biases on the projections to queries, keys and values.
    layer_scale: initial value of a learned factor per channel on a and f; None:
      no such factor.
    dropout: rate of dropout on the output of attention and of the MLP.
    mlp_dropout: rate of dropout inside the MLP.
    attention_dropout: rate of dropout on the attention weights.
    epsilon: of the norms.
    dtype: of the arithmetic; norms and softmax are in float32.
    param_dtype: of the parameters.
    kernel_init: initialiser of the kernels.
    implementation: of `ops.attention`.
    return_branches: return (x, (a, f)) instead of (x, None).
  """

  num_heads: int
  mlp_dim: int
  pre_norm: bool = True
  act: str = "gelu"
  qkv_bias: bool = True
  layer_scale: float | None = None
  dropout: float = 0.0
  mlp_dropout: float = 0.0
  attention_dropout: float = 0.0
  epsilon: float = 1e-6
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  kernel_init: Initializer = nn.initializers.truncated_normal(0.02)
  implementation: Any = None
  return_branches: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    drop_path_rate: float | Float[Array, ""] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    deterministic: bool = True,
  ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
    """Applies the block; the signature is that of a body for `nn.scan`.

    Args:
      x: the residual stream.
      drop_path_rate: of stochastic depth, drawn apart for a and f; None: none.
      mask: True for real tokens.
      deterministic: no dropout and no stochastic depth; both need the rng
        "dropout" otherwise.

    Returns:
      The stream, and the two branches if `return_branches`.
    """
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    shared = dict(kernel_init=self.kernel_init, **types)
    norm1 = LayerNorm(epsilon=self.epsilon, name="norm1", **types)
    norm2 = LayerNorm(epsilon=self.epsilon, name="norm2", **types)
    attention = MultiHeadAttention(
      num_heads=self.num_heads,
      head_dim=x.shape[-1] // self.num_heads,
      qkv_bias=self.qkv_bias,
      dropout=self.attention_dropout,
      implementation=self.implementation,
      name="attention",
      **shared,
    )
    mlp = MLP(
      hidden=self.mlp_dim,
      act=self.act,
      inner_dropout=self.mlp_dropout,
      name="mlp",
      **shared,
    )

    def branch(y: Array, name: str) -> Array:
      y = nn.Dropout(self.dropout)(y, deterministic=deterministic)
      if self.layer_scale is not None:
        init = nn.initializers.constant(self.layer_scale)
        init = nn.with_logical_partitioning(init, ("embed",))
        scale = self.param(
          f"{name}_scale", init, y.shape[-1:], self.param_dtype
        )
        y = y * scale.astype(y.dtype)
      if drop_path_rate is not None and not deterministic:
        y = drop_path(y, drop_path_rate, self.make_rng("dropout"))
      self.sow("intermediates", f"{name}_out", y)
      return y

    def add(x: Array, y: Array) -> Array:
      return constrain(x + y, BATCH_AXES, "sequence", None)

    def attend(x: Array) -> Array:
      return attention(x, mask=mask, deterministic=deterministic)

    if self.pre_norm:
      a = branch(attend(norm1(x)), "attention")
      x = add(x, a)
      f = branch(mlp(norm2(x), deterministic=deterministic), "mlp")
      x = add(x, f)
    else:
      a = branch(attend(x), "attention")
      x = norm1(add(x, a))
      f = branch(mlp(x, deterministic=deterministic), "mlp")
      x = norm2(add(x, f))
    return x, (a, f) if self.return_branches else None


def encoder_blocks(
  count: int, *, remat: str, scan_layers: bool, scan_over: bool, **parts: Any
) -> Any:
  """`count` blocks for the `setup` of a model, which calls them by turns.

  Args:
    count: L.
    remat: "none", or a key of `stacking.REMAT_POLICIES`.
    scan_layers: one block scanned over stacked parameters, or a list.
    scan_over: whether the scanned block's second argument has an axis L.
    **parts: fields of `EncoderBlock`.
  """
  block = EncoderBlock
  if remat != "none":
    block = nn.remat(
      block,
      prevent_cse=not scan_layers,
      policy=stacking.REMAT_POLICIES[remat],
      static_argnums=(4,),  # deterministic
    )
  if not scan_layers:
    return [block(**parts) for _ in range(count)]
  scan = nn.scan(
    block,
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=(0 if scan_over else nn.broadcast, nn.broadcast, nn.broadcast),
    length=count,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return scan(**parts)
