"""Vision Transformers: ViT, DeiT (distilled too), DeiT III, CLIP's, DINOv2's.

"An Image is Worth 16x16 Words", arXiv 2010.11929; "Training data-efficient
image transformers & distillation through attention" (DeiT), arXiv 2012.12877;
"DeiT III", arXiv 2204.07118. Names of variants and fields are those of timm.
"""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from multihead.errors import UserError
from multihead.layers import LayerNorm, Linear, stacking
from multihead.layers.encoder import encoder_blocks
from multihead.layers.mlp import ACTIVATIONS
from multihead.parallel.sharding import BATCH_AXES, constrain

# Width, depth, heads, width of the MLP: ViT paper, table 1 (base, large, huge);
# DeiT paper, table 1 (tiny, small); DeiT III (medium); "Scaling Vision
# Transformers", arXiv 2106.04560, table 2 (giant, gigantic).
_SIZES = {
  "tiny": (192, 12, 3, 768),
  "small": (384, 12, 6, 1536),
  "medium": (512, 12, 8, 2048),
  "base": (768, 12, 12, 3072),
  "large": (1024, 24, 16, 4096),
  "huge": (1280, 32, 16, 5120),
  "giant": (1408, 40, 16, 6144),
  "gigantic": (1664, 48, 16, 8192),
}

_GAP = dict(class_token=False, global_pool="avg")
_REG4 = dict(reg_tokens=4, no_embed_class=True)
_DEIT3 = dict(no_embed_class=True, init_values=1e-6)
_CLIP = dict(pre_norm=True, norm_eps=1e-5)
_DINO = dict(img_size=518, init_values=1e-5, num_classes=0)

# Names, whose parts give size, patch and image, and what else sets them apart.
# Classes are as timm builds them: 0 where the release has no classifier.
_NAMES: tuple[tuple[str, dict[str, Any]], ...] = (
  ("vit_tiny_patch16_224 vit_tiny_patch16_384 vit_small_patch32_224 "
   "vit_small_patch32_384 vit_small_patch16_224 vit_small_patch16_384 "
   "vit_base_patch32_224 vit_base_patch32_384 vit_base_patch16_224 "
   "vit_base_patch16_384 vit_base_patch8_224 vit_large_patch32_384 "
   "vit_large_patch16_224 vit_large_patch16_384 vit_large_patch14_224 "
   "vit_giant_patch14_224 vit_gigantic_patch14_224", {}),
  ("vit_small_patch8_224 vit_large_patch32_224 vit_huge_patch14_224",
   dict(num_classes=0)),
  ("vit_small_patch16_36x1_224", dict(depth=36, init_values=1e-5)),
  ("vit_base_patch16_224_miil", dict(num_classes=11221, qkv_bias=False)),
  ("deit_tiny_patch16_224 deit_small_patch16_224 deit_base_patch16_224 "
   "deit_base_patch16_384", {}),
  ("deit_tiny_distilled_patch16_224 deit_small_distilled_patch16_224 "
   "deit_base_distilled_patch16_224 deit_base_distilled_patch16_384",
   dict(distilled=True)),
  ("deit3_small_patch16_224 deit3_small_patch16_384 deit3_medium_patch16_224 "
   "deit3_base_patch16_224 deit3_base_patch16_384 deit3_large_patch16_224 "
   "deit3_large_patch16_384 deit3_huge_patch14_224", _DEIT3),
  ("vit_medium_patch16_gap_256 vit_medium_patch16_gap_384",
   dict(_GAP, fc_norm=False, qkv_bias=False, init_values=1e-6)),
  ("vit_base_patch16_gap_224", dict(_GAP, fc_norm=False, num_heads=16)),
  ("vit_medium_patch16_reg4_gap_256", dict(_GAP, **_REG4, init_values=1e-5)),
  ("vit_base_patch16_reg4_gap_256", dict(_GAP, **_REG4)),
  ("vit_base_patch16_siglip_gap_224 vit_base_patch16_siglip_gap_256",
   dict(_GAP, fc_norm=False, num_classes=0)),
  ("vit_base_patch32_clip_224 vit_base_patch16_clip_224 "
   "vit_base_patch16_clip_384 vit_large_patch14_clip_224 "
   "vit_huge_patch14_clip_224", _CLIP),
  ("vit_base_patch32_clip_quickgelu_224 vit_base_patch16_clip_quickgelu_224",
   dict(_CLIP, act="quick_gelu", num_classes=512)),
  ("vit_small_patch14_dinov2 vit_base_patch14_dinov2 vit_large_patch14_dinov2",
   _DINO),
  ("vit_small_patch14_reg4_dinov2 vit_base_patch14_reg4_dinov2 "
   "vit_large_patch14_reg4_dinov2", dict(_DINO, **_REG4)),
  ("flexivit_small flexivit_base flexivit_large",
   dict(img_size=240, patch_size=16, no_embed_class=True)),
)  # fmt: skip


def _variant(name: str, fields: dict[str, Any]) -> dict[str, Any]:
  (size,) = set(name.split("_")) & _SIZES.keys()
  shape = dict(zip(_SHAPE, _SIZES[size], strict=True))
  for field, pattern in (
    ("patch_size", r"_patch(\d+)"),
    ("img_size", r"_(\d{3})(?:_|$)"),
  ):
    if found := re.search(pattern, name):
      shape[field] = int(found[1])
  return {**shape, "num_classes": 1000, **fields}


_SHAPE = ("embed_dim", "depth", "num_heads", "mlp_dim")
VARIANTS: dict[str, dict[str, Any]] = {
  name: _variant(name, fields)
  for names, fields in _NAMES
  for name in names.split()
}


class ViT(nn.Module):
  """An image classifier; fields are timm's where timm has them.

  The stages can be called alone, by `model.apply(variables, x, method=...)`:
  `embed` (images to the stream), `encode` (the blocks), `pool` (the stream to
  features) and `classify` (features to logits). Sown, per block and stacked if
  the blocks are scanned: `attention_out` and `mlp_out`, which with `embedding`
  sum up to the stream that `pool` reads, and `heads`.

  Attributes:
    img_size: height and width of the images, or (height, width).
    patch_size: of the square patches.
    in_chans: channels of the images.
    num_classes: 0 gives features instead of logits.
    global_pool: "token" (the class token) or "avg" (the mean over patches).
    embed_dim, depth, num_heads: the shape.
    mlp_dim: inner width of the MLP (timm: embed_dim * mlp_ratio).
    qkv_bias: biases on queries, keys and values.
    init_values: initial layer scale; None: no layer scale.
    class_token: whether there is one.
    no_embed_class: positions for the patches only, not for the other tokens.
    reg_tokens: register tokens.
    pre_norm: a norm before the blocks; the patch projection then has no bias.
    final_norm: a norm after them.
    fc_norm: the final norm comes after pooling instead of before; None: if
      global_pool is "avg".
    distilled: DeiT's distillation token and its head.
    dynamic_img_size: take images of any size, with the position embedding
      interpolated on the fly.
    norm_eps: of all norms.
    act: "gelu", "gelu_tanh" or "quick_gelu".
    drop_rate: dropout before the head.
    pos_drop_rate: after the position embedding.
    proj_drop_rate: after attention, and twice in the MLP.
    attn_drop_rate: on the attention weights.
    drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    dtype: of activations and matrix products; norms, softmax and logits are
      float32.
    param_dtype: of the parameters.
    scan_layers: one compiled block, parameters stacked on a leading axis, or
      one after another.
    remat: what the backward pass recomputes: "none", "full" or "dots".
    attention_implementation: see `multihead.ops`.
  """

  img_size: int | tuple[int, int] = 32
  patch_size: int = 4
  in_chans: int = 3
  num_classes: int = 10
  global_pool: str = "token"
  embed_dim: int = 64
  depth: int = 4
  num_heads: int = 4
  mlp_dim: int = 256
  qkv_bias: bool = True
  init_values: float | None = None
  class_token: bool = True
  no_embed_class: bool = False
  reg_tokens: int = 0
  pre_norm: bool = False
  final_norm: bool = True
  fc_norm: bool | None = None
  distilled: bool = False
  dynamic_img_size: bool = False
  norm_eps: float = 1e-6
  act: str = "gelu"
  drop_rate: float = 0.0
  pos_drop_rate: float = 0.0
  proj_drop_rate: float = 0.0
  attn_drop_rate: float = 0.0
  drop_path_rate: float = 0.0
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  scan_layers: bool = True
  remat: str = "none"
  attention_implementation: Any = None

  def __post_init__(self) -> None:
    super().__post_init__()
    height, width = self.image_shape
    token = self.global_pool == "token"
    for wrong, text in (
      (
        height % self.patch_size or width % self.patch_size,
        f"img_size={self.img_size} must be a multiple of "
        f"patch_size={self.patch_size}",
      ),
      (
        self.embed_dim % self.num_heads,
        f"embed_dim={self.embed_dim} must be a multiple of "
        f"num_heads={self.num_heads}",
      ),
      (
        self.global_pool not in ("token", "avg"),
        f"global_pool={self.global_pool!r}; allowed are 'token' and 'avg'",
      ),
      (
        token and not self.class_token,
        "global_pool='token' needs class_token=True; without a class token "
        "use 'avg'",
      ),
      (
        self.distilled and not token,
        "distilled=True reads the class and the distillation token; use "
        "global_pool='token'",
      ),
      (
        self.distilled and (self.reg_tokens or self.uses_fc_norm),
        "distilled=True goes with neither reg_tokens nor fc_norm",
      ),
      (
        self.act not in ACTIVATIONS,
        f"act={self.act!r}; allowed are {', '.join(ACTIVATIONS)}",
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

  @property
  def image_shape(self) -> tuple[int, int]:
    """Height and width of the images."""
    size = self.img_size
    return (size, size) if isinstance(size, int) else tuple(size)

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of patches that the position embedding is for."""
    height, width = self.image_shape
    return height // self.patch_size, width // self.patch_size

  @property
  def num_prefix_tokens(self) -> int:
    """Tokens before the patches: class, distillation, registers."""
    return self.class_token + self.distilled + self.reg_tokens

  @property
  def uses_fc_norm(self) -> bool:
    """Whether the final norm comes after pooling."""
    return self.global_pool == "avg" if self.fc_norm is None else self.fc_norm

  def init_inputs(self) -> tuple[Array]:
    """Arguments of `__call__` that make the parameters."""
    return (jnp.zeros((1, *self.image_shape, self.in_chans)),)

  def setup(self) -> None:
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    width = self.embed_dim
    init = nn.initializers.truncated_normal(0.02)

    def token(name: str, shape: tuple[int, ...], std: float = 0.02) -> Array:
      init = nn.initializers.truncated_normal(std)
      init = nn.with_logical_partitioning(init, (None, None, "embed"))
      return self.param(name, init, (1, *shape), self.param_dtype)

    self.patch_embed = Linear(
      (width,),
      (None, None, None, "embed"),
      inputs=3,
      use_bias=not self.pre_norm,
      kernel_init=nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", in_axis=(0, 1, 2)
      ),
      **types,
    )
    if self.class_token:
      self.cls_token = token("cls_token", (1, width))
    if self.distilled:
      self.dist_token = token("dist_token", (1, width))
    if self.reg_tokens:
      self.reg_token = token("reg_token", (self.reg_tokens, width))
    positions = self.grid[0] * self.grid[1]
    if not self.no_embed_class:
      positions += self.num_prefix_tokens
    self.pos_embed = token("pos_embed", (positions, width))
    self.pos_drop = nn.Dropout(self.pos_drop_rate)
    norm = dict(epsilon=self.norm_eps, **types)
    if self.pre_norm:
      self.norm_pre = LayerNorm(**norm)
    self.blocks = self._blocks(kernel_init=init, **types)
    if self.final_norm:
      self.norm = LayerNorm(**norm)
    self.head_drop = nn.Dropout(self.drop_rate)
    if self.num_classes:
      head = dict(
        features=(self.num_classes,),
        axis_names=("embed", "vocab"),
        use_bias=True,
        kernel_init=init,
        result_dtype=jnp.float32,
        **types,
      )
      self.head = Linear(**head)
      if self.distilled:
        self.head_dist = Linear(**head)

  def _blocks(self, **shared: Any) -> Any:
    return encoder_blocks(
      self.depth,
      remat=self.remat,
      scan_layers=self.scan_layers,
      scan_over=True,
      num_heads=self.num_heads,
      mlp_dim=self.mlp_dim,
      act=self.act,
      qkv_bias=self.qkv_bias,
      layer_scale=self.init_values,
      dropout=self.proj_drop_rate,
      mlp_dropout=self.proj_drop_rate,
      attention_dropout=self.attn_drop_rate,
      epsilon=self.norm_eps,
      implementation=self.attention_implementation,
      **shared,
    )

  def __call__(
    self,
    images: Float[Array, "B height width C"],
    *,
    deterministic: bool = True,
    both_heads: bool = False,
  ) -> Any:
    """Classifies images.

    Args:
      images: normalised as the weights expect it; channels last.
      deterministic: no dropout and no stochastic depth; both need the rng
        "dropout" otherwise.
      both_heads: of a distilled model, for its training: the logits of the
        class token and of the distillation token instead of their mean.

    Returns:
      Logits [B, num_classes] in float32; a pair of them if `both_heads`;
      features [B, D] if there are no classes.

    Raises:
      UserError: images of another size or number of channels, or `both_heads`
        of a model that is not distilled.
    """
    x = self.embed(images, deterministic=deterministic)
    x = self.pool(self.encode(x, deterministic=deterministic))
    return self.classify(x, deterministic=deterministic, both_heads=both_heads)

  def embed(
    self,
    images: Float[Array, "B height width C"],
    *,
    deterministic: bool = True,
  ) -> Float[Array, "B T D"]:
    """Patches, positions and the other tokens, which come first."""
    grid = self._grid_of(images)
    batch, _, _, channels = images.shape
    p = self.patch_size
    x = images.astype(self.dtype)
    x = x.reshape(batch, grid[0], p, grid[1], p, channels).swapaxes(2, 3)
    x = self.patch_embed(x.reshape(batch, -1, p, p, channels))
    positions = self.pos_embed
    if grid != self.grid:
      first = 0 if self.no_embed_class else self.num_prefix_tokens
      positions = interpolate_positions(positions, self.grid, grid, first)
    positions = positions.astype(self.dtype)
    prefix = [
      getattr(self, name)
      for name, present in (
        ("cls_token", self.class_token),
        ("dist_token", self.distilled),
        ("reg_token", self.reg_tokens),
      )
      if present
    ]
    prefix = [
      jnp.broadcast_to(t.astype(self.dtype), (batch, *t.shape[1:]))
      for t in prefix
    ]
    if self.no_embed_class:
      x = jnp.concatenate([*prefix, x + positions], axis=1)
    else:
      x = jnp.concatenate([*prefix, x], axis=1) + positions
    x = self.pos_drop(x, deterministic=deterministic)
    if self.pre_norm:
      x = self.norm_pre(x)
    x = constrain(x, BATCH_AXES, "sequence", None)
    self.sow("intermediates", "embedding", x)
    return x

  def _grid_of(self, images: Array) -> tuple[int, int]:
    if images.ndim != 4 or images.shape[-1] != self.in_chans:
      raise UserError(
        f"images must be [B, height, width, {self.in_chans}], got "
        f"{list(images.shape)}; channels come last"
      )
    size = images.shape[1:3]
    p = self.patch_size
    if size[0] % p or size[1] % p or 0 in size:
      raise UserError(
        f"images of {size[0]}x{size[1]} do not divide into patches of {p}x{p}"
      )
    if size != self.image_shape and not self.dynamic_img_size:
      raise UserError(
        f"images of {size[0]}x{size[1]}, but the model's img_size is "
        f"{self.img_size}; make it with dynamic_img_size=True, or change it "
        "and its parameters with models.vit.resize"
      )
    return size[0] // p, size[1] // p

  def encode(
    self, x: Float[Array, "B T D"], *, deterministic: bool = True
  ) -> Float[Array, "B T D"]:
    """Applies the blocks to the stream."""
    rates = jnp.linspace(0.0, self.drop_path_rate, self.depth)
    rates = None if self.drop_path_rate == 0 else rates
    if self.scan_layers:
      return self.blocks(x, rates, None, deterministic)[0]
    for i, block in enumerate(self.blocks):
      rate = None if rates is None else rates[i]
      x, _ = block(x, rate, None, deterministic)
    return x

  def pool(self, x: Float[Array, "B T D"]) -> Float[Array, "B P D"]:
    """Normalises the stream and reads it out.

    Returns:
      [B, 1, D] features, or [B, 2, D] if distilled: those of the class and of
      the distillation token.
    """
    if self.final_norm and not self.uses_fc_norm:
      x = self.norm(x)
    if self.global_pool == "avg":
      patches = x[:, self.num_prefix_tokens :].astype(jnp.float32)
      x = jnp.mean(patches, axis=1, keepdims=True).astype(x.dtype)
    else:
      x = x[:, : 1 + self.distilled]
    if self.final_norm and self.uses_fc_norm:
      x = self.norm(x)
    self.sow("intermediates", "features", x)
    return x

  def classify(
    self,
    x: Float[Array, "B P D"],
    *,
    deterministic: bool = True,
    both_heads: bool = False,
  ) -> Any:
    """Logits of the features that `pool` gives; see `__call__`."""
    if both_heads and not (self.distilled and self.num_classes):
      raise UserError("both_heads=True needs a distilled model with classes")
    x = self.head_drop(x, deterministic=deterministic)
    if not self.num_classes:
      return jnp.mean(x, axis=1)
    logits = self.head(x[:, 0])
    if not self.distilled:
      return logits
    pair = logits, self.head_dist(x[:, 1])
    return pair if both_heads else (pair[0] + pair[1]) / 2

  @property
  def num_hidden_layers(self) -> int:
    """The number of blocks, under the name that every encoder has."""
    return self.depth

  def unroll(self, params: Any) -> tuple["ViT", Any]:
    """The same model with its blocks one after another, and its parameters."""
    if not self.scan_layers:
      return self, params
    params = stacking.unstack(params, "blocks", self.depth)
    return self.clone(scan_layers=False), params

  def stack(self, params: Any) -> tuple["ViT", Any]:
    """The same model with its blocks scanned, and its parameters stacked."""
    if self.scan_layers:
      return self, params
    params = stacking.stack(params, "blocks", self.depth)
    return self.clone(scan_layers=True), params


def interpolate_positions(
  positions: Float[Array, "1 T D"],
  old: tuple[int, int],
  new: tuple[int, int],
  prefix: int,
) -> Float[Array, "1 S D"]:
  """Resamples a position embedding to another grid of patches.

  Bicubic with antialiasing, in float32, as timm does; the positions of the
  tokens before the patches stay.

  Args:
    positions: `prefix` rows, then one per patch, row by row.
    old: rows and columns of the grid it is for.
    new: those of the result.
    prefix: how many rows belong to other tokens.
  """
  width = positions.shape[-1]
  patches = positions[:, prefix:].astype(jnp.float32)
  patches = jax.image.resize(
    patches.reshape(1, *old, width), (1, *new, width), "bicubic"
  )
  patches = patches.reshape(1, -1, width).astype(positions.dtype)
  return jnp.concatenate([positions[:, :prefix], patches], axis=1)


def resize(
  model: ViT, params: Any, img_size: int | tuple[int, int]
) -> tuple[ViT, Any]:
  """The model for images of another size, to train on or to save.

  Returns:
    The model with that img_size, and params with its position embedding
    interpolated.

  Raises:
    UserError: img_size is not a multiple of the patch size.
  """
  resized = model.clone(img_size=img_size)
  first = 0 if model.no_embed_class else model.num_prefix_tokens
  positions = interpolate_positions(
    params["pos_embed"], model.grid, resized.grid, first
  )
  return resized, {**params, "pos_embed": positions}
