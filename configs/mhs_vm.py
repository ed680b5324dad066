r"""MHS-VM (arXiv 2406.05992) and VM-UNet (arXiv 2402.02491), segmentation.

  python -m experiments.train --config=configs/mhs_vm.py:nuclei \
    --workdir=runs/nuclei
  python -m experiments.train --config=configs/mhs_vm.py:isic18 \
    --workdir=runs/isic18 --config.data.path=/data/isic18

| variant | hardware | expect |
|---|---|---|
| tiny | 1 CPU core, a minute | nothing: for tests |
| nuclei | 2 busy CPU cores, 7 minutes | IoU 0.89 (Otsu 0.81), DSC 0.94 |
| lesions | 2 CPU cores, not measured | drawn lesions, exact masks |
| isic17, isic18 | 1 GPU, not measured | your images: config.data.path, with |
| | | train/ and val/, each images/ and masks/ |
| synapse | 1 GPU, not measured | your files: config.data.path |

isic17 and isic18 keep the published sizes, AdamW at 1e-3 and 300 epochs, but
turn every sample by an angle of its own, keep masks hard, and let the rate fall
once. `:isic18,faithful` is the published recipe: one angle for the whole run,
soft masks, min-max to 0 .. 255, weight decay on every parameter, a cosine with
a period of 100 epochs that ends at its maximum. VM-UNet: config.model.heads=0.
"""

from ml_collections import ConfigDict

from configs import common

_VARIANTS = ("tiny", "nuclei", "lesions", "isic17", "isic18", "synapse")
# Fields of the model that may be set, with their types; unset: the model's.
_MODEL = dict(
  img_size=int, in_chans=int, num_classes=int, embed_dim=int, depths=tuple,
  depths_decoder=tuple, patch_size=int, heads=int, projection=bool,
  threshold=float, routes=tuple, scale_free=bool, state_size=int,
  drop_path_rate=float,
)  # fmt: skip
# At 0.5 some gates of so small a network are shut at first, and stay shut: no
# gradient comes through them.
_SMALL = dict(
  embed_dim=32, depths=(1, 1, 1), depths_decoder=(1, 1, 1), state_size=4,
  drop_path_rate=0.0, threshold=0.0,
)  # fmt: skip
_SHAPES = {
  "tiny": dict(
    embed_dim=16, depths=(1, 1), depths_decoder=(1, 1), state_size=2,
    drop_path_rate=0.0,
  ),
  "nuclei": _SMALL,
  "lesions": _SMALL,
  "isic17": dict(variant="mhs_vm_4_heads", threshold=0.0),
  "isic18": dict(variant="mhs_vm_4_heads", threshold=0.5),
  "synapse": dict(
    variant="mhs_vm_4_heads", threshold=0.0, num_classes=9, img_size=224
  ),
}  # fmt: skip
_DATA = {
  "tiny": dict(path="lesions", size=16, examples=20),
  "nuclei": dict(path="nuclei", size=64),
  "lesions": dict(path="lesions", size=64),
  "isic17": dict(path="", size=256, prefetch=8, cache_mb=8192),
  "isic18": dict(path="", size=256, prefetch=8, cache_mb=8192),
  "synapse": dict(
    path="",
    size=224,
    num_classes=9,
    augment="synapse",
    normalise="none",
    prefetch=8,
  ),
}
_FAITHFUL_DATA = dict(normalise="published", augment="isic", soft_masks=True)
# Training images in VM-UNet's archives, as far as is known.
_EPOCHS = dict(isic17=-(-1500 // 32), isic18=-(-1886 // 32))


def get_config(variant: str = "nuclei") -> ConfigDict:
  """The config of a variant of the table above."""
  name, _, option = variant.partition(",")
  allowed = (*_VARIANTS, *(f"{name},faithful" for name in _EPOCHS))
  if variant not in allowed:
    raise common.unknown_variant(variant, allowed)
  config = common.training()
  config.task = "segmentation"
  config.model = common.model("mhs_vm", **_MODEL)
  config.model.update(_SHAPES[name])
  config.data = common.segmentation_data(**_DATA[name])
  if "variant" not in _SHAPES[name]:
    config.model.img_size = config.data.size
  config.optimizer.update(lr=1e-3, weight_decay=1e-2, b2=0.999, clip_norm=0.0)
  if name == "tiny":
    config.update(dict(total_steps=20, batch_size=4))
  elif name in ("nuclei", "lesions"):
    config.update(dict(total_steps=600, batch_size=8, log_every_steps=20))
    config.optimizer.update(
      lr=2e-3, warmup_steps=30, end_factor=0.1, clip_norm=1.0
    )
    config.eval.every_steps = 150
  else:
    epoch = _EPOCHS.get(name, 2211 // 32)
    config.update(
      dict(total_steps=300 * epoch, batch_size=32, log_every_steps=20)
    )
    config.optimizer.update(end_factor=0.01)
    config.eval.every_steps = 5 * epoch
    config.checkpoint.every_steps = epoch
  if option:
    config.data.update(_FAITHFUL_DATA)
    config.optimizer.update(
      schedule="wave", decay_steps=50 * _EPOCHS[name], decay_all=True
    )
  return config
