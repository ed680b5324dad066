"""BERT: counts, goldens of transformers, masks, and ways of running it."""

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
from multihead.models import bert
from multihead.parallel import make_mesh, sharding

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import encoder_cases as cases  # noqa: E402

TOLERANCE = 2e-5  # of the largest value

# Counted in the modules of transformers 5.23 (encoder and pooler); the cased
# ones have a vocabulary of 28,996 instead of 30,522.
COUNTS = {
  "bert-tiny": 4_385_920,
  "bert-mini": 11_170_560,
  "minilm-l6": 22_713_216,
  "bert-small": 28_763_648,
  "minilm-l12": 33_360_000,
  "bert-medium": 41_373_184,
  "bert-base-cased": 109_482_240 - 1526 * 768,
  "bert-base-uncased": 109_482_240,
  "roberta-base": 124_645_632,
  "bert-large-cased": 335_141_888 - 1526 * 1024,
  "bert-large-uncased": 335_141_888,
  "roberta-large": 355_359_744,
}

TINY = dict(
  vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
  intermediate_size=24, max_position_embeddings=20,
)  # fmt: skip


@functools.cache
def tiny(**fields):
  """A small model with parameters far from their initial values."""
  model = bert.Bert(**{**TINY, **fields})
  params = sharding.init_params(model, jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noisy = [
    x + 0.2 * jax.random.normal(k, x.shape)
    for k, x in zip(keys, leaves, strict=True)
  ]
  return model, jax.tree.unflatten(tree, noisy)


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=("method", "deterministic", "normalise"),
)
def apply(model, params, *args, **kwargs):
  return model.apply({"params": params}, *args, **kwargs)


def tokens(batch=2, length=7, seed=0):
  return np.random.default_rng(seed).integers(0, 30, (batch, length))


@pytest.mark.parametrize("variant", COUNTS)
def test_count(variant):
  model = models.create("bert", variant)
  assert (
    sharding.param_count(sharding.abstract_params(model)) == (COUNTS[variant])
  )


def test_every_variant_is_counted():
  assert set(models.variants("bert")) == set(COUNTS)


@pytest.mark.parametrize("case", ["bert", "roberta"])
def test_golden(case, tmp_path):
  with np.load(GOLDEN / "encoders.npz") as stored:
    expected = stored[case]
    shapes = json.loads(str(stored[f"{case}_shapes"]))
  cases.write_directory(tmp_path, case, shapes)
  model, params = checkpoints.from_pretrained(tmp_path)
  ids, mask = cases.texts(padding=1 if case == "roberta" else 0)
  got = np.asarray(jax.jit(model.apply)({"params": params}, ids, mask))
  if case == "roberta":
    got, expected = got[mask], expected[mask]
  assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("offset", [0, 2])
def test_padding_changes_nothing(offset):
  model, params = tiny(num_labels=3, position_offset=offset)
  ids = tokens(length=5)
  expected = apply(model, params, ids)
  padded = np.pad(ids, ((0, 0), (0, 4)), constant_values=29)
  mask = np.arange(9) < 5
  got = apply(model, params, padded, np.broadcast_to(mask, padded.shape))
  np.testing.assert_allclose(got, expected, atol=2e-6)


def test_padding_counts_no_position():
  """With an offset, as RoBERTa's, padding may also stand on the left."""
  model, params = tiny(position_offset=2)
  ids = tokens(length=5)
  padded = np.pad(ids, ((0, 0), (3, 0)))
  mask = np.broadcast_to(np.arange(8) >= 3, padded.shape)
  got = apply(model, params, padded, mask)[:, 3:]
  np.testing.assert_allclose(got, apply(model, params, ids), atol=2e-6)


def test_one_token_and_token_types():
  model, params = tiny()
  ids = tokens(length=1)
  assert apply(model, params, ids).shape == (2, 1, 16)
  ids = tokens()
  zeros = apply(model, params, ids, None, np.zeros_like(ids))
  np.testing.assert_array_equal(zeros, apply(model, params, ids))
  ones = apply(model, params, ids, None, np.ones_like(ids))
  assert not np.allclose(zeros, ones)


def test_sentence_embeddings():
  model, params = tiny()
  ids = tokens(batch=3)
  mask = np.arange(7) < np.array([[7], [4], [0]])
  hidden = np.asarray(apply(model, params, ids, mask), np.float64)
  embed = functools.partial(
    apply, model, params, ids, mask, method="embed_sentences"
  )
  want = np.stack([hidden[0].mean(0), hidden[1, :4].mean(0), np.zeros(16)])
  np.testing.assert_allclose(embed(normalise=False), want, atol=1e-6)
  norms = np.linalg.norm(embed(), axis=1)
  np.testing.assert_allclose(norms, [1, 1, 0], atol=1e-6)


def test_scan_and_remat_change_nothing():
  model, params = tiny(num_labels=3)
  ids = tokens()
  mask = np.arange(7) < np.array([[7], [4]])

  @functools.partial(jax.jit, static_argnums=0)
  @functools.partial(jax.grad, argnums=1)
  def gradient(model, params):
    return jnp.sum(apply(model, params, ids, mask) ** 2)

  expected = gradient(model, params)
  unrolled, layers = model.unroll(params)
  again = gradient(unrolled.clone(remat="full"), layers)
  chex.assert_trees_all_close(
    unrolled.stack(again)[1], expected, rtol=1e-4, atol=2e-6
  )


def test_dropout_acts_in_training_alone():
  model, params = tiny(num_labels=3)
  none = model.clone(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
  ids = tokens()
  rngs = {"dropout": jax.random.key(0)}
  expected = apply(none, params, ids)
  np.testing.assert_array_equal(apply(model, params, ids), expected)
  same = apply(none, params, ids, deterministic=False, rngs=rngs)
  np.testing.assert_array_equal(same, expected)
  other = apply(model, params, ids, deterministic=False, rngs=rngs)
  assert not np.allclose(other, expected)


def test_sharded():
  model, params = tiny(num_labels=4)
  ids = tokens(batch=8)
  mask = np.arange(7) < np.array([[7], [4]] * 4)
  loss = lambda params, ids, mask: jnp.mean(
    apply(model, params, ids, mask) ** 2
  )
  expected = jax.jit(jax.value_and_grad(loss))(params, ids, mask)
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  with jax.set_mesh(mesh):
    places = sharding.param_shardings(model, mesh)
    params = jax.tree.map(jax.device_put, params, places)
    ids, mask = jax.device_put((ids, mask), sharding.batch_sharding(mesh))
    got = jax.jit(jax.value_and_grad(loss))(params, ids, mask)
  chex.assert_trees_all_close(got, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("fields, text", [
  (dict(num_attention_heads=3), "multiple of"),
  (dict(hidden_act="swoosh"), "gelu"),
  (dict(num_labels=2, add_pooling_layer=False), "add_pooling_layer"),
  (dict(remat="some"), "'dots'"),
])  # fmt: skip
def test_fields_that_cannot_be(fields, text):
  with pytest.raises(UserError, match=text):
    bert.Bert(**{**TINY, **fields})


def test_inputs_that_do_not_fit():
  model, params = tiny(position_offset=2)
  with pytest.raises(UserError, match="18 positions"):
    apply(model, params, tokens(length=19))
  with pytest.raises(ValueError, match="mask has shape"):
    apply(model, params, tokens(), np.ones((2, 6), bool))
  with pytest.raises(ValueError, match="must be"):
    apply(model, params, np.zeros(3, np.int32))
