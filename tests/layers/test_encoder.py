"""The encoder's layers against their formulas, written out in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from multihead.layers import (
  MLP,
  EncoderBlock,
  LayerNorm,
  MultiHeadAttention,
  drop_path,
)
from multihead.layers.mlp import activation


def values(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def layer_norm(x, p, epsilon=1e-6):
  mean = x.mean(-1, keepdims=True)
  variance = ((x - mean) ** 2).mean(-1, keepdims=True)
  return (x - mean) / np.sqrt(variance + epsilon) * p["scale"] + p["bias"]


def gelu(x):
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def mlp(x, p):
  inner = gelu(x @ p["up"]["kernel"] + p["up"]["bias"])
  return inner @ p["down"]["kernel"] + p["down"]["bias"]


def attention(x, p, mask=None):
  q, k, v = (
    np.einsum("btd,dnh->btnh", x, p[n]["kernel"]) + p[n].get("bias", 0)
    for n in ("query", "key", "value")
  )
  logits = np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
  if mask is not None:
    logits = np.where(mask[:, None, None], logits, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  z = np.einsum("bnts,bsnh->btnh", weights, v)
  out = np.einsum("btnh,nhd->btd", z, p["out"]["kernel"])
  return out + p["out"].get("bias", 0), z


def parameters(module, x, seed=0):
  """Parameters far from zero, in float64 and as the module takes them."""
  boxed = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  leaves, tree = jax.tree.flatten(boxed)
  rng = np.random.default_rng(seed)
  exact = [0.5 * rng.normal(size=leaf.shape) for leaf in leaves]
  tree = jax.tree.unflatten(tree, exact)
  # The boxes hold the axes' names; what is inside is what is applied.
  plain = jax.tree.map(
    lambda leaf: leaf.unbox(), tree, is_leaf=lambda x: hasattr(x, "unbox")
  )
  return plain, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), plain)


class EncoderTest(parameterized.TestCase):
  def test_layer_norm(self):
    x, p = values(0, 2, 3, 5) + 7, {"scale": values(1, 5), "bias": values(2, 5)}
    got = LayerNorm(epsilon=1e-3).apply({"params": p}, x)
    np.testing.assert_allclose(got, layer_norm(x, p, 1e-3), rtol=2e-5)
    constant = LayerNorm().apply({"params": p}, np.full((1, 5), 1e4))
    np.testing.assert_allclose(constant[0], p["bias"], atol=1e-4)

  def test_layer_norm_in_bfloat16_computes_in_float32(self):
    x = (values(0, 4, 64) + 50).astype(jnp.bfloat16)
    p = {"scale": np.ones(64), "bias": np.zeros(64)}
    got = LayerNorm(dtype=jnp.bfloat16).apply({"params": p}, x)
    assert got.dtype == jnp.bfloat16
    want = layer_norm(np.asarray(x, np.float64), p)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.02)

  @parameterized.parameters(
    ("gelu", gelu),
    ("quick_gelu", lambda x: x / (1 + np.exp(-1.702 * x))),
    (
      "gelu_tanh",
      lambda x: (
        0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
      ),
    ),
  )
  def test_activations(self, name, formula):
    x = np.linspace(-4, 4, 31)
    np.testing.assert_allclose(activation(name)(x), formula(x), atol=2e-6)

  def test_unknown_activation(self):
    with self.assertRaisesRegex(ValueError, "did you mean 'gelu'"):
      activation("gelo")

  def test_mlp(self):
    module, x = MLP(hidden=7), values(0, 2, 3, 4)
    exact, params = parameters(module, x)
    got = module.apply({"params": params}, x)
    np.testing.assert_allclose(got, mlp(x, exact), atol=2e-5)

  @parameterized.product(
    heads=(1, 3), length=(1, 5), masked=(True, False), biases=(True, False)
  )
  def test_attention(self, heads, length, masked, biases):
    module = MultiHeadAttention(heads, 4, qkv_bias=biases, out_bias=biases)
    x = values(0, 2, length, 6)
    mask = None
    if masked:
      mask = np.ones((2, length), bool)
      mask[1, length // 2 + 1 :] = False
    exact, params = parameters(module, x)
    got, sown = module.apply(
      {"params": params}, x, mask=mask, mutable="intermediates"
    )
    want, z = attention(x, exact, mask)
    np.testing.assert_allclose(got, want, atol=2e-5)
    np.testing.assert_allclose(sown["intermediates"]["heads"][0], z, atol=2e-5)

  def test_attention_dropout_is_that_of_the_weights(self):
    """Its mean is the output without it; rows without a token give zeros."""
    module = MultiHeadAttention(2, 4, dropout=0.3)
    x = values(0, 3, 5, 6)
    mask = np.arange(5) < np.array([[5], [3], [0]])
    _, params = parameters(module, x)

    def heads(key, deterministic=False):
      _, sown = module.apply(
        {"params": params},
        x,
        mask=mask,
        deterministic=deterministic,
        rngs={"dropout": key},
        mutable="intermediates",
      )
      return sown["intermediates"]["heads"][0]

    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = jax.jit(jax.vmap(heads))(keys)
    want = heads(keys[0], deterministic=True)
    error = np.abs(drawn.mean(0) - want)
    assert float((error / (drawn.std(0) / 2000**0.5 + 1e-6)).max()) < 5
    assert float(drawn.std(0)[:2].min()) > 0.01
    np.testing.assert_array_equal(drawn[:, 2], np.zeros_like(drawn[:, 2]))

  def test_drop_path(self):
    x = jnp.ones((20000, 2, 3))
    out = drop_path(x, jnp.float32(0.25), jax.random.key(0))
    rows = np.asarray(out[:, 0, 0])
    np.testing.assert_array_equal(out, np.broadcast_to(rows[:, None, None],
                                                       out.shape))  # fmt: skip
    np.testing.assert_allclose(np.unique(rows), [0, 4 / 3], rtol=1e-6)
    assert abs(rows.mean() - 1) < 0.02
    np.testing.assert_array_equal(drop_path(x, 0.0, jax.random.key(0)), x)

  @parameterized.product(pre_norm=(True, False), scaled=(True, False))
  def test_block(self, pre_norm, scaled):
    module = EncoderBlock(
      num_heads=2,
      mlp_dim=9,
      pre_norm=pre_norm,
      layer_scale=0.1 if scaled else None,
      return_branches=True,
    )
    x = values(0, 2, 5, 6)
    mask = np.arange(5) < np.array([[5], [3]])
    p, params = parameters(module, x)
    got, (a, f) = module.apply({"params": params}, x, mask=mask)
    one = np.ones(6)
    scale_a = p["attention_scale"] if scaled else one
    scale_f = p["mlp_scale"] if scaled else one
    if pre_norm:
      want_a = (
        scale_a * attention(layer_norm(x, p["norm1"]), p["attention"], mask)[0]
      )
      middle = x + want_a
      want_f = scale_f * mlp(layer_norm(middle, p["norm2"]), p["mlp"])
      want = middle + want_f
    else:
      want_a = scale_a * attention(x, p["attention"], mask)[0]
      middle = layer_norm(x + want_a, p["norm1"])
      want_f = scale_f * mlp(middle, p["mlp"])
      want = layer_norm(middle + want_f, p["norm2"])
    for ours, exact in ((got, want), (a, want_a), (f, want_f)):
      np.testing.assert_allclose(ours, exact, atol=5e-5)

  def test_layer_scale_starts_at_its_value(self):
    module = EncoderBlock(num_heads=2, mlp_dim=9, layer_scale=0.25)
    init = jax.jit(module.init)
    params = init(jax.random.key(0), values(0, 1, 3, 6))["params"]
    for name in ("attention_scale", "mlp_scale"):
      np.testing.assert_array_equal(params[name].unbox(), np.full(6, 0.25))
