"""MHS-VM and VM-UNet: U-shaped networks of scans that segment images.

"MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba", arXiv
2406.05992, on the network of "VM-UNet: Vision Mamba UNet for Medical Image
Segmentation", arXiv 2402.02491. The two differ in the scan of their blocks.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from multihead.errors import UserError
from multihead.layers import (
  SS2D,
  LayerNorm,
  Linear,
  MultiHeadScan,
  VSSBlock,
  stacking,
)
from multihead.layers.multi_head_scan import uniform_within
from multihead.layers.scan_routes import Route
from multihead.parallel.sharding import BATCH_AXES, constrain

_SS2D = dict(heads=0)
_NO_PROJECTION = dict(projection=False)
# The authors' configs of MHS-VM and of VM-UNet; the last is the default of
# VM-UNet's code, which none of its configs uses.
VARIANTS: dict[str, dict[str, Any]] = {
  "mhs_vm_4_heads_no_projection": dict(heads=4, **_NO_PROJECTION),
  "mhs_vm_3_heads_no_projection": dict(heads=3, **_NO_PROJECTION),
  "mhs_vm_4_heads": dict(heads=4),
  "mhs_vm_3_heads": dict(heads=3),
  "vm_unet": _SS2D,
  "vm_unet_synapse": dict(_SS2D, num_classes=9, img_size=224),
  "vm_unet_deep": dict(_SS2D, depths=(2, 2, 9, 2), depths_decoder=(2, 9, 2, 2)),
}


class MHSVM(nn.Module):
  """A segmentation network: patches, an encoder, a decoder with sums as skips.

  Width doubles and the map halves from stage to stage of the encoder, and back
  in the decoder. Images may have any height and width that `stride` divides;
  the parameters do not depend on them.

  Attributes:
    img_size: height and width of the images that parameters are made with, or
      (height, width).
    in_chans: channels of the images; those of one channel are repeated.
    num_classes: logits per pixel; 1 for a mask.
    embed_dim: width of the first stage.
    depths: blocks of each stage of the encoder.
    depths_decoder: of the decoder, the narrowest map first.
    patch_size: of the square patches.
    heads: of the multi-head scan; 0: SS2D, which makes this VM-UNet.
    projection, threshold, routes, scale_free: of the multi-head scan.
    state_size: M of every scan.
    drop_path_rate: stochastic depth of the innermost blocks, growing linearly
      from 0 at the first and falling to 0 at the last.
    dtype: of activations and matrix products; norms, scans, gates and logits
      are in float32.
    param_dtype: of the parameters.
    remat: what the backward pass recomputes: "none", "full" or "dots".
    scan_implementation: of `ops.selective_scan`.
  """

  img_size: int | tuple[int, int] = 256
  in_chans: int = 3
  num_classes: int = 1
  embed_dim: int = 96
  depths: tuple[int, ...] = (2, 2, 2, 2)
  depths_decoder: tuple[int, ...] = (2, 2, 2, 1)
  patch_size: int = 4
  heads: int = 4
  projection: bool = True
  threshold: float | None = 0.5
  routes: tuple[Route, ...] | None = None
  scale_free: bool = False
  state_size: int = 16
  drop_path_rate: float = 0.2
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  scan_implementation: Any = None

  def __post_init__(self) -> None:
    super().__post_init__()
    stages = len(self.depths)
    for wrong, text in (
      (
        not stages or len(self.depths_decoder) != stages,
        f"depths={tuple(self.depths)} and depths_decoder="
        f"{tuple(self.depths_decoder)} must have one entry per stage each",
      ),
      (self.patch_size < 1, f"patch_size={self.patch_size} must be positive"),
      (
        self.embed_dim < 4 or self.embed_dim % 4,
        f"embed_dim={self.embed_dim} must be a multiple of 4",
      ),
      (
        self.num_classes < 1,
        f"num_classes={self.num_classes} must be at least 1",
      ),
      (
        self.heads > self.embed_dim,
        f"heads={self.heads} are more than embed_dim={self.embed_dim}",
      ),
      (
        self.heads and not self.projection and self.embed_dim % self.heads,
        f"embed_dim={self.embed_dim} must be a multiple of heads={self.heads} "
        "without a projection; use projection=True",
      ),
      (
        not self.heads and self.routes is not None,
        "routes are those of the multi-head scan; heads=0 is SS2D",
      ),
      (
        self.remat not in ("none", *stacking.REMAT_POLICIES),
        f"remat={self.remat!r}; allowed are 'none', 'full' and 'dots'",
      ),
      (
        not 0 <= self.drop_path_rate < 1,
        f"drop_path_rate={self.drop_path_rate} must lie in [0, 1)",
      ),
    ):
      if wrong:
        raise UserError(text)
    self._check_size(*self.image_shape, f"img_size={self.img_size}")
    try:
      self._scan(self.embed_dim)
    except ValueError as error:  # heads, routes, threshold
      raise UserError(str(error)) from error

  @property
  def image_shape(self) -> tuple[int, int]:
    """Height and width of the images that parameters are made with."""
    size = self.img_size
    return (size, size) if isinstance(size, int) else tuple(size)

  @property
  def stride(self) -> int:
    """What divides the height and the width of all images: 32 if published."""
    return self.patch_size * 2 ** (len(self.depths) - 1)

  def _check_size(self, height: int, width: int, what: str) -> None:
    if not height or not width or height % self.stride or width % self.stride:
      raise UserError(
        f"{what}: height and width must be multiples of {self.stride}; resize "
        "or predict with multihead.tasks.tiling, or pad to "
        f"{max(1, -(-height // self.stride)) * self.stride}x"
        f"{max(1, -(-width // self.stride)) * self.stride}"
      )

  def init_inputs(self) -> tuple[Array]:
    """Arguments of `__call__` that make the parameters."""
    return (jnp.zeros((1, *self.image_shape, self.in_chans)),)

  def _scan(self, width: int) -> nn.Module:
    shared = dict(
      state_size=self.state_size,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      implementation=self.scan_implementation,
      parent=None,  # The block takes it over.
    )
    if not self.heads:
      return SS2D(dt_rank=-(-width // 16), **shared)
    return MultiHeadScan(
      heads=self.heads,
      projection=self.projection,
      threshold=self.threshold,
      routes=self.routes,
      scale_free=self.scale_free,
      **shared,
    )

  def setup(self) -> None:
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    block = VSSBlock
    if self.remat != "none":
      block = nn.remat(
        block, policy=stacking.REMAT_POLICIES[self.remat], static_argnums=(2,)
      )

    def linear(features: int, **options: Any) -> Linear:
      return Linear(
        (features,), (*[None] * options.get("inputs", 1), "embed"),
        **{**types, **options},
      )  # fmt: skip

    def norm() -> LayerNorm:
      return LayerNorm(epsilon=1e-5, **types)

    def stages(
      widths: Sequence[int], depths: Sequence[int], rates: np.ndarray
    ) -> list[list[VSSBlock]]:
      rates = iter(rates.tolist())
      return [
        [
          block(
            self._scan(width),
            expand=1 if self.heads else 2,
            output_projection=not self.heads,
            drop_path_rate=next(rates),
            **types,
          )
          for _ in range(depth)
        ]
        for width, depth in zip(widths, depths, strict=True)
      ]

    def convolution(features: int, fan_in: int, **options: Any) -> Linear:
      init = uniform_within(fan_in**-0.5)
      return linear(
        features, use_bias=True, kernel_init=init, bias_init=init, **options
      )

    p, first = self.patch_size, self.embed_dim
    widths = [first * 2**i for i in range(len(self.depths))]
    rates = lambda depths: np.linspace(0, self.drop_path_rate, sum(depths))
    self.patch_embed = convolution(first, p * p * self.in_chans, inputs=3)
    self.patch_norm = norm()
    self.encoder = stages(widths, self.depths, rates(self.depths))
    self.merge_norms = [norm() for _ in widths[1:]]
    self.merges = [linear(width) for width in widths[1:]]
    self.decoder = stages(
      widths[::-1], self.depths_decoder, rates(self.depths_decoder)[::-1]
    )
    # To four pixels of half the width each.
    self.expands = [linear(2 * width) for width in widths[:0:-1]]
    self.expand_norms = [norm() for _ in widths[1:]]
    self.final_expand = linear(p * p * first // 4)
    self.final_norm = norm()
    self.head = convolution(
      self.num_classes, first // 4, result_dtype=jnp.float32
    )

  def __call__(
    self,
    images: Float[Array, "B height width C"],
    *,
    deterministic: bool = True,
  ) -> Float[Array, "B height width classes"]:
    """Segments images.

    Args:
      images: channels last, in the range of the training data.
      deterministic: no stochastic depth; it needs the rng "dropout" otherwise.

    Returns:
      Logits in float32. Their sigmoid is the probability of the mask if there
      is one class (the authors' code returns that), else the softmax over them
      that of each class.

    Raises:
      UserError: images of another number of channels, or whose height or width
        `stride` does not divide.
    """
    images = self._checked(images)
    x = images.astype(self.dtype)
    x = self.patch_norm(self.patch_embed(_patches(x, self.patch_size)))
    skips = []
    for stage, blocks in enumerate(self.encoder):
      if stage:
        x = self.merge_norms[stage - 1](_merged(x))
        x = self.merges[stage - 1](x)
      x = constrain(x, BATCH_AXES, None, None, None)
      skips.append(x)
      for block in blocks:
        x = block(x, deterministic)
    for stage, blocks in enumerate(self.decoder):
      if stage:
        # The stage's input before its blocks; the first one is not used.
        x = x + skips.pop()
        x = _spread(self.expands[stage - 1](x), 2)
        x = self.expand_norms[stage - 1](x)
        x = constrain(x, BATCH_AXES, None, None, None)
      for block in blocks:
        x = block(x, deterministic)
    x = self.final_norm(_spread(self.final_expand(x), self.patch_size))
    return self.head(x)

  def _checked(self, images: Array) -> Array:
    if images.ndim != 4 or images.shape[-1] not in (1, self.in_chans):
      raise UserError(
        f"images must be [B, height, width, {self.in_chans}], got "
        f"{list(images.shape)}; channels come last"
      )
    height, width = images.shape[1:3]
    self._check_size(height, width, f"images of {height}x{width}")
    shape = (*images.shape[:-1], self.in_chans)
    return jnp.broadcast_to(images, shape)


def _patches(
  x: Float[Array, "B height width C"], p: int
) -> Float[Array, "B rows columns P P C"]:
  """Square patches of p pixels a side."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // p, p, width // p, p, channels)
  return x.swapaxes(2, 3)


def _merged(
  x: Float[Array, "B height width C"],
) -> Float[Array, "B rows columns E"]:
  """The four pixels of each square, column by column, as channels."""
  patches = _patches(x, 2).swapaxes(3, 4)
  return patches.reshape(*patches.shape[:3], -1)


def _spread(
  x: Float[Array, "B rows columns E"], p: int
) -> Float[Array, "B height width C"]:
  """Each pixel's channels as p rows of p pixels."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height, width, p, p, channels // p**2).swapaxes(2, 3)
  return x.reshape(batch, height * p, width * p, -1)
