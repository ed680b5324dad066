"""Targets, counts, merging, files, batches of adapters, budgets."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from multihead import adapters
from multihead.adapters import Hydra, fingerprint, overlap
from multihead.adapters.budget import price
from multihead.errors import UserError
from tests.adapters.models import Net, double, init, random_like, stacked


def vit_base(stack=True):
  """The shapes of ViT-B/16's blocks."""

  def linear(d_in, d_out):
    lead = (12,) if stack else ()
    return {
      "kernel": jax.ShapeDtypeStruct((*lead, d_in, d_out), jnp.float32),
      "bias": jax.ShapeDtypeStruct((*lead, d_out), jnp.float32),
    }

  block = {
    "attention": {"out": linear(768, 768)},
    "mlp": {"up": linear(768, 3072), "down": linear(3072, 768)},
  }
  if stack:
    return {"blocks": block}
  return {f"blocks_{i}": block for i in range(12)}


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize(
  ("targets", "settings", "count"),
  [
    (["attention/out", "mlp/down"], dict(r_par=2, r_seq=2, bias=True), 239_712),
    (["mlp/down"], dict(r_par=2, r_seq=2, bias=True), 147_504),
    (["mlp/down"], dict(r_par=4, r_seq=8), 331_776),
    (["attention/out", "mlp/down"], dict(r_par=2, r_seq=2), 202_752),
  ],
)
def test_published_counts(stack, targets, settings, count):
  params = vit_base(stack)
  adapter = Hydra(targets, **settings)
  made = jax.eval_shape(lambda: adapter.init(jax.random.key(0), params))
  assert sum(leaf.size for leaf in jax.tree.leaves(made)) == count
  counts = adapter.counts(params)
  assert sum(counts.values()) == count
  assert len(counts) == len(targets) * (1 if stack else 12)


# Targets.


def small():
  def linear(d_in, d_out):
    return {"kernel": jnp.ones((d_in, d_out)), "bias": jnp.zeros(d_out)}

  return {
    "embed": {"embedding": jnp.ones((4, 3))},
    "norm": {"scale": jnp.ones(3)},
    "conv": {"kernel": jnp.ones((3, 1, 3))},
    "encoder": {"down": linear(3, 5), "up": linear(5, 3)},
    "decoder": {"down": linear(3, 5)},
  }


@pytest.mark.parametrize(
  ("targets", "paths"),
  [
    (["down"], ["decoder/down", "encoder/down"]),
    (["encoder/down", "up"], ["encoder/down", "encoder/up"]),
    (".*/(up|down)", ["decoder/down", "encoder/down", "encoder/up"]),
    ("encoder/.*", ["encoder/down", "encoder/up"]),
    ("all-linear", ["decoder/down", "encoder/down", "encoder/up"]),
  ],
)
def test_targets(targets, paths):
  assert list(Hydra(targets, 1).select(small())) == paths


@pytest.mark.parametrize(
  ("targets", "words"),
  [
    ("encoder/dwn", ["'encoder/dwn' matches no module", "'encoder/down'"]),
    (["up", "layers.0.donw"], ["'layers.0.donw'", "/down'"]),
    ("down", ["'down' matches no module", "/down'", "whole path"]),
    (["wn"], ["matches no module"]),
    ("(", ["not a regular expression"]),
    ([], ["list of names"]),
    (["embed"], ["'embed'", "linear map", "embedding"]),
    (["norm"], ["'norm'", "linear map", "scale"]),
    ("encoder/.*|norm", ["'norm'", "linear map"]),
    (["conv"], ["'conv'", "convolution", "linear_maps"]),
  ],
)
def test_wrong_targets_say_what_is_there(targets, words):
  params = small()
  before = jax.tree.map(np.array, params)
  with pytest.raises(UserError) as error:
    Hydra(targets, 1).init(jax.random.key(0), params)
  for word in words:
    assert word in str(error.value)
  assert "\n" not in str(error.value)
  jax.tree.map(np.testing.assert_array_equal, params, before)


def test_targets_of_a_traced_model():
  x = jnp.ones((1, 4, 8))
  model = Net()
  params = init(model, x)
  maps = adapters.linear_maps(model, x)
  with pytest.raises(UserError, match="'conv'.*not call it as a linear map"):
    Hydra(["conv"], 1, maps=maps).select(params)
  with pytest.raises(UserError, match="'heads'.*linear_maps"):
    Hydra(["heads"], 1).select(params)
  assert Hydra(["heads"], 1, maps=maps).select(params)
  with pytest.raises(UserError, match="trace the model"):
    other = {**params, "up": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
    Hydra(["up"], 1, maps=maps).select(other)


def test_what_only_looks_like_a_map_is_found_when_it_runs():
  class Odd(nn.Module):
    @nn.compact
    def __call__(self, x):
      kernel = self.param("kernel", nn.initializers.ones, (4, 4))
      return x * kernel

  class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
      return Odd(name="odd")(x)

  x = jnp.ones((4, 4))
  params = init(Outer(), x)
  adapter = Hydra(["odd"], 1)
  ours = adapter.init(jax.random.key(0), params)
  with pytest.raises(ValueError, match="'odd' is not a linear map but a Odd"):
    adapter.apply(Outer(), params, ours, x)


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    (dict(), "all 0"),
    (dict(r_par=1.5), "rank is an integer"),
    (dict(r_par=1, init="kaimng"), "kaiming_uniform"),
    (dict(r_par=1, scaling="alpha"), "rank_stabilised"),
    (dict(r_par=1, bias="down"), "'up'"),
    (dict(r_par=1, dropout=1.0), r"\[0, 1\)"),
    (dict(r_par={"encoder/dwn": 1}), "no target"),
  ],
)
def test_wrong_settings(settings, words):
  with pytest.raises(UserError, match=words):
    Hydra(["down"], **settings).init(jax.random.key(0), small())


def test_parameters_of_another_adapter_are_refused():
  params = small()
  adapter = Hydra(["down"], 2)
  ours = Hydra(["down"], 3).init(jax.random.key(0), params)
  with pytest.raises(UserError, match="not the parameters of this adapter"):
    adapter.merge(params, ours)


# Merging.


def merged_pair(dtype=jnp.float32, **settings):
  model, params, x = stacked()
  params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
  settings = {"r_par": 2, "r_seq": 2, **settings}
  adapter = Hydra(["up", "down"], **settings)
  ours = random_like(adapter.init(jax.random.key(2), params), 3, 0.3)
  return model, params, x, adapter, ours


@pytest.mark.parametrize(
  "settings",
  [
    dict(bias=True),
    dict(r_seq=0),
    dict(r_par=0, scale=0.5),
    dict(r_par=0, r_seq=0, r_pre=2, bias=True),
    dict(r_pre=3, bias="up", learn_scale=True),
  ],
  ids=str,
)
def test_unmerge(settings):
  _, params, _, adapter, ours = merged_pair(**settings)
  merged = adapter.merge(params, ours)
  back = adapter.unmerge(merged, ours)
  for found, expected in zip(jax.tree.leaves(back), jax.tree.leaves(params)):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  for original in (params, adapter.keep(params)):
    back = adapter.unmerge(merged, ours, original)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_merging_twice_and_other_mistakes_change_nothing():
  _, params, _, adapter, ours = merged_pair()
  before = jax.tree.map(np.array, params)
  merged = adapter.merge(params, ours)
  kept = jax.tree.map(np.array, merged)
  other = jax.tree.map(lambda x: x + 1, params)
  for call, words in (
    (lambda: adapter.merge(merged, ours), "merged into these .* already"),
    (lambda: adapter.merge(other, ours), "not the base"),
    (lambda: adapter.unmerge(params, ours), "no adapter is merged"),
    (lambda: adapter.unmerge(merged, ours, other), "not the base"),
    (lambda: adapter.init(jax.random.key(0), other), "not the base"),
    (
      lambda: adapter.replace(dropout=0.1).merge(params, ours),
      "dropout=0.1.*deterministic",
    ),
  ):
    with pytest.raises(UserError, match=words) as error:
      call()
    assert "\n" not in str(error.value)
  jax.tree.map(np.testing.assert_array_equal, params, before)
  jax.tree.map(np.testing.assert_array_equal, merged, kept)
  adapter.replace(dropout=0.1).deterministic().merge(params, ours)


def test_biases_need_a_bias_to_merge_into():
  params = {"map": {"kernel": jnp.ones((3, 4))}}
  adapter = Hydra("map", 1, bias=True)
  ours = adapter.init(jax.random.key(0), params)
  with pytest.raises(UserError, match="has no bias"):
    adapter.merge(params, ours)


def test_bfloat16_weights_are_rounded_once(caplog):
  _, params, _, adapter, ours = merged_pair(jnp.bfloat16)
  with caplog.at_level(logging.INFO):
    merged = adapter.merge(params, ours)
  assert "rounding loses at most" in caplog.text
  for path in ("up", "down"):
    w = double(params)["layers"][path]["kernel"]
    branch = double(ours)["layers"][path]
    a, b, c, d = (
      branch[name][side]["kernel"]
      for name in ("par", "seq")
      for side in ("down", "up")
    )
    exact = w + a @ b + w @ c @ d
    found = merged["layers"][path]["kernel"]
    assert found.dtype == jnp.bfloat16
    # The nearest number, but where float32 sums fall on the other side of a
    # tie: half a unit in the last of 8 places.
    error = np.abs(np.asarray(found, np.float64) - exact)
    assert np.all(error <= 2.0**-8 * np.abs(exact) * 1.001)
    rounding = adapter.rounding(params, ours)[f"layers/{path}/kernel"]
    np.testing.assert_allclose(rounding.largest, error.max(), rtol=1e-3)
    share = np.linalg.norm(error) / np.linalg.norm(exact - w)
    np.testing.assert_allclose(rounding.of_update, share, rtol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
def test_every_hydra_is_a_lora_of_the_summed_rank(bias):
  model, params, x, adapter, ours = merged_pair(r_pre=1, bias=bias)
  lora, factors = adapter.to_lora(params, ours)
  assert lora.settings.ranks_of("layers/up") == {"par": 5}
  wanted = adapter.apply(model, params, ours, x)
  np.testing.assert_allclose(
    lora.apply(model, params, factors, x), wanted, rtol=1e-4, atol=1e-4
  )
  # And by the SVD of the merged update, without the factors.
  if not bias:
    merged = adapter.merge(params, ours)
    update = merged["layers"]["up"]["kernel"] - params["layers"]["up"]["kernel"]
    left, values, right = np.linalg.svd(np.asarray(update, np.float64))
    assert np.all(values[:, 5:] < 1e-4)
    cut = (left[..., :5] * values[:, None, :5]) @ right[:, :5]
    np.testing.assert_allclose(cut, update, atol=1e-4)


def test_merging_compiles():
  _, params, _, adapter, ours = merged_pair()
  merged = jax.jit(adapter.merge)(params, ours)
  expected = adapter.merge(params, ours)
  for found, wanted in zip(jax.tree.leaves(merged), jax.tree.leaves(expected)):
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_fingerprint_sees_every_change():
  tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2, jnp.bfloat16)}
  first = fingerprint(tree)
  assert first == fingerprint(jax.tree.map(np.asarray, tree))
  others = [
    {**tree, "a": tree["a"].at[1, 2].add(2.0**-20)},
    {**tree, "a": tree["a"].reshape(3, 2)},
    {**tree, "a": tree["a"][::-1]},
    {**tree, "a": tree["a"].astype(jnp.bfloat16)},
    {"c": tree["a"], "b": tree["b"]},
    {**tree, "b": -tree["b"]},
  ]
  assert len({first, *map(fingerprint, others)}) == 7


# Files.


def test_file_holds_the_adapter_alone(tmp_path):
  _, params, x, adapter, ours = merged_pair(
    learn_scale=True, dropout=0.1, scale_seq=0.5
  )
  path = tmp_path / "deep" / "adapter.safetensors"
  head = {"head": {"kernel": jnp.ones((2, 3))}}
  adapters.save(path, adapter, ours, trained=head)
  stored = load_file(path)
  assert sum(a.size for a in stored.values()) == 6 + sum(
    leaf.size for leaf in jax.tree.leaves(ours)
  )
  found, tree, trained = adapters.load(path, params)
  assert found.settings == adapter.settings and found.base == adapter.base
  jax.tree.map(np.testing.assert_array_equal, tree, ours)
  np.testing.assert_array_equal(trained["head"]["kernel"], np.ones((2, 3)))
  model, _, x = stacked()
  np.testing.assert_array_equal(
    found.apply(model, params, tree, x), adapter.apply(model, params, ours, x)
  )
  with pytest.raises(UserError, match="adapter.safetensors.*not the base"):
    adapters.load(path, jax.tree.map(lambda leaf: leaf * 1.001, params))
  path.write_bytes(path.read_bytes()[:-7])
  with pytest.raises(UserError, match="torn"):
    adapters.load(path, params)
  save_file(stored, path)
  with pytest.raises(UserError, match="not an adapter"):
    adapters.load(path, params)
  with pytest.raises(UserError, match="cannot be read"):
    adapters.load(tmp_path / "missing", params)
  with pytest.raises(UserError, match="does not know its base"):
    adapters.save(path, Hydra("up", 1), {})


@pytest.mark.parametrize("bias", [False, "up"])
def test_peft_directory(tmp_path, bias):
  model, params, x, _, _ = merged_pair()
  maps = adapters.linear_maps(model, x)
  adapter = Hydra(
    ["query", "out", "down"], r_par={"layers/query": 3, "layers/down": 2,
    "layers/out": 2}, scale=1.5, scaling="rank", bias=bias, maps=maps
  )  # fmt: skip
  ours = random_like(adapter.init(jax.random.key(0), params), 1)
  adapters.save_peft(tmp_path, adapter, ours)
  stored = load_file(tmp_path / "adapter_model.safetensors")
  key = "base_model.model.layers.1.query.lora_A.weight"
  np.testing.assert_array_equal(
    stored[key], ours["layers"]["query"]["par"]["down"]["kernel"][1].T
  )
  found, tree = adapters.load_peft(tmp_path, params, maps=maps)
  np.testing.assert_allclose(
    found.apply(model, params, tree, x),
    adapter.apply(model, params, ours, x),
    rtol=1e-5,
    atol=1e-5,
  )
  with pytest.raises(UserError, match="no linear map known here"):
    adapters.load_peft(tmp_path, params, names={"layers/down": "l.{layer}.d"})


def test_peft_refuses_what_it_cannot_hold(tmp_path):
  _, params, _, adapter, ours = merged_pair()
  with pytest.raises(UserError, match="to_lora"):
    adapters.save_peft(tmp_path, adapter, ours)
  lora, factors = adapter.to_lora(params, ours)
  adapters.save_peft(tmp_path, lora, factors)
  config = tmp_path / "adapter_config.json"
  text = config.read_text()
  config.write_text(text.replace('"use_dora": false', '"use_dora": true'))
  with pytest.raises(UserError, match="use_dora=True is not supported"):
    adapters.load_peft(tmp_path, params)
  config.write_text("{")
  with pytest.raises(UserError, match="not JSON"):
    adapters.load_peft(tmp_path, params)
  config.unlink()
  with pytest.raises(UserError, match="adapter_config.json"):
    adapters.load_peft(tmp_path, params)
  config.write_text(text)
  weights = tmp_path / "adapter_model.safetensors"
  stored = load_file(weights)
  save_file({k: v for k, v in stored.items() if ".0." not in k}, weights)
  with pytest.raises(UserError, match="2 of the 3 layers"):
    adapters.load_peft(tmp_path, params)


# Several adapters in one batch.


def test_each_example_has_its_own_adapter():
  model, params, x = stacked()
  x = jnp.concatenate([x, x])
  maps = adapters.linear_maps(model, x)
  adapter = Hydra("all-linear", 2, 1, r_pre=1, bias="up", maps=maps)
  new = adapter.init(jax.random.key(0), params)
  several = [random_like(new, seed, 0.3) for seed in range(2)] + [new]
  bank = adapters.stack_adapters(several)
  ids = jnp.array([1, 0, 2, 1])
  run = jax.jit(
    lambda ids: adapter.apply(model, params, bank, x, adapter_ids=ids)
  )
  found = run(ids)
  for row, number in enumerate(ids):
    alone = adapter.apply(model, params, several[number], x[row : row + 1])
    np.testing.assert_allclose(found[row], alone[0], rtol=1e-4, atol=1e-4)
  base = model.apply({"params": params}, x)
  np.testing.assert_allclose(found[2], base[2], rtol=1e-5, atol=1e-5)
  run(jnp.array([0, 0, 1, 2]))
  assert run._cache_size() == 1
  with pytest.raises(UserError, match="adapter 1 has other"):
    other = Hydra("all-linear", 1, maps=maps).init(jax.random.key(0), params)
    adapters.stack_adapters([new, other])


# Budgets.


def test_budget_is_spent_by_price():
  maps = Hydra(["mlp/down"], 1).select(vit_base())
  (target,) = maps.values()
  assert price("par", target) == 12 * 3840
  assert price("seq", target) == 12 * 1536
  ranks = adapters.allocate(maps, 12 * 2 * 5 * 1536)
  # Equal spending: five sequential ranks cost two parallel ones.
  assert ranks == {
    "r_par": {"blocks/mlp/down": 2},
    "r_seq": {"blocks/mlp/down": 5},
  }
  adapter = Hydra(["mlp/down"], **ranks)
  assert sum(adapter.counts(vit_base()).values()) == 12 * 2 * 5 * 1536


def test_budget_follows_importance_and_is_never_exceeded():
  params = vit_base(stack=False)
  maps = Hydra("all-linear", 1).select(params)
  importance = {path: 0.0 for path in maps if "mlp/up" in path}
  importance["blocks_3/mlp/down/par"] = 9.0
  for budget in (4000, 100_001, 700_000):
    ranks = adapters.allocate(maps, budget, importance=importance)
    spent = Hydra("all-linear", **ranks).counts(params)
    assert sum(spent.values()) <= budget < sum(spent.values()) + 3840
    assert not any("mlp/up" in path for path in spent)
  best = max(ranks["r_par"], key=ranks["r_par"].get)
  assert best == "blocks_3/mlp/down"
  with pytest.raises(UserError, match="budget=10 buys no rank"):
    adapters.allocate(maps, 10)
  with pytest.raises(UserError, match="'sequential'"):
    adapters.allocate(maps, 10_000, branches=["sequential"])


# The figure of the paper.


def test_overlap():
  rng = np.random.default_rng(0)
  w = rng.standard_normal((8, 6))
  left, values, right = np.linalg.svd(w)
  inside = rng.standard_normal((8, 2)) @ right[:2]
  outside = rng.standard_normal((8, 2)) @ right[4:]
  assert abs(overlap.subspace_overlap(w, inside, 2) - 1) < 1e-5
  assert abs(overlap.subspace_overlap(w, outside, 2)) < 1e-5
  both = overlap.subspace_overlap(
    np.stack([w, w]), np.stack([inside, outside]), 2
  )
  np.testing.assert_allclose(both, [1, 0], atol=1e-5)
  assert (
    abs(
      overlap.subspace_overlap(w, left[:, :1] @ outside[:1], 1, side="input")
      - 1
    )
    < 1e-5
  )
  assert overlap.subspace_overlap(w, 0 * w, 3) == 0
  random = [
    overlap.subspace_overlap(w, rng.standard_normal((8, 6)), 3)
    for _ in range(200)
  ]
  assert abs(np.mean(random) - 3 / 6) < 0.03
  with pytest.raises(ValueError, match="between 1 and 6"):
    overlap.subspace_overlap(w, w, 7)
  with pytest.raises(ValueError, match="side"):
    overlap.subspace_overlap(w, w, 2, side="left")
