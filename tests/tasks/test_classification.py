"""The classification tasks: losses, mixup, sums, data in."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead import models, tasks
from multihead.errors import UserError
from multihead.tasks import classification
from multihead.train import config as config_lib

VIT = dict(
  img_size=6, patch_size=3, in_chans=1, num_classes=3, embed_dim=8, depth=1,
  num_heads=2, mlp_dim=8,
)  # fmt: skip
BERT = dict(
  vocab_size=260, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
  intermediate_size=8, max_position_embeddings=16, num_labels=2,
)  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
  """Sixty images whose class is written all over them."""
  rng = np.random.default_rng(0)
  labels = np.arange(60) % 3
  images = rng.integers(0, 60, (60, 6, 6)) + 80 * labels[:, None, None]
  np.savez(tmp_path / "x.npz", images=images.astype(np.uint8), labels=labels)
  return str(tmp_path / "x.npz")


@pytest.fixture
def sentences(tmp_path):
  records = [
    {"text": f"{'good' if i % 2 else 'bad'} film {i}", "label": i % 2}
    for i in range(40)
  ]
  file = tmp_path / "x.jsonl"
  file.write_text("\n".join(map(json.dumps, records)))
  return str(file)


def image_task(path, fields=(), **data):
  return tasks.create(
    "image_classification",
    models.create("vit", **{**VIT, **dict(fields)}),
    classification.ImageData(path=path, **data),
    sequence_length=256,
    batch_size=8,
  )


def text_task(path, fields=(), **data):
  return tasks.create(
    "text_classification",
    models.create("bert", **{**BERT, **dict(fields)}),
    classification.TextData(path=path, **data),
    sequence_length=12,
    batch_size=8,
  )


def compiled(task):
  return jax.jit(task.loss_fn, static_argnums=3)


def test_smoothed_loss_is_cross_entropy_with_its_target():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(5, 7)) * 3
  labels = rng.integers(0, 7, 5)
  target = np.full((5, 7), 0.1 / 7)
  target[np.arange(5), labels] += 0.9
  log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  losses, hits = classification.smoothed_losses(
    jnp.asarray(logits, jnp.float32), jnp.asarray(labels), 0.1
  )
  np.testing.assert_allclose(losses, -(target * log).sum(-1), rtol=1e-5)
  np.testing.assert_array_equal(hits, logits.argmax(-1) == labels)
  plain, _ = classification.smoothed_losses(
    jnp.asarray(logits, jnp.float32), jnp.asarray(labels), 0.0
  )
  np.testing.assert_allclose(plain, -log[np.arange(5), labels], rtol=1e-5)


@pytest.mark.parametrize("make", [image_task, text_task])
def test_a_batch_and_what_it_gives(make, pictures, sentences):
  task = make(pictures if make is image_task else sentences)
  params = task.init_params(jax.random.key(0))
  batch = next(task.train_iterator())
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), task.init_batch())
  assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == shapes
  loss_fn = compiled(task)
  loss, found = loss_fn(params, batch, jax.random.key(0), False)
  sums = jax.jit(task.eval_fn)(params, batch)
  summary = task.summarise(sums)
  assert float(loss) == pytest.approx(summary["loss"], rel=1e-5)
  assert float(found["accuracy"]) == pytest.approx(summary["accuracy"])
  assert float(found["weight"]) == 8
  # Rows without weight do not count, whatever is in them.
  key = "images" if make is image_task else "tokens"
  other = {**batch, key: batch[key].copy()}
  other[key][3:] = 1
  other["weights"] = (np.arange(8) < 3).astype(np.float32)
  few = {name: np.concatenate([x[:3]] * 3)[:8] for name, x in other.items()}
  few["weights"] = other["weights"]
  again, _ = loss_fn(params, other, jax.random.key(0), False)
  want, _ = loss_fn(params, few, jax.random.key(0), False)
  assert float(again) == pytest.approx(float(want), rel=1e-5)


def test_every_validation_example_is_scored_once(pictures):
  task = image_task(pictures, validation_fraction=0.25)
  params = task.init_params(jax.random.key(0))
  sums = [jax.jit(task.eval_fn)(params, b) for b in task.eval_iterator()]
  assert len(sums) == 2
  total = sum(np.asarray(s.confusion) for s in sums)
  np.testing.assert_array_equal(total.sum(1), [5, 5, 5])


def test_mixup_mixes_images_and_targets_alike(pictures):
  task = image_task(pictures, mixup=0.8)
  batch = next(task.train_iterator())
  mixed, (share, labels) = task.mix(batch, jax.random.key(3))
  assert 0 < share < 1
  np.testing.assert_array_equal(labels, batch["labels"][::-1])
  x = batch["images"]
  np.testing.assert_allclose(
    mixed["images"], share * x + (1 - share) * x[::-1], atol=1e-6
  )
  params = task.init_params(jax.random.key(0))
  rng = jax.random.key(1)
  _, draw = jax.random.split(rng)
  mixed, (share, labels) = task.mix(batch, draw)
  logits_of, loss_fn = jax.jit(task.logits), compiled(task)
  logits = logits_of(params, mixed)
  own, _ = classification.smoothed_losses(logits, batch["labels"], 0)
  others, _ = classification.smoothed_losses(logits, labels, 0)
  loss, _ = loss_fn(params, batch, rng, True)
  want = np.mean(share * own + (1 - share) * others)
  assert float(loss) == pytest.approx(float(want), rel=1e-5)
  # Not in evaluation.
  plain, _ = classification.smoothed_losses(
    logits_of(params, batch), batch["labels"], 0
  )
  loss, _ = loss_fn(params, batch, rng, False)
  assert float(loss) == pytest.approx(float(plain.mean()), rel=1e-5)


def test_dropout_is_on_in_training_alone(sentences):
  task = text_task(sentences)
  params = task.init_params(jax.random.key(0))
  batch = next(task.train_iterator())
  loss_fn = compiled(task)
  loss = lambda seed, train: float(
    loss_fn(params, batch, jax.random.key(seed), train)[0]
  )
  assert loss(0, True) != loss(1, True)
  assert loss(0, False) == loss(1, False)


def test_baselines_and_facts(pictures, sentences):
  found = image_task(pictures).baselines()
  assert found["nearest_class_mean_error"] == 0
  assert found["commonest_class_error"] == pytest.approx(2 / 3)
  assert text_task(sentences).baselines()["naive_bayes_error"] == 0
  facts = text_task(sentences).facts()
  assert "2 classes, 32 texts for training, 8 for validation" in facts[0]
  assert "0 of 40 texts are cut" in facts[1] or "cut to 12" in facts[1]


@pytest.mark.parametrize("fields, data, text", [
  (dict(num_classes=4), {}, "config.model.num_classes=3"),
  ({}, dict(label_smoothing=1.0), "label_smoothing"),
  ({}, dict(classes="0,7"), "no class '7'"),
  ({}, dict(normalise="imagenet"), "3 channels"),
  ({}, dict(path="/nowhere"), "no such folder"),
])  # fmt: skip
def test_images_that_cannot_be_used(fields, data, text, pictures):
  with pytest.raises(UserError, match=text):
    image_task(**{"path": pictures, "fields": fields, **data})


@pytest.mark.parametrize("fields, data, text", [
  (dict(num_labels=3), {}, "config.model.num_labels=2"),
  (dict(vocab_size=100), {}, "vocab_size to at least 258"),
  (dict(type_vocab_size=1), dict(pair_field="text"), "type_vocab_size"),
  ({}, dict(tokenizer="package:no_such_package/x"), "no_such_package"),
])  # fmt: skip
def test_texts_that_cannot_be_used(fields, data, text, sentences):
  with pytest.raises(UserError, match=text):
    text_task(sentences, fields, **data)


def test_a_model_of_another_kind(pictures, sentences):
  with pytest.raises(UserError, match="reads no images"):
    tasks.create(
      "image_classification", models.create("bert", **BERT),
      classification.ImageData(path=pictures), sequence_length=8, batch_size=2,
    )  # fmt: skip
  with pytest.raises(UserError, match="num_labels"):
    tasks.create(
      "text_classification", models.create("vit", **VIT),
      classification.TextData(path=sentences), sequence_length=8, batch_size=2,
    )  # fmt: skip


def test_config_sections_are_read_strictly():
  values = {
    "task": "image_classification",
    "model": {"name": "vit"},
    "data": {"flips": True},
  }
  with pytest.raises(UserError, match="flips"):
    config_lib.read_config(values)
  values["data"] = {"flip": True, "shift": 2}
  config = config_lib.read_config(values)
  assert config.data == classification.ImageData(flip=True, shift=2)
  assert config_lib.read_config(config.to_dict()) == config
