"""Schedules against closed forms, optimizers against NumPy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from multihead.errors import UserError
from multihead.train import optimizers
from multihead.train.config import OptimizerConfig


def _rates(total, **settings):
  schedule = optimizers.make_schedule(OptimizerConfig(**settings), total)
  return [float(schedule(i)) for i in range(total)]


class ScheduleTest(parameterized.TestCase):
  @parameterized.parameters(*optimizers.SCHEDULES)
  def test_warm_up_rises_in_equal_steps_to_the_peak(self, name):
    rates = _rates(40, schedule=name, lr=0.8, warmup_steps=4)
    np.testing.assert_allclose(rates[:4], [0.2, 0.4, 0.6, 0.8], rtol=1e-6)
    assert max(rates) == pytest.approx(0.8)

  @parameterized.parameters(*optimizers.SCHEDULES)
  def test_first_update_moves_without_a_warm_up(self, name):
    assert _rates(40, schedule=name, lr=0.8)[0] > 0.7

  def test_constant(self):
    np.testing.assert_allclose(_rates(5, schedule="constant", lr=0.3), 0.3)

  def test_linear_and_cosine_end_at_the_factor(self):
    n = 10
    share = np.arange(1, n + 1) / n
    linear = 2.0 * (1 - 0.75 * share)
    cosine = 2.0 * (0.25 + 0.75 * 0.5 * (1 + np.cos(np.pi * share)))
    settings = dict(lr=2.0, end_factor=0.25)
    np.testing.assert_allclose(
      _rates(n, schedule="linear", **settings), linear, rtol=1e-5
    )
    np.testing.assert_allclose(
      _rates(n, schedule="cosine", **settings), cosine, rtol=1e-5
    )

  def test_wave_comes_back_and_ends_where_it_is(self):
    """The rate of VM-UNet: a cosine of period 2 x 50, 300 without restart."""
    epochs = np.arange(301)
    published = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * epochs / 50))
    rates = _rates(
      301, schedule="wave", lr=1e-3, decay_steps=50, end_factor=0.01
    )
    np.testing.assert_allclose(rates, published, rtol=1e-3, atol=1e-8)
    assert rates[300] == pytest.approx(1e-3) and rates[50] < 1.1e-5

  def test_decay_shorter_than_the_run_stays_at_its_end(self):
    rates = _rates(9, schedule="linear", lr=1.0, decay_steps=3, end_factor=0.0)
    np.testing.assert_allclose(rates[:3], [2 / 3, 1 / 3, 0], atol=1e-6)
    np.testing.assert_allclose(rates[3:], 0, atol=1e-6)

  def test_wsd_is_stable_then_exponential(self):
    rates = _rates(
      20,
      schedule="wsd",
      lr=1.0,
      warmup_steps=5,
      decay_steps=8,
      end_factor=1 / 8,
    )
    np.testing.assert_allclose(rates[4:12], 1.0, rtol=1e-6)
    ratios = np.divide(rates[12:], rates[11:-1])
    np.testing.assert_allclose(ratios, (1 / 8) ** (1 / 8), rtol=1e-5)
    assert rates[-1] == pytest.approx(1 / 8, rel=1e-5)

  def test_power_falls_with_the_fourth_root(self):
    rates = _rates(3200, schedule="power", lr=1.0, warmup_steps=200)
    assert rates[199] == pytest.approx(1.0)
    # 16 times the warm-up: half the rate.
    assert rates[3199] == pytest.approx(0.5, rel=1e-5)

  @parameterized.parameters(
    (dict(schedule="cosin"), "(did you mean 'cosine'?)"),
    (dict(name="adam"), "(did you mean 'adamw'?)"),
    (dict(warmup_steps=11), "do not fit into total_steps=10"),
    (dict(warmup_steps=6, decay_steps=6), "do not fit into total_steps=10"),
    (dict(schedule="wsd", end_factor=0.0), "must be above 0 for wsd"),
  )
  def test_mistakes(self, settings, message):
    with pytest.raises(UserError) as raised:
      optimizers.make_optimizer(OptimizerConfig(**settings), 10)
    assert message in str(raised.value)


def _params():
  rng = np.random.default_rng(0)
  leaf = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    "embed": {"embedding": leaf(5, 3)},
    "layers": {
      "norm": {"scale": leaf(2, 3)},
      "mamba": {
        "A_log": leaf(2, 4),
        "D": leaf(2, 4),
        "dt_bias": leaf(2, 4),
        "conv_x": {"kernel": leaf(2, 4, 3), "bias": leaf(2, 3)},
      },
    },
  }


class OptimizerTest(parameterized.TestCase):
  def test_only_matrices_decay(self):
    params = _params()
    config = OptimizerConfig(
      name="sgd", lr=1.0, schedule="constant", weight_decay=0.5
    )
    optimizer, _ = optimizers.make_optimizer(config, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    moved = {
      jax.tree_util.keystr(path, simple=True, separator="/")
      for path, update in jax.tree_util.tree_leaves_with_path(updates)
      if np.any(update)
    }
    assert moved == {"embed/embedding", "layers/mamba/conv_x/kernel"}
    np.testing.assert_allclose(
      updates["embed"]["embedding"], -0.5 * params["embed"]["embedding"]
    )

  @parameterized.parameters("constant", "power")
  def test_adamw_against_numpy(self, schedule):
    config = OptimizerConfig(
      lr=0.1,
      schedule=schedule,
      warmup_steps=3,
      weight_decay=0.2,
      b1=0.8,
      b2=0.9,
      eps=1e-6,
      clip_norm=1.5,
    )
    optimizer, _ = optimizers.make_optimizer(config, 9)
    start = np.random.default_rng(1).normal(size=(4, 3))
    params = {"kernel": jnp.asarray(start, jnp.float32)}
    state = optimizer.init(params)
    p, m, v = start.copy(), 0.0, 0.0
    for t in range(1, 10):
      grad = np.random.default_rng(t + 1).normal(size=(4, 3))
      updates, state = optimizer.update(
        {"kernel": jnp.asarray(grad, jnp.float32)}, state, params
      )
      params = optax.apply_updates(params, updates)
      norm = math.sqrt((grad**2).sum())
      grad = grad * min(1.0, 1.5 / norm)
      m = 0.8 * m + 0.2 * grad
      v = 0.9 * v + 0.1 * grad**2
      step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6)
      factor = min(t / 3, 1.0)
      if schedule == "power":
        factor *= (max(t, 3) / 3) ** -0.25
      # The decay of the power schedule falls like the rate.
      decay = 0.2 * (factor if schedule == "power" else 1.0)
      p = p - 0.1 * factor * (step + decay * p)
    np.testing.assert_allclose(params["kernel"], p, rtol=2e-5, atol=2e-6)

  @parameterized.parameters("adamw", "lion", "sgd")
  def test_each_lowers_a_quadratic(self, name):
    lr = {"adamw": 0.1, "lion": 0.02, "sgd": 0.05}[name]
    config = OptimizerConfig(name=name, lr=lr, schedule="cosine", b1=0.8)
    optimizer, _ = optimizers.make_optimizer(config, 200)
    params = {"kernel": jnp.ones((3, 3))}
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
      grads = jax.grad(lambda p: jnp.sum(p["kernel"] ** 2))(params)
      updates, state = optimizer.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    for _ in range(200):
      params, state = step(params, state)
    assert float(jnp.max(jnp.abs(params["kernel"]))) < 0.05
