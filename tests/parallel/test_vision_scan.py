"""A network of scans over maps on a mesh of eight, beside one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead import models, parallel
from multihead.parallel import sharding


def make():
  """Four heads of four routes: 16 scans, in a stage of four channels each."""
  return models.create(
    "mhs_vm",
    img_size=8,
    patch_size=2,
    in_chans=1,
    embed_dim=16,
    depths=(1,),
    depths_decoder=(0,),
    state_size=2,
    threshold=0.0,
    drop_path_rate=0.0,
  )


def drawn(model):
  leaves, tree = jax.tree.flatten(sharding.abstract_params(model))
  draw = np.random.default_rng(0).normal
  return jax.tree.unflatten(
    tree, [jnp.float32(0.4 * draw(size=leaf.shape)) for leaf in leaves]
  )


@pytest.mark.parametrize(
  "axes", (dict(tensor=8), dict(data=2, tensor=4)), ids=str
)
def test_routes_over_the_mesh_as_on_one_device(axes):
  model = make()
  params = drawn(model)
  draw = np.random.default_rng(1).normal
  images, weight = (jnp.float32(draw(size=(4, 8, 8, 1))) for _ in range(2))

  def step(params, images):
    loss = lambda params: jnp.sum(
      weight * model.apply({"params": params}, images)
    )
    return jax.value_and_grad(loss)(params)

  want = jax.device_get(jax.jit(step)(params, images))
  mesh = parallel.make_mesh(**axes)
  placed = jax.device_put(params, sharding.param_shardings(model, mesh))
  routes = placed["encoder_0_0"]["scan"]["routes"]
  ways = axes["tensor"]
  for name, leaf in routes.items():
    local = leaf.addressable_shards[0].data.shape
    assert local == (16 // ways, *leaf.shape[1:]), name
  rows = sharding.batch_sharding(mesh)
  with jax.set_mesh(mesh):
    compiled = jax.jit(step).lower(
      placed, jax.device_put(images, rows)
    ).compile()  # fmt: skip
    got = jax.device_get(compiled(placed, jax.device_put(images, rows)))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3),
    got,
    want,
  )
  text = compiled.as_text()
  # No device gets the scans, their B, C or step sizes from another one: what
  # is gathered has no axis of pixels and routes, and the routes never do.
  batch = 4 // axes.get("data", 1)
  gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)
  for shape in gathered:
    sizes = [int(n) for n in shape.split(",") if n]
    assert np.prod(sizes) <= batch * 16 * 16, shape  # a map of 16 channels
  assert f"{batch},16,{16 // ways},4" in text
  assert f"{batch},16,16,4]" not in text
