"""Scans over feature maps: SS2D, the multi-head scan, and the VSS block.

SS2D and the block are those of VMamba (arXiv 2401.10166) as VM-UNet (arXiv
2402.02491) has them; the multi-head scan and its gate are those of "MHS-VM:
Multi-Head Scanning in Parallel Subspaces for Vision Mamba", arXiv 2406.05992.
All scans of a layer, of every head and route, run as one call.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from multihead.layers.encoder import drop_path
from multihead.layers.linear import Initializer, Linear
from multihead.layers.mamba import log_uniform_dt_bias
from multihead.layers.mamba1 import s4d_real_A
from multihead.layers.norms import LayerNorm
from multihead.layers.scan_routes import (
  ROUTES,
  Route,
  check_name,
  route_gather,
  scan_orders,
)
from multihead.parallel import sharded_ops
from multihead.parallel.sharding import BATCH_AXES, constrain

_SCANS = 4  # A route: two paths, each forwards and backwards.
_NORM_EPSILON = 1e-5


def uniform_within(bound: float) -> Initializer:
  """An initialiser: uniform in [-bound, bound]."""

  def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def _safe_sqrt(x: Array) -> Array:
  """The root, with a gradient of zero at zero."""
  positive = x > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def scan_route_gate(
  ys: Float[Array, "K ..."],
  threshold: float,
  *,
  scale_free: bool = False,
  epsilon: float = 1e-5,
) -> Float[Array, "..."]:
  """The factor of `scan_route_attention`: relu(cv - threshold).

  With sigma the standard deviation over the K scans (its divisor is K - 1), low
  their minimum and mu = mean(ys - low), cv = sigma / (mu + epsilon) is the
  coefficient of variation. Where the scans differ by much more than epsilon it
  lies in [sqrt(K) / (K - 1), sqrt(K)], so that a threshold below that screens
  nothing; where they differ by less, epsilon closes the gate.

  Args:
    ys: results of K > 1 scans of one value.
    threshold: not negative.
    scale_free: multiply epsilon by the root mean square of the K results. The
      gate then depends on how far they differ in proportion to their size, and
      not on their scale.
    epsilon: keeps cv finite.

  Returns:
    The gates in float32 (float64 if ys is); zero, with a gradient of zero,
    where all results are equal.

  Raises:
    ValueError: fewer than two scans, or a negative threshold.
  """
  if ys.ndim < 1 or ys.shape[0] < 2:
    raise ValueError(
      f"ys must be [K, ...] with K > 1 scans, got shape {ys.shape}"
    )
  if threshold < 0:
    raise ValueError(f"threshold={threshold} must not be negative")
  ys = ys.astype(jnp.promote_types(ys.dtype, jnp.float32))
  spread = ys - jnp.min(ys, axis=0)
  mu = jnp.mean(spread, axis=0)
  square = jnp.sum((spread - mu) ** 2, axis=0) / (ys.shape[0] - 1)
  if scale_free:
    epsilon = epsilon * _safe_sqrt(jnp.mean(ys * ys, axis=0))
  scale = mu + epsilon
  # It is zero only where all results are, and sigma with them.
  scale = jnp.where(scale > 0, scale, 1)
  return jax.nn.relu(_safe_sqrt(square) / scale - threshold)


def scan_route_attention(
  ys: Float[Array, "K ..."],
  threshold: float,
  *,
  scale_free: bool = False,
  epsilon: float = 1e-5,
) -> Float[Array, "..."]:
  """Scan Route Attention of MHS-VM: the sum of K scans times their gate.

  Arguments, result and errors are those of `scan_route_gate`.
  """
  gate = scan_route_gate(ys, threshold, scale_free=scale_free, epsilon=epsilon)
  return jnp.sum(ys.astype(gate.dtype), axis=0) * gate


class RouteScan(nn.Module):
  """Selective scans of n maps, each in orders of its own.

  Every scan has its own projections, step sizes, decays and direct path.

  Attributes:
    state_size: M, states per channel.
    dt_rank: R, of the projection to the step sizes.
    dtype: of the projections; the rest is in float32.
    param_dtype: of the parameters.
    implementation: of `ops.selective_scan`.
  """

  state_size: int
  dt_rank: int
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  implementation: Any = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B L N S"],
    order: Int[np.ndarray, "G L"],
    inverse: Int[np.ndarray, "G L"],
  ) -> Float[Array, "B L N K S"]:
    """Scans each map in K = G / N orders.

    Args:
      x: N maps of S channels, pixels in rows.
      order: see `scan_routes.scan_orders`; those of the first map first.
      inverse: its inverse.

    Returns:
      The results at their pixels, in float32.
    """
    batch, length, maps, width = x.shape
    scans = len(order)
    each = scans // maps
    size, rank = self.state_size, self.dt_rank

    def param(name: str, init: Initializer, *shape: int) -> Array:
      names = ("ssm_heads", *(None for _ in shape))
      init = nn.with_logical_partitioning(init, names)
      return self.param(name, init, (scans, *shape), self.param_dtype)

    def project(equation: str, x: Array, kernel: Array) -> Array:
      return jnp.einsum(
        equation,
        x.astype(self.dtype),
        kernel.astype(self.dtype),
        preferred_element_type=jnp.float32,
      )

    def place(x: Array) -> Array:
      return constrain(x, BATCH_AXES, None, "tensor", None)

    x = jnp.broadcast_to(x[:, :, :, None], (batch, length, maps, each, width))
    x = place(x.reshape(batch, length, scans, width))
    x = place(route_gather(x, order, inverse))
    steering = param(
      "steering", uniform_within(width**-0.5), width, rank + 2 * size
    )
    dt = param("dt", uniform_within(rank**-0.5), rank, width)
    vectors = dict(
      delta_bias=param("dt_bias", log_uniform_dt_bias(), width),
      A=-jnp.exp(param("A_log", s4d_real_A, width, size).astype(jnp.float32)),
      D=param("D", nn.initializers.ones, width),
    )
    p = place(project("blgs,gsp->blgp", x, steering))
    low, B, C = jnp.split(p, [rank, rank + size], axis=-1)
    delta = place(project("blgr,grs->blgs", low, dt))
    channels = scans * width

    y = sharded_ops.selective_scan(
      # float32, since the results have the dtype of u.
      x.astype(jnp.float32).reshape(batch, length, channels),
      delta.reshape(batch, length, channels),
      B=B,
      C=C,
      delta_softplus=True,
      implementation=self.implementation,
      **{
        name: v.astype(jnp.float32).reshape(channels, *v.shape[2:])
        for name, v in vectors.items()
      },
    )
    y = place(y.reshape(batch, length, scans, width))
    y = place(route_gather(y, inverse, order))
    return y.reshape(batch, length, maps, each, width)


def _check_map(x: Array) -> None:
  if x.ndim != 4:
    raise ValueError(
      f"a feature map must be [B, height, width, C], got shape {x.shape}"
    )


class SS2D(nn.Module):
  """One map scanned along rows and columns, both ways, and summed.

  What VMamba calls so: the cross scan, the scans and the cross merge, without
  the projections around them, which the VSS block has.

  Attributes:
    state_size: M.
    dt_rank: R; None: ceil(E / 32), which is a sixteenth of the width of a block
      that expands twofold.
    dtype: of the projections and of the result.
    param_dtype: of the parameters.
    implementation: of `ops.selective_scan`.
  """

  state_size: int = 16
  dt_rank: int | None = None
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  implementation: Any = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "B height width E"]
  ) -> Float[Array, "B height width E"]:
    _check_map(x)
    batch, height, width, channels = x.shape
    order, inverse = scan_orders(["Z"], height, width)
    # The published parameters have the two forward scans first.
    order, inverse = order[[0, 2, 1, 3]], inverse[[0, 2, 1, 3]]
    y = RouteScan(
      state_size=self.state_size,
      dt_rank=self.dt_rank or math.ceil(channels / 32),
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      implementation=self.implementation,
      name="routes",
    )(x.reshape(batch, height * width, 1, channels), order, inverse)
    return jnp.sum(y, axis=(2, 3)).reshape(x.shape).astype(self.dtype)


class MultiHeadScan(nn.Module):
  """Subspaces of a map, each scanned along its own route.

  MHS-VM, figure 1. The channels are projected to `heads` subspaces of width
  S = C // heads. Each is scanned four ways along its route, and the four
  results are fused by Scan Route Attention. Sown: `open_gate` [heads], the
  fraction of gates above zero.

  Attributes:
    heads: number of subspaces.
    projection: normalise the heads together and project them back to C
      channels. Without it the result has heads * S, as the next norm gets them.
    threshold: of the gate; None: no gate, the four results are summed.
    state_size: M.
    routes: one `scan_routes.Route` a head; None: the first of C, X, S, Z.
    scale_free: see `scan_route_gate`.
    dtype: of the projections and of the result; scans and gates are in float32.
    param_dtype: of the parameters.
    implementation: of `ops.selective_scan`.
  """

  heads: int = 4
  projection: bool = True
  threshold: float | None = 0.5
  state_size: int = 16
  routes: tuple[Route, ...] | None = None
  scale_free: bool = False
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  implementation: Any = None

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.routes is None:
      if not 1 <= self.heads <= len(ROUTES):
        raise ValueError(
          f"heads={self.heads}; without routes it must lie in 1..{len(ROUTES)}"
        )
    elif len(self.routes) != self.heads or not self.heads:
      raise ValueError(
        f"{len(self.routes)} routes for heads={self.heads}; give one a head"
      )
    for route in self.routes or ():
      if not callable(route):
        check_name(route)
    if self.threshold is not None and self.threshold < 0:
      raise ValueError(
        f"threshold={self.threshold} must not be negative; None is no gate"
      )

  @nn.compact
  def __call__(
    self, x: Float[Array, "B height width C"]
  ) -> Float[Array, "B height width C"]:
    _check_map(x)
    batch, height, width, channels = x.shape
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    size = channels // self.heads
    if not size or (channels % self.heads and not self.projection):
      raise ValueError(
        f"{channels} channels do not divide into {self.heads} heads, and there "
        "is no projection back; change either, or use projection=True"
        if size
        else f"{channels} channels are too few for {self.heads} heads"
      )
    subspaces = ("ssm_heads", "head_dim")
    v = Linear(
      (self.heads, size), ("embed", *subspaces), name="inward", **types
    )(x.reshape(batch, height * width, channels))
    ys = RouteScan(
      state_size=self.state_size,
      dt_rank=math.ceil(size / 16),
      implementation=self.implementation,
      name="routes",
      **types,
    )(v, *scan_orders(self.routes or ROUTES[: self.heads], height, width))
    y = jnp.sum(ys, axis=3)
    if self.threshold is not None:
      gate = scan_route_gate(
        jnp.moveaxis(ys, 3, 0), self.threshold, scale_free=self.scale_free
      )
      opened = jnp.mean(gate > 0, axis=(0, 1, 3), dtype=jnp.float32)
      self.sow("intermediates", "open_gate", opened)
      y = y * gate
    y = y.reshape(batch, height, width, self.heads * size)
    if not self.projection:
      return y.astype(self.dtype)
    y = LayerNorm(epsilon=_NORM_EPSILON, name="norm", **types)(y)
    return Linear(
      (channels,), (*subspaces, "embed"), inputs=2, name="outward", **types
    )(y.reshape(batch, height, width, self.heads, size))


class DepthwiseConv(nn.Module):
  """A 3x3 convolution of each channel, zero beyond the border, with a bias.

  Attributes:
    dtype: of the result.
    param_dtype: of the parameters.
  """

  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B height width E"]
  ) -> Float[Array, "B height width E"]:
    def param(name: str, *lead: int) -> Array:
      names = (*(None for _ in lead), "ssm_channels")
      init = nn.with_logical_partitioning(uniform_within(1 / 3), names)
      shape = (*lead, x.shape[-1])
      return self.param(name, init, shape, self.param_dtype).astype(self.dtype)

    kernel, bias = param("kernel", 3, 3), param("bias")
    height, width = x.shape[1:3]
    x = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
    # Nine products that fuse: a grouped convolution is slow on a CPU.
    return bias + sum(
      kernel[i, j] * x[:, i : i + height, j : j + width]
      for i in range(3)
      for j in range(3)
    )


class VSSBlock(nn.Module):
  """f += gated scan of LayerNorm(f): the visual state-space block.

  That of VMamba; MHS-VM, figure 1. With E = expand * C channels inside:

    x, z = split(LayerNorm(f) W_in);  x = silu(conv(x))
    f += drop_path(LayerNorm(scan(x)) * silu(z) (W_out))

  Attributes:
    scan: `MultiHeadScan` or `SS2D`, made with parent=None.
    expand: E / C; 1 for the multi-head scan, 2 for SS2D.
    output_projection: whether there is W_out; needed where E is not C.
    drop_path_rate: of stochastic depth.
    dtype: of the arithmetic; norms are in float32.
    param_dtype: of the parameters.
  """

  scan: nn.Module
  expand: int = 1
  output_projection: bool = False
  drop_path_rate: float = 0.0
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, f: Float[Array, "B height width C"], deterministic: bool = True
  ) -> Float[Array, "B height width C"]:
    """Applies the block.

    Args:
      f: a feature map.
      deterministic: no stochastic depth; it needs the rng "dropout" otherwise.
    """
    _check_map(f)
    if self.expand != 1 and not self.output_projection:
      raise ValueError(
        f"expand={self.expand} needs output_projection=True, to come back to "
        "the width of the input"
      )
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)

    def norm(name: str) -> LayerNorm:
      return LayerNorm(epsilon=_NORM_EPSILON, name=name, **types)

    def inward(name: str) -> Linear:
      width = self.expand * f.shape[-1]
      return Linear((width,), ("embed", "ssm_channels"), name=name, **types)

    u = norm("norm")(f)
    x, z = inward("x")(u), inward("z")(u)
    x = self.scan(jax.nn.silu(DepthwiseConv(name="conv", **types)(x)))
    y = norm("scan_norm")(x) * jax.nn.silu(z)
    if self.output_projection:
      y = Linear(
        f.shape[-1:], ("ssm_channels", "embed"), name="outward", **types
      )(y)
    if self.drop_path_rate and not deterministic:
      y = drop_path(y, self.drop_path_rate, self.make_rng("dropout"))
    return constrain(f + y, BATCH_AXES, None, None, None)
