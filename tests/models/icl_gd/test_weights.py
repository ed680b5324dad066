"""Constructed weights beside float64 loops that know nothing of attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from multihead.models import icl_gd


def draw(d, o, n, batch=7, seed=0):
  """x, y, x_query, W0 in float64; the y are unrelated to the x."""
  rng = np.random.default_rng(seed)
  x = rng.uniform(-0.5, 0.5, (batch, n, d))
  return x, rng.normal(size=(batch, n, o)), x[:, 0] * 2, rng.normal(size=(o, d))


def tokens(x, y, query, first=None):
  """[B, N + 1, d + o], float32; `first` [B, o] is written beside the query."""
  first = np.zeros((len(x), y.shape[-1])) if first is None else first
  context = np.concatenate([x, y], -1)
  last = np.concatenate([query, first], -1)[:, None]
  return jnp.asarray(np.concatenate([context, last], 1), jnp.float32)


def descend(x, y, weights, steps, right=None):
  """Each W after a step on 1/2 sum |W x - y|^2, times `right` if given."""
  out = []
  for step in steps:
    gradient = np.zeros_like(weights)
    for j in range(x.shape[1]):
      error = np.einsum("bod,bd->bo", weights, x[:, j]) - y[:, j]
      gradient += error[:, :, None] * x[:, j][:, None, :]
    weights = weights - step * (gradient if right is None else gradient @ right)
    out.append(weights)
  return out


def ask(weights, query):
  return np.einsum("bod,bd->bo", weights, query)


class GradientDescent(parameterized.TestCase):
  @parameterized.parameters(
    ((10, 1, 10), True), ((12, 8, 45), False), ((3, 2, 1), False)
  )
  def test_layers_are_steps(self, size, zero):
    d, o, n = size
    x, y, query, start = draw(d, o, n)
    start = start * (1 - zero)
    step = 0.9 / np.linalg.eigvalsh(np.einsum("bni,bnj->bij", x, x)).max()
    h, answers = run(
      icl_gd.ICLGD(num_layers=20, output_size=o),
      icl_gd.gd_weights(d, o, step=step, initial=None if zero else start),
      tokens(x, y, query, -query @ start.T),
    )
    begin = np.broadcast_to(start, (len(x), o, d))
    for k, weights in enumerate(descend(x, y, begin, [step] * 20), 1):
      want = ask(weights, query)
      assert np.abs(answers[k] - want).max() < 1e-4 * np.abs(want).max()
      left = y - np.einsum("bod,bnd->bno", weights - start, x)
      np.testing.assert_allclose(h[k, :, :-1, d:], left, atol=1e-4)
      # Inputs stay as they are.
      np.testing.assert_allclose(h[k, :, :-1, :d], x, atol=1e-6)

  def test_each_layer_has_its_own_step(self):
    x, y, query, start = draw(4, 2, 5)
    steps = [0.1, 0.4, 0.05]
    model = icl_gd.ICLGD(num_layers=3, recurrent=False, output_size=2)
    params = icl_gd.gd_weights(4, 2, step=steps, num_layers=3, initial=start)
    got = model.apply({"params": params}, tokens(x, y, query, -query @ start.T))
    begin = np.broadcast_to(start, (len(x), 2, 4))
    want = ask(descend(x, y, begin, steps)[-1], query)
    np.testing.assert_allclose(got, want, atol=1e-5)

  def test_matrices_as_the_paper_writes_them(self):
    layer = icl_gd.gd_weights(2, step=0.25, initial=jnp.array([[3.0, 4.0]]))
    layer = layer["layer"]["attention"]
    look = np.diag([1.0, 1, 0])
    np.testing.assert_array_equal(layer["query"][:, 0], look)
    np.testing.assert_array_equal(layer["key"][:, 0], look)
    value = [[0, 0, 3], [0, 0, 4], [0, 0, -1]]
    np.testing.assert_array_equal(layer["value"][:, 0], value)
    np.testing.assert_array_equal(layer["output"][0], np.diag([0, 0, 0.25]))
    layer = icl_gd.gdpp_weights(2, step=0.25, curvature=0.5)["layer"]
    layer = layer["attention"]
    np.testing.assert_array_equal(layer["value"][:, 0], np.diag([1, 1, -1]))
    np.testing.assert_array_equal(
      layer["output"][0], np.diag([-0.5, -0.5, 0.25])
    )

  def test_curvature(self):
    # One eigenvalue at a time: 1 - c s a^2 and a (1 - gamma s a^2).
    d, o, n, step, gamma = 5, 2, 6, 0.5, 0.2
    x, y, query, _ = draw(d, o, n)
    params = icl_gd.gdpp_weights(d, o, step=step, curvature=gamma)
    model = icl_gd.ICLGD(num_layers=3, output_size=o)
    h, answers = run(model, params, tokens(x, y, query))
    for b in range(len(x)):
      s, axes = np.linalg.eigh(x[b].T @ x[b])
      errors, scale, weights = np.ones(d), np.ones(d), np.zeros(d)
      for k in range(1, 4):
        weights = weights + step * errors * scale**2
        errors = errors * (1 - step * s * scale**2)
        scale = scale * (1 - gamma * s * scale**2)
        found = axes @ np.diag(weights) @ axes.T
        want = y[b].T @ x[b] @ found @ query[b]
        np.testing.assert_allclose(answers[k, b], want, atol=1e-5)
        shrunk = x[b] @ axes @ np.diag(scale) @ axes.T
        np.testing.assert_allclose(h[k, b, :-1, :d], shrunk, atol=1e-5)

  def test_rates_that_do_not_fit(self):
    with pytest.raises(ValueError, match="needs num_layers"):
      icl_gd.gd_weights(3, step=[0.1, 0.2])
    with pytest.raises(ValueError, match=r"lengths \[2, 3\] for 3 layers"):
      icl_gd.gdpp_weights(3, step=[0.1, 0.2], curvature=0.1, num_layers=3)


def run(model, params, inputs):
  """All tokens, and the answers after each layer."""

  @jax.jit
  def both(params, inputs):
    h = model.apply({"params": params}, inputs, method="trace")
    return h, model.read_out(h)

  return map(np.asarray, both(params, inputs))


def test_one_step_size_for_each_head():
  d, o = 6, 2
  x, y, query, _ = draw(d, o, 8)
  axes, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(d, d)))
  directions = np.stack([axes[:, :2], axes[:, 2:4], axes[:, 4:]])
  steps = np.array([0.1, 0.3, 0.5])
  params = icl_gd.multi_head_gd_weights(
    jnp.asarray(directions, jnp.float32), jnp.asarray(steps), o
  )
  model = icl_gd.ICLGD(num_layers=4, num_heads=3, key_size=2, output_size=o)
  got = model.apply({"params": params}, tokens(x, y, query))
  matrix = sum(c * u @ u.T for c, u in zip(steps, directions))
  begin = np.zeros((len(x), o, d))
  want = ask(descend(x, y, begin, [1.0] * 4, right=matrix)[-1], query)
  np.testing.assert_allclose(got, want, atol=1e-5)
  found = icl_gd.learned_preconditioner(params["layer"]["attention"], d, o)
  np.testing.assert_allclose(found, matrix, atol=1e-6)


class Copying(parameterized.TestCase):
  @parameterized.parameters((9, 1, 10, 10), (2, 2, 4, 3), (3, 1, 8, 1))
  def test_copies_then_descends(self, d, o, positions, n):
    x, y, query, _ = draw(d, o, n)
    inputs = np.zeros((len(x), 2 * n + 1, d + o), np.float32)
    inputs[:, 0:-1:2, :d], inputs[:, 1::2, d:] = x, y
    inputs[:, -1, :d] = query
    model = icl_gd.ICLGD(
      num_layers=2,
      recurrent=False,
      first_layer_softmax=True,
      positions="concat",
      position_size=positions,
      output_size=o,
    )
    params = icl_gd.copy_weights(d, o, positions, step=0.4)
    h, answers = run(model, params, inputs)
    # Every token but the query and the one before it has the next one beside
    # it, in place of its position.
    copied = h[1, :, :-2, : d + o]
    np.testing.assert_allclose(copied, inputs[:, 1:-1], atol=2e-5)
    np.testing.assert_allclose(h[1, :, :-2, d + o : positions], 0, atol=2e-5)
    want = ask(descend(x, y, np.zeros((len(x), o, d)), [0.4])[-1], query)
    np.testing.assert_allclose(answers[-1], want, atol=1e-5)

  def test_room_for_the_copy(self):
    with pytest.raises(ValueError, match="position_size is 4"):
      icl_gd.copy_weights(4, 1, 4, step=0.1)


class Invariants(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    self.layer = {
      "query": normal(4, 2, 3),
      "key": normal(4, 2, 3),
      "value": normal(4, 2, 3),
      "output": normal(2, 3, 4),
    }
    self.tokens = normal(3, 6, 4)
    self.model = icl_gd.ICLGD(num_heads=2, key_size=3)

  def answers(self, layer):
    params = {"params": {"layer": {"attention": layer}}}
    return self.model.apply(params, self.tokens)

  def test_layer_depends_on_nothing_else(self):
    kq, pv = icl_gd.invariants(self.layer)
    for n in range(2):
      want = self.layer["query"][:, n] @ self.layer["key"][:, n].T
      np.testing.assert_allclose(kq[n], want, atol=1e-5)
      want = self.layer["value"][:, n] @ self.layer["output"][n]
      np.testing.assert_allclose(pv[n], want, atol=1e-5)
    # The factor of KQ moves to PV; an orthogonal matrix between Wq and Wk.
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    other = {
      "query": 8 * self.layer["query"] @ turn,
      "key": self.layer["key"] @ turn,
      "value": self.layer["value"] / 2,
      "output": self.layer["output"] / 4,
    }
    np.testing.assert_allclose(
      self.answers(other), self.answers(self.layer), rtol=2e-5
    )

  def test_gd_is_its_step(self):
    layer = icl_gd.gd_weights(5, 2, step=0.3)["layer"]["attention"]
    found = icl_gd.learned_preconditioner(layer, 5, 2)
    np.testing.assert_allclose(found, 0.3 * np.eye(5), atol=1e-6)

  def test_between_equal_functions_is_the_same_function(self):
    one = {n: w[:, :1] for n, w in self.layer.items() if n != "output"}
    one["output"] = self.layer["output"][:1]
    scaled = {**one, "key": -3 * one["key"], "value": -one["value"] / 3}
    model = icl_gd.ICLGD(key_size=3)
    apply = lambda m, layer: m.apply(
      {"params": {"layer": {"attention": layer}}}, self.tokens
    )
    for share in (0.0, 0.3, 1.0):
      mixed = icl_gd.interpolate(one, scaled, 3, share)
      np.testing.assert_allclose(
        apply(icl_gd.ICLGD(), mixed), apply(model, one), rtol=1e-4, atol=1e-5
      )

  def test_between_a_layer_and_gd(self):
    # KQ = 2 I and PV = -1/2 diag(0, 0, 0, 4): a step of 4; beside a step of 1.
    eye = jnp.diag(jnp.array([1.0, 1, 1, 0]))
    last = jnp.diag(jnp.array([0.0, 0, 0, 1]))
    large = {
      "query": 2 * eye[:, None],
      "key": eye[:, None],
      "value": -2 * last[:, None],
      "output": last[None],
    }
    small = icl_gd.gd_weights(3, step=1.0)["layer"]["attention"]
    mixed = icl_gd.interpolate(large, small, 3)
    np.testing.assert_allclose(
      icl_gd.learned_preconditioner(mixed, 3), 2.5 * np.eye(3), atol=1e-6
    )

  def test_heads_cannot_be_averaged(self):
    with pytest.raises(ValueError, match="2 heads cannot be averaged"):
      icl_gd.interpolate(self.layer, self.layer, 3)


class Online(parameterized.TestCase):
  @parameterized.product(
    size=[(6, 2, 13), (3, 1, 1), (1, 1, 5)], chunk=[1, 4, 64]
  )
  def test_is_the_delta_rule(self, size, chunk):
    d, o, n = size
    x, y, _, start = draw(d, o, n)
    queries = np.random.default_rng(5).normal(size=x.shape)
    weights = np.broadcast_to(start, (len(x), o, d)).copy()
    want = []
    for t in range(n):
      error = y[:, t] - ask(weights, x[:, t])
      weights += 0.7 * error[:, :, None] * x[:, t][:, None]
      want.append(ask(weights, queries[:, t]))
    args = [jnp.asarray(a, jnp.float32) for a in (x, y)]
    out, last = icl_gd.online_gd(
      *(*args, 0.7),
      initial=jnp.broadcast_to(jnp.asarray(start, jnp.float32), weights.shape),
      queries=jnp.asarray(queries, jnp.float32),
      chunk_size=chunk,
    )
    np.testing.assert_allclose(out, np.stack(want, 1), atol=1e-5)
    np.testing.assert_allclose(last, weights, atol=1e-5)

  def test_asks_itself(self):
    # A step of 1 / |x|^2 leaves no error on the pair just seen.
    x, y, _, _ = draw(3, 2, 6)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    out, _ = icl_gd.online_gd(
      *(jnp.asarray(a, jnp.float32) for a in (x, y)), 1.0
    )
    np.testing.assert_allclose(out, y, atol=1e-5)
