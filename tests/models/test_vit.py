"""ViT: counts, goldens of timm, and that every way of running it agrees."""

import functools
import json
import pathlib
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead import checkpoints, models
from multihead.errors import UserError
from multihead.models import vit
from multihead.parallel import make_mesh, sharding

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import encoder_cases as cases  # noqa: E402

TOLERANCE = 2e-5  # of the largest logit

# Counted in the modules of timm 1.0.31.
COUNTS = {
  "vit_tiny_patch16_224": 5_717_416,
  "vit_tiny_patch16_384": 5_790_376,
  "vit_small_patch32_224": 22_878_952,
  "vit_small_patch32_384": 22_915_432,
  "vit_small_patch16_224": 22_050_664,
  "vit_small_patch16_384": 22_196_584,
  "vit_small_patch8_224": 21_670_272,
  "vit_small_patch16_36x1_224": 64_665_448,
  "vit_base_patch32_224": 88_224_232,
  "vit_base_patch32_384": 88_297_192,
  "vit_base_patch16_224": 86_567_656,
  "vit_base_patch16_384": 86_859_496,
  "vit_base_patch8_224": 86_576_872,
  "vit_base_patch16_224_miil": 94_399_957,
  "vit_large_patch32_224": 305_510_400,
  "vit_large_patch32_384": 306_632_680,
  "vit_large_patch16_224": 304_326_632,
  "vit_large_patch16_384": 304_715_752,
  "vit_large_patch14_224": 304_203_752,
  "vit_huge_patch14_224": 630_764_800,
  "vit_giant_patch14_224": 1_012_611_432,
  "vit_gigantic_patch14_224": 1_844_440_680,
  "deit_tiny_patch16_224": 5_717_416,
  "deit_small_patch16_224": 22_050_664,
  "deit_base_patch16_224": 86_567_656,
  "deit_base_patch16_384": 86_859_496,
  "deit_tiny_distilled_patch16_224": 5_910_800,
  "deit_small_distilled_patch16_224": 22_436_432,
  "deit_base_distilled_patch16_224": 87_338_192,
  "deit_base_distilled_patch16_384": 87_630_032,
  "deit3_small_patch16_224": 22_059_496,
  "deit3_small_patch16_384": 22_205_416,
  "deit3_medium_patch16_224": 38_849_512,
  "deit3_base_patch16_224": 86_585_320,
  "deit3_base_patch16_384": 86_877_160,
  "deit3_large_patch16_224": 304_374_760,
  "deit3_large_patch16_384": 304_763_880,
  "deit3_huge_patch14_224": 632_126_440,
  "vit_medium_patch16_gap_256": 38_861_288,
  "vit_medium_patch16_gap_384": 39_025_128,
  "vit_medium_patch16_reg4_gap_256": 38_881_768,
  "vit_base_patch16_gap_224": 86_566_120,
  "vit_base_patch16_reg4_gap_256": 86_615_272,
  "vit_base_patch16_siglip_gap_224": 85_797_120,
  "vit_base_patch16_siglip_gap_256": 85_843_200,
  "vit_base_patch32_clip_224": 88_225_000,
  "vit_base_patch16_clip_224": 86_568_424,
  "vit_base_patch16_clip_384": 86_860_264,
  "vit_large_patch14_clip_224": 304_204_776,
  "vit_huge_patch14_clip_224": 632_047_080,
  "vit_base_patch32_clip_quickgelu_224": 87_849_728,
  "vit_base_patch16_clip_quickgelu_224": 86_193_152,
  "vit_small_patch14_dinov2": 22_056_192,
  "vit_base_patch14_dinov2": 86_579_712,
  "vit_large_patch14_dinov2": 304_367_616,
  "vit_small_patch14_reg4_dinov2": 22_057_344,
  "vit_base_patch14_reg4_dinov2": 86_582_016,
  "vit_large_patch14_reg4_dinov2": 304_370_688,
  "flexivit_small": 22_061_416,
  "flexivit_base": 86_589_160,
  "flexivit_large": 304_355_304,
}

TINY = dict(
  img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=3, num_heads=2,
  mlp_dim=24, num_classes=5,
)  # fmt: skip


@functools.cache
def tiny(**fields):
  """A small model with parameters far from their initial values."""
  model = vit.ViT(**{**TINY, **fields})
  params = sharding.init_params(model, jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noisy = [
    x + 0.2 * jax.random.normal(k, x.shape)
    for k, x in zip(keys, leaves, strict=True)
  ]
  return model, jax.tree.unflatten(tree, noisy)


def images(batch=3, size=(8, 8), channels=1, seed=0):
  shape = (batch, *size, channels)
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=("method", "mutable", "deterministic", "both_heads"),
)
def apply(model, params, *args, **kwargs):
  return model.apply({"params": params}, *args, **kwargs)


@pytest.mark.parametrize("variant", COUNTS)
def test_count(variant):
  model = models.create("vit", variant)
  assert (
    sharding.param_count(sharding.abstract_params(model)) == (COUNTS[variant])
  )


def test_every_variant_is_counted():
  assert set(models.variants("vit")) == set(COUNTS)


@pytest.mark.parametrize("case", [c for c in cases.CASES if "vit" in c])
def test_golden(case, tmp_path):
  with np.load(GOLDEN / "encoders.npz") as stored:
    expected = stored[case]
    shapes = json.loads(str(stored[f"{case}_shapes"]))
  cases.write_directory(tmp_path, case, shapes)
  model, params = checkpoints.from_pretrained(tmp_path)
  got = jax.jit(model.apply)({"params": params}, cases.images())
  assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("fields", [
  {},
  dict(init_values=0.5),
  dict(global_pool="avg", class_token=False, reg_tokens=2),
])  # fmt: skip
def test_paths_sum_to_the_stream(fields):
  """embedding + every attention_out and mlp_out is what pool reads."""
  model, params = tiny(**fields)
  x = images()
  logits, sown = apply(model, params, x, mutable="intermediates")
  sown = sown["intermediates"]
  total = sown["embedding"][0]
  total += sown["blocks"]["attention_out"][0].sum(0)
  total += sown["blocks"]["mlp_out"][0].sum(0)
  embedded = apply(model, params, x, method="embed")
  stream = apply(model, params, embedded, method="encode")
  np.testing.assert_allclose(total, stream, atol=2e-5)
  features = apply(model, params, total, method="pool")
  again = apply(model, params, features, method="classify")
  np.testing.assert_allclose(again, logits, atol=2e-5)
  # The heads, each through its rows of the output projection.
  heads = sown["blocks"]["attention"]["heads"][0]
  out = params["blocks"]["attention"]["out"]
  a = jnp.einsum("lbtnh,lnhd->lbtd", heads, out["kernel"])
  a = a + out["bias"][:, None, None]
  if "init_values" in fields:
    a = a * params["blocks"]["attention_scale"][:, None, None]
  np.testing.assert_allclose(a, sown["blocks"]["attention_out"][0], atol=2e-5)


def test_scan_and_remat_change_nothing():
  model, params = tiny()
  x = images()

  @functools.partial(jax.jit, static_argnums=0)
  @functools.partial(jax.grad, argnums=1)
  def gradient(model, params):
    return jnp.sum(apply(model, params, x) ** 2)

  expected = gradient(model, params)
  close = functools.partial(
    chex.assert_trees_all_close, expected, rtol=1e-4, atol=2e-6
  )
  close(gradient(model.clone(remat="full"), params))
  unrolled, layers = model.unroll(params)
  close(unrolled.stack(gradient(unrolled.clone(remat="dots"), layers))[1])
  chex.assert_trees_all_equal(unrolled.stack(layers)[1], params)


def test_dropout_needs_a_key_and_uses_it():
  model, params = tiny(drop_path_rate=0.4, drop_rate=0.1, pos_drop_rate=0.1)
  x = images()
  model = model.clone(remat="full")
  run = lambda seed: apply(
    model,
    params,
    x,
    deterministic=False,
    rngs={"dropout": jax.random.key(seed)},
  )
  np.testing.assert_array_equal(run(0), run(0))
  assert not np.allclose(run(0), run(1))
  with pytest.raises(Exception, match="dropout"):
    apply(model, params, x, deterministic=False)


def test_stochastic_depth_grows_with_depth():
  """Block l of L drops at l / (L - 1) times the rate; the first one never."""
  model, params = tiny(drop_path_rate=0.6)
  x = images(batch=600)
  _, sown = apply(
    model,
    params,
    x,
    deterministic=False,
    rngs={"dropout": jax.random.key(0)},
    mutable="intermediates",
  )
  out = sown["intermediates"]["blocks"]["attention_out"][0]
  dropped = (np.abs(out).max(axis=(2, 3)) == 0).mean(axis=1)
  np.testing.assert_allclose(dropped, [0, 0.3, 0.6], atol=0.07)


@pytest.mark.parametrize("mesh", [
  dict(data=8), dict(data=2, fsdp=2, tensor=2),
])  # fmt: skip
def test_sharded(mesh):
  model, params = tiny()
  x = images(batch=8)
  loss = lambda params, x: jnp.mean(apply(model, params, x) ** 2)
  expected = jax.jit(jax.value_and_grad(loss))(params, x)
  mesh = make_mesh(**mesh)
  with jax.set_mesh(mesh):
    places = sharding.param_shardings(model, mesh)
    params = jax.tree.map(jax.device_put, params, places)
    x = jax.device_put(x, sharding.batch_sharding(mesh))
    got = jax.jit(jax.value_and_grad(loss))(params, x)
  chex.assert_trees_all_close(got, expected, rtol=2e-4, atol=1e-6)


def test_parameters_carry_their_axes():
  model, _ = tiny()
  mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
  places = sharding.param_shardings(model, mesh)["blocks"]
  spec = lambda leaf: tuple(leaf.spec)
  assert spec(places["attention"]["query"]["kernel"]) == (
    None, "fsdp", "tensor", None
  )  # fmt: skip
  assert spec(places["attention"]["out"]["kernel"]) == (
    None, "tensor", None, "fsdp"
  )  # fmt: skip
  assert spec(places["mlp"]["up"]["kernel"]) == (None, "fsdp", "tensor")


def test_bfloat16():
  model, params = tiny()
  x = images()
  expected = apply(model, params, x)
  got = apply(model.clone(dtype=jnp.bfloat16), params, x)
  assert got.dtype == jnp.float32
  assert np.abs(got - expected).max() <= 0.05 * np.abs(expected).max()


def test_distilled_gives_the_mean_of_two_heads():
  model, params = tiny(distilled=True)
  x = images()
  first, second = apply(model, params, x, both_heads=True)
  assert not np.allclose(first, second)
  mean = apply(model, params, x)
  np.testing.assert_allclose(mean, (first + second) / 2, rtol=1e-6)
  with pytest.raises(UserError, match="distilled"):
    apply(*tiny(), x, both_heads=True)


def test_no_classes_gives_features():
  model, params = tiny(num_classes=0)
  features = apply(model, params, images())
  assert features.shape == (3, 16)
  np.testing.assert_allclose(
    features.mean(-1), jnp.mean(params["norm"]["bias"]), atol=1
  )


def test_resize_keeps_the_other_tokens():
  model, params = tiny(distilled=True)
  same, unchanged = vit.resize(model, params, 8)
  assert same == model
  chex.assert_trees_all_close(unchanged, params, atol=1e-6)
  wide, resized = vit.resize(model, params, (8, 20))
  assert wide.grid == (2, 5)
  positions = resized["pos_embed"]
  assert positions.shape == (1, 12, 16)
  np.testing.assert_array_equal(positions[:, :2], params["pos_embed"][:, :2])
  # Rows are not resampled here, so each row's ends stay near its old ends.
  x = images(size=(8, 20))
  got = apply(wide, resized, x)
  dynamic = apply(model.clone(dynamic_img_size=True), params, x)
  np.testing.assert_allclose(got, dynamic, atol=1e-5)


def test_interpolation_of_a_plane_is_the_plane():
  """Away from the border, a bicubic filter keeps what is linear."""
  rows, columns = np.mgrid[:8, :8] + 0.5
  plane = (2 * rows - 3 * columns).reshape(1, 64, 1)
  got = vit.interpolate_positions(jnp.asarray(plane), (8, 8), (16, 16), 0)
  rows, columns = (np.mgrid[:16, :16] + 0.5) / 2
  want = (2 * rows - 3 * columns)[5:-5, 5:-5]
  got = np.asarray(got).reshape(16, 16)[5:-5, 5:-5]
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_interpolation_is_bicubic():
  """An impulse becomes the kernel of Keys with a = -1/2 at quarter steps."""
  impulse = jnp.zeros((1, 8, 1)).at[0, 4].set(1.0)
  got = vit.interpolate_positions(impulse, (8, 1), (16, 1), 0)[0, :, 0]
  near, far, over, last = 0.8671875, 0.2265625, -0.0703125, -0.0234375
  want = [last, over, far, near, near, far, over, last]
  np.testing.assert_allclose(got[5:13], want, atol=1e-6)
  np.testing.assert_allclose(got[:5], 0, atol=1e-6)


@pytest.mark.parametrize("fields, text", [
  (dict(img_size=10), "multiple of patch_size"),
  (dict(num_heads=3), "multiple of num_heads"),
  (dict(global_pool="mean"), "'token' and 'avg'"),
  (dict(class_token=False), "needs class_token"),
  (dict(distilled=True, global_pool="avg"), "distilled"),
  (dict(act="swoosh"), "gelu"),
  (dict(remat="some"), "'dots'"),
  (dict(drop_path_rate=1.0), "drop_path_rate"),
])  # fmt: skip
def test_fields_that_cannot_be(fields, text):
  with pytest.raises(UserError, match=text):
    vit.ViT(**{**TINY, **fields})


@pytest.mark.parametrize("shape, text", [
  ((2, 8, 8, 3), "channels come last"),
  ((8, 8, 1), "channels come last"),
  ((2, 9, 8, 1), "do not divide"),
  ((2, 12, 8, 1), "dynamic_img_size"),
])  # fmt: skip
def test_images_that_do_not_fit(shape, text):
  model, params = tiny()
  with pytest.raises(UserError, match=text):
    apply(model, params, np.zeros(shape, np.float32))
