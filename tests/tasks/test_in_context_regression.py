"""Task families: laws, labels, tokens, determinism."""

import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from multihead.errors import UserError
from multihead.tasks import in_context_regression as icr
from multihead.tasks.in_context_regression import InContextRegression


def sample(count=64, seed=0, **fields):
  # One program for equal families of equal size.
  draw = jax.jit(InContextRegression.sample, static_argnums=(0, 2))
  tasks = draw(InContextRegression(**fields), jax.random.key(seed), count)
  return jax.tree.map(np.asarray, tasks)


class Determinism(parameterized.TestCase):
  def test_a_task_depends_on_key_and_number_alone(self):
    fields = dict(noise=0.1, distractors=2, inputs="mixture", normalize=True)
    chex.assert_trees_all_equal(sample(**fields), sample(**fields))
    few, many = sample(5, **fields), sample(**fields)
    # The norm of a matrix may round otherwise in another batch.
    first = jax.tree.map(lambda x: x[:5], many)
    chex.assert_trees_all_close(few, first, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(sample(5).x, sample().x[:5])
    other = sample(seed=1, **fields)
    for name in ("x", "y", "latent"):
      assert not np.any(getattr(many, name) == getattr(other, name))
    # No two tasks share anything.
    assert len(np.unique(many.x)) == many.x.size

  def test_scales_given_late(self):
    family = InContextRegression()
    key = jax.random.key(0)
    base = family.sample(key, 4)
    late = jax.jit(
      lambda r, w: family.sample(key, 4, input_range=r, weight_scale=w)
    )(2.0, 3.0)
    np.testing.assert_allclose(late.x, 2 * base.x, rtol=1e-6)
    np.testing.assert_allclose(late.y, 6 * base.y, rtol=1e-5, atol=1e-5)
    early = InContextRegression(input_range=2.0, weight_scale=3.0)
    chex.assert_trees_all_close(early.sample(key, 4), late, atol=1e-5)


class Inputs(parameterized.TestCase):
  @parameterized.parameters("uniform", "normal", "laplace")
  def test_moments(self, law):
    fields = dict(inputs=law, input_range=1.5, input_size=3)
    tasks = sample(20_000, **fields)
    variance, fourth = InContextRegression(**fields).moments()
    for x in (tasks.x, tasks.x_query):
      x = x.astype(np.float64)
      for power, want in ((1, 0.0), (2, variance), (4, fourth)):
        values = (x**power).reshape(len(x), -1).mean(-1)
        se = values.std() / np.sqrt(len(values))
        assert abs(values.mean() - want) < 4 * se

  def test_uniform_is_within_its_range(self):
    tasks = sample(2000, input_range=3.0)
    assert 1.49 < np.abs(tasks.x).max() <= 1.5

  def test_exponential_is_positive(self):
    tasks = sample(20_000, inputs="exponential", input_range=2.0)
    assert tasks.x.min() >= 0
    assert tasks.x.mean() == pytest.approx(2.0, rel=0.01)
    with pytest.raises(ValueError, match="no closed form.*exponential"):
      InContextRegression(inputs="exponential").moments()

  def test_covariance(self):
    fields = dict(inputs="anisotropic", input_size=3, spectrum=(0.1, 1.0, 4.0))
    want = InContextRegression(**fields).covariance
    np.testing.assert_allclose(np.linalg.eigvalsh(want), fields["spectrum"])
    assert np.abs(want - np.diag(np.diag(want))).max() > 0.3
    x = sample(20_000, **fields).x.reshape(-1, 3)
    np.testing.assert_allclose(x.T @ x / len(x), want, atol=0.05)
    plain = InContextRegression(**fields, rotation_seed=None).covariance
    np.testing.assert_array_equal(plain, np.diag(fields["spectrum"]))

  def test_normalized_mixture(self):
    tasks = sample(300, inputs="mixture", normalize=True, input_range=2.5)
    norms = np.linalg.norm(tasks.x, axis=(1, 2))
    np.testing.assert_allclose(norms, 2.5, rtol=1e-5)
    # About a third of the tasks has no negative input at all.
    positive = (tasks.x >= 0).all((1, 2)).mean()
    assert 0.23 < positive < 0.43
    # The query is of the same scale, not itself of that norm.
    size = np.linalg.norm(tasks.x_query, axis=-1) * np.sqrt(10)
    assert 2.2 < size.mean() < 2.8 and size.std() > 0.2


class Functions(parameterized.TestCase):
  def test_linear(self):
    tasks = sample(2000, input_size=3, output_size=2, weight_scale=2.0)
    want = np.einsum("bod,bnd->bno", tasks.latent, tasks.x)
    np.testing.assert_allclose(tasks.y, want, rtol=1e-4, atol=1e-5)
    want = np.einsum("bod,bd->bo", tasks.latent, tasks.x_query)
    np.testing.assert_allclose(tasks.y_query, want, rtol=1e-4, atol=1e-5)
    assert tasks.latent.std() == pytest.approx(2.0, rel=0.03)

  def test_noise_and_distractors(self):
    clean = sample(1000)
    noisy = sample(1000, noise=0.3)
    difference = noisy.y - clean.y
    assert difference.std() == pytest.approx(0.3, rel=0.03)
    np.testing.assert_array_equal(noisy.y_query, clean.y_query)
    wrong = sample(1000, distractors=3)
    moved = (wrong.y != clean.y)[..., 0]
    np.testing.assert_array_equal(moved.sum(1), 3)
    # Everywhere in the context, and of the law N(0, 1).
    assert moved.mean(0).min() > 0.25
    assert wrong.y[moved].std() == pytest.approx(1.0, rel=0.05)
    # Tokens say what y says.
    np.testing.assert_array_equal(wrong.tokens[:, :-1, 10:], wrong.y)

  @parameterized.parameters("sine", "sine_independent")
  def test_sine(self, function):
    fields = dict(input_size=1, input_range=10.0, function=function)
    tasks = sample(4000, **fields)
    amplitude, phase = tasks.latent.T
    assert amplitude.min() >= 0.1 and amplitude.max() <= 0.5
    assert phase.min() >= 0 and phase.max() <= np.pi
    want = amplitude[:, None] * np.sin(tasks.x[..., 0] + phase[:, None])
    np.testing.assert_allclose(tasks.y[..., 0], want, atol=1e-5)
    correlation = np.corrcoef(amplitude, phase)[0, 1]
    if function == "sine":
      assert correlation == pytest.approx(1.0, abs=1e-5)
    else:
      assert abs(correlation) < 0.05
      assert phase.std() == pytest.approx(np.pi / np.sqrt(12), rel=0.05)


class Tokens(parameterized.TestCase):
  X = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
  Y = jnp.array([[[5.0], [6.0]]])
  QUERY = jnp.array([[7.0, 8.0]])

  def test_concat(self):
    got = icr.concat_tokens(self.X, self.Y, self.QUERY)
    np.testing.assert_array_equal(got, [[[1, 2, 5], [3, 4, 6], [7, 8, 0]]])
    got = icr.concat_tokens(
      self.X, self.Y, self.QUERY, jnp.array([[10.0, 1.0]])
    )
    np.testing.assert_array_equal(got[0, -1], [7, 8, -78])

  def test_classic(self):
    got = icr.classic_tokens(self.X, self.Y, self.QUERY)
    np.testing.assert_array_equal(
      got, [[[1, 2], [0, 5], [3, 4], [0, 6], [7, 8]]]
    )
    got = icr.classic_tokens(self.X, self.Y, self.QUERY, wide=True)
    np.testing.assert_array_equal(
      got, [[[1, 2, 0], [0, 0, 5], [3, 4, 0], [0, 0, 6], [7, 8, 0]]]
    )

  @parameterized.parameters("concat", "classic", "classic_wide")
  def test_sizes(self, layout):
    family = InContextRegression(3, 2, 4, layout=layout)
    tokens = family.sample(jax.random.key(0), 2).tokens
    assert tokens.shape == (2, family.length, family.token_size)

  def test_loss(self):
    p, y = jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.zeros((2, 2))
    assert float(icr.squared_loss(p, y)) == 0.5 * 5 / 2


class Diabetes(parameterized.TestCase):
  FIELDS = dict(inputs="diabetes", input_range=np.sqrt(12))

  def test_rows_of_the_table(self):
    from sklearn import datasets

    table = datasets.load_diabetes(scaled=False)
    z = (table.data - table.data.mean(0)) / table.data.std(0)
    label = (table.target - table.target.mean()) / table.target.std()
    tasks = sample(40, **self.FIELDS, function="measured", weight_scale=2.0)
    x = np.concatenate([tasks.x, tasks.x_query[:, None]], 1)
    y = np.concatenate([tasks.y, tasks.y_query[:, None]], 1)[..., 0]
    for b in range(len(x)):
      rows = np.abs(x[b][:, None] - z).max(-1).argmin(-1)
      np.testing.assert_allclose(x[b], z[rows], atol=1e-5)
      np.testing.assert_allclose(y[b], 2 * label[rows], atol=1e-5)
      assert len(set(rows)) == 11
    linear = sample(40, **self.FIELDS)
    want = np.einsum("bod,bnd->bno", linear.latent, linear.x)
    np.testing.assert_allclose(linear.y, want, atol=1e-4)

  def test_without_scikit_learn(self):
    icr._diabetes.cache_clear()
    saved = {n: m for n, m in sys.modules.items() if n.startswith("sklearn")}
    try:
      for name in saved:
        del sys.modules[name]
      sys.modules["sklearn"] = None
      with pytest.raises(UserError, match=r"pip install 'multihead\[tables\]'"):
        sample(2, **self.FIELDS)
    finally:
      del sys.modules["sklearn"]
      sys.modules.update(saved)

  def test_more_rows_than_there_are(self):
    with pytest.raises(UserError, match="the diabetes table has 442"):
      sample(2, **self.FIELDS, context_size=442)


class Mistakes(parameterized.TestCase):
  @parameterized.parameters(
    (dict(inputs="unifrom"), "did you mean 'uniform'"),
    (dict(function="cosine"), "one of linear, sine"),
    (dict(layout="classical"), "did you mean 'classic'"),
    (dict(context_size=0), "context_size is 0"),
    (dict(distractors=11), "between 0 and context_size=10"),
    (dict(noise=-1.0), "must not be negative"),
    (dict(inputs="anisotropic"), "0 eigenvalues"),
    (dict(spectrum=(1.0,) * 10), "other inputs none"),
    (dict(function="sine"), "one input and one output"),
    (dict(layout="classic", input_size=1, output_size=2), "classic_wide"),
    (dict(inputs="diabetes", input_size=4), "10 columns"),
    (dict(function="measured"), "one label of inputs='diabetes'"),
  )
  def test_fields(self, fields, text):
    with pytest.raises(UserError, match=text):
      InContextRegression(**fields)
