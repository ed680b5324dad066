"""Closed forms beside Monte Carlo, and recursions beside float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from multihead.models import icl_gd

COUNT = 100_000


def draw(law, d, n, o=1, *, noise=0.0, wrong=0, weight=1.0, seed=0):
  """x, y, x_query, y_query of many tasks, without the library's sampler."""
  rng = np.random.default_rng(seed)
  shape = (COUNT, n + 1, d)
  x = {
    "uniform": lambda: rng.uniform(-0.5, 0.5, shape),
    "normal": lambda: rng.standard_normal(shape),
  }[law]()
  w = weight * rng.standard_normal((COUNT, o, d))
  y = np.matmul(x, w.swapaxes(1, 2))
  context = y[:, :n] + noise * rng.standard_normal((COUNT, n, o))
  context[:, :wrong] = rng.standard_normal((COUNT, wrong, o))
  return x[:, :n], context, x[:, n], y[:, n]


def one_step(x, y, query, matrix):
  """x_q^T matrix sum_j x_j y_j: what a step from zero predicts."""
  grad = np.matmul(x.swapaxes(1, 2), y)
  return np.matmul((query @ matrix)[:, None], grad)[:, 0]


def estimate(values):
  return values.mean(), values.std() / np.sqrt(len(values))


class OneStep(parameterized.TestCase):
  @parameterized.parameters(
    ("uniform", 10, 10, {}, 1 / 12, 1 / 80),
    ("normal", 5, 7, {}, 1.0, 3.0),
    ("normal", 4, 1, dict(o=3, weight=0.5), 1.0, 3.0),
    ("normal", 3, 12, dict(noise=0.8), 1.0, 3.0),
    ("uniform", 4, 9, dict(wrong=3, weight=2.0), 1 / 12, 1 / 80),
  )
  def test_closed_form(self, law, d, n, more, variance, fourth):
    step, loss = icl_gd.optimal_step_and_loss(
      *(d, n, variance, fourth),
      output_size=more.get("o", 1),
      weight_variance=more.get("weight", 1.0) ** 2,
      noise_variance=more.get("noise", 0.0) ** 2,
      distractors=more.get("wrong", 0),
    )
    x, y, query, target = draw(law, d, n, **more)
    slope = one_step(x, y, query, np.eye(d))
    error = step * slope - target
    mean, se = estimate(0.5 * (error**2).sum(-1))
    assert abs(mean - loss) < 3 * se
    # At the best step the loss has no slope.
    mean, se = estimate((error * slope).sum(-1))
    assert abs(mean) < 3 * se

  def test_values_of_the_paper(self):
    step, loss = icl_gd.optimal_step_and_loss(10, 10, 1 / 12, 1 / 80)
    assert step == pytest.approx(0.6061, abs=1e-4)
    assert loss == pytest.approx(0.2062, abs=1e-4)
    # Of normal inputs: 1 / (N + d + 1) and d/2 (1 - N / (N + d + 1)).
    step, loss = icl_gd.optimal_step_and_loss(10, 10, 1.0, 3.0)
    assert step == pytest.approx(1 / 21)
    assert loss == pytest.approx(5 * 11 / 21)


class Anisotropic(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.9)
  def test_best_preconditioner(self, noise):
    d, n = 3, 6
    root = np.array([[1.0, 0, 0], [0.5, 0.7, 0], [-0.3, 0.2, 0.4]])
    covariance = root @ root.T
    more = dict(noise_variance=noise**2)
    best = icl_gd.anisotropic_preconditioner(covariance, n, **more)
    x, y, query, target = draw("normal", d, n)
    x, query = x @ root.T, query @ root.T
    # Labels anew: weights are N(0, 1) on the inputs as they are now.
    rng = np.random.default_rng(1)
    w = rng.standard_normal((COUNT, d, 1))
    y, target = np.matmul(x, w), np.matmul(query[:, None], w)[:, 0]
    y = y + noise * rng.standard_normal(y.shape)
    error = one_step(x, y, query, best / n) - target
    mean, se = estimate(0.5 * error[:, 0] ** 2)
    assert abs(mean - icl_gd.anisotropic_loss(covariance, n, **more)) < 3 * se
    # The derivative by each entry of the preconditioner vanishes.
    for i in range(d):
      for j in range(d):
        move = np.zeros((d, d))
        move[i, j] = 1
        mean, se = estimate((error * one_step(x, y, query, move))[:, 0])
        assert abs(mean) < 3.5 * se

  def test_isotropic_is_one_step(self):
    step, loss = icl_gd.optimal_step_and_loss(4, 9, 2.0, 12.0)
    best = icl_gd.anisotropic_preconditioner(2 * np.eye(4), 9)
    np.testing.assert_allclose(best / 9, step * np.eye(4), rtol=1e-12)
    assert icl_gd.anisotropic_loss(2 * np.eye(4), 9) == pytest.approx(loss)


class ManySteps(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.x, cls.y, cls.query, cls.target = draw("uniform", 10, 10)
    gram = np.matmul(cls.x.swapaxes(1, 2), cls.x)
    cls.spectra = jnp.asarray(np.linalg.eigvalsh(gram), jnp.float32)

  # Of 40,000 contexts: the best step and loss of K layers.
  @parameterized.parameters(
    (1, 0.605, 0.2062),
    (2, 0.600, 0.1566),
    (3, 0.585, 0.1328),
    (5, 0.560, 0.1086),
    (10, 0.485, 0.0849),
  )
  def test_losses_from_spectra(self, layers, step, loss):
    found = icl_gd.k_step_loss(self.spectra, jnp.full(layers, step), 1 / 12)
    assert found.shape == (COUNT,)
    assert float(found.mean()) == pytest.approx(loss, rel=0.01)

  def test_spectra_of_contexts(self):
    got = icl_gd.gram_eigenvalues(jnp.asarray(self.x[:20], jnp.float32))
    np.testing.assert_allclose(got, self.spectra[:20], atol=1e-5)

  def test_one_layer_is_the_closed_form(self):
    step, loss = icl_gd.optimal_step_and_loss(10, 10, 1 / 12, 1 / 80)
    found = icl_gd.k_step_loss(self.spectra, jnp.array([step]), 1 / 12)
    mean, se = estimate(np.asarray(found, np.float64))
    assert abs(mean - loss) < 3 * se

  def test_curvature_from_spectra_and_by_simulation(self):
    rates = dict(
      steps=jnp.array([1.4, 1.2, 1.0]), curvature=jnp.array([0.2, 0.15, 0.1])
    )
    found = icl_gd.k_step_loss(
      *(self.spectra, rates["steps"], 1 / 12), curvature=rates["curvature"]
    )
    arrays = [jnp.asarray(a, jnp.float32) for a in (self.x, self.y, self.query)]
    answer = icl_gd.gd_predictions(*arrays, **rates)[-1]
    loss = 0.5 * (np.asarray(answer, np.float64) - self.target) ** 2
    # The same contexts, so that only W and the query differ.
    mean, se = estimate(loss[:, 0] - np.asarray(found, np.float64))
    assert abs(mean) < 3 * se

  def test_search(self):
    loss = lambda step, gamma, spectra: jnp.mean(
      icl_gd.k_step_loss(
        *(spectra, jnp.full(2, step), 1 / 12), curvature=jnp.full(2, gamma)
      )
    )
    few = self.spectra[:5000]
    step, gamma, found = icl_gd.best_rates(loss, few, (0.0, 2.0))
    assert gamma == 0.0
    assert step == pytest.approx(0.600, abs=0.02)
    assert found == pytest.approx(0.1566, rel=0.02)
    step, gamma, found = icl_gd.best_rates(loss, few, (0.0, 4.0), (0.0, 0.5))
    assert found < 0.1135
    assert (step, gamma) == pytest.approx((1.36, 0.178), rel=0.08)

  def test_search_passes_what_diverges(self):
    loss = lambda a, b, _: jnp.where(a > 1, jnp.nan, (a - 0.7) ** 2 + b * b + 2)
    step, other, found = icl_gd.best_rates(loss, None, (0.0, 8.0), (-3.0, 3.0))
    assert (step, other, found) == pytest.approx((0.7, 0.0, 2.0), abs=0.01)


def test_predictions_step_by_step():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(3, 4, 2)), rng.normal(size=(3, 4, 2))
  query, start = rng.normal(size=(3, 2)), rng.normal(size=(2, 2))
  right = np.array([[1.0, 0.2], [0.3, 0.5]])
  steps = [0.1, 0.05]
  got = icl_gd.gd_predictions(
    *(jnp.asarray(a, jnp.float32) for a in (x, y, query)),
    steps,
    preconditioner=jnp.asarray(right, jnp.float32),
    initial=jnp.asarray(start, jnp.float32),
  )
  for b in range(3):
    w = start.copy()
    for k, step in enumerate(steps):
      w = w - step * (w @ x[b].T - y[b].T) @ x[b] @ right
      np.testing.assert_allclose(got[k, b], w @ query[b], atol=1e-5)


class Regression(parameterized.TestCase):
  @parameterized.parameters((3, 8, 2), (6, 4, 1), (2, 1, 1))
  def test_ridge_and_least_squares(self, d, n, o):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, n, d)), rng.normal(size=(5, n, o))
    query = rng.normal(size=(5, d))
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, y, query)]
    ridge = icl_gd.ridge_predictions(*arrays, 0.3)
    least = icl_gd.least_squares_predictions(*arrays)
    for b in range(5):
      w = np.linalg.solve(x[b].T @ x[b] + 0.3 * np.eye(d), x[b].T @ y[b])
      np.testing.assert_allclose(ridge[b], query[b] @ w, rtol=1e-4, atol=1e-5)
      w, *_ = np.linalg.lstsq(x[b], y[b], rcond=None)
      np.testing.assert_allclose(least[b], query[b] @ w, rtol=1e-3, atol=1e-4)

  def test_ridge_is_the_best_there_is(self):
    noise = 0.5
    x, y, query, target = draw("normal", 4, 8, noise=noise)
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, y, query)]
    loss = lambda p: ((np.asarray(p, np.float64) - target) ** 2).mean()
    best = loss(icl_gd.ridge_predictions(*arrays, noise**2))
    for other in (0.5, 2.0):
      assert best < loss(icl_gd.ridge_predictions(*arrays, other * noise**2))
    assert best < loss(icl_gd.least_squares_predictions(*arrays))

  def test_no_penalty_is_no_ridge(self):
    x = jnp.ones((1, 2, 2))
    with pytest.raises(ValueError, match="least_squares_predictions"):
      icl_gd.ridge_predictions(x, x, x[:, 0], 0.0)
    with jax.disable_jit(), pytest.raises(ValueError, match="positive"):
      icl_gd.ridge_predictions(x, x, x[:, 0], float("nan"))
