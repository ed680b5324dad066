"""Adapters on a mesh of eight: where they live; nothing is gathered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from multihead import adapters
from multihead.adapters import Hydra, fingerprint
from multihead.adapters.linear_maps import flatten
from multihead.parallel import make_mesh, sharding
from tests.adapters.models import random_like, stacked

MESHES = [dict(data=4, tensor=2), dict(data=2, fsdp=2, tensor=2)]


def placed(axes, bias=True):
  """A Stack with an adapter on every map, on the host and on a mesh."""
  mesh = make_mesh(**axes)
  model, params, _ = stacked()
  x = jax.random.normal(jax.random.key(7), (8, 5, 6))
  maps = adapters.linear_maps(model)
  adapter = Hydra("all-linear", 2, 2, r_pre=1, bias=bias, maps=maps)
  ours = random_like(adapter.init(jax.random.key(0), params), 1, 0.3)
  where = sharding.param_shardings(model, mesh)
  spread = adapter.shardings(params, where)
  return mesh, model, adapter, x, params, ours, where, spread


def test_low_rank_parts_follow_the_weight():
  *_, spread = placed(MESHES[1])
  specs = {path: s.spec for path, s in flatten(spread["layers"]).items()}
  whole, t = (None, None), "tensor"
  expected = {
    # Column-parallel: the output is split (heads, or the inner width).
    "query/par/down": whole, "query/par/up": (None, t),
    "query/seq/down": (t, None), "query/seq/up": (None, t),
    "query/pre/down": whole, "query/pre/up": whole,
    "up/par/down": whole, "up/par/up": (None, t),
    "up/seq/down": (t, None), "up/seq/up": (None, t),
    # Row-parallel: the input is.
    "out/par/down": (t, None), "out/par/up": whole,
    "out/seq/down": whole, "out/seq/up": whole,
    "down/par/down": (t, None), "down/par/up": whole,
    "down/seq/down": whole, "down/seq/up": whole,
    "down/pre/down": (t, None), "down/pre/up": (None, t),
  }  # fmt: skip
  for path, spec in expected.items():
    assert specs[f"{path}/kernel"] == P(None, *spec), path
  assert specs["up/par/up/bias"] == P(None, t)
  assert specs["up/par/down/bias"] == P(None, None)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_eight_devices_equal_one_and_gather_no_activations(axes):
  mesh, model, adapter, x, params, ours, where, spread = placed(axes)

  def loss(tree, params, x):
    out = adapter.apply(model, params, tree, x)
    return jnp.mean(out**2), out

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (_, expected), wanted = step(ours, params, x)
  with jax.set_mesh(mesh):
    args = (
      jax.device_put(ours, spread),
      jax.device_put(params, where),
      jax.device_put(x, jax.sharding.NamedSharding(mesh, P(("data", "fsdp")))),
    )
    (_, found), grads = step(*args)
    text = step.lower(*args).compile().as_text()
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted)):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
  gathered = re.findall(r"= (\S+?)\{[\d,]*\}[^=]*? all-gather\(", text)
  if "fsdp" not in axes:
    assert not gathered
  # Over fsdp, weights are; an activation has the rows of a batch, of 5 tokens.
  assert not [
    shape for shape in gathered if re.search(r"[\[,](5|10|20)[,\]]", shape)
  ]


def test_merging_and_fingerprints_do_not_depend_on_the_mesh():
  mesh, _, adapter, _, params, ours, where, spread = placed(MESHES[1], False)
  spread_params = jax.device_put(params, where)
  assert fingerprint(spread_params) == fingerprint(params)
  merged = adapter.merge(spread_params, jax.device_put(ours, spread))
  expected = adapter.merge(params, ours)
  for a, b, place in zip(*map(jax.tree.leaves, (merged, expected, where))):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert a.sharding == place
  assert fingerprint(merged) != fingerprint(params)
