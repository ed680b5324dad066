r"""Vision Transformers (arXiv 2010.11929) and DeiT (2012.12877).

  python -m experiments.train --config=configs/vit.py:digits \
    --workdir=/tmp/digits
  python -m experiments.train --config=configs/vit.py:deit_small \
    --workdir=/tmp/deit --config.data.path=/data/imagenet

| variant | hardware | time | expect |
|---|---|---|---|
| tiny | 1 CPU core | seconds | nothing: for tests |
| digits | 2 busy CPU cores | 2.7 minutes | 98.1 % right (class means: 90.0) |
| folder | 1 GPU | not measured | your images: config.data.path, |
| | | | config.model.num_classes |
| deit_tiny ... vit_large | 8 GPUs | not measured | ImageNet as folders |

The published sizes take DeiT's recipe (its table 9): AdamW, 300 epochs of
ImageNet-1k in batches of 1,024, mixup, random crops, stochastic depth. Of that
recipe RandAugment, CutMix, random erasing and repeated augmentation are not
here, so its accuracies are not to be expected.
"""

from ml_collections import ConfigDict

from configs import common

# Shape of ours -> fields of the model.
_SHAPES = {
  "tiny": dict(
    img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=16,
    depth=2, num_heads=2, mlp_dim=32,
  ),
  "digits": dict(
    img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64,
    depth=4, num_heads=4, mlp_dim=128, drop_path_rate=0.1,
  ),
  "folder": dict(
    img_size=64, patch_size=8, in_chans=3, num_classes=10, embed_dim=192,
    depth=9, num_heads=3, mlp_dim=768, drop_path_rate=0.1,
  ),
}  # fmt: skip

# Shape of ours -> the rest of its config.
_RUNS = {
  "tiny": dict(total_steps=20, batch_size=8),
  "digits": dict(
    total_steps=3000, batch_size=64, log_every_steps=100,
    optimizer=dict(lr=2e-3, warmup_steps=100, weight_decay=0.05, b2=0.999),
    eval=dict(every_steps=500),
  ),
  "folder": dict(
    total_steps=10_000, batch_size=128, dtype="bfloat16", log_every_steps=50,
    optimizer=dict(lr=1e-3, warmup_steps=500, weight_decay=0.05, b2=0.999),
    eval=dict(every_steps=1000),
  ),
}  # fmt: skip
_DATA = {
  "tiny": dict(shift=1),
  "digits": dict(shift=1, label_smoothing=0.1),
  "folder": dict(random_crop=0.3, flip=True, label_smoothing=0.1),
}

# Published variant -> its name in timm.
_PUBLISHED = {
  "deit_tiny": "deit_tiny_patch16_224",
  "deit_small": "deit_small_patch16_224",
  "deit_base": "deit_base_patch16_224",
  "deit_base_distilled": "deit_base_distilled_patch16_224",
  "deit3_small": "deit3_small_patch16_224",
  "deit3_base": "deit3_base_patch16_224",
  "vit_tiny": "vit_tiny_patch16_224",
  "vit_small": "vit_small_patch16_224",
  "vit_base": "vit_base_patch16_224",
  "vit_large": "vit_large_patch16_224",
}
_EPOCH = 1_281_167 // 1024


def get_config(variant: str = "digits") -> ConfigDict:
  """The config of a variant of the table above."""
  if variant not in (*_SHAPES, *_PUBLISHED):
    raise common.unknown_variant(variant, (*_SHAPES, *_PUBLISHED))
  config = common.training()
  config.task = "image_classification"
  config.model = common.model(
    "vit",
    **dict.fromkeys(_SHAPES["tiny"], int),
    **dict.fromkeys(("drop_path_rate", "drop_rate", "init_values"), float),
    **dict.fromkeys(("scan_layers", "dynamic_img_size", "distilled"), bool),
    **dict(global_pool=str, attention_implementation=str, reg_tokens=int),
  )
  if variant in _PUBLISHED:
    config.model.update(variant=_PUBLISHED[variant], drop_path_rate=0.1)
    config.data = common.image_data(
      normalise="imagenet", centre_crop=0.875, random_crop=0.08, flip=True,
      mixup=0.8, label_smoothing=0.1, prefetch=16,
    )  # fmt: skip
    config.update(dtype="bfloat16", total_steps=300 * _EPOCH, batch_size=1024)
    config.optimizer.update(
      lr=1e-3, warmup_steps=5 * _EPOCH, end_factor=0.01, weight_decay=0.05,
      b2=0.999, clip_norm=0.0,
    )  # fmt: skip
    config.eval.update(every_steps=5 * _EPOCH)
    config.checkpoint.update(every_steps=_EPOCH)
  else:
    config.model.update(**_SHAPES[variant])
    config.data = common.image_data(**_DATA[variant])
    config.update(_RUNS[variant])
  return config
