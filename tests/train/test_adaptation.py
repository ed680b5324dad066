"""Training an adapter and a head: what is stored, what moves, mistakes."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from multihead import adapters, train
from multihead.errors import UserError
from multihead.parallel import sharding
from multihead.tasks.adaptation import divide
from multihead.train import adaptation
from multihead.train import run as run_lib
from multihead.train import state as state_lib
from multihead.train import step as step_lib

ADAPTER = dict(targets="hidden", r_par=1, r_seq=2, trained="out", dropout=0.2)


def prepared(toy, devices=1, task=None, mesh=None, **adapter):
  config = toy.config(
    adapter={**ADAPTER, **adapter}, mesh=mesh or {}, total_steps=12
  )
  task = task or toy.Task(toy.Model(), config.batch_size)
  mesh = run_lib.make_mesh(config, jax.devices()[:devices])
  config, task = adaptation.adapt(config, task, mesh)
  return run_lib.prepare(config, task=task, devices=jax.devices()[:devices])


def begun(run):
  """The first state and the step of a run."""
  with jax.set_mesh(run.mesh):
    state = state_lib.init_state(
      run.task.init_params, run.optimizer, run.shardings, seed=0, mesh=run.mesh
    )
  step = step_lib.TrainStep(
    run.task.loss_fn,
    run.optimizer,
    run.schedule,
    run.shardings,
    batch_sharding=run.batch_sharding,
    frozen=run.task.frozen,
  )
  return state, step


def nbytes(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_frozen_weights_have_no_gradient_and_no_optimizer_memory(toy):
  task = toy.Task(toy.Model(vocab_size=64, width=48))
  run = prepared(toy, task=task, trained=None)
  state, step = begun(run)
  trained = 48 * 1 + 1 * 48 + 2 * 2 * 48
  assert sharding.param_count(state.params) == trained
  # Two moments of what is trained, and counters.
  assert nbytes(state.opt_state) <= 2 * 4 * trained + 16
  assert nbytes(run.task.frozen) > 20 * nbytes(state.params)
  with jax.set_mesh(run.mesh):
    batch = run.place(next(run.task.train_iterator()))
    compiled = step.lower(state, batch).compile()
  # Nothing of the base's matrices comes out, and the base goes in once: it is
  # an argument, not a constant of the program.
  memory = compiled.memory_analysis()
  frozen = nbytes(run.task.frozen)
  assert memory.output_size_in_bytes < nbytes(state) + 1024
  inputs = memory.argument_size_in_bytes
  assert 0.99 * frozen < inputs < nbytes(state) + frozen + 4096
  text = compiled.as_text()
  # Forward: x W [rows, 48] once each way (to the inputs of the branches), but
  # no product of the shape of a frozen matrix's gradient.
  gradient = "f32[48,48]{1,0} dot("
  assert gradient not in text
  assert "f32[48,64]{1,0} dot(" not in text

  # With the whole model trained, both are there: the test can fail.
  whole = toy.run(toy.config(), task=task)
  state = jax.eval_shape(
    lambda: whole.optimizer.init(whole.task.abstract_params())
  )
  grad = jax.jit(
    jax.grad(lambda p, b: task.loss_fn(p, b, None, True)[0])
  ).lower(task.abstract_params(), batch)
  text = grad.compile().as_text()
  assert gradient in text


def test_frozen_weights_stay_bit_for_bit_and_the_loss_falls(toy):
  run = prepared(toy)
  before = jax.tree.map(np.array, run.task.frozen)
  state, step = begun(run)
  start = jax.tree.map(np.array, state.params)
  losses = []
  batches = run.task.train_iterator()
  with jax.set_mesh(run.mesh):
    for _ in range(10):
      state, metrics = step(state, run.place(next(batches)))
      losses.append(float(metrics["loss"]))
  jax.tree.map(np.testing.assert_array_equal, run.task.frozen, before)
  assert np.mean(losses[-3:]) < losses[0] - 0.1
  assert step.compilations == 1
  moved = jax.tree.map(lambda new, old: np.any(new != old), state.params, start)
  assert all(jax.tree.leaves(moved))
  # Evaluation has no dropout and equals the merged model.
  batch = run.place(next(batches))
  found = run.task.eval_fn(state.params, batch, frozen=run.task.frozen)
  merged = run.task.merged(state.params)
  expected = run.task.inner.eval_fn(merged, batch)
  np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)


def test_mesh_of_eight_trains_as_one_device_does(toy):
  losses = []
  for devices, mesh in ((1, {}), (8, dict(data=2, fsdp=2, tensor=2))):
    run = prepared(toy, devices, mesh=mesh, dropout=0.0)
    state, step = begun(run)
    batches = run.task.train_iterator()
    with jax.set_mesh(run.mesh):
      for _ in range(6):
        state, metrics = step(state, run.place(next(batches)))
        losses.append(float(metrics["loss"]))
  np.testing.assert_allclose(losses[:6], losses[6:], atol=1e-5, rtol=0)


def test_divide():
  tree = {"head": {"kernel": 1}, "header": 2, "body": 3}
  frozen, trained = divide(tree, "head/")
  assert frozen == {"header": 2, "body": 3}
  assert trained == {"head": {"kernel": 1}}
  assert divide(tree, None) == (tree, {})
  with pytest.raises(UserError, match="begins the path of no parameter"):
    divide(tree, "heads")
  with pytest.raises(UserError, match="not a regular expression"):
    divide(tree, "(")


def test_mistakes(toy):
  with pytest.raises(UserError, match="'hiden'.*'hidden'"):
    prepared(toy, targets="hiden")
  with pytest.raises(UserError, match="fingerprint"):
    prepared(toy, fingerprint="0" * 32)
  with pytest.raises(UserError, match="neither targets nor trained"):
    toy.config(adapter=dict(base="somewhere"))
  with pytest.raises(UserError, match="r_parr.*r_par"):
    toy.config(adapter=dict(r_parr=3))


# From a run to an adapter over it, through the files.


def config_of(corpus, **sections):
  values = dict(
    model=dict(
      name="falcon_h1", vocab_size=264, hidden_size=16, intermediate_size=24,
      num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
      head_dim=8, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4,
      mamba_chunk_size=8,
    ),
    total_steps=2, batch_size=8, sequence_length=16,
    data=dict(path=corpus, shared_words=0),
    eval=dict(baselines=False, sample_tokens=4),
  )  # fmt: skip
  return train.read_config({**values, **sections})


@pytest.mark.slow
def test_adapting_a_run(tmp_path):
  corpus = tmp_path / "text"
  corpus.mkdir()
  for i in range(3):
    (corpus / f"{i}.txt").write_text(f"line {i} of the text. " * 60)
  base, other, work = (str(tmp_path / n) for n in ("base", "other", "work"))
  train.train(config_of(str(corpus)), base)
  train.train(config_of(str(corpus), seed=1), other)
  adapter = dict(
    base=base, targets="attention/out, mlp/down", r_par=1, r_seq=1,
    trained="final_norm",
  )  # fmt: skip
  optimizer = dict(lr=0.05, schedule="constant")
  config = config_of(str(corpus), adapter=adapter, optimizer=optimizer)
  result = train.train(config, work)
  assert result.finished and isinstance(result.sample, str)
  found = train.config.read_json(f"{work}/config.json")
  assert found.adapter.fingerprint
  trained = (2 * 16 + 2 * 16) + (16 + 24 + 2 * 16) + 16
  assert result.metrics["parameters"] == trained

  # What evaluation and generation load is the merged model.
  mesh = run_lib.make_mesh(found)
  _, params = run_lib.load_params(found, work, mesh)
  _, start = run_lib.load_params(config_of(str(corpus)), base, mesh)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, start)
  run = run_lib.prepare(found, task=None)
  task = run.task.inner
  plain = run_lib.prepare(config_of(str(corpus)), task=task)
  loss = run_lib.evaluate(plain, params)["loss"]
  assert abs(loss - result.metrics["validation_loss"]) < 1e-4
  assert abs(loss - run_lib.evaluate(plain, start)["loss"]) > 1e-3

  # The file holds the adapter and the norm, and finds its base again.
  file = pathlib.Path(work, "adapter.safetensors")
  assert sum(x.size for x in load_file(file).values()) == trained
  ours, tree, norm = adapters.load(file, start)
  frozen, _ = divide(start, "final_norm")
  merged = {**ours.merge(frozen, tree), **norm}
  for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params)):
    np.testing.assert_allclose(a, b, atol=1e-6)
  _, wrong = run_lib.load_params(config_of(str(corpus), seed=1), other)
  with pytest.raises(UserError, match="not the base"):
    adapters.load(file, wrong)

  # Going on over another base is refused, and so is loading for use.
  longer = config_of(
    str(corpus), adapter={**adapter, "base": other}, total_steps=4
  )
  with pytest.raises(UserError, match="began over a base"):
    train.train(longer, work)
  values = json.loads(pathlib.Path(work, "config.json").read_text())
  values["adapter"]["base"] = other
  with pytest.raises(UserError, match="has changed"):
    run_lib.load_params(train.read_config(values), work)

  # A base of another shape, and one that is not there.
  wide = config_of(str(corpus), adapter=adapter)
  wide.model.overrides["intermediate_size"] = 32
  with pytest.raises(UserError, match=r"does not fit.*mlp/\w+/kernel, \["):
    train.train(wide, str(tmp_path / "wide"))
  gone = config_of(str(corpus), adapter={**adapter, "base": "nowhere"})
  with pytest.raises(UserError, match="nowhere"):
    train.train(gone, str(tmp_path / "gone"))
