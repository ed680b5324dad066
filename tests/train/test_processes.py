"""Whole processes: killed at any moment, told to stop, two of them together."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from multihead.train import checkpoints, writers
from multihead.train import config as config_lib
from multihead.train import run as run_lib

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 400


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  """A corpus, and the programs that the processes compile."""
  folder = tmp_path_factory.mktemp("shared")
  (folder / "corpus").mkdir()
  rng = np.random.default_rng(0)
  words = "the a state head layer of and with in runs scans reads".split()
  for i in range(6):
    lines = [" ".join(rng.choice(words, 9)) + "." for _ in range(40)]
    (folder / "corpus" / f"{i}.txt").write_text("\n".join(lines))
  return folder


def _start(shared, workdir, *arguments, **config):
  settings = {
    "total_steps": STEPS,
    "sequence_length": 16,
    "batch_size": 4,
    "log_every_steps": 10,
    "checkpoint.every_steps": 20,
    "data.path": shared / "corpus",
    "data.shared_words": 0,
    "eval.baselines": False,
    "eval.sample_tokens": 0,
    "model.num_hidden_layers": 1,
    **config,
  }
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    # Compiling costs this tiny model more than running.
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_COMPILATION_CACHE_DIR": str(shared / "programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  return subprocess.Popen(
    [
      *(sys.executable, "-m", "experiments.train"),
      *("--config=configs/falcon_h1.py:tiny", f"--workdir={workdir}"),
      *(f"--config.{name}={value}" for name, value in settings.items()),
      *arguments,
    ],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _finish(process, code=0):
  out, _ = process.communicate(timeout=300)
  assert process.returncode == code, out
  return out


def _saved_steps(workdir):
  folder = pathlib.Path(workdir) / "checkpoints"
  return [int(p.name) for p in folder.glob("*") if p.name.isdigit()]


def _wait_for_step(process, workdir, step):
  end = time.time() + 240
  while max(_saved_steps(workdir), default=0) < step:
    assert process.poll() is None, process.communicate()[0]
    assert time.time() < end
    time.sleep(0.002)


def _final(workdir):
  """Every array and the data position of the last checkpoint."""
  config = config_lib.read_json(f"{workdir}/config.json")
  run = run_lib.prepare(config, devices=jax.devices()[:1])
  saved = checkpoints.Checkpoints(f"{workdir}/checkpoints")
  state, position = saved.restore(saved.latest_step(), run.target)
  saved.close()
  return jax.tree.map(np.array, state), position


@pytest.fixture(scope="module")
def whole(shared):
  """The run that nobody disturbs."""
  workdir = shared / "whole"
  _finish(_start(shared, workdir))
  state, position = _final(workdir)
  assert int(state.step) == STEPS
  return state, position


def _assert_same_as(whole, workdir):
  state, position = _final(workdir)
  assert position == whole[1]
  jax.tree.map(np.testing.assert_array_equal, state, whole[0])


def test_killed_at_a_random_step_goes_on_bit_for_bit(shared, whole, tmp_path):
  process = _start(shared, tmp_path)
  # Not only just after a checkpoint: at any moment of the twenty steps.
  _wait_for_step(process, tmp_path, random.randrange(20, STEPS // 2, 20))
  time.sleep(random.random() * 0.1)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  assert max(_saved_steps(tmp_path)) < STEPS
  out = _finish(_start(shared, tmp_path))
  assert "continuing from step" in out
  _assert_same_as(whole, tmp_path)
  steps = [r["step"] for r in writers.read_records(str(tmp_path))]
  assert steps == sorted(steps)


def test_sigterm_saves_and_exits_with_a_message(shared, tmp_path):
  process = _start(shared, tmp_path, **{"checkpoint.every_steps": 1000})
  metrics = tmp_path / "metrics.jsonl"
  end = time.time() + 240
  while not (metrics.exists() and metrics.stat().st_size):
    assert process.poll() is None, process.communicate()[0]
    assert time.time() < end
    time.sleep(0.002)
  process.send_signal(signal.SIGTERM)
  out = _finish(process)
  (step,) = _saved_steps(tmp_path)
  assert 10 <= step < STEPS
  assert f"stopped after step {step} of {STEPS}" in out
  assert "Traceback" not in out


def _two(shared, workdir, **config):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  processes = [
    _start(
      shared,
      workdir,
      f"--coordinator_address=localhost:{port}",
      "--num_processes=2",
      f"--process_id={i}",
      **config,
    )
    for i in range(2)
  ]
  return [_finish(process) for process in processes]


def test_two_processes_train_and_resume(shared, tmp_path):
  config = {"checkpoint.every_steps": 4, "log_every_steps": 1}
  config["optimizer.schedule"] = "constant"
  first = _two(shared, tmp_path / "two", **config, total_steps=6)
  assert "devices: 2 x cpu (cpu), 2 process(es); mesh: data=2" in first[0]
  assert "devices:" not in first[1]
  second = _two(shared, tmp_path / "two", **config, total_steps=10)
  assert "continuing from step 6" in second[0]
  _finish(_start(shared, tmp_path / "one", **config, total_steps=10))
  losses = lambda name: [
    (record["step"], record["loss"])
    for record in writers.read_records(str(tmp_path / name))
    if "loss" in record
  ]
  assert [step for step, _ in losses("two")] == list(range(1, 11))

  np.testing.assert_allclose(losses("two"), losses("one"), atol=1e-5)
  metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
  assert metrics["devices"] == 2
  assert metrics["steps"] == 10
  assert (tmp_path / "two" / "report.md").exists()
