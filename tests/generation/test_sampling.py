"""Sampling against brute force in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from multihead.generation import sampling


def _brute_force(logits, temperature, top_k, top_p):
  """The distribution that tokens must be drawn from, float64, one row."""
  logits = np.asarray(logits, np.float64) / temperature
  order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
  if top_k is not None:
    order = order[:top_k]
  weights = np.exp(logits[order] - logits[order].max())
  weights /= weights.sum()
  if top_p is not None and top_p < 1:
    kept, total = 0, 0.0
    for weight in weights:
      kept, total = kept + 1, total + weight
      if total >= top_p:
        break
    order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
  distribution = np.zeros(len(logits))
  distribution[order] = weights
  return distribution


def _draws(logits, count, **settings):
  strategy, numbers = sampling.plan(logits.shape[-1], **settings)
  rows = jnp.broadcast_to(logits, (count, logits.shape[-1]))
  sample = jax.jit(sampling.sample, static_argnames="strategy")
  return np.asarray(sample(rows, jax.random.key(0), strategy, numbers))


class SamplingTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(temperature=1.0),
    dict(temperature=0.5),
    dict(temperature=2.0, top_k=3),
    dict(temperature=1.0, top_k=1),
    dict(temperature=1.0, top_k=100),
    dict(temperature=1.0, top_p=0.7),
    dict(temperature=1.0, top_p=1e-6),
    dict(temperature=1.0, top_p=1.0),
    dict(temperature=0.7, top_k=5, top_p=0.8),
    dict(temperature=1.5, top_k=2, top_p=0.99),
  )
  def test_draws_follow_the_distribution(self, **settings):
    logits = np.array([0.3, 2.0, -1.0, 1.9, 0.0, -30.0, 1.0], np.float32)
    count = 40_000
    drawn = _draws(logits, count, **settings)
    settings = {"top_k": None, "top_p": None, **settings}
    wanted = _brute_force(logits, **settings)
    found = np.bincount(drawn, minlength=len(logits)) / count
    np.testing.assert_array_equal(found[wanted == 0], 0)
    # Five standard deviations of a frequency.
    margin = 5 * np.sqrt(wanted * (1 - wanted) / count)
    np.testing.assert_array_less(np.abs(found - wanted), margin + 1e-12)

  def test_nucleus_border_is_inclusive(self):
    # 0.5 + 0.25 reaches 0.75 exactly: the third token is out; a little more
    # and it is in.
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    self.assertEqual(
      set(_draws(logits, 2000, temperature=1.0, top_p=0.75)), {0, 1}
    )
    self.assertEqual(
      set(_draws(logits, 2000, temperature=1.0, top_p=0.76)), {0, 1, 2}
    )

  def test_ties_keep_exactly_k(self):
    logits = np.zeros(9, np.float32)
    drawn = _draws(logits, 2000, temperature=1.0, top_k=4)
    self.assertEqual(set(drawn), {0, 1, 2, 3})

  def test_large_k_beyond_the_first_block(self):
    logits = np.linspace(0, 1, 300, dtype=np.float32)
    drawn = _draws(logits, 20_000, temperature=1.0, top_k=200)
    self.assertEqual(drawn.min(), 100)
    self.assertEqual(drawn.max(), 299)

  def test_masked_tokens_are_never_drawn(self):
    logits = np.array([-np.inf, 0.0, -np.inf, 1.0], np.float32)
    for settings in ({}, {"top_k": 3}, {"top_p": 0.999999}):
      drawn = _draws(logits, 2000, temperature=5.0, **settings)
      self.assertEqual(set(drawn), {1, 3}, settings)

  def test_greedy_takes_the_largest_of_each_row(self):
    logits = np.random.default_rng(0).normal(size=(5, 33)).astype(np.float32)
    strategy, numbers = sampling.plan(33)
    tokens = sampling.sample(jnp.asarray(logits), None, strategy, numbers)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    self.assertEqual(tokens.dtype, jnp.int32)

  def test_rows_are_drawn_independently(self):
    drawn = _draws(np.zeros(1000, np.float32), 2000, temperature=1.0)
    self.assertGreater(len(set(drawn)), 800)

  def test_other_numbers_share_a_program(self):
    plans = [
      sampling.plan(50_000, temperature=t, top_k=k, top_p=p)[0]
      for t, k, p in ((0.1, 40, None), (3.0, 50, 0.9), (1.0, 64, 0.5))
    ]
    self.assertLen(set(plans), 1)

  @parameterized.parameters(
    (dict(temperature=-1.0), "temperature=-1.0"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(temperature=1.0, top_k=0), "top_k=0"),
    (dict(temperature=1.0, top_p=0.0), "top_p=0.0"),
    (dict(temperature=1.0, top_p=1.5), "top_p=1.5"),
  )
  def test_numbers_outside_their_range(self, settings, text):
    with self.assertRaisesRegex(ValueError, text):
      sampling.plan(10, **settings)
