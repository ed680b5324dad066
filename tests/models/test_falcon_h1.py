"""Falcon-H1: counts, multipliers, and that every way of running it agrees."""

import dataclasses
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from multihead import models
from multihead.errors import UserError
from multihead.models import falcon_h1
from multihead.parallel import make_mesh, sharding

# Exact counts: 1.5B-Deep and Tiny-90M are published; the others follow from
# the published shapes (paper, table of shapes) and round to the names.
COUNTS = {
  "tiny-90m": 91_131_072,
  "0.5b": 521_411_104,
  "1.5b": 1_554_863_488,
  "1.5b-deep": 1_554_872_208,
  "3b": 3_149_387_264,
  "7b": 7_585_648_736,
  "34b": 33_642_516_224,
}

# As printed in the released config.json files.
RELEASED = {
  "0.5b": dict(
    embedding=5.656854249492381,
    lm_head=0.0390625,
    key=0.390625,
    attention_out=0.9375,
    ssm_in=1.25,
    ssm_out=0.23570226039551587,
    mlp_gate=0.8838834764831845,
    mlp_down=0.5859375,
  ),
  "3b": dict(
    lm_head=0.015625,
    key=0.0441942,
    attention_out=0.15,
    ssm_in=0.5,
    ssm_out=0.0883883,
    mlp_gate=0.3535534,
    mlp_down=0.078125,
  ),
  "7b": dict(
    lm_head=0.01302083,
    key=0.0306904,
    attention_out=0.1041667,
    ssm_in=0.4166667,
    ssm_out=0.1178511,
    mlp_gate=0.2946278,
    mlp_down=0.0325521,
  ),
  "34b": dict(
    lm_head=0.0078125,
    key=0.0110485,
    attention_out=0.0375,
    ssm_in=0.25,
    ssm_out=0.0883883,
    mlp_gate=0.1767767,
    mlp_down=0.0111607,
  ),
}

DISTINCT = falcon_h1.Multipliers(
  embedding=1.7,
  lm_head=0.6,
  key=0.8,
  attention_in=1.1,
  attention_out=0.9,
  ssm_in=1.2,
  ssm_out=0.7,
  mlp_gate=0.85,
  mlp_down=1.3,
  ssm=(0.5, 1.4, 0.75, 1.25, 0.65),
)


def small(**overrides):
  """A model in which no two sizes agree by accident."""
  fields = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_n_heads=6,
    mamba_d_head=5,
    mamba_n_groups=2,
    mamba_d_state=7,
    mamba_chunk_size=4,
    initializer_range=0.2,
    multipliers=DISTINCT,
  )
  return models.create("falcon_h1", None, **{**fields, **overrides})


@functools.lru_cache
def perturbed(model, seed=0):
  """Parameters in which nothing is zero or one by initialisation."""
  params = sharding.init_params(model, jax.random.key(seed))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  return tree.unflatten(
    [
      leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
      for leaf, key in zip(leaves, keys, strict=True)
    ]
  )


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=("prefill", "last_only")
)
def run(model, params, *args, **kwargs):
  return model.apply({"params": params}, *args, **kwargs)


def tokens_like(batch, length, seed=3):
  return jax.random.randint(jax.random.key(seed), (batch, length), 0, 61)


def assert_close(actual, expected, tolerance=2e-5):
  """Compares logits relative to the largest of them."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  chex.assert_equal_shape((actual, expected))
  error = np.abs(actual - expected).max() / np.abs(expected).max()
  assert error <= tolerance, error


class Counts(parameterized.TestCase):
  def test_every_variant_is_counted(self):
    self.assertEqual(tuple(COUNTS), models.variants("falcon_h1"))

  @parameterized.parameters(*COUNTS)
  def test_count(self, variant):
    model = models.create("falcon_h1", variant)
    count = sharding.param_count(sharding.abstract_params(model))
    self.assertEqual(count, COUNTS[variant])

  def test_count_does_not_depend_on_scan(self):
    shapes = sharding.abstract_params(
      models.create("falcon_h1", "0.5b", scan_layers=False)
    )
    self.assertEqual(sharding.param_count(shapes), COUNTS["0.5b"])

  @parameterized.parameters(*RELEASED)
  def test_multipliers(self, variant):
    ours = dataclasses.asdict(models.create("falcon_h1", variant).multipliers)
    for name, value in RELEASED[variant].items():
      np.testing.assert_allclose(ours[name], value, rtol=5e-6, err_msg=name)
    np.testing.assert_allclose(
      ours["ssm"], (0.3535534, 0.25, 0.1767767, 0.5, 0.3535534), rtol=1e-6
    )

  def test_base_shape_transfers_to_itself(self):
    """With a base of one's own, equal shapes give the base's factors."""
    shape = dict(
      hidden_size=64, attention_width=64, ssm_width=128, intermediate_size=96
    )
    base = {f"base_{k}": v for k, v in shape.items()}
    at_base = falcon_h1.multipliers_for_shape(head_dim=128, **shape, **base)
    deep = models.create("falcon_h1", "1.5b-deep").multipliers
    for ours, theirs in zip(
      jax.tree.leaves(dataclasses.asdict(at_base)),
      jax.tree.leaves(dataclasses.asdict(deep)),
      strict=True,
    ):
      self.assertAlmostEqual(ours, theirs)


class Agreement(parameterized.TestCase):
  """One function, run in several ways."""

  @parameterized.product(scan=(True, False), groups=(1, 2), norm=(True, False))
  def test_cache_matches_whole(self, scan, groups, norm):
    model = small(scan_layers=scan, mamba_n_groups=groups, mamba_rms_norm=norm)
    params = perturbed(model)
    tokens = tokens_like(2, 11)
    whole = run(model, params, tokens)
    self.assertEqual(whole.dtype, jnp.float32)
    for pieces in ((11,), (4, 7), (1,) * 11, (5, 1, 1, 4)):
      cache, start, out = model.init_cache(2, 16), 0, []
      for size in pieces:
        logits, cache = run(
          model, params, tokens[:, start : start + size], cache=cache
        )
        out.append(logits)
        start += size
      assert_close(jnp.concatenate(out, axis=1), whole)
      self.assertEqual(int(cache["index"]), 11)

  def test_prefill_promise_and_last_only(self):
    model = small()
    params = perturbed(model)
    tokens = tokens_like(2, 9)
    want, plain = run(model, params, tokens, cache=model.init_cache(2, 16))
    got, promised = run(
      model,
      params,
      tokens,
      cache=model.init_cache(2, 16),
      prefill=True,
      last_only=True,
    )
    assert_close(got, want[:, -1:])
    chex.assert_trees_all_close(plain, promised, rtol=1e-4, atol=1e-5)

  def test_scan_and_unrolled_agree(self):
    model = small()
    params = perturbed(model)
    tokens = tokens_like(2, 9)
    flat, unrolled = model.unroll(params)
    assert_close(
      run(flat, unrolled, tokens),
      run(model, params, tokens),
    )
    again, stacked = flat.stack(unrolled)
    self.assertEqual(again, model)
    chex.assert_trees_all_equal(stacked, params)

  @parameterized.product(cached=(True, False), bias=(True, False))
  def test_left_padding_is_exact(self, cached, bias):
    model = small(
      mamba_proj_bias=bias,
      attention_bias=bias,
      projectors_bias=bias,
      mlp_bias=bias,
    )
    params = perturbed(model)
    tokens = tokens_like(1, 7)
    want = run(model, params, tokens)
    padded = jnp.concatenate([jnp.full((1, 5), 60), tokens], axis=1)
    mask = jnp.arange(12)[None] >= 5
    if not cached:
      got = run(model, params, padded, mask)
      assert_close(got[:, 5:], want)
      return
    cache, got = model.init_cache(1, 16), []
    for start, stop in ((0, 6), (6, 10), (10, 11), (11, 12)):
      logits, cache = run(
        model,
        params,
        padded[:, start:stop],
        mask[:, start:stop],
        cache=cache,
      )
      got.append(logits)
    assert_close(jnp.concatenate(got, axis=1)[:, 5:], want)
    self.assertEqual(int(cache["length"][0]), 7)

  def test_right_padding_leaves_the_state_alone(self):
    model = small()
    params = perturbed(model)
    tokens = tokens_like(1, 7)
    _, want = run(model, params, tokens, cache=model.init_cache(1, 16))
    padded = jnp.concatenate([tokens, jnp.full((1, 4), 60)], axis=1)
    _, got = run(
      model,
      params,
      padded,
      jnp.arange(11)[None] < 7,
      cache=model.init_cache(1, 16),
    )
    chex.assert_trees_all_close(
      got["layers"]["ssm"], want["layers"]["ssm"], rtol=1e-4, atol=1e-6
    )

  def test_packed_documents_do_not_see_each_other(self):
    model = small()
    params = perturbed(model)
    tokens = tokens_like(1, 14)
    lengths = (3, 1, 6, 4)
    segments = jnp.repeat(jnp.arange(4) + 1, jnp.array(lengths))[None]
    packed = run(model, params, tokens, segment_ids=segments)
    start = 0
    for length in lengths:
      piece = slice(start, start + length)
      alone = run(model, params, tokens[:, piece])
      assert_close(packed[:, piece], alone)
      start += length

  def test_every_multiplier_matters(self):
    """A factor that is read but not applied, or applied twice, is caught."""
    model = small(num_hidden_layers=1)
    params = perturbed(model)
    tokens = tokens_like(1, 6)
    base = run(model, params, tokens)
    for field in dataclasses.fields(DISTINCT):
      value = getattr(DISTINCT, field.name)
      options = (
        [
          tuple(2 * v if i == j else v for j, v in enumerate(value))
          for i in range(5)
        ]
        if field.name == "ssm"
        else [2 * value]
      )
      for changed in options:
        other = model.clone(
          multipliers=dataclasses.replace(DISTINCT, **{field.name: changed})
        )
        change = jnp.abs(run(other, params, tokens) - base).max()
        self.assertGreater(change, 1e-4, (field.name, changed))

  @parameterized.parameters("full", "dots")
  def test_remat_gives_the_same_gradient(self, remat):
    params = perturbed(small())
    tokens = tokens_like(2, 9)

    def grad(model):
      return jax.jit(
        jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, tokens))))
      )(params)

    chex.assert_trees_all_close(
      grad(small(remat=remat)), grad(small()), rtol=2e-4, atol=2e-5
    )

  def test_bfloat16_stays_near_float32(self):
    model = small()
    params = perturbed(model)
    tokens = tokens_like(2, 9)
    want = run(model, params, tokens)
    got = run(model.clone(dtype=jnp.bfloat16), params, tokens)
    self.assertEqual(got.dtype, jnp.float32)
    assert_close(got, want, 5e-2)

  @parameterized.parameters(
    dict(data=2, fsdp=2, tensor=2),
    dict(data=1, fsdp=2, tensor=4),
    dict(data=2, sequence=4),
    dict(sequence=2, fsdp=2, tensor=2),
  )
  def test_sharded_agrees(self, **axes):
    """Also where 2 key heads and 2 groups meet 4 tensor devices."""
    model = small(mamba_n_heads=8)
    params = perturbed(model)
    tokens = tokens_like(4, 16)
    segments = jnp.sort(
      jax.random.randint(jax.random.key(9), (4, 16), 1, 4), axis=1
    )

    def loss(params, tokens, segments):
      logits = run(model, params, tokens, segment_ids=segments)
      return jnp.sum(jnp.sin(logits)), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, want), want_grad = step(params, tokens, segments)
    mesh = make_mesh(**axes)
    with jax.set_mesh(mesh):
      placed = jax.device_put(params, sharding.param_shardings(model, mesh))
      batch = jax.device_put((tokens, segments), sharding.batch_sharding(mesh))
      (_, got), got_grad = step(placed, *batch)
    assert_close(got, want)
    chex.assert_trees_all_close(
      jax.device_get(got_grad), want_grad, rtol=1e-3, atol=2e-4
    )


class Compiled(absltest.TestCase):
  def test_only_weights_are_gathered(self):
    """No all-gather of q, k, v, the scan's inputs or any other activation."""
    model = small(
      num_attention_heads=4,
      mamba_n_heads=6,
      mamba_n_groups=1,
      hidden_size=32,
      intermediate_size=88,
      vocab_size=78,
    )
    mesh = make_mesh(data=2, fsdp=2, tensor=2)

    def loss(params, tokens):
      return jnp.mean(model.apply({"params": params}, tokens) ** 2)

    shardings = sharding.param_shardings(model, mesh)
    shapes = sharding.abstract_params(model)
    with jax.set_mesh(mesh):
      step = jax.jit(jax.grad(loss), out_shardings=shardings)
      tokens = jax.ShapeDtypeStruct(
        (8, 52), jnp.int32, sharding=sharding.batch_sharding(mesh)
      )
      placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
      )
      text = step.lower(placed, tokens).compile().as_text()
    gathers = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)
    self.assertNotEmpty(gathers)  # those of fsdp
    weights = set()
    for leaf in jax.tree.leaves(shapes):
      for shape in (leaf.shape, leaf.shape[1:]):  # stacked, or of one layer
        weights |= {math.prod(shape), math.prod(shape) // 2}
    for shape in gathers:
      size = math.prod(int(n) for n in shape.split(","))
      self.assertIn(size, weights, f"gathered: [{shape}]")


class Errors(absltest.TestCase):
  def test_names_are_suggested(self):
    with self.assertRaisesRegex(UserError, "did you mean 'falcon_h1'"):
      models.create("falcon-h1")
    with self.assertRaisesRegex(UserError, "its variants are tiny-90m, 0.5b"):
      models.create("falcon_h1", "9b")
    with self.assertRaisesRegex(UserError, "did you mean 'hidden_size'"):
      models.create("falcon_h1", "0.5b", hidden_sizes=3)

  def test_values_are_checked(self):
    with self.assertRaisesRegex(UserError, "num_key_value_heads=3"):
      small(num_key_value_heads=3)
    with self.assertRaisesRegex(UserError, "remat='all'"):
      small(remat="all")
    with self.assertRaisesRegex(UserError, "max_position_embeddings=8"):
      run(
        small(max_position_embeddings=8), perturbed(small()), tokens_like(1, 9)
      )

  def test_list(self):
    self.assertEqual(models.list("falcon*"), ("falcon_h1",))
    self.assertEqual(models.list("nothing*"), ())

  def test_shapes_are_checked(self):
    model = small()
    params = perturbed(model)
    with self.assertRaisesRegex(ValueError, "mask has shape"):
      run(model, params, tokens_like(1, 5), jnp.ones((1, 4), bool))
    with self.assertRaisesRegex(ValueError, "segment_ids cannot"):
      run(
        model,
        params,
        tokens_like(1, 5),
        segment_ids=jnp.ones((1, 5), jnp.int32),
        cache=model.init_cache(1, 8),
      )
