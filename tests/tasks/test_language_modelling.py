"""The language-modelling task: loss, sums, text in, text out."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from multihead import tasks
from multihead.errors import UserError
from multihead.parallel import make_mesh, sharding
from multihead.tasks import language_modelling as lm


class Bigram(nn.Module):
  """Logits from a table; the least that the task asks of a model."""

  vocab_size: int = 264
  max_position_embeddings: int = 64

  @nn.compact
  def __call__(self, tokens, segment_ids=None):
    shape = (self.vocab_size, self.vocab_size)
    table = self.param("table", nn.initializers.normal(1.0), shape)
    return table[tokens]


@pytest.fixture(autouse=True)
def _folder(request, tmp_path):
  if request.instance is not None:
    request.instance.folder = tmp_path


def _float64_losses(logits, targets):
  logits = np.asarray(logits, np.float64)
  top = logits.max(-1, keepdims=True)
  lse = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
  return lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


class TokenLossesTest(parameterized.TestCase):
  @parameterized.parameters((1, 1, 2), (2, 5, 7), (3, 4, 264))
  def test_against_float64(self, *shape):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=shape).astype(np.float32) * 30
    targets = rng.integers(0, shape[-1], shape[:-1])
    losses, hits = lm.token_losses(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(
      losses, _float64_losses(logits, targets), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(hits, logits.argmax(-1) == targets)

  def test_gradient_is_softmax_minus_one_hot(self):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(2, 3, 9)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 9, (2, 3)))
    grad = jax.grad(lambda x: lm.token_losses(x, targets)[0].sum())(logits)
    want = jax.nn.softmax(logits) - jax.nn.one_hot(targets, 9)
    np.testing.assert_allclose(grad, want, atol=1e-6)

  def test_large_logits_and_bfloat16(self):
    logits = jnp.asarray([[[1e4, 0.0, -1e4]]], jnp.bfloat16)
    losses, hits = lm.token_losses(logits, jnp.asarray([[1]]))
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, 1e4, rtol=1e-2)
    assert not hits[0, 0]

  def test_split_vocabulary_is_not_gathered(self):
    mesh = make_mesh(data=1, tensor=8)
    where = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(None, None, "tensor")
    )
    logits = jax.ShapeDtypeStruct((2, 16, 264), jnp.float32, sharding=where)
    targets = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    grad = lambda x, t: jax.grad(lambda x: lm.token_losses(x, t)[0].sum())(x)
    with jax.set_mesh(mesh):
      text = jax.jit(grad).lower(logits, targets).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text


class LanguageModellingTest(parameterized.TestCase):
  def _task(self, documents=None, length=16, batch=4, **data):
    rng = np.random.default_rng(0)
    words = ["one", "two", "three", "four", "fünf", "six", "seven", "eight"]
    documents = documents or [
      " ".join(rng.choice(words, 60)) + ".\n" for _ in range(8)
    ]
    folder = self.folder / "corpus"
    folder.mkdir(exist_ok=True)
    for i, document in enumerate(documents):
      (folder / f"{i}.txt").write_text(document, encoding="utf-8")
    config = lm.DataConfig(
      path=str(folder), validation_fraction=0.3, shared_words=0, **data
    )
    return tasks.create(
      "language_modelling",
      Bigram(),
      config,
      sequence_length=length,
      batch_size=batch,
    )

  def test_loss_is_the_mean_over_tokens_that_count(self):
    task = self._task()
    batch = {**next(task.train_iterator())}
    batch["weights"] = batch["weights"] * (np.arange(16) % 3 > 0)
    params = task.init_params(jax.random.key(0))
    loss, metrics = task.loss_fn(params, batch, jax.random.key(1), True)
    logits = np.asarray(params["table"])[batch["tokens"]]
    losses = _float64_losses(logits, batch["targets"])
    weights = batch["weights"]
    np.testing.assert_allclose(
      loss, (losses * weights).sum() / weights.sum(), rtol=1e-5
    )
    hits = logits.argmax(-1) == batch["targets"]
    np.testing.assert_allclose(
      metrics["accuracy"], (hits * weights).sum() / weights.sum(), rtol=1e-5
    )
    assert float(metrics["weight"]) == weights.sum()

  def test_nothing_counts(self):
    task = self._task()
    batch = {**next(task.train_iterator())}
    batch["weights"] = np.zeros_like(batch["weights"])
    params = task.init_params(jax.random.key(0))
    loss, grads = jax.value_and_grad(
      lambda p: task.loss_fn(p, batch, None, True)[0]
    )(params)
    assert float(loss) == 0.0
    assert not np.any(np.asarray(grads["table"]))

  def test_bits_per_byte_over_the_validation_text(self):
    task = self._task(overlap=0)
    params = task.init_params(jax.random.key(0))
    sums = [task.eval_fn(params, b) for b in task.eval_iterator()]
    total = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), 0), *sums)
    found = task.summarise(total)
    # By hand: every byte of every validation document, after the one before
    # it, the first one after bos.
    table = np.asarray(params["table"])
    nats = num_bytes = 0
    for document in task.split.validation:
      ids = np.frombuffer(document.text.encode(), np.uint8).astype(int)
      before = np.concatenate([[256], ids[:-1]])
      nats += _float64_losses(table[before], ids).sum()
      num_bytes += len(ids)
    want = nats / math.log(2) / num_bytes
    assert found["bits_per_byte"] == pytest.approx(want, rel=1e-5)
    assert found["loss"] == pytest.approx(nats / num_bytes, rel=1e-5)

  def test_baselines_are_of_the_same_split(self):
    task = self._task()
    found = task.baselines()
    assert set(found) == {
      "gzip_bits_per_byte",
      *(f"markov_{order}_bits_per_byte" for order in range(1, 6)),
    }
    # Words of a known list: more context tells more.
    assert found["markov_3_bits_per_byte"] < found["markov_1_bits_per_byte"]

  def test_init_batch_is_like_the_real_ones(self):
    task = self._task()
    like = lambda batch: {k: (v.shape, v.dtype) for k, v in batch.items()}
    assert like(task.init_batch()) == like(next(task.train_iterator()))
    assert like(task.init_batch()) == like(next(task.eval_iterator()))
    assert task.units_per_step == 64

  def test_processes_share_a_batch(self):
    task = self._task()
    whole = next(task.train_iterator())
    parts = [next(task.train_iterator(i, 2)) for i in range(2)]
    for name in whole:
      np.testing.assert_array_equal(
        whole[name], np.concatenate([p[name] for p in parts])
      )

  def test_tokenizer_larger_than_the_model(self):
    folder = self.folder / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("some text. " * 50)
    with pytest.raises(UserError, match="258 ids, but the model's vocab_size"):
      tasks.create(
        "language_modelling",
        Bigram(vocab_size=256),
        lm.DataConfig(path=str(folder), shared_words=0),
        sequence_length=8,
        batch_size=2,
      )

  def test_no_text(self):
    with pytest.raises(UserError, match="no such file or folder"):
      tasks.create(
        "language_modelling",
        Bigram(),
        lm.DataConfig(path=str(self.folder / "none")),
        sequence_length=8,
        batch_size=2,
      )

  def test_unknown_task(self):
    with pytest.raises(UserError, match="did you mean 'language_modelling'"):
      tasks.create("language_modeling", Bigram(), lm.DataConfig())


class SampleTest(parameterized.TestCase):
  """What the model says is cut at the end of the document."""

  def _sample(self, monkeypatch_tokens, prompt, length, positions=64):
    seen = {}

    def generate(model, params, tokens, *, max_new_tokens, **settings):
      seen.update(tokens=np.asarray(tokens), new=max_new_tokens, **settings)
      new = np.resize(monkeypatch_tokens, (1, max_new_tokens))
      return np.concatenate([np.asarray(tokens), new], axis=1)

    class Fixed(Bigram):
      def unroll(self, params):
        return self, params

    folder = self.folder / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("some text. " * 50)
    task = tasks.create(
      "language_modelling",
      Fixed(max_position_embeddings=positions),
      lm.DataConfig(path=str(folder), shared_words=0),
      sequence_length=8,
      batch_size=2,
    )
    before = lm.generation.generate
    lm.generation.generate = generate
    try:
      return task.sample({}, prompt=prompt, length=length), seen
    finally:
      lm.generation.generate = before

  def test_prompt_and_continuation(self):
    text, seen = self._sample(list(b"abc"), "In the ", 6)
    assert text == "In the abcabc"
    np.testing.assert_array_equal(seen["tokens"][0], [256, *b"In the "])
    assert seen["eos_id"] == 257

  def test_ends_with_the_document(self):
    text, _ = self._sample([*b"ab", 257, 257], "", 6)
    assert text == "ab"

  def test_long_prompt_keeps_its_end(self):
    text, seen = self._sample(list(b"z"), "0123456789" * 9, 10, positions=16)
    assert text == "56789" + "z" * 10
    assert seen["tokens"].shape == (1, 6)


def test_model_places_logits_for_the_loss():
  # The task relies on a batch sharding that any mesh can give.
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  where = sharding.batch_sharding(mesh)
  assert where.shard_shape((8, 16)) == (2, 16)
