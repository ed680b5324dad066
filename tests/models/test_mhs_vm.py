"""MHS-VM and VM-UNet: counts, the whole network in float64, any size."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead import models, parallel
from multihead.errors import UserError
from multihead.models import mhs_vm
from multihead.parallel import sharding
from tests.layers import scan_reference as reference

# Counted in the authors' modules.
COUNTS = {
  "mhs_vm_4_heads_no_projection": 14_121_577,
  "mhs_vm_3_heads_no_projection": 14_250_601,
  "mhs_vm_4_heads": 17_257_129,
  "mhs_vm_3_heads": 17_386_153,
  "vm_unet": 27_427_561,
  "vm_unet_synapse": 27_427_761,
  "vm_unet_deep": 44_273_833,
}
# Of one block at widths 96, 192, 384 and 768.
BLOCKS = {
  "vm_unet": (105_408, 339_840, 1_195_776, 4_455_936),
  "mhs_vm_4_heads": (59_136, 193_536, 691_200, 2_598_912),
  "mhs_vm_3_heads": (59_136, 195_072, 697_344, 2_623_488),
}
OUTSIDE = 3_145_129  # Of the blocks, with one class.

# 16 channels leave four for the last norm; of one it would give zeros.
TINY = dict(
  img_size=8, embed_dim=16, depths=(1, 2, 1), depths_decoder=(1, 1, 2),
  patch_size=2, state_size=2, num_classes=2, heads=3, in_chans=2,
)  # fmt: skip
# The network around them compiles fast.
NO_BLOCKS = dict(depths=(0, 0), depths_decoder=(0, 0))


@functools.cache
def tiny(**fields):
  """A small model with parameters far from their initial values."""
  model = mhs_vm.MHSVM(**{**TINY, **fields})
  shapes, tree = jax.tree.flatten(sharding.abstract_params(model))
  draw = np.random.default_rng(0).normal
  leaves = [jnp.float32(draw(size=s.shape) / 2) for s in shapes]
  return model, jax.tree.unflatten(tree, leaves)


def images(batch=2, size=(8, 8), channels=2, seed=0):
  draw = np.random.default_rng(seed).normal
  return jnp.float32(draw(size=(batch, *size, channels)))


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, x):
  return model.apply({"params": params}, x)


def oracle(model, params, x):
  """The network on one image [height, width, C]."""
  p = model.patch_size

  def linear(name, x):
    return x @ params[name]["kernel"] + params[name].get("bias", 0)

  def spread(x, p):
    """Channels in the order row, column, channel."""
    rows = [
      np.concatenate([
        np.stack(np.split(pixel, p * p)).reshape(p, p, -1) for pixel in row
      ], axis=1)
      for row in x
    ]  # fmt: skip
    return np.concatenate(rows, axis=0)

  def stage(x, kind, number):
    for name in sorted(params):
      if name.startswith(f"{kind}_{number}_"):
        x = reference.block(params[name], x)
    return x

  patch = params["patch_embed"]
  rows, columns = x.shape[0] // p, x.shape[1] // p
  x = np.array([
    [
      np.tensordot(
        x[i * p : i * p + p, j * p : j * p + p], patch["kernel"], axes=3
      )
      for j in range(columns)
    ]
    for i in range(rows)
  ]) + patch["bias"]  # fmt: skip
  x = reference.layer_norm(params["patch_norm"], x)
  inputs = []
  for i in range(len(model.depths)):
    if i:
      corners = x[::2, ::2], x[1::2, ::2], x[::2, 1::2], x[1::2, 1::2]
      x = np.concatenate(corners, axis=-1)
      x = reference.layer_norm(params[f"merge_norms_{i - 1}"], x)
      x = linear(f"merges_{i - 1}", x)
    inputs.append(x)
    x = stage(x, "encoder", i)
  for j in range(len(model.depths)):
    if j:
      x = x + inputs[len(model.depths) - j]
      x = spread(linear(f"expands_{j - 1}", x), 2)
      x = reference.layer_norm(params[f"expand_norms_{j - 1}"], x)
    x = stage(x, "decoder", j)
  x = spread(linear("final_expand", x), p)
  return linear("head", reference.layer_norm(params["final_norm"], x))


@pytest.mark.parametrize("heads", (3, 0))
def test_network_follows_the_equations(heads):
  model, params = tiny(heads=heads)
  x = images(1, (8, 16))
  got = apply(model, params, x)
  assert got.dtype == jnp.float32 and got.shape == (1, 8, 16, 2)
  p, x = jax.tree.map(lambda v: np.asarray(v, np.float64), (params, x))
  want = oracle(model, p, x[0])
  assert want.std(axis=(0, 1)).min() > 0.05  # Pixels differ.
  np.testing.assert_allclose(got[0], want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", COUNTS)
def test_parameter_counts(variant):
  assert models.variants("mhs_vm") == tuple(COUNTS)
  model = models.create("mhs_vm", variant, scan_implementation="reference")
  params = sharding.abstract_params(model)
  assert sharding.param_count(params) == COUNTS[variant]
  if variant not in BLOCKS:
    return
  counts = {k: sharding.param_count(v) for k, v in params.items()}
  for width, count in enumerate(BLOCKS[variant]):
    assert counts[f"encoder_{width}_0"] == count
    assert counts[f"decoder_{3 - width}_0"] == count
  outside = [n for k, n in counts.items() if not k.startswith(("enc", "dec"))]
  assert sum(outside) == OUTSIDE


def test_rates_of_stochastic_depth():
  bound = mhs_vm.MHSVM().bind({"params": {}})
  rates = lambda stages: [b.drop_path_rate for stage in stages for b in stage]
  np.testing.assert_allclose(
    rates(bound.encoder),
    (0, 0.0286, 0.0571, 0.0857, 0.1143, 0.1429, 0.1714, 0.2),
    atol=5e-5,
  )
  np.testing.assert_allclose(
    rates(bound.decoder),
    (0.2, 0.1667, 0.1333, 0.1, 0.0667, 0.0333, 0),
    atol=5e-5,
  )


def test_initial_values():
  model = mhs_vm.MHSVM(**{**TINY, **NO_BLOCKS, "embed_dim": 64})
  params = sharding.init_params(model, jax.random.key(0))
  bound = 8**-0.5  # Patches of 2 x 2 with two channels.
  for leaf in params["patch_embed"].values():
    assert 0.9 * bound < np.abs(leaf).max() <= bound
  assert 0 < np.abs(params["head"]["bias"]).max() <= 0.25
  assert abs(np.std(params["merges_0"]["kernel"]) - 0.02) < 1e-3


def test_one_channel_is_repeated():
  model, params = tiny(**NO_BLOCKS)
  x = images(1, channels=1)
  chex.assert_trees_all_equal(
    apply(model, params, x), apply(model, params, jnp.tile(x, 2))
  )


def test_what_is_recomputed_changes_nothing():
  model, params = tiny(heads=1, depths=(1,), depths_decoder=(0,))
  x = images()

  def gradient(model):
    loss = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
    return jax.jit(jax.grad(loss))(params)

  want = gradient(model)
  got = gradient(model.clone(remat="full"))
  chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-3)


def test_training_drops_blocks():
  model, params = tiny(
    heads=0, depths=(0, 0), depths_decoder=(0, 2), drop_path_rate=0.5
  )
  x = jnp.tile(images(1), (16, 1, 1, 1))
  run = lambda key: model.apply(
    {"params": params}, x, deterministic=False, rngs={"dropout": key}
  )
  rows = np.asarray(jax.jit(run)(jax.random.key(0)))[:, 0, 0, 0]
  # The first of the two blocks is there, scaled up, or not; the last one is.
  assert len(np.unique(rows.round(4))) == 2


def test_same_numbers_on_a_mesh():
  model, params = tiny(heads=4, depths=(0, 1), depths_decoder=(0, 1))
  x = images(2)
  want = apply(model, params, x)
  mesh = parallel.make_mesh(data=2, tensor=4)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, sharding.param_shardings(model, mesh))
    got = apply(model, placed, jax.device_put(x, jax.NamedSharding(
      mesh, jax.P("data")
    )))  # fmt: skip
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
  "fields, text",
  (
    (
      dict(img_size=(256, 100)),
      r"img_size=.256, 100.*multiples of 32.*256x128",
    ),
    (dict(depths=(2, 2)), "one entry per stage"),
    (dict(embed_dim=6), "embed_dim=6 must be a multiple of 4"),
    (dict(num_classes=0), "num_classes=0 must be at least 1"),
    (dict(heads=5), "heads=5; without routes"),
    (dict(heads=3, projection=False, embed_dim=16), "projection=True"),
    (dict(routes=("C", "X", "S", "zed")), "unknown scan route 'zed'"),
    (dict(heads=0, routes=("C",)), "heads=0 is SS2D"),
    (dict(threshold=-1.0), "threshold=-1.0 must not be negative"),
    (dict(drop_path_rate=1.0), r"drop_path_rate=1.0 must lie in \[0, 1\)"),
    (dict(remat="some"), "remat='some'"),
    (dict(patch_size=0), "patch_size=0"),
    (dict(embed_dim=4, heads=5), "heads=5 are more than embed_dim=4"),
  ),
)
def test_mistakes_in_fields_are_named(fields, text):
  with pytest.raises(UserError, match=text):
    models.create("mhs_vm", **fields)


def test_mistakes_in_images_are_named():
  model = mhs_vm.MHSVM()
  for shape, text in (
    ((1, 64, 50, 3), "images of 64x50: .* multiples of 32; .* to 64x64"),
    ((1, 0, 32, 3), "images of 0x32"),
    ((1, 3, 64, 64), r"must be \[B, height, width, 3\], got \[1, 3, 64, 64\]"),
    ((64, 64, 3), "channels come last"),
  ):
    with pytest.raises(UserError, match=text):
      jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
