"""The configs of MHS-VM: every variant builds, and which recipe is which."""

import pytest

from configs import mhs_vm
from multihead.data import pair_transforms
from multihead.parallel import sharding
from multihead.tasks import segmentation
from multihead.train import config as config_lib

VARIANTS = (*mhs_vm._VARIANTS, "isic17,faithful", "isic18,faithful")


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_builds(variant):
  config = config_lib.read_config(mhs_vm.get_config(variant))
  model = config_lib.build_model(config)
  assert isinstance(config.data, segmentation.SegmentationData)
  assert config.data.size == model.img_size
  assert config.data.size % model.stride == 0
  assert config.data.num_classes == model.num_classes
  assert config.data.augment in pair_transforms.AUGMENTATIONS
  assert config.data.normalise in pair_transforms.NORMALISATIONS
  if variant.startswith("isic"):
    assert sharding.param_count(sharding.abstract_params(model)) == 17_257_129
    assert model.threshold == (0.0 if variant.startswith("isic17") else 0.5)


def test_faithful_is_the_published_recipe():
  fixed, faithful = (
    config_lib.read_config(mhs_vm.get_config(name))
    for name in ("isic18", "isic18,faithful")
  )
  assert (fixed.data.augment, faithful.data.augment) == ("rotations", "isic")
  assert (fixed.data.soft_masks, faithful.data.soft_masks) == (False, True)
  optimizer = faithful.optimizer
  assert optimizer.decay_all and not fixed.optimizer.decay_all
  assert optimizer.schedule == "wave" and fixed.optimizer.schedule == "cosine"
  assert faithful.total_steps == 6 * optimizer.decay_steps
  assert (optimizer.lr, optimizer.weight_decay) == (1e-3, 1e-2)


def test_unknown_variant():
  with pytest.raises(ValueError, match="did you mean 'nuclei'"):
    mhs_vm.get_config("nuclie")
  with pytest.raises(ValueError, match="no variant 'nuclei,faithful'"):
    mhs_vm.get_config("nuclei,faithful")
