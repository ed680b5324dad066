"""Falcon-H1 trains the same on one device and on a mesh of eight."""

import jax
import numpy as np
import pytest

from configs import falcon_h1
from multihead.tasks import language_modelling as lm
from multihead.train import config as config_lib
from multihead.train import run as run_lib
from multihead.train import state as state_lib
from multihead.train import step as step_lib


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus")
  rng = np.random.default_rng(0)
  words = "the a state head layer of and with in runs scans reads".split()
  for i in range(4):
    lines = [" ".join(rng.choice(words, 9)) + "." for _ in range(20)]
    (folder / f"{i}.txt").write_text("\n".join(lines))
  return str(folder)


def _losses(corpus, devices, **settings):
  config = falcon_h1.get_config("tiny")
  config.data.update(path=corpus, shared_words=0)
  config.sequence_length = 24
  for section, values in settings.items():
    if isinstance(values, dict):
      config[section].update(values)
    else:
      config[section] = values
  config = config_lib.read_config(config)
  run = run_lib.prepare(config, devices=jax.devices()[:devices])
  assert isinstance(run.task, lm.LanguageModelling)
  with jax.set_mesh(run.mesh):
    state = state_lib.init_state(
      run.task.init_params,
      run.optimizer,
      run.shardings,
      seed=config.seed,
      mesh=run.mesh,
    )
    step = step_lib.TrainStep(
      run.task.loss_fn,
      run.optimizer,
      run.schedule,
      run.shardings,
      micro_batches=config.grad_accum_steps,
      batch_sharding=run.batch_sharding,
    )
    batches = run.task.train_iterator()
    losses = []
    for _ in range(20):
      state, metrics = step(state, run.place(next(batches)))
      losses.append(float(metrics["loss"]))
  assert step.compilations == 1
  return np.array(losses)


@pytest.fixture(scope="module")
def one_device(corpus):
  return _losses(corpus, 1)


def test_loss_falls(one_device):
  assert one_device[-1] < one_device[0] - 0.2


def test_mesh_of_eight_gives_the_same_losses(corpus, one_device):
  mesh = dict(data=2, fsdp=2, tensor=2)
  np.testing.assert_allclose(
    _losses(corpus, 8, mesh=mesh), one_device, atol=1e-5, rtol=0
  )


def test_split_sequences_accumulation_and_remat_give_them_too(
  corpus, one_device
):
  losses = _losses(
    corpus,
    4,
    mesh=dict(fsdp=2, sequence=2),
    grad_accum_steps=2,
    remat="full",
  )
  np.testing.assert_allclose(losses, one_device, atol=1e-5, rtol=0)
