"""layers.Mamba against its equations in float64, and decoded and sharded."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead import layers, parallel
from multihead.parallel import sharding

D, E, M, R, W = 8, 12, 4, 3, 4


def make_mixer(**options):
  return layers.Mamba(
    **dict(channels=E, state_size=M, dt_rank=R, conv_width=W) | options
  )


def make_params(mixer, seed=0):
  """Random values everywhere, so that no parameter can be forgotten."""
  shapes = jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 1, D)))
  shapes = nn.meta.unbox(shapes["params"])
  leaves, tree = jax.tree.flatten(shapes)
  draw = np.random.default_rng(seed).normal
  values = [jnp.float32(draw(size=leaf.shape) / 2) for leaf in leaves]
  return jax.tree.unflatten(tree, values)


def inputs(batch, length, seed=1):
  draw = np.random.default_rng(seed).normal
  return jnp.float32(draw(size=(batch, length, D)))


@functools.partial(jax.jit, static_argnums=0)
def apply(mixer, params, u, **options):
  return mixer.apply({"params": params}, u, **options)


def oracle(params, u):
  """Section 3.4 and algorithm 2, one token at a time, in float64."""
  params = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
  silu = lambda v: v / (1 + np.exp(-v))

  def line(name, v):
    layer = params[name]
    return v @ layer["kernel"] + layer.get("bias", 0)

  x, z = line("x", u), line("z", u)
  past = np.pad(x, ((0, 0), (W - 1, 0), (0, 0)))
  conv = params["conv"]
  taps = [past[:, i : i + x.shape[1]] * conv["kernel"][i] for i in range(W)]
  x = silu(sum(taps) + conv.get("bias", 0))
  low, B, C = np.split(line("steering", x), [R, R + M], axis=-1)
  delta = np.logaddexp(line("dt", low) + params["dt_bias"], 0)
  A = -np.exp(params["A_log"])
  h, y = np.zeros((len(u), E, M)), np.zeros_like(x)
  for t in range(u.shape[1]):
    h = np.exp(delta[:, t, :, None] * A) * h
    h += (delta * x)[:, t, :, None] * B[:, t, None]
    y[:, t] = np.sum(h * C[:, t, None], axis=-1) + params["D"] * x[:, t]
  return line("out", y * silu(z))


@pytest.mark.parametrize("conv_bias, use_bias", ((True, False), (False, True)))
def test_follows_the_equations(conv_bias, use_bias):
  mixer = make_mixer(conv_bias=conv_bias, use_bias=use_bias)
  params = make_params(mixer)
  assert ("bias" in params["conv"]) == conv_bias
  assert all(("bias" in params[name]) == use_bias for name in ("x", "z", "out"))
  for length in (1, 21):
    u = inputs(2, length)
    y, cache = apply(mixer, params, u)
    assert cache is None
    want = oracle(params, np.asarray(u, np.float64))
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


def test_size_of_mamba_130m():
  """24 such mixers and norms, the last norm and the embedding: 129,135,360."""
  mixer = layers.Mamba(channels=1536)
  shapes = jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 1, 768)))
  count = sharding.param_count(nn.meta.unbox(shapes["params"]))
  assert 24 * (count + 768) + 768 + 50280 * 768 == 129_135_360


def test_initial_values():
  mixer = layers.Mamba(channels=512, dt_range=(1e-2, 0.5), dt_scale=0.5)
  init = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 1, 64)))
  params = nn.meta.unbox(init["params"])
  steps = np.asarray(jax.nn.softplus(params["dt_bias"]))
  assert steps.min() * 1.001 >= 1e-2 and steps.max() <= 0.5 * 1.001
  # Log-uniform: a quarter of the range of logarithms has a quarter of them.
  logs = np.log(steps / 1e-2) / math.log(50)
  assert np.abs(np.histogram(logs, 4, (0, 1))[0] / 512 - 0.25).max() < 0.08
  np.testing.assert_allclose(
    np.exp(params["A_log"]), np.tile(np.arange(1, 17), (512, 1)), rtol=1e-6
  )
  np.testing.assert_array_equal(params["D"], 1)
  kernel = np.asarray(params["dt"]["kernel"])
  assert kernel.shape == (4, 512)
  bound = 0.5 * 4**-0.5
  assert 0.98 * bound < np.abs(kernel).max() <= bound


def test_decoding_continues_what_prefill_left():
  """Whole, in two pieces, and token by token, behind left padding."""
  mixer = make_mixer()
  params = make_params(mixer)
  u = inputs(2, 17)
  whole, _ = apply(mixer, params, u)
  padding = jnp.arange(10) >= jnp.array([[3], [6]])
  first = jnp.stack([jnp.roll(u[0, :10], 3, 0), jnp.roll(u[1, :10], 6, 0)])
  first = first.at[0, :3].set(1e3).at[1, :6].set(-1e3)
  y, cache = jax.jit(
    lambda u, mask, cache: mixer.apply(
      {"params": params}, u, mask=mask, cache=cache, prefill=True
    )
  )(first, padding, mixer.empty_cache(2))
  rows = (slice(3, None), slice(6, None))
  for row, real in enumerate(rows):
    count = 10 - real.start
    np.testing.assert_allclose(
      y[row, real], whole[row, :count], rtol=1e-4, atol=1e-5
    )
  # A second piece, again padded on the left, each row at its own place.
  done = (7, 4)
  second = jnp.stack([u[row, d : d + 5] for row, d in enumerate(done)])
  second = jnp.pad(second, ((0, 0), (2, 0), (0, 0)), constant_values=99)
  mask = jnp.broadcast_to(jnp.arange(7) >= 2, (2, 7))
  y, cache = apply(mixer, params, second, mask=mask, cache=cache)
  for row, d in enumerate(done):
    np.testing.assert_allclose(
      y[row, 2:], whole[row, d : d + 5], rtol=1e-4, atol=1e-5
    )
  # Single tokens; the second row rests at one step.
  for step, active in enumerate(([True, True], [True, False], [True, True])):
    at = (12 + step, 9 + step - (step > 1))
    now = jnp.stack([u[row, t] for row, t in enumerate(at)])[:, None]
    mask = jnp.array(active)[:, None]
    y, cache = apply(mixer, params, now, mask=mask, cache=cache)
    for row, t in enumerate(at):
      if active[row]:
        np.testing.assert_allclose(
          y[row, 0], whole[row, t], rtol=1e-4, atol=1e-5
        )


def test_segments_are_separate_sequences():
  mixer = make_mixer()
  params = make_params(mixer)
  u = inputs(1, 20)
  ids = jnp.array([[0] * 6 + [1] * 13 + [0]])
  y, _ = apply(mixer, params, u, segment_ids=ids)
  for part in (slice(0, 6), slice(6, 19), slice(19, 20)):
    alone, _ = apply(mixer, params, u[:, part])
    np.testing.assert_allclose(y[:, part], alone, rtol=1e-4, atol=1e-5)


def test_padding_gets_no_gradient():
  mixer = make_mixer(use_bias=True)
  params = make_params(mixer)
  u = inputs(2, 9)
  mask = jnp.arange(9) >= jnp.array([[0], [4]])
  weight = jnp.where(mask[..., None], inputs(2, 9, seed=5), 0)

  @jax.jit
  def gradient(u):
    loss = lambda u: jnp.sum(
      weight * mixer.apply({"params": params}, u, mask=mask)[0]
    )
    return jax.grad(loss)(u)

  grad = gradient(u)
  np.testing.assert_array_equal(grad[1, :4], 0)
  assert np.isfinite(grad).all() and (np.abs(grad[1, 4:]) > 0).all()
  np.testing.assert_array_equal(grad, gradient(u.at[1, :4].set(7)))


def test_bfloat16_keeps_its_state_in_float32():
  mixer = make_mixer(dtype=jnp.bfloat16)
  params = make_params(mixer)
  u = inputs(1, 40)
  cache = mixer.empty_cache(1)
  y, cache = apply(mixer, params, u, cache=cache)
  assert (y.dtype, cache["conv"].dtype, cache["ssm"].dtype) == (
    jnp.bfloat16,
    jnp.bfloat16,
    jnp.float32,
  )
  want = oracle(params, np.asarray(u, np.float64))
  assert np.abs(np.float64(y) - want).max() < 0.03 * np.abs(want).max()


def test_same_numbers_on_a_mesh():
  mixer = make_mixer()
  params = make_params(mixer)
  u, weight = inputs(4, 16), inputs(4, 16, seed=2)
  ids = jnp.repeat(jnp.array([[0, 1, 2, 0]]), jnp.array([3, 4, 5, 4]), axis=1)
  ids = jnp.tile(ids, (4, 1))

  def step(params, u, ids):
    def loss(params, u):
      y, _ = mixer.apply({"params": params}, u, segment_ids=ids)
      return jnp.sum(weight * y)

    return jax.value_and_grad(loss, argnums=(0, 1))(params, u)

  want = jax.device_get(jax.jit(step)(params, u, ids))
  mesh = parallel.make_mesh(data=2, sequence=2, tensor=2)
  boxed = jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 1, D)))

  def place(box, value):
    spec = sharding.partition_spec(value.shape, box.names, mesh)
    return jax.device_put(value, jax.NamedSharding(mesh, spec))

  is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
  with jax.set_mesh(mesh):
    placed = jax.tree.map(place, boxed["params"], params, is_leaf=is_box)
    assert "tensor" in placed["A_log"].sharding.spec
    rows = sharding.batch_sharding(mesh)
    u, ids = jax.device_put((u, ids), rows)
    compiled = jax.jit(step).lower(placed, u, ids).compile()
    got = jax.device_get(compiled(placed, u, ids))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
  jax.tree.map(close, got, want)
  # No device ever holds the channels of another one: [B, T, E] stays split.
  for shape in re.findall(r"f32\[([\d,]+)\]", compiled.as_text()):
    assert not re.fullmatch(rf"\d+,\d+,{E}", shape), shape
