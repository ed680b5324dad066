"""ViT beside live models of timm and of `transformers`, in float32."""

import json

import jax
import numpy as np
import pytest

from multihead import checkpoints, models
from multihead.errors import UserError
from multihead.models import vit
from multihead.parallel import sharding

torch = pytest.importorskip(
  "torch", reason="torch is not installed: pip install 'multihead[parity]'"
)
for _name in ("timm", "transformers"):
  if not __import__("importlib.util").util.find_spec(_name):
    pytest.skip(
      f"{_name} is not installed: pip install 'multihead[parity]'",
      allow_module_level=True,
    )

pytestmark = pytest.mark.parity

TOLERANCE = 2e-5  # of the largest logit
SMALL = dict(
  img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=7
)
# What sets a case apart: timm's architecture and the arguments beside SMALL.
CASES = {
  "plain": ("vit_tiny_patch16_224", {}),
  "one_head_odd": (
    "vit_tiny_patch16_224",
    dict(num_heads=1, img_size=(24, 40), in_chans=1, mlp_ratio=2.5),
  ),
  "no_qkv_bias": ("vit_base_patch16_224_miil", {}),
  "distilled": ("deit_tiny_distilled_patch16_224", {}),
  "deit3": ("deit3_small_patch16_224", dict(init_values=0.3)),
  "gap": ("vit_medium_patch16_gap_256", dict(init_values=0.2)),
  "registers": ("vit_medium_patch16_reg4_gap_256", dict(init_values=0.2)),
  "clip": ("vit_base_patch16_clip_224", {}),
  "clip_quick_gelu": ("vit_base_patch32_clip_quickgelu_224", {}),
  "dino": ("vit_small_patch14_reg4_dinov2", dict(num_classes=0)),
  "class_token_and_gap": ("vit_tiny_patch16_224", dict(global_pool="avg")),
}


@pytest.fixture(autouse=True)
def two_threads():
  before = torch.get_num_threads()
  torch.set_num_threads(2)
  yield
  torch.set_num_threads(before)


def perturb(net, seed=0):
  """Weights far from their initial values, norms and biases too."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in net.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      scale = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
      parameter.add_(scale * noise)
  return net.eval()


def images(model, batch=3, size=None):
  shape = (batch, *(size or model.image_shape), model.in_chans)
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def logits(net, x):
  """Of a timm or transformers model."""
  with torch.inference_mode():
    out = net(torch.from_numpy(x.transpose(0, 3, 1, 2)))
  return getattr(out, "logits", out).numpy()


def check(record, ours, expected, name, tolerance=TOLERANCE):
  error = np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max()
  record(name, float(error))
  print(f"{name}: max |difference| / max |logit| = {error:.1e}")
  assert error <= tolerance


def check_same_weights(net, again):
  before, after = net.state_dict(), again.state_dict()
  assert before.keys() == after.keys()
  assert all(torch.equal(before[name], after[name]) for name in before)


def apply(model, params, x, **options):
  run = jax.jit(lambda p, x: model.apply({"params": p}, x, **options))
  return run(params, x)


def build(name):
  import timm

  architecture, arguments = CASES[name]
  return perturb(timm.create_model(architecture, **{**SMALL, **arguments}))


@pytest.mark.parametrize("case", CASES)
def test_timm(case, tmp_path, record_property):
  """Their directory in, our directory out, their model of it."""
  import timm
  from timm.models import save_for_hf

  net = build(case)
  save_for_hf(net, str(tmp_path / "theirs"), safe_serialization=True)
  model, params = checkpoints.from_pretrained(tmp_path / "theirs")
  assert sharding.param_count(params) == sum(
    p.numel() for p in net.parameters()
  )
  x = images(model)
  expected = logits(net, x)
  check(record_property, apply(model, params, x), expected, f"{case} import")

  unrolled = model.unroll(params)
  checkpoints.save_pretrained(tmp_path / "ours", *unrolled, format="timm")
  again = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True)
  check_same_weights(net, again)
  again = logits(again.eval(), x)
  check(record_property, again, expected, f"{case} export", tolerance=1e-6)
  assert checkpoints.from_pretrained(tmp_path / "ours")[0] == model


def test_both_heads(record_property, tmp_path):
  from timm.models import save_for_hf

  net = build("distilled")
  save_for_hf(net, str(tmp_path), safe_serialization=True)
  model, params = checkpoints.from_pretrained(tmp_path)
  x = images(model)
  net.set_distilled_training(True)
  net.train()  # every rate of dropout is zero
  with torch.inference_mode():
    expected = net(torch.from_numpy(x.transpose(0, 3, 1, 2)))
  ours = apply(model, params, x, both_heads=True)
  for got, want, name in zip(ours, expected, ("class", "dist"), strict=True):
    check(record_property, got, want.numpy(), name)
  unrolled = apply(*model.unroll(params), x, both_heads=True)
  check(record_property, unrolled[1], expected[1].numpy(), "unrolled")


@pytest.mark.parametrize("case", ["plain", "distilled", "deit3"])
@pytest.mark.parametrize("size", [(48, 48), (24, 40), (16, 56)])
def test_other_sizes(case, size, tmp_path, record_property):
  """Interpolated positions: up, down, and not square."""
  import timm
  from timm.models import save_for_hf

  architecture, arguments = CASES[case]
  net = timm.create_model(
    architecture, **{**SMALL, **arguments}, dynamic_img_size=True
  )
  net = perturb(net)
  save_for_hf(net, str(tmp_path), safe_serialization=True)
  model, params = checkpoints.from_pretrained(tmp_path)
  assert model.dynamic_img_size
  x = images(model, size=size)
  expected = logits(net, x)
  check(record_property, apply(model, params, x), expected, "on the fly")
  resized, params = vit.resize(
    model.clone(dynamic_img_size=False), params, size
  )
  check(record_property, apply(resized, params, x), expected, "resized")


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224"])
def test_published_size(name, tmp_path, record_property):
  import timm
  from timm.models import save_for_hf

  net = perturb(timm.create_model(name))
  save_for_hf(net, str(tmp_path), safe_serialization=True)
  model, params = checkpoints.from_pretrained(tmp_path)
  x = images(model, batch=2)
  check(record_property, apply(model, params, x), logits(net, x), name)


def test_every_variant_has_the_parameters_of_timm():
  import timm

  for name in models.variants("vit"):
    with torch.device("meta"):
      net = timm.create_model(name)
    ours = models.create("vit", name)
    count = sum(p.numel() for p in net.parameters())
    assert sharding.param_count(sharding.abstract_params(ours)) == count, name
    block = net.blocks[0]
    assert ours.norm_eps == block.norm1.eps, name
    assert ours.num_heads == block.attn.num_heads, name
    assert ours.global_pool == net.global_pool, name
    assert ours.no_embed_class == net.no_embed_class, name


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_transformers(kind, tmp_path, record_property):
  import transformers

  shape = dict(
    hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
    intermediate_size=40, image_size=32, patch_size=8, num_labels=5,
    hidden_act="gelu_new",
  )  # fmt: skip
  if kind == "vit":
    cls, config = transformers.ViTForImageClassification, "ViTConfig"
  else:
    cls = transformers.DeiTForImageClassificationWithTeacher
    config = "DeiTConfig"
  net = perturb(cls(getattr(transformers, config)(**shape)))
  net.save_pretrained(tmp_path / "theirs")
  model, params = checkpoints.from_pretrained(tmp_path / "theirs")
  x = images(model)
  expected = logits(net, x)
  check(record_property, apply(model, params, x), expected, f"{kind} import")

  checkpoints.save_pretrained(
    tmp_path / "ours", model, params, format="transformers"
  )
  again = cls.from_pretrained(tmp_path / "ours").eval()
  check_same_weights(net, again)
  again = logits(again, x)
  check(record_property, again, expected, f"{kind} export", tolerance=1e-6)
  config = json.loads((tmp_path / "ours" / "config.json").read_text())
  assert config["layer_norm_eps"] == 1e-12
  with pytest.raises(UserError, match="norm_eps=1e-12"):
    checkpoints.save_pretrained(
      tmp_path / "other", model, params, format="timm"
    )
