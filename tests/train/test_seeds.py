"""Several seeds as one program: one compilation, and each as if alone."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from multihead.errors import UserError
from multihead.models import icl_gd
from multihead.parallel import make_mesh
from multihead.tasks.in_context_regression import (
  InContextRegression,
  squared_loss,
)
from multihead.train import NonFiniteError
from multihead.train import seeds as seeds_lib

FAMILY = InContextRegression(5, context_size=5)
MODEL = icl_gd.ICLGD(init_scale=0.02)


def init(key):
  tokens = jnp.zeros((1, FAMILY.length, FAMILY.token_size))
  return nn.meta.unbox(MODEL.init(key, tokens)["params"])


def loss(params, key, batch=64):
  tasks = FAMILY.sample(key, batch)
  answers = MODEL.apply({"params": params}, tasks.tokens)
  return squared_loss(answers, tasks.y_query)


def quadratic(params, key):
  """A loss whose gradient is the parameter minus a number of the key's."""
  noise = jax.random.normal(key)
  return 0.5 * (params["w"] - noise) ** 2 + 0.5 * params["b"] ** 2


def start(key):
  return {"w": jax.random.normal(key), "b": jnp.ones(())}


fit = functools.partial(
  seeds_lib.train_seeds,
  start,
  quadratic,
  optax.sgd(0.1),
  seeds=(3, 4, 5),
  total_steps=6,
  log_every=2,
)


def test_learns_and_compiles_once():
  result = seeds_lib.train_seeds(
    init,
    loss,
    optax.chain(optax.clip_by_global_norm(1e-3), optax.adam(3e-3, b2=0.98)),
    seeds=range(5),
    total_steps=400,
    log_every=100,
    evaluate=lambda p: {"held_out": loss(p, jax.random.key(99), 2000)},
    mesh=seeds_lib.seed_mesh(5),
  )
  assert result.compilations == 1
  np.testing.assert_array_equal(result.steps, [100, 200, 300, 400])
  for name in ("train_loss", "held_out"):
    assert result.history[name].shape == (4, 5)
  # Some seeds first take targets for keys and inputs for values, which makes
  # a weight of rank one, and stay there longer.
  zero, losses = 5 / 12 / 2, np.sort(result.history["held_out"][-1])
  assert losses[2] < 0.6 * zero and losses[4] < 0.95 * zero
  assert result.steps_per_second > 0
  leaf = result.params["layer"]["attention"]["query"]
  assert leaf.shape == (5, 6, 1, 6) and len(np.unique(leaf[:, 0, 0, 0])) == 5


def test_is_the_plain_loop():
  result = fit(evaluate=lambda p: {"w": p["w"]})
  for i, seed in enumerate((3, 4, 5)):
    first, key = jax.random.split(jax.random.key(seed))
    w, b, losses, records = float(start(first)["w"]), 1.0, [], []
    for step in range(6):
      noise = float(jax.random.normal(jax.random.fold_in(key, step)))
      losses.append(0.5 * (w - noise) ** 2 + 0.5 * b**2)
      w, b = w - 0.1 * (w - noise), 0.9 * b
      records.append(w)
    np.testing.assert_allclose(
      result.history["train_loss"][:, i],
      np.reshape(losses, (3, 2)).mean(1),
      rtol=1e-5,
    )
    np.testing.assert_allclose(
      result.history["w"][:, i], records[1::2], rtol=1e-5
    )
    np.testing.assert_allclose(result.params["w"][i], w, rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_devices_change_nothing(devices):
  many = dict(seeds=(1, 2, 3, 4))
  want = fit(**many, mesh=make_mesh(devices=jax.devices()[:1]))
  got = fit(**many, mesh=seeds_lib.seed_mesh(4, devices))
  assert got.compilations == 1
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    (got.params, got.history),
    (want.params, want.history),
  )


def test_a_seed_is_alone():
  want, got = fit(), fit(seeds=(4,))
  np.testing.assert_allclose(got.params["w"][0], want.params["w"][1], rtol=1e-6)


def test_what_is_not_trained_stays():
  result = fit(trainable=lambda path: path == ("w",))
  np.testing.assert_array_equal(result.params["b"], 1)
  np.testing.assert_allclose(result.params["w"], fit().params["w"], rtol=1e-6)


def test_cycle_repeats_the_batches():
  # With a rate of 1 the parameter is the noise of the last step.
  one = functools.partial(
    seeds_lib.train_seeds, start, quadratic, optax.sgd(1.0), seeds=(0,)
  )
  at = lambda steps, cycle: float(
    one(total_steps=steps, log_every=steps, cycle=cycle).params["w"][0]
  )
  assert at(4, 3) == pytest.approx(at(1, 0))
  assert at(4, 0) != pytest.approx(at(1, 0))


def test_records_are_told():
  told = []
  fit(on_log=lambda step, found: told.append((step, found["train_loss"].shape)))
  assert told == [(2, (3,)), (4, (3,)), (6, (3,))]


def test_a_loss_that_is_not_finite():
  def bad(params, key):
    return jnp.where(params["w"] > 0, jnp.nan, 1.0) * params["b"]

  signs = [
    float(start(jax.random.split(jax.random.key(s))[0])["w"]) > 0
    for s in range(4)
  ]
  assert any(signs) and not all(signs)
  wrong = ", ".join(str(s) for s in range(4) if signs[s])
  with pytest.raises(
    NonFiniteError, match=f"seed {wrong} is not finite at step 2"
  ):
    seeds_lib.train_seeds(
      *(start, bad, optax.sgd(0.1)), seeds=range(4), total_steps=4, log_every=2
    )


def test_the_mesh_divides_the_seeds():
  sizes = {n: seeds_lib.seed_mesh(n).shape["data"] for n in (1, 3, 5, 6, 9, 16)}
  assert sizes == {1: 1, 3: 3, 5: 5, 6: 6, 9: 3, 16: 8}
  with pytest.raises(UserError, match="data=2 must divide the 5 seeds"):
    seeds_lib.seed_mesh(5, 2)
  with pytest.raises(UserError, match="the 8 devices here"):
    seeds_lib.seed_mesh(16, 16)


@pytest.mark.parametrize(
  "wrong", [dict(total_steps=5), dict(seeds=()), dict(log_every=0)]
)
def test_steps_come_in_whole_records(wrong):
  with pytest.raises(UserError, match="must be a positive multiple"):
    fit(**wrong)
