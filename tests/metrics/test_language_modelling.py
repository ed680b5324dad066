"""Sums of loss and accuracy against float64, and how they merge."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead.metrics import language_modelling as lm


def _batch(seed, shape, vocabulary=11, dtype=np.float32):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(*shape, vocabulary), scale=3).astype(dtype)
  targets = rng.integers(0, vocabulary, shape)
  weights = (rng.random(shape) < 0.7).astype(np.float32)
  return logits, targets, weights


def _expected(batches):
  """Float64, token by token."""
  nll, correct, total = 0.0, 0.0, 0.0
  for logits, targets, weights in batches:
    for place in np.ndindex(targets.shape):
      row = [float(x) for x in logits[place]]
      top = max(row)
      lse = top + math.log(sum(math.exp(x - top) for x in row))
      weight = float(weights[place])
      nll += weight * (lse - row[targets[place]])
      correct += weight * (row.index(top) == targets[place])
      total += weight
  return nll / total, correct / total, total


class TestUpdate:
  @pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7,), (2, 3, 4)])
  def test_against_float64(self, shape):
    batch = _batch(0, shape)
    batch[2].flat[0] = 1
    result = lm.compute(jax.jit(lm.update)(lm.empty(), *batch))
    loss, accuracy, tokens = _expected([batch])
    assert result["loss"] == pytest.approx(loss, rel=1e-6)
    assert result["accuracy"] == pytest.approx(accuracy, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(loss / math.log(2), 1e-6)
    assert result["tokens"] == tokens

  def test_batches_of_unequal_weight(self):
    batches = [_batch(s, (2, t)) for s, t in enumerate((1, 9, 3))]
    batches[1] = (*batches[1][:2], np.full((2, 9), 0.25, np.float32))
    sums = lm.empty()
    for batch in batches:
      sums = lm.update(sums, *batch)
    result = lm.compute(sums)
    loss, accuracy, tokens = _expected(batches)
    assert result["loss"] == pytest.approx(loss, rel=1e-6)
    assert result["accuracy"] == pytest.approx(accuracy, rel=1e-6)
    assert result["tokens"] == pytest.approx(tokens)
    mean_of_means = np.mean([_expected([b])[0] for b in batches])
    assert abs(mean_of_means - loss) > 1e-3

  def test_merge_is_update(self):
    batches = [_batch(s, (2, 5)) for s in range(4)]
    one_by_one = lm.empty()
    for batch in batches:
      one_by_one = lm.update(one_by_one, *batch)
    parts = [lm.update(lm.empty(), *b) for b in batches]
    merged = lm.merge(lm.merge(parts[3], parts[0]), lm.merge(*parts[1:3]))
    for key, value in lm.compute(one_by_one).items():
      assert lm.compute(merged)[key] == pytest.approx(value, rel=1e-7)

  def test_bfloat16_logits_are_summed_in_float32(self):
    logits, targets, weights = _batch(1, (4, 50))
    rounded = jnp.asarray(logits, jnp.bfloat16)
    result = lm.compute(lm.update(lm.empty(), rounded, targets, weights))
    loss, _, _ = _expected(
      [(np.asarray(rounded, np.float64), targets, weights)]
    )
    assert result["loss"] == pytest.approx(loss, rel=1e-6)

  def test_nothing_of_an_unscored_token_counts(self):
    logits, targets, weights = _batch(2, (3, 6))
    spoilt = np.where(weights[..., None] > 0, logits, np.nan)
    clean = lm.compute(lm.update(lm.empty(), logits, targets, weights))
    result = lm.compute(lm.update(lm.empty(), spoilt, targets, weights))
    assert result == clean and math.isfinite(result["loss"])

  def test_nan_that_counts_shows(self):
    logits, targets, weights = _batch(2, (3, 6))
    logits[0, 0], weights[0, 0] = np.nan, 1
    result = lm.compute(lm.update(lm.empty(), logits, targets, weights))
    assert math.isnan(result["loss"])

  def test_equal_logits_are_not_all_right(self):
    targets = np.arange(8)[None]
    result = lm.compute(
      lm.update(lm.empty(), np.zeros((1, 8, 8)), targets, np.ones((1, 8)))
    )
    assert result["accuracy"] == 1 / 8
    assert result["bits_per_byte"] == pytest.approx(3)

  def test_a_masked_logit_is_an_infinite_loss(self):
    logits = np.zeros((1, 2, 3), np.float32)
    logits[..., 0] = -np.inf
    nll, _ = lm.token_losses(logits, np.asarray([[0, 1]]))
    np.testing.assert_allclose(nll, [[np.inf, math.log(2)]], rtol=1e-6)


class TestSums:
  def test_many_batches_do_not_round_away(self):
    # One float32 would stand still at 2^24 tokens, and drift in the loss.
    step = jax.jit(lm.update_from_losses)
    nll = jnp.full((1, 1), 1.1)
    ones = jnp.full((1, 1), 1.0)
    sums = lm.Sums(
      *((jnp.float32(v), jnp.float32(0)) for v in (1.1 * 2**24, 0, 2**24))
    )
    start = lm.compute(sums)["tokens"] * lm.compute(sums)["loss"]
    for _ in range(300):
      sums = step(sums, nll, ones > 0, ones)
    result = lm.compute(sums)
    assert result["tokens"] == 2**24 + 300
    total = result["loss"] * result["tokens"]
    assert total - start == pytest.approx(300 * float(np.float32(1.1)), 1e-6)
    assert result["accuracy"] == pytest.approx(300 / (2**24 + 300), rel=1e-9)

  def test_is_a_pytree_that_a_scan_can_carry(self):
    batches = [_batch(s, (2, 5)) for s in range(6)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    sums, _ = jax.lax.scan(
      lambda s, b: (lm.update(s, *b), None), lm.empty(), stacked
    )
    assert lm.compute(sums)["loss"] == pytest.approx(
      _expected(batches)[0], rel=1e-6
    )

  def test_vocabulary_over_devices_is_not_gathered(self):
    mesh = jax.make_mesh(
      (2,),
      ("tensor",),
      (jax.sharding.AxisType.Auto,),
      devices=jax.devices()[:2],
    )
    spec = jax.sharding.PartitionSpec(None, None, "tensor")
    logits, targets, _ = _batch(0, (2, 8), vocabulary=64)
    sharded = jax.device_put(logits, jax.sharding.NamedSharding(mesh, spec))
    losses = jax.jit(lambda x, t: lm.token_losses(x, t)[0])
    text = losses.lower(sharded, targets).compile().as_text()
    assert "all-gather" not in text
    np.testing.assert_allclose(
      losses(sharded, targets), lm.token_losses(logits, targets)[0], rtol=1e-5
    )


class TestCompute:
  def test_bytes_per_token(self):
    sums = lm.update(lm.empty(), *_batch(3, (2, 5)))
    bits = lm.compute(sums)["bits_per_byte"]
    quarter = lm.compute(sums, bytes_per_token=4.0)["bits_per_byte"]
    assert quarter == pytest.approx(bits / 4)
    with pytest.raises(ValueError, match="bytes_per_token is 0"):
      lm.compute(sums, bytes_per_token=0)

  def test_nothing_scored(self):
    result = lm.compute(lm.empty())
    assert result.pop("tokens") == 0
    assert all(math.isnan(v) for v in result.values())

  def test_a_diverged_run_gets_its_numbers(self):
    sums = lm.update_from_losses(
      lm.empty(), np.full((1, 1), 1e4), np.ones((1, 1), bool), np.ones((1, 1))
    )
    assert lm.compute(sums)["perplexity"] == math.inf
