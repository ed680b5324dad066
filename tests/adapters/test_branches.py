"""The branches of one map against their formula in float64."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead import adapters
from multihead.adapters import Hydra
from tests.adapters.models import (
  Net,
  Stack,
  double,
  falcon,
  init,
  random_like,
  stacked,
)

SUBSETS = [
  dict(zip(("r_pre", "r_par", "r_seq"), ranks))
  for ranks in itertools.product((0, 2), (0, 3), (0, 1))
  if any(ranks)
]


class One(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(5, name="map")(x)


def one(seed=0):
  model = One()
  x = jax.random.normal(jax.random.key(seed), (2, 3, 4))
  params = random_like(init(model, x), seed + 1)
  return model, params, x


def formula(params, branch_params, x, scales):
  """Section 2 of the paper, and the input-side branch, in float64."""
  p, x = double(params), np.asarray(x, np.float64)
  w, b = p["kernel"], p["bias"]
  f0 = x @ w + b
  y = f0
  for name, branch in double(branch_params).items():
    source = f0 if name == "seq" else x
    down, up = branch["down"], branch["up"]
    hidden = source @ down["kernel"] + down.get("bias", 0)
    out = scales[name] * (hidden @ up["kernel"] + up.get("bias", 0))
    y = y + (out @ w if name == "pre" else out)
  return y


@pytest.mark.parametrize("ranks", SUBSETS, ids=str)
@pytest.mark.parametrize("bias", [False, True, "up"])
def test_formula_and_merge(ranks, bias):
  model, params, x = one()
  adapter = Hydra(
    "map", **ranks, bias=bias, scale=1.7, scale_seq=0.6, scale_pre=-0.3
  )
  ours = random_like(adapter.init(jax.random.key(0), params), 5)
  assert set(ours["map"]) == {n[2:] for n, r in ranks.items() if r}
  expected = formula(
    params["map"], ours["map"], x, {"par": 1.7, "seq": 0.6, "pre": -0.3}
  )
  found = adapter.apply(model, params, ours, x)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  merged = adapter.merge(params, ours)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  folded = model.apply({"params": merged}, x)
  np.testing.assert_allclose(folded, expected, rtol=1e-5, atol=1e-5)
  rank = np.linalg.matrix_rank(
    double(merged)["map"]["kernel"] - double(params)["map"]["kernel"], tol=1e-4
  )
  assert rank <= sum(ranks.values())


def test_scalings():
  model, params, x = one()
  for scaling, factor in (
    ("constant", 2.0),
    ("rank", 2.0 / 4),
    ("rank_stabilised", 2.0 / 4**0.5),
  ):
    adapter = Hydra("map", r_par=4, scale=2.0, scaling=scaling)
    ours = random_like(adapter.init(jax.random.key(0), params), 5)
    expected = formula(params["map"], ours["map"], x, {"par": factor})
    np.testing.assert_allclose(
      adapter.apply(model, params, ours, x), expected, rtol=1e-5, atol=1e-5
    )


def test_learned_scales_start_at_theirs_and_have_gradients():
  model, params, x = one()
  adapter = Hydra("map", 2, 2, scale=3.0, scale_seq=0.5, learn_scale=True)
  ours = adapter.init(jax.random.key(0), params)
  assert ours["map"]["par"]["scale"] == 3.0
  assert ours["map"]["seq"]["scale"] == 0.5
  ours = random_like(ours, 3)
  scales = {name: float(ours["map"][name]["scale"]) for name in ("par", "seq")}
  expected = formula(params["map"], ours["map"], x, scales)
  found = adapter.apply(model, params, ours, x)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  grads = jax.grad(lambda a: jnp.sum(adapter.apply(model, params, a, x) ** 2))(
    ours
  )
  assert grads["map"]["par"]["scale"] != 0
  merged = adapter.merge(params, ours)
  np.testing.assert_allclose(
    model.apply({"params": merged}, x), expected, rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(
  "kind", ["kaiming_uniform", "xavier_uniform", "normal"]
)
def test_initial_values(kind):
  params = {"map": {"kernel": jnp.zeros((400, 300)), "bias": jnp.zeros(300)}}
  adapter = Hydra("map", 8, 8, bias=True, init=kind)
  made = adapter.init(jax.random.key(1), params)["map"]
  for name, width in (("par", 400), ("seq", 300)):
    down = np.asarray(made[name]["down"]["kernel"])
    assert down.shape == (width, 8)
    bound = {
      "kaiming_uniform": width**-0.5,
      "xavier_uniform": (6 / (width + 8)) ** 0.5,
    }
    if kind in bound:
      assert np.abs(down).max() <= bound[kind]
      deviation = bound[kind] / 3**0.5
    else:
      deviation = 0.02
    assert abs(down.std() / deviation - 1) < 0.05
    for leaf in (made[name]["up"]["kernel"], made[name]["up"]["bias"]):
      assert not np.any(leaf)
    assert not np.any(made[name]["down"]["bias"])
  assert not np.array_equal(
    made["par"]["down"]["kernel"][:300], made["seq"]["down"]["kernel"]
  )


def test_seq_sees_the_frozen_output_only():
  model, params, x = one()
  adapter = Hydra("map", 2, 2)
  ours = random_like(adapter.init(jax.random.key(0), params), 5)
  other = jax.tree.map(jnp.array, ours)
  other["map"]["par"] = random_like(ours["map"]["par"], 9)

  def alone(name, tree):
    single = Hydra("map", **{f"r_{name}": 2})
    return single.apply(model, params, {"map": {name: tree["map"][name]}}, x)

  f0 = model.apply({"params": params}, x)
  for tree in (ours, other):
    both = adapter.apply(model, params, tree, x)
    apart = f0 + (alone("par", tree) - f0) + (alone("seq", tree) - f0)
    np.testing.assert_allclose(both, apart, atol=2e-6)
  # A sequential branch behind the parallel one would differ by this.
  cross = (
    x
    @ ours["map"]["par"]["down"]["kernel"]
    @ ours["map"]["par"]["up"]["kernel"]
  ) @ ours["map"]["seq"]["down"]["kernel"]
  assert np.abs(cross @ ours["map"]["seq"]["up"]["kernel"]).max() > 0.1


def test_gradients_are_those_of_the_formula():
  model, params, x = one()
  s = 1.3
  adapter = Hydra("map", 2, 3, scale=s)
  ours = random_like(adapter.init(jax.random.key(0), params), 5)
  g = jax.random.normal(jax.random.key(8), (2, 3, 5))

  def loss(tree, x):
    return jnp.sum(g * adapter.apply(model, params, tree, x))

  grads, dx = jax.grad(loss, (0, 1))(ours, x)
  p, o = double(params)["map"], double(ours)["map"]
  X, G = (np.asarray(v, np.float64).reshape(6, -1) for v in (x, g))
  w, f0 = p["kernel"], X @ p["kernel"] + p["bias"]
  a, b = o["par"]["down"]["kernel"], o["par"]["up"]["kernel"]
  c, d = o["seq"]["down"]["kernel"], o["seq"]["up"]["kernel"]
  expected = {
    ("par", "down"): s * X.T @ (G @ b.T),
    ("par", "up"): s * (X @ a).T @ G,
    ("seq", "down"): s * f0.T @ (G @ d.T),
    ("seq", "up"): s * (f0 @ c).T @ G,
  }
  for (branch, side), value in expected.items():
    np.testing.assert_allclose(
      grads["map"][branch][side]["kernel"], value, rtol=1e-5, atol=1e-5
    )
  full = (G + s * G @ d.T @ c.T) @ w.T + s * G @ b.T @ a.T
  np.testing.assert_allclose(dx.reshape(6, -1), full, rtol=1e-5, atol=1e-5)


FIELDS = [dict(), dict(remat=True), dict(scan_layers=False)]


def perturbed(**fields):
  """A Stack with an adapter on every map, all values random."""
  model, params, x = stacked(**fields)
  maps = adapters.linear_maps(model, x)
  adapter = Hydra("all-linear", 2, 1, r_pre=1, scale=0.7, maps=maps)
  ours = adapter.init(jax.random.key(2), params)
  return model, params, x, adapter, random_like(ours, 3, 0.3)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_new_branches_change_nothing_and_only_up_projections_move(fields):
  model, params, x = stacked(**fields)
  maps = adapters.linear_maps(model, x)
  adapter = Hydra("all-linear", 2, 2, r_pre=1, bias=True, maps=maps)
  ours = adapter.init(jax.random.key(2), params)
  base = model.apply({"params": params}, x)
  found = adapter.apply(model, params, ours, x)
  if model.scan_layers:  # compiled, and so in another order
    np.testing.assert_allclose(found, base, rtol=1e-5, atol=1e-5)
  else:
    np.testing.assert_array_equal(found, base)
  grads = jax.jit(
    jax.grad(lambda tree: jnp.sum(adapter.apply(model, params, tree, x) ** 2))
  )(ours)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    moves = not name.endswith(("down/kernel", "down/bias"))
    assert np.any(grad) == moves, name


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_stacked_layers_equal_merged_ones(fields):
  model, params, x, adapter, ours = perturbed(**fields)
  found = jax.jit(lambda t: adapter.apply(model, params, t, x))(ours)
  merged = adapter.merge(params, ours)
  np.testing.assert_allclose(
    model.apply({"params": merged}, x), found, rtol=1e-4, atol=1e-4
  )
  assert np.abs(found - model.apply({"params": params}, x)).max() > 0.1


def test_each_stacked_layer_has_branches_of_its_own():
  model, params, x, adapter, ours = perturbed()
  swap = lambda x: x[jnp.array([0, 2, 1])]
  other = {**ours, "layers": jax.tree.map(swap, ours["layers"])}
  found, swapped = (adapter.apply(model, params, t, x) for t in (ours, other))
  assert np.abs(found - swapped).max() > 0.1
  # Unrolled, with each layer's own: the same function.
  split = lambda tree: {
    f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], tree["layers"])
    for i in range(3)
  }
  single = Stack(scan_layers=False)
  unrolled = Hydra(
    "all-linear", 2, 1, r_pre=1, scale=0.7,
    maps=adapters.linear_maps(single, x),
  )  # fmt: skip
  np.testing.assert_allclose(
    unrolled.apply(single, split(params), split(ours), x),
    found,
    rtol=1e-5,
    atol=1e-5,
  )


def test_falcon_h1():
  model = falcon()
  tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 40)
  params = init(model, tokens)
  maps = adapters.linear_maps(model)
  assert maps == adapters.linear_maps(model, tokens)
  adapter = Hydra(
    ["attention/query", "attention/out", "mamba/x", "mlp/down", "lm_head"],
    2,
    2,
    maps=maps,
  )
  ours = adapter.init(jax.random.key(2), params)
  ours = random_like(ours, 3, 0.2)
  found, base = jax.jit(
    lambda p, t: (
      adapter.apply(model, p, t, tokens),
      model.apply({"params": p}, tokens),
    )
  )(params, ours)
  assert np.abs(found - base).max() > 0.01
  merged = adapter.merge(params, ours)
  np.testing.assert_allclose(
    jax.jit(model.apply)({"params": merged}, tokens), found, atol=2e-5
  )


def test_kernels_with_axes_for_heads():
  model = Net()
  x = jax.random.normal(jax.random.key(0), (3, 4, 8))
  params = random_like(init(model, x), 2)
  maps = adapters.linear_maps(model, x)
  assert (maps["heads"].inputs, maps["heads"].features) == ((8,), (2, 5))
  assert (maps["join"].inputs, maps["join"].features) == ((2, 5), (6,))
  assert "conv" not in maps and "norm" not in maps
  adapter = Hydra(["heads", "join"], 2, 2, r_pre=1, bias=True, maps=maps)
  ours = random_like(adapter.init(jax.random.key(2), params), 3)
  assert ours["join"]["par"]["down"]["kernel"].shape == (10, 2)
  found = adapter.apply(model, params, ours, x)
  merged = adapter.merge(params, ours)
  assert merged["heads"]["kernel"].shape == (8, 2, 5)
  np.testing.assert_allclose(
    model.apply({"params": merged}, x), found, rtol=2e-4, atol=2e-4
  )
  assert np.abs(found - model.apply({"params": params}, x)).max() > 0.1


def test_bfloat16_follows_the_model():
  model = Net(dtype=jnp.bfloat16)
  x = jax.random.normal(jax.random.key(0), (1, 1, 8))
  params = random_like(init(model, x), 2)
  adapter = Hydra(["up", "down"], 2, 2)
  ours = random_like(adapter.init(jax.random.key(2), params), 3)
  found = adapter.apply(model, params, ours, x)
  assert found.dtype == jnp.bfloat16
  exact = adapter.apply(Net(), params, ours, x)
  np.testing.assert_allclose(
    np.asarray(found, np.float32), exact, atol=0.03 * np.abs(exact).max()
  )


def test_unmerged_branches_stay_low_rank():
  """No product of the unmerged pass has the cost of a second full one."""
  model, params, _ = one()
  x = jnp.ones((64, 4))
  adapter = Hydra("map", 1, 1)
  ours = adapter.init(jax.random.key(0), params)
  jaxpr = jax.make_jaxpr(lambda t: adapter.apply(model, params, t, x))(ours)
  sizes = [
    tuple(v.aval.shape for v in eqn.invars)
    for eqn in jaxpr.jaxpr.eqns
    if eqn.primitive.name == "dot_general"
  ]
  full = [s for s in sizes if s == ((64, 4), (4, 5))]
  assert len(full) == 1 and len(sizes) == 5
  assert all(1 in s[0] + s[1] for s in sizes if s not in full)


@pytest.mark.parametrize("remat", [False, True])
def test_dropout(remat):
  model, params, x, adapter, ours = perturbed(remat=remat)
  adapter = adapter.replace(dropout=0.5)

  @jax.jit
  def run(tree, key):
    out = adapter.apply(model, params, tree, x, dropout_rng=key)
    return jnp.sum(out**2), out

  off = adapter.apply(model, params, ours, x)
  plain = adapter.deterministic().apply(model, params, ours, x)
  np.testing.assert_array_equal(off, plain)
  first, again, other = (run(ours, jax.random.key(i))[1] for i in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-3
  assert np.abs(first - off).max() > 1e-3
  # The backward pass, recomputed or not, has the forward pass's masks.
  key, step = jax.random.key(0), 2e-3
  grads = jax.grad(lambda t: run(t, key)[0])(ours)
  way = random_like(ours, 11, 1.0)
  move = lambda h: jax.tree.map(lambda a, d: a + h * d, ours, way)
  slope = (run(move(step), key)[0] - run(move(-step), key)[0]) / (2 * step)
  expected = sum(
    jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(way))
  )
  np.testing.assert_allclose(slope, expected, rtol=2e-2)


def test_dropout_is_right_on_average():
  model, params, x = one()
  adapter = Hydra("map", 3, 3, bias=True, dropout=0.4)
  ours = random_like(adapter.init(jax.random.key(0), params), 5)
  keys = jax.random.split(jax.random.key(1), 10_000)
  masked = jax.jit(
    jax.vmap(lambda key: adapter.apply(model, params, ours, x, dropout_rng=key))
  )(keys)
  whole = adapter.apply(model, params, ours, x)
  error = np.abs(masked.mean(0) - whole).max() / np.abs(whole).max()
  assert error < 1e-2
  assert np.std(np.asarray(masked), axis=0).min() > 0.01


def test_dropout_differs_between_stacked_layers_and_branches():
  params = {"layers": {"map": {"kernel": jnp.zeros((3, 4, 5))}}}
  adapter = Hydra("layers/map", 2, 2, dropout=0.5)
  ours = adapter.init(jax.random.key(0), params)
  tree = adapter.insert(params, ours, dropout_rng=jax.random.key(1))
  keys = np.asarray(tree["layers"]["map"]["hydra"]["key"])
  assert len(np.unique(keys.reshape(-1, keys.shape[-1]), axis=0)) == 9


def test_within_shard_map():
  mesh = jax.make_mesh(
    (4,),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:4],
  )
  model, params, _ = one()
  x = jax.random.normal(jax.random.key(0), (8, 3, 4))
  adapter = Hydra("map", 2, 2)
  ours = random_like(adapter.init(jax.random.key(0), params), 5)
  spec = jax.sharding.PartitionSpec
  run = jax.shard_map(
    lambda p, a, x: adapter.apply(model, p, a, x),
    mesh=mesh,
    in_specs=(spec(), spec(), spec("data")),
    out_specs=spec("data"),
  )
  np.testing.assert_allclose(
    jax.jit(run)(params, ours, x),
    adapter.apply(model, params, ours, x),
    atol=1e-6,
  )
