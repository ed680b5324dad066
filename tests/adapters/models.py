"""Small models to adapt, and random parameters for their adapters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from multihead import models
from multihead.layers import Linear

FALCON = dict(
  vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
  num_attention_heads=4, num_key_value_heads=2, head_dim=4, mamba_n_heads=2,
  mamba_d_head=8, mamba_d_state=4, mamba_chunk_size=8,
)  # fmt: skip


def falcon(**fields):
  return models.create("falcon_h1", **{**FALCON, **fields})


class Block(nn.Module):
  """A map to heads, one from them, and an MLP, all with residuals."""

  @nn.compact
  def __call__(self, x, _):
    h = Linear((2, 3), ("embed", "heads", "head_dim"), name="query")(x)
    x = x + Linear((6,), ("heads", "head_dim", "embed"), inputs=2, name="out")(
      jnp.tanh(h)
    )
    h = Linear((8,), ("embed", "mlp"), use_bias=True, name="up")(x)
    down = Linear((6,), ("mlp", "embed"), use_bias=True, name="down")
    return x + down(nn.silu(h)), None


class Stack(nn.Module):
  """Blocks scanned over or one by one, recomputed or not."""

  depth: int = 3
  scan_layers: bool = True
  remat: bool = False

  def init_inputs(self):
    return (jnp.zeros((1, 1, 6)),)

  @nn.compact
  def __call__(self, x):
    block = nn.remat(Block) if self.remat else Block
    if self.scan_layers:
      scan = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=self.depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      return scan(name="layers")(x, None)[0]
    for i in range(self.depth):
      x, _ = block(name=f"layers_{i}")(x, None)
    return x


def stacked(seed=0, **fields):
  """A Stack, its parameters (all random) and an input."""
  model = Stack(**fields)
  x = jax.random.normal(jax.random.key(seed), (2, 5, 6))
  return model, random_like(init(model, x), seed + 2), x


class Net(nn.Module):
  """Dense maps with biases, one map to heads and one from them, a norm."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    kind = dict(dtype=self.dtype)
    x = nn.LayerNorm(name="norm", **kind)(x)
    h = nn.DenseGeneral((2, 5), name="heads", **kind)(x)
    h = nn.DenseGeneral(6, axis=(-2, -1), name="join", **kind)(jnp.tanh(h))
    h = nn.Dense(9, name="up", **kind)(h)
    h = nn.Dense(7, name="down", **kind)(nn.gelu(h))
    conv = nn.Conv(7, (3,), name="conv", **kind)(h)
    return nn.Dense(3, use_bias=False, name="head", **kind)(conv)


def init(model, *inputs):
  """Parameters without boxes; compiled, which is faster than op by op."""
  make = lambda: nn.meta.unbox(model.init(jax.random.key(1), *inputs))
  return jax.jit(make)()["params"]


def random_like(tree, seed=0, scale=0.5):
  """A tree of the same shapes, every leaf random (biases and scales too)."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(
      scale * rng.standard_normal(leaf.shape), leaf.dtype
    ),
    tree,
  )


def double(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
