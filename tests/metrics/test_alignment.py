"""Alignment of known predictors, and sensitivities of known layers."""

import jax.numpy as jnp
import numpy as np
import pytest

from multihead.metrics import alignment

RNG = np.random.default_rng(0)
B, T, D = 6, 5, 4
TOKENS = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)


def test_gradients_of_a_linear_predictor_are_its_weights():
  # The weight of task b is made of its context; two outputs.
  def predict(tokens):
    weights = jnp.stack([tokens[:, 0, :3], tokens[:, 1, :3] ** 2], 1)
    return jnp.einsum("bod,bd->bo", weights, tokens[:, -1, :3])

  predictions, gradients = alignment.query_gradients(predict, TOKENS, 3)
  np.testing.assert_allclose(predictions, predict(TOKENS), rtol=1e-6)
  want = np.stack([TOKENS[:, 0, :3], TOKENS[:, 1, :3] ** 2], 1)
  np.testing.assert_allclose(gradients, want, rtol=1e-6)


def test_alignment():
  g = jnp.asarray(RNG.normal(size=(B, 2, 3)), jnp.float32)
  p = jnp.asarray(RNG.normal(size=(B, 2)), jnp.float32)
  same = alignment.align((p, g), (p, g))
  np.testing.assert_allclose(same, (1, 0, 0), atol=1e-6)
  doubled = alignment.align((2 * p, 2 * g), (p, g))
  norms = np.linalg.norm(np.asarray(g).reshape(B, -1), axis=-1)
  want = (1, norms.mean(), np.abs(p).mean())
  np.testing.assert_allclose(doubled, want, rtol=1e-5)
  assert float(alignment.align((p, -g), (p, g)).cosine) == pytest.approx(-1)
  # A rotation by 90 degrees in one plane of all six numbers.
  flat = g.reshape(B, 6)
  turned = jnp.stack([-flat[:, 1], flat[:, 0]], 1)
  plane = flat.at[:, 2:].set(0)
  turned = plane.at[:, :2].set(turned)
  found = alignment.align(
    (p, plane.reshape(B, 2, 3)), (p, turned.reshape(B, 2, 3))
  )
  assert float(found.cosine) == pytest.approx(0, abs=1e-6)
  # Tasks count alike, whatever the size of their gradients.
  mixed = g.at[0].multiply(-100)
  found = alignment.align((p, mixed), (p, g))
  assert float(found.cosine) == pytest.approx((B - 2) / B, abs=1e-5)


def test_no_gradient_is_no_alignment():
  zero, p = jnp.zeros((B, 1, 3)), jnp.zeros((B, 1))
  np.testing.assert_array_equal(alignment.align((p, zero), (p, zero)), 0)


def test_sensitivity_of_known_layers():
  own = alignment.copy_sensitivity(lambda t: 3 * t, TOKENS)
  # The sum of D channels has the gradient (3, 3, 3, 3).
  np.testing.assert_allclose(own, (3 * np.sqrt(D), 0, 0), rtol=1e-6)
  shift = lambda t: jnp.concatenate([t[:, 1:], t[:, :1]], 1)
  copied = alignment.copy_sensitivity(shift, TOKENS)
  np.testing.assert_allclose(copied, (0, np.sqrt(D), 0), rtol=1e-6)
  mean = alignment.copy_sensitivity(
    lambda t: jnp.broadcast_to(t.mean(1, keepdims=True), t.shape), TOKENS
  )
  np.testing.assert_allclose(mean, np.full(3, np.sqrt(D) / T), rtol=1e-5)


def test_sensitivity_averages_before_the_norm():
  # Gradients of opposite sign cancel, as published.
  sign = jnp.where(jnp.arange(B) % 2 == 0, 1.0, -1.0)[:, None, None]
  found = alignment.copy_sensitivity(lambda t: sign * t, TOKENS)
  np.testing.assert_allclose(found, 0, atol=1e-6)


def test_too_short_for_a_sensitivity():
  with pytest.raises(ValueError, match="T must be at least 3"):
    alignment.copy_sensitivity(lambda t: t, TOKENS[:, :2])
