"""`experiments.convert` from the outside."""

import importlib.util
import os

import jax
import numpy as np
import pytest

from experiments import common
from multihead import checkpoints
from multihead.train import run as run_lib
from multihead.train.checkpoints import Checkpoints
from tests.experiments.scripts import (
  TINY,
  assert_mistakes,
  make_run,
  run_scripts,
  tiny_config,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  return workdir, *make_run(workdir)


def test_there_and_back(run, tmp_path):
  workdir, model, params = run
  hub, new = tmp_path / "hub", tmp_path / "new"
  (code, out, err), (code_back, _, err_back) = run_scripts(
    tmp_path / "cases",
    ("convert", f"--workdir={workdir}", f"--output={hub}"),
    (
      "convert", f"--checkpoint={hub}", f"--workdir={new}", f"--config={TINY}"
    ),
  )  # fmt: skip
  assert code == 0, err
  assert "ids 0 to 255 are bytes" in out
  assert code_back == 0, err_back
  special = checkpoints.read_special_tokens(hub)
  assert (special.bos, special.eos) == (256, (257,))
  equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
  loaded, loaded_params = checkpoints.from_pretrained(hub)
  assert loaded.multipliers == model.multipliers
  equal(loaded_params, params)
  # What evaluation and generation read.
  equal(common.load_model(str(new))[1], params)
  # What training goes on from: a whole state.
  ready = run_lib.prepare(tiny_config(), devices=jax.devices()[:1])
  saved = Checkpoints(os.path.join(new, "checkpoints"))
  state, position = saved.restore(saved.latest_step(), ready.target)
  saved.close()
  equal(state.params, params)
  assert state.step == 1
  iter(ready.task.train_iterator()).set_state(position)


def test_mistakes_get_one_line_and_exit_code_2(run, tmp_path):
  workdir, model, params = run
  checkpoints.save_pretrained(tmp_path / "hub", model, params)
  other = model.clone(rope_theta=5.0)
  checkpoints.save_pretrained(tmp_path / "other", other, params)
  source = f"--checkpoint={tmp_path}/hub"
  config, new = f"--config={TINY}", f"--workdir={tmp_path}/new"
  cases = {
    "give --workdir and --output": [f"--workdir={workdir}"],
    "to write a Hugging Face directory, or": [source, f"--output={tmp_path}/x"],
    "is not empty": [f"--workdir={workdir}", f"--output={tmp_path}/hub"],
    "--workdir is missing": [f"--output={tmp_path}/x"],
    "--config is missing": [source, new],
    "exists; give the --workdir of a new run": [
      source,
      config,
      f"--workdir={workdir}",
    ],
    "rope_theta is 5.0 there and 100000000000.0 in": [
      f"--checkpoint={tmp_path}/other",
      config,
      new,
    ],
    "no such directory": ["--checkpoint=/nowhere", config, new],
  }
  assert_mistakes(
    tmp_path / "cases",
    {text: ("convert", *arguments) for text, arguments in cases.items()},
  )
  assert not (tmp_path / "new").exists()


def test_a_check_without_transformers_says_what_to_install(run, tmp_path):
  arguments = [f"--workdir={run[0]}", f"--output={tmp_path}/hub", "--check"]
  [(code, _, err)] = run_scripts(
    tmp_path / "cases", ("convert", *arguments), hidden=("torch",)
  )
  assert code == 2
  assert "pip install 'multihead[parity]'" in err


ENCODERS = {
  "vit": ("configs/vit.py:tiny", ("transformers", "timm")),
  "bert": ("configs/bert.py:tiny", ("transformers",)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_there_and_back(name, tmp_path):
  spec, formats = ENCODERS[name]
  model, params = make_run(tmp_path / "run", spec)
  cases = []
  for layout in formats:
    hub, new = tmp_path / layout, tmp_path / f"{layout}_run"
    run, config = f"--workdir={tmp_path}/run", f"--config={spec}"
    cases += [
      ("convert", run, f"--output={hub}", f"--format={layout}"),
      ("convert", f"--checkpoint={hub}", f"--workdir={new}", config),
    ]
  for code, _, errors in run_scripts(tmp_path / "cases", *cases):
    assert code == 0, errors
  for layout in formats:
    _, loaded = checkpoints.from_pretrained(tmp_path / layout)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    path = str(tmp_path / f"{layout}_run")
    again, loaded, _ = common.load_model(path)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parity
@pytest.mark.parametrize("name", ENCODERS)
def test_check_compares_encoders(name, tmp_path):
  for package in ("transformers", "timm"):
    if not importlib.util.find_spec(package):
      pytest.skip(f"{package} is missing: pip install 'multihead[parity]'")
  try:
    importlib.import_module("torchvision")
  except RuntimeError as error:
    pytest.skip(f"torchvision was built for another torch: {error}")
  spec, formats = ENCODERS[name]
  make_run(tmp_path / "run", spec)
  cases = [
    (
      "convert",
      f"--workdir={tmp_path}/run",
      f"--output={tmp_path}/{layout}",
      f"--format={layout}",
      "--check",
    )
    for layout in formats
  ]
  for code, out, errors in run_scripts(tmp_path / "cases", *cases):
    assert code == 0, errors
    assert "is the same at 100.00%" in out


@pytest.mark.parity
def test_check_compares_with_transformers(run, tmp_path):
  pytest.importorskip("transformers", reason="pip install multihead[parity]")
  workdir, model, params = run
  checkpoints.save_pretrained(tmp_path / "right", model, params)
  found = run_scripts(
    tmp_path / "cases",
    ("convert", f"--workdir={workdir}", f"--output={tmp_path}/a", "--check"),
    (
      "convert",
      f"--workdir={workdir}",
      f"--output={tmp_path}/b",
      "--dtype=bfloat16",
      "--check",
    ),
    (
      "convert",
      f"--checkpoint={tmp_path}/right",
      f"--workdir={tmp_path}/c",
      f"--config={TINY}",
      "--check",
    ),
  )
  for code, out, err in found:
    assert code == 0, err
    assert "the same at 100.00% of 300 positions" in out
