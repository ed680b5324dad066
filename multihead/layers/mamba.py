"""The Mamba-2 mixer (Dao and Gu, 2024): gated SSD behind a short convolution.

The fused input projection of the published checkpoints (gate | x | B | C | dt)
is kept as four projections, and the convolution as two, so that a mesh axis
splits the heads and leaves the groups whole; nothing is gathered.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from multihead import ops
from multihead.layers.linear import Initializer, Linear
from multihead.layers.norms import GatedRMSNorm
from multihead.layers.short_conv import ShortConv, past_padding
from multihead.parallel import sharded_ops
from multihead.parallel.sharding import BATCH_AXES, constrain


def log_uniform_dt_bias(
  low: float = 1e-3, high: float = 0.1, floor: float = 1e-4
) -> Initializer:
  """dt_bias such that softplus(dt_bias) is log-uniform in [low, high]."""

  def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    draw = jax.random.uniform(key, shape, jnp.float32)
    dt = jnp.exp(draw * math.log(high / low) + math.log(low))
    dt = jnp.maximum(dt, floor)
    return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)

  return init


def log_uniform_A(low: float = 1.0, high: float = 16.0) -> Initializer:
  """A_log such that exp(A_log) is uniform in [low, high]."""

  def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

  return init


def counting_A(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """A_log = log(1), log(2), .., log(N): head n decays at rate n."""
  del key
  return jnp.log(jnp.arange(1, shape[0] + 1, dtype=jnp.float32)).astype(dtype)


class Mamba2(nn.Module):
  """N state-space heads of width H with a state of M, in G groups.

  Attributes:
    num_heads: N.
    head_dim: H.
    state_size: M.
    groups: G; head n reads B and C of group n // (N // G).
    conv_width: W, taps of the causal convolution.
    chunk_size: of the chunked scan; changes the speed only.
    in_multiplier: a fixed factor on the input.
    multipliers: fixed factors on gate, x, B, C and dt, biases included.
    dt_limit: the step sizes are clipped to this range.
    gated_norm: whether a GatedRMSNorm follows the scan; a plain silu(gate)
      does otherwise.
    norm_before_gate: order inside the gated norm.
    epsilon: of the gated norm.
    conv_bias, in_bias, out_bias: which biases exist.
    initializer: "mamba" (A uniform in [1, 16], dt log-uniform in [1e-3, 0.1])
      or "normal" (A = 1..N, dt_bias = 1).
    dtype: of the projections; decays, states and the gated norm are float32.
    param_dtype: of the parameters.
    kernel_init: initialiser of the projections.
    implementation: of `ops.ssd`.
  """

  num_heads: int
  head_dim: int
  state_size: int
  groups: int = 1
  conv_width: int = 4
  chunk_size: int = 128
  in_multiplier: float = 1.0
  multipliers: tuple[float, float, float, float, float] = (1.0,) * 5
  dt_limit: tuple[float, float] = (0.0, float("inf"))
  gated_norm: bool = True
  norm_before_gate: bool = False
  epsilon: float = 1e-5
  conv_bias: bool = True
  in_bias: bool = False
  out_bias: bool = False
  initializer: str = "mamba"
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
      cache: {"conv_x" [B, W-1, N, H], "conv_bc" [B, W-1, 2, G, M],
        "ssm" [B, N, H, M] float32}: what the tokens before u left.
      prefill: promises that the cache is empty, so that it is not read.

    Returns:
      The output, and the cache after u.
    """
    heads = (self.num_heads, self.head_dim)
    groups = (2, self.groups, self.state_size)

    def project(features: tuple[int, ...], names: tuple, name: str) -> Array:
      return Linear(
        features,
        ("embed", *names),
        use_bias=self.in_bias,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        kernel_init=self.kernel_init,
        name=name,
      )(u)

    def vector(name: str, init: Initializer) -> Array:
      init = nn.with_logical_partitioning(init, ("ssm_heads",))
      value = self.param(name, init, (self.num_heads,), self.param_dtype)
      return value.astype(jnp.float32)

    def hide(x: Array) -> Array:
      if mask is None:
        return x
      return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, 0)

    u = u * self.in_multiplier
    m_gate, m_x, m_b, m_c, m_dt = self.multipliers
    head_axes = ("ssm_heads", "head_dim")
    group_axes = (None, "groups", "state")
    gate = project(heads, head_axes, "gate") * m_gate
    x = project(heads, head_axes, "x") * m_x
    bc = project(groups, group_axes, "bc")
    bc = constrain(bc, BATCH_AXES, "sequence", None, "tensor", None)
    bc = bc * jnp.asarray([m_b, m_c], bc.dtype)[:, None, None]
    dt = project((self.num_heads,), ("ssm_heads",), "dt") * m_dt

    # Padding must be zero before the convolution (a bias of the projection
    # would leak) and after it (its own bias would).
    x, bc = hide(x), hide(bc)
    returning = cache is not None
    reading = returning and not prefill
    past_x = past_bc = None
    if reading:
      past_x = cache["conv_x"].astype(x.dtype)
      past_bc = cache["conv_bc"].astype(bc.dtype)
      if mask is not None:
        past_x, x = past_padding(past_x, x, mask)
        past_bc, bc = past_padding(past_bc, bc, mask)
    conv = dict(segment_ids=segment_ids, return_state=returning)
    layer = dict(
      width=self.conv_width,
      use_bias=self.conv_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )
    x, conv_x = ShortConv(axis_names=head_axes, name="conv_x", **layer)(
      x, state=past_x, **conv
    )
    bc, conv_bc = ShortConv(axis_names=group_axes, name="conv_bc", **layer)(
      bc, state=past_bc, **conv
    )
    x, bc = hide(x), hide(bc)
    x = constrain(x, BATCH_AXES, "sequence", "tensor", None)
    B, C = bc[:, :, 0], bc[:, :, 1]

    normal = self.initializer == "normal"
    A = -jnp.exp(vector("A_log", counting_A if normal else log_uniform_A()))
    D = vector("D", nn.initializers.ones)
    dt_bias = vector(
      "dt_bias", nn.initializers.ones if normal else log_uniform_dt_bias()
    )
    dt = jax.nn.softplus(dt.astype(jnp.float32) + dt_bias)
    # A step of zero leaves the state as it is.
    dt = hide(jnp.clip(dt, *self.dt_limit))

    if reading and u.shape[1] == 1:
      y, state = ops.ssd_step(
        cache["ssm"], x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D
      )
      y = y[:, None]
    else:
      out = sharded_ops.ssd(
        x,
        dt,
        A,
        B,
        C,
        D,
        chunk_size=self.chunk_size,
        initial_state=cache["ssm"] if reading else None,
        segment_ids=segment_ids,
        return_final_state=returning,
        implementation=self.implementation,
      )
      y, state = out if returning else (out, None)

    if self.gated_norm:
      y = GatedRMSNorm(
        groups=self.groups,
        norm_before_gate=self.norm_before_gate,
        epsilon=self.epsilon,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name="norm",
      )(y, gate)
    else:
      y = y * jax.nn.silu(gate.astype(jnp.float32))
    y = Linear(
      u.shape[-1:],
      (*head_axes, "embed"),
      inputs=2,
      use_bias=self.out_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=self.kernel_init,
      name="out",
    )(y)
    if not returning:
      return y, None
    new = {"conv_x": conv_x, "conv_bc": conv_bc, "ssm": state}
    return y, {
      name: x.reshape(cache[name].shape).astype(cache[name].dtype)
      for name, x in new.items()
    }
