"""The network beside a plain float64 one, and what the paper says of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from multihead import models
from multihead.errors import UserError
from multihead.models import icl_gd
from multihead.models.icl_gd.network import sinusoids
from multihead.parallel import sharding


def make(shape=(3, 6, 5), seed=0, **fields):
  """A model with parameters large enough to matter, and tokens."""
  model = icl_gd.ICLGD(**fields)
  tokens = np.random.default_rng(seed).normal(size=shape)
  tokens = jnp.asarray(tokens, jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(1), tokens)["params"]
  params = nn.meta.unbox(shapes)
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(2)
  leaves = [0.4 * rng.normal(size=leaf.shape) for leaf in leaves]
  params = jax.tree.unflatten(
    tree, [jnp.asarray(leaf, jnp.float32) for leaf in leaves]
  )
  return model, params, tokens


def softmax(a):
  a = np.exp(a - a.max(-1, keepdims=True))
  return a / a.sum(-1, keepdims=True)


def norm(x, p):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
  return x * p["scale"] + p["bias"]


def gelu(x):
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mlp(x, p, name):
  first, second = p[f"{name}_in"], p[f"{name}_out"]
  inner = gelu(x @ first["kernel"] + first.get("bias", 0))
  return inner @ second["kernel"] + second.get("bias", 0)


def plain_attention(h, context, p, kind):
  """[T, D] and [S, D], one head after the other, weights and all."""
  out = 0
  for n in range(p["query"].shape[1]):
    q, k, v = h @ p["query"][:, n], context @ p["key"][:, n], None
    v = context @ p["value"][:, n]
    if kind == "sum_norm":
      q = q / (q.sum(-1, keepdims=True) + 1e-6)
      k = k / (k.sum(-1, keepdims=True) + 1e-6)
    linear = q @ k.T
    soft = softmax(linear / np.sqrt(q.shape[-1]))
    g = 1 / (1 + np.exp(-10 * p["mix"][0, 0])) if kind == "mix" else 0
    weights = {
      "softmax": soft,
      "mix": g * soft + (1 - g) * linear,
    }.get(kind, linear)
    out = out + weights @ v @ p["output"][n]
  return out


def plain(model, params, tokens):
  """The answers after every layer, [L + 1, B, o], in float64."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  answers = []
  for h in np.asarray(tokens, np.float64):
    if model.embedding_size:
      h = h @ p["embedding"]["linear"]["kernel"]
      if model.embedding_mlp:
        h = h + mlp(h, p["embedding"], "mlp")
    row = [-h[-1, -model.output_size :]]
    for i in range(model.num_layers):
      layer = p["layer"] if model.recurrent else p[f"layers_{i}"]
      kind = model.attention
      if not model.recurrent:
        if i == 0 and model.first_layer_softmax:
          kind = "softmax"
        elif i > 0 and kind == "mix":
          kind = "linear"
      u = norm(h, layer["norm"]) if "norm" in layer else h
      context = u if model.include_query else u[:-1]
      update = plain_attention(u, context, layer["attention"], kind)
      h = add(model, h, update)
      if model.mlp_widening:
        u = norm(h, layer["mlp_norm"]) if "mlp_norm" in layer else h
        h = add(model, h, mlp(u, layer, "mlp"))
      row.append(-h[-1, -model.output_size :])
    answers.append(row)
  return np.array(answers).swapaxes(0, 1)


def add(model, h, update):
  if model.update_targets_only:
    update = update.copy()
    update[:, : -model.output_size] = 0
  h = h + model.dampening * update
  return np.clip(h, -model.clip, model.clip) if model.clip else h


CASES = (
  dict(),
  dict(num_heads=3, key_size=2, output_size=2),
  dict(num_layers=3, include_query=True),
  dict(num_layers=2, recurrent=False, num_heads=2),
  dict(attention="softmax", num_heads=2, key_size=3, num_layers=2),
  dict(attention="mix", num_layers=2),
  dict(attention="mix", num_layers=2, recurrent=False),
  dict(attention="sum_norm", num_heads=2),
  dict(num_layers=2, recurrent=False, first_layer_softmax=True),
  dict(num_layers=2, layer_norm=True, mlp_widening=2),
  dict(num_layers=2, recurrent=False, layer_norm=True, mlp_widening=3),
  dict(num_layers=3, dampening=0.5, update_targets_only=True, output_size=2),
  dict(num_layers=3, clip=0.7, mlp_widening=1),
  dict(embedding_size=6, embedding_mlp=2, num_layers=2),
)


class Forward(parameterized.TestCase):
  @parameterized.parameters(*CASES)
  def test_as_a_plain_network(self, **fields):
    model, params, tokens = make(**fields)
    want = plain(model, params, tokens)

    @jax.jit
    def both(params):
      h = model.apply({"params": params}, tokens, method="trace")
      return h, model.apply({"params": params}, tokens)

    h, short = both(params)
    assert h.shape[:3] == (model.num_layers + 1, *tokens.shape[:2])
    scale = np.abs(want).max()
    got = model.read_out(h)
    np.testing.assert_allclose(got, want, atol=2e-5 * scale)
    # The short way computes the query alone in the last layer.
    np.testing.assert_allclose(short, want[-1], atol=2e-5 * scale)

  @parameterized.parameters("linear", "softmax", "mix", "sum_norm")
  def test_implementations_agree(self, kind):
    model, params, tokens = make(attention=kind, num_heads=2)
    run = lambda name: jax.jit(
      jax.value_and_grad(
        lambda p: jnp.sum(
          model.clone(implementation=name).apply({"params": p}, tokens) ** 2
        )
      )
    )(params)
    want, got = run("reference"), run("xla")
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      *(got, want),
    )

  def test_bfloat16(self):
    model, params, tokens = make(num_layers=2)
    want = model.apply({"params": params}, tokens)
    got = model.clone(dtype=jnp.bfloat16).apply({"params": params}, tokens)
    assert got.dtype == jnp.bfloat16
    scale = np.abs(want).max()
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05 * scale)

  def test_one_pair_of_context(self):
    model, params, tokens = make(shape=(2, 2, 3))
    want = plain(model, params, tokens)[-1]
    got = model.apply({"params": params}, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


class Symmetries(parameterized.TestCase):
  @parameterized.parameters(
    dict(num_layers=3), dict(attention="softmax", num_heads=2)
  )
  def test_order_of_the_context_does_not_matter(self, **fields):
    model, params, tokens = make(**fields)
    order = np.array([3, 0, 4, 1, 2, 5])
    got, want = (
      model.apply({"params": params}, t) for t in (tokens[:, order], tokens)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

  def test_one_layer_is_linear_in_query_and_targets(self):
    model, params, tokens = make()
    # The construction's form: targets are neither keys nor, of inputs, values.
    params = jax.tree.map(lambda x: x, params)
    layer = params["layer"]["attention"]
    layer["key"] = layer["key"].at[-1].set(0)
    layer["value"] = layer["value"].at[:-1].set(0)
    tokens = tokens.at[:, -1, -1].set(0)
    ask = lambda t: model.apply({"params": params}, t)
    once = ask(tokens)
    other = tokens.at[:, -1, :-1].set(tokens[:, 0, :-1])
    both = tokens.at[:, -1].add(other[:, -1])
    np.testing.assert_allclose(
      ask(both), once + ask(other), rtol=1e-5, atol=1e-6
    )
    scaled = tokens.at[:, :-1, -1].multiply(3)
    np.testing.assert_allclose(ask(scaled), 3 * once, rtol=1e-5, atol=1e-6)


class Positions(parameterized.TestCase):
  def test_sinusoids(self):
    got = sinusoids(5, 6)
    for t in range(5):
      for i in range(3):
        angle = t / 10000 ** (2 * i / 6)
        np.testing.assert_allclose(got[t, 2 * i], np.sin(angle), atol=1e-6)
        np.testing.assert_allclose(got[t, 2 * i + 1], np.cos(angle), atol=1e-6)
    assert sinusoids(3, 5).shape == (3, 5)

  def test_where_they_go(self):
    embed = lambda **fields: (lambda m, p, t: (
      np.asarray(m.apply({"params": p}, t, method="embed")), np.asarray(t)
    ))(*make(**fields))  # fmt: skip
    rows = np.asarray(sinusoids(6, 4))
    got, tokens = embed(positions="concat", position_size=4)
    np.testing.assert_allclose(got[..., 4:], tokens)
    np.testing.assert_allclose(got[0, :, :4], rows)
    got, _ = embed(positions="concat", position_size=4, position_flip=True)
    np.testing.assert_allclose(got[0, :, :4], rows[::-1])
    got, tokens = embed(positions="concat", position_size=4, position_zero=True)
    np.testing.assert_allclose(got[..., :4], 0)
    got, tokens = embed(positions="add")
    np.testing.assert_allclose(
      got - tokens,
      np.broadcast_to(sinusoids(6, 5), tokens.shape),
      atol=1e-6,
    )


class Parameters(parameterized.TestCase):
  @parameterized.parameters(
    ("one_layer", 11, 484),
    ("two_layer", 11, 484),
    ("deep", 11, 5 * 484),
    ("softmax", 11, 968),
    ("sine", 2, 19_480),
    ("copy", 10, 3200),
  )
  def test_counts(self, variant, width, count):
    model = models.create("icl_gd", variant)
    tokens = jnp.zeros((1, 3, width))
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert sharding.param_count(nn.meta.unbox(shapes)) == count

  def test_every_variant_is_counted(self):
    assert set(models.variants("icl_gd")) == {
      *("one_layer", "two_layer", "deep", "softmax", "sine", "copy")
    }

  def test_initial_values(self):
    model = icl_gd.ICLGD(num_layers=4, key_size=80, init_scale=0.02)
    params = model.init(jax.random.key(0), jnp.zeros((1, 2, 50)))["params"]
    layer = nn.meta.unbox(params)["layer"]["attention"]
    for name, inputs in (("query", 50), ("value", 50), ("output", 80)):
      std = np.sqrt(0.02 / 4 / inputs)
      assert np.std(layer[name]) == pytest.approx(std, rel=0.05)
      # A normal law cut at two of its own standard deviations.
      assert np.abs(layer[name]).max() < 2.001 * std / 0.8796

  def test_norms_of_untied_layers_begin_with_the_second(self):
    fields = dict(num_layers=2, layer_norm=True)
    _, tied, _ = make(**fields)
    _, untied, _ = make(**fields, recurrent=False)
    assert "norm" in tied["layer"]
    assert "norm" not in untied["layers_0"] and "norm" in untied["layers_1"]


class Mistakes(parameterized.TestCase):
  @parameterized.parameters(
    (dict(attention="linaer"), "did you mean 'linear'"),
    (dict(positions="rotary"), "one of none, add, concat"),
    (dict(num_layers=0), "num_layers is 0; it must be at least 1"),
    (dict(first_layer_softmax=True), "needs recurrent=False"),
    (dict(positions="concat"), "it belongs to 'concat'"),
    (dict(position_size=3), "it belongs to 'concat'"),
    (dict(embedding_mlp=2), "needs an embedding_size"),
  )
  def test_fields(self, fields, text):
    with pytest.raises(UserError, match=text):
      icl_gd.ICLGD(**fields)

  def test_tokens(self):
    model, params, tokens = make()
    with pytest.raises(ValueError, match=r"must be \[B, T, D\], got \[6, 5\]"):
      model.apply({"params": params}, tokens[0])
    with pytest.raises(ValueError, match="hold no context"):
      model.apply({"params": params}, tokens[:, :1])
