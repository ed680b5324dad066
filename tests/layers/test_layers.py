"""Layers against their formulas, written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from multihead.layers import (
  GatedMLP,
  GatedRMSNorm,
  Linear,
  RMSNorm,
  apply_rope,
)


def silu(x):
  return x / (1 + np.exp(-x))


def values(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


class Layers(parameterized.TestCase):
  def test_rms_norm(self):
    x, scale = values(0, 2, 3, 5), values(1, 5)
    want = scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    got = RMSNorm().apply({"params": {"scale": jnp.asarray(scale)}}, x)
    np.testing.assert_allclose(got, want, rtol=1e-5)

  def test_rms_norm_scales_after_the_cast(self):
    x = jnp.full((1, 4), 3.0, jnp.bfloat16)
    out = RMSNorm(dtype=jnp.bfloat16).apply(
      {"params": {"scale": jnp.full(4, 1.25)}}, x
    )
    self.assertEqual(out.dtype, jnp.bfloat16)
    np.testing.assert_array_equal(out, np.full((1, 4), 1.25))

  @parameterized.product(groups=(1, 2, 3), before=(True, False))
  def test_gated_rms_norm(self, groups, before):
    x, gate, scale = (
      values(0, 2, 3, 6, 4),
      values(1, 2, 3, 6, 4),
      values(2, 6, 4),
    )
    y = x if before else x * silu(gate)
    flat = y.reshape(2, 3, groups, -1)
    y = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-5)
    y = y.reshape(x.shape) * scale
    want = y * silu(gate) if before else y
    got = GatedRMSNorm(groups=groups, norm_before_gate=before).apply(
      {"params": {"scale": jnp.asarray(scale)}}, x, gate
    )
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)

  def test_rope_rotates_pairs(self):
    x = values(0, 1, 4, 2, 6)
    positions = np.array([[0, 3, 7, 50]])
    want = np.empty_like(x)
    for i in range(3):
      angle = positions[0] * 100.0 ** (-2 * i / 6)
      z = (x[0, :, :, i] + 1j * x[0, :, :, i + 3]) * np.exp(1j * angle)[:, None]
      want[0, :, :, i], want[0, :, :, i + 3] = z.real, z.imag
    got = apply_rope(jnp.asarray(x), positions, theta=100.0)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

  def test_rope_scores_depend_on_differences_only(self):
    q, k = values(0, 1, 1, 1, 8), values(1, 1, 1, 1, 8)

    def score(i, j):
      rotate = lambda x, p: apply_rope(jnp.asarray(x), jnp.array([[p]]))
      return float(jnp.sum(rotate(q, i) * rotate(k, j)))

    self.assertAlmostEqual(score(9, 4), score(105, 100), places=4)
    self.assertNotAlmostEqual(score(9, 4), score(9, 5), places=3)

  def test_rope_needs_pairs(self):
    with self.assertRaisesRegex(ValueError, "got 5"):
      apply_rope(jnp.ones((1, 1, 1, 5)), jnp.zeros((1, 1), jnp.int32))

  def test_linear_over_several_axes(self):
    layer = Linear(
      (3, 2), ("heads", None, "embed", None), inputs=2, use_bias=True
    )
    x = values(0, 2, 5, 4, 7)
    params = {"kernel": values(1, 4, 7, 3, 2), "bias": values(2, 3, 2)}
    want = np.einsum("btnh,nhde->btde", x, params["kernel"]) + params["bias"]
    got = layer.apply({"params": jax.tree.map(jnp.asarray, params)}, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

  def test_gated_mlp(self):
    layer = GatedMLP(7, gate_multiplier=0.6, down_multiplier=1.7, use_bias=True)
    x = values(0, 2, 3, 5)
    params = {
      "gate": {"kernel": values(1, 5, 7), "bias": values(2, 7)},
      "up": {"kernel": values(3, 5, 7), "bias": values(4, 7)},
      "down": {"kernel": values(5, 7, 5), "bias": values(6, 5)},
    }
    line = lambda n, v: v @ params[n]["kernel"] + params[n]["bias"]
    want = 1.7 * line("down", line("up", x) * silu(0.6 * line("gate", x)))
    got = layer.apply({"params": jax.tree.map(jnp.asarray, params)}, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
