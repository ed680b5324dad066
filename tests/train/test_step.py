"""The compiled step: accumulation, guard, clipping, average, one compile."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from multihead.train import state as state_lib
from multihead.train import step as step_lib


@pytest.fixture(autouse=True)
def _names(request, toy):
  request.instance.toy = toy


def _close(first, second, rtol=1e-6, atol=1e-7):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    first,
    second,
  )


def _equal(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


class GradientsTest(parameterized.TestCase):
  def _setup(self):
    task = self.toy.Task(self.toy.Model(), batch_size=8, length=5)
    params = task.init_params(jax.random.key(0))
    batch = next(task.train_iterator())
    return task, params, batch

  @parameterized.parameters(2, 4, 8)
  def test_accumulation_equals_the_whole_batch(self, micro_batches):
    task, params, batch = self._setup()
    # Micro-batches of very different weight: a mean of their means is wrong.
    batch["weights"][::2, 1:] = 0.0
    batch["weights"][1] = 0.0
    want = step_lib.gradients(task.loss_fn, params, batch, jax.random.key(1))
    got = jax.jit(
      lambda p, b: step_lib.gradients(
        task.loss_fn, p, b, jax.random.key(1), micro_batches=micro_batches
      )
    )(params, batch)
    _close(got, want)
    assert float(got[1]["weight"]) == batch["weights"].sum()

  def test_nothing_scored_gives_zero_not_nan(self):
    task, params, batch = self._setup()
    batch["weights"][:] = 0.0
    for micro_batches in (1, 4):
      grads, metrics = step_lib.gradients(
        task.loss_fn,
        params,
        batch,
        jax.random.key(1),
        micro_batches=micro_batches,
      )
      _equal(grads, jax.tree.map(jnp.zeros_like, grads))
      assert float(metrics["loss"]) == 0.0

  def test_each_micro_batch_has_its_key(self):
    def loss_fn(params, batch, rng, train):
      assert train
      noise = jax.random.normal(rng)
      return params * noise, {"weight": 1.0 * batch["x"].shape[0]}

    grad = lambda key, n: step_lib.gradients(
      loss_fn, 1.0, {"x": jnp.zeros((4, 1))}, key, micro_batches=n
    )[0]
    key = jax.random.key(3)
    want = np.mean(
      [jax.random.normal(jax.random.fold_in(key, i)) for i in range(4)]
    )
    np.testing.assert_allclose(grad(key, 4), want, rtol=1e-6)


class TrainStepTest(parameterized.TestCase):
  def _make(self, devices=1, **settings):
    run = self.toy.run(self.toy.config(**settings), devices)
    state = state_lib.init_state(
      run.task.init_params,
      run.optimizer,
      run.shardings,
      seed=0,
      mesh=run.mesh,
      ema=run.config.ema_decay > 0,
    )
    step = step_lib.TrainStep(
      run.task.loss_fn,
      run.optimizer,
      run.schedule,
      run.shardings,
      micro_batches=run.config.grad_accum_steps,
      batch_sharding=run.batch_sharding,
      ema_decay=run.config.ema_decay,
    )
    return run, state, step

  @parameterized.parameters((1, 1), (8, 1), (8, 2))
  def test_one_compilation_and_a_falling_loss(self, devices, accum):
    mesh = dict(fsdp=2, tensor=2) if devices == 8 else {}
    run, state, step = self._make(
      devices, mesh=mesh, grad_accum_steps=accum, total_steps=30
    )
    batches = run.task.train_iterator()
    losses = []
    for _ in range(30):
      state, metrics = step(state, run.place(next(batches)))
      losses.append(float(metrics["loss"]))
    assert step.compilations == 1
    assert losses[-1] < 0.7 * losses[0]
    assert int(state.step) == 30
    for leaf, where in zip(
      jax.tree.leaves(state), jax.tree.leaves(run.shardings), strict=True
    ):
      assert leaf.sharding.is_equivalent_to(where, leaf.ndim)

  def test_state_is_donated(self):
    run, state, step = self._make()
    kernel = state.params["hidden"]["kernel"]
    step(state, run.place(next(run.task.train_iterator())))
    assert kernel.is_deleted()

  def test_step_against_optax(self):
    run, state, step = self._make(optimizer=dict(lr=0.1, clip_norm=0.01))
    batch = run.place(next(run.task.train_iterator()))
    params = jax.tree.map(jnp.copy, state.params)
    grads = jax.jit(
      jax.grad(lambda p: run.task.loss_fn(p, batch, None, True)[0])
    )(params)
    updates, _ = jax.jit(run.optimizer.update)(
      grads, run.optimizer.init(params), params
    )
    want = optax.apply_updates(params, updates)
    state, metrics = step(state, batch)
    _close(state.params, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
      metrics["gradient_norm"], optax.tree.norm(grads), rtol=1e-5
    )
    assert float(metrics["learning_rate"]) == pytest.approx(
      float(run.schedule(0))
    )

  @parameterized.parameters(1, 2)
  def test_non_finite_update_is_not_applied(self, accum):
    run, state, step = self._make(ema_decay=0.5, grad_accum_steps=accum)
    batches = run.task.train_iterator()
    good = next(batches)
    state, metrics = step(state, run.place(good))
    assert bool(metrics["finite"])
    before = jax.tree.map(np.array, state)
    bad = {**good, "weights": good["weights"].copy()}
    bad["weights"][3, 2] = np.inf
    state, metrics = step(state, run.place(bad))
    assert not bool(metrics["finite"])
    for part in ("params", "opt_state", "ema"):
      _equal(getattr(state, part), getattr(before, part))
    assert int(state.step) == 2
    # It goes on from there as if that batch had not been.
    state, metrics = step(state, run.place(good))
    assert bool(metrics["finite"])
    assert np.isfinite(float(optax.tree.norm(state.params)))

  def test_average_of_parameters(self):
    run, state, step = self._make(ema_decay=0.75)
    want = jax.tree.map(np.array, state.params)
    _equal(state.ema, want)
    batches = run.task.train_iterator()
    for _ in range(3):
      state, _ = step(state, run.place(next(batches)))
      want = jax.tree.map(
        lambda old, new: 0.75 * old + 0.25 * np.array(new), want, state.params
      )
    _close(state.ema, want, rtol=1e-5)
    assert state.eval_params is state.ema

  def test_bfloat16_computes_low_and_keeps_masters(self):
    config = self.toy.config()
    task = self.toy.Task(self.toy.Model(dtype=jnp.bfloat16), 8, 4)
    run = self.toy.run(config, task=task)
    state = state_lib.init_state(
      task.init_params, run.optimizer, run.shardings, seed=0, mesh=run.mesh
    )
    step = step_lib.TrainStep(
      task.loss_fn, run.optimizer, run.schedule, run.shardings
    )
    batch = run.place(next(task.train_iterator()))
    assert "bf16" in step.lower(state, batch).as_text()
    state, _ = step(state, batch)
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
      assert leaf.dtype in (jnp.float32, jnp.int32)

  def test_each_step_has_its_key(self):
    run, state, _ = self._make()
    seen = []

    def loss_fn(params, batch, rng, train):
      loss, metrics = run.task.loss_fn(params, batch, rng, train)
      return loss, {**metrics, "draw": jax.random.uniform(rng)}

    step = step_lib.TrainStep(
      loss_fn, run.optimizer, run.schedule, run.shardings
    )
    batch = run.place(next(run.task.train_iterator()))
    for _ in range(3):
      state, metrics = step(state, batch)
      seen.append(float(metrics["draw"]))
    assert len(set(seen)) == 3
