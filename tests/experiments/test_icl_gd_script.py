"""experiments.icl_gd: the checks without training, small studies, mistakes."""

import json
import math
import pathlib

import numpy as np
import pytest

from configs import icl_gd as config_file
from experiments import icl_gd
from experiments.in_context import figures, studies
from experiments.in_context.outcome import Outcome
from multihead.errors import UserError
from multihead.train import writers
from tests.experiments.scripts import assert_mistakes, run_scripts

FILE = "configs/icl_gd.py"


def read(path):
  return json.loads(pathlib.Path(path).read_text())


def test_construct_and_a_tiny_run(tmp_path):
  runs = {name: str(tmp_path / name) for name in ("construct", "tiny")}
  results = run_scripts(
    tmp_path / "scripts",
    *(
      ("icl_gd", f"--config={FILE}:{name}", f"--workdir={workdir}", "--seed=7")
      for name, workdir in runs.items()
    ),
  )
  for code, _, err in results:
    assert code == 0, err
  metrics = read(f"{runs['construct']}/metrics.json")
  assert metrics["expectations_met"] is True
  assert metrics["gd_max_relative_error"] < 1e-4
  assert metrics["residual_max_error"] < 1e-4
  for name in ("gdpp", "multi_head", "copy", "online"):
    assert metrics[f"{name}_max_error"] < 1e-5
  metrics = read(f"{runs['tiny']}/metrics.json")
  for name in (
    *("loss", "gd_loss", "optimal_loss", "model_cosine", "learned_step"),
    *("steps_per_second", "published_recipe_steps_per_second"),
  ):
    assert math.isfinite(metrics[name]), name
  assert metrics["compilations"] == 1
  assert metrics["expectations_met"] is False  # of 20 steps
  assert len(metrics["loss_of_seeds"]) == 2
  assert metrics["loss"] == pytest.approx(np.mean(metrics["loss_of_seeds"]))
  for (_, out, _), workdir in zip(results, runs.values()):
    report = pathlib.Path(workdir, "report.md").read_text()
    assert "| | measured | expected | |" in out and "| yes |" in out
    assert out.split("\n\n|")[1].split("\n\n")[0] in report
    drawn = list(pathlib.Path(workdir).glob("*.png"))
    assert drawn and all(f"({file.name})" in report for file in drawn)
  assert "**NO**" in results[1][1]
  lines = pathlib.Path(runs["tiny"], "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [10, 20]
  sweeps = read(f"{runs['tiny']}/sweeps.json")
  assert np.shape(sweeps["input_range"]["transformer"]) == (13, 2)


def settings(variant, **more):
  config = config_file.get_config(variant)
  config.update(
    dict(total_steps=4, log_every_steps=2, batch_size=8, seeds=2),
    **dict(eval_tasks=32, final_tasks=64),
  )
  config.update(more)
  return icl_gd.read_config(config)


@pytest.mark.parametrize(
  ("variant", "more", "names"),
  [
    ("softmax", {}, "one_head_loss model_cosine"),
    ("anisotropic", {}, "preconditioner_error optimal_loss"),
    ("real", {}, "ridge_loss measured_preconditioned_gd_loss retuned_gd_loss"),
    ("sine", dict(model=dict(embedding_size=6)), "independent_reference_loss"),
    ("copy", {}, "drop_step crossing_step update_sensitivity_next"),
  ],
)
def test_studies(variant, more, names, tmp_path):
  """Every study runs; that it finds what it should takes minutes."""
  given = settings(variant, **more)
  writer = writers.MetricWriter(str(tmp_path), tensorboard=False)
  outcome = studies.STUDIES[given.study](given, str(tmp_path), writer)
  writer.close()
  outcome.write(given, str(tmp_path))
  found = read(tmp_path / "metrics.json")
  for name in ("loss", "compilations", *names.split()):
    assert name in found
  assert found["compilations"] == 1
  for name in outcome.drawn.values():
    assert (tmp_path / name).stat().st_size > 5000
  for row in outcome.rows:
    assert f"| {row.name} |" in (tmp_path / "report.md").read_text()


def test_mistakes(tmp_path):
  work = f"--workdir={tmp_path}/run"
  tiny = [f"--config={FILE}:tiny", work]
  (tmp_path / "trained" / "checkpoints").mkdir(parents=True)
  cases = {
    "--config is missing": [work],
    "--workdir is missing": tiny[:1],
    "did you mean 'one_layer'": [f"--config={FILE}:one_layr", work],
    "did you mean 'total_steps'": [*tiny, "--config.total_step=3"],
    "is not one of experiments.icl_gd": [
      *("--config=configs/falcon_h1.py:tiny", work)
    ],
    "config.study is 'layer'": [*tiny, "--config.study=layer"],
    "must be a positive multiple": [*tiny, "--config.total_steps=15"],
    "did you mean 'softmax'": [*tiny, "--config.model.attention=softmx"],
    "between 0 and context_size=4": [*tiny, "--config.task.distractors=5"],
    "config.batch_size is 0": [*tiny, "--config.batch_size=0"],
    "data=3 must divide the 2 seeds": [*tiny, "--config.mesh.data=3"],
    "optimizer.name is 'adam'": [*tiny, "--config.optimizer.name=adam"],
    "must be at least 2 in the softmax study": [
      *(*tiny, "--config.study=softmax")
    ],
    "the copy study needs": [*tiny, "--config.study=copy"],
    "the sine study needs": [*tiny, "--config.study=sine"],
    "is that of a training run": [tiny[0], f"--workdir={tmp_path}/trained"],
  }
  assert_mistakes(
    tmp_path / "scripts", {k: ("icl_gd", *v) for k, v in cases.items()}
  )


def test_a_key_that_nothing_reads():
  for path, text in (
    ("task.inptus", "did you mean 'task.inputs'"),
    ("optimizer.rate", "unknown config key 'optimizer.rate'"),
    ("model.heads", "no field 'heads'"),
    ("mesh.fsdp", "unknown config key 'mesh.fsdp'"),
  ):
    values = config_file.get_config("tiny").to_dict()
    section, key = path.split(".")
    values[section][key] = 1
    with pytest.raises(UserError, match=text):
      icl_gd.read_config(values)


def test_confidence_of_a_mean():
  # Half width t s / sqrt(n); t = 2.776 at 4 degrees of freedom.
  values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
  want = 2.776 * np.std(values, ddof=1) / np.sqrt(5)
  assert figures.half_width(values) == pytest.approx(want, rel=2e-3)
  assert figures.half_width(np.array([3.0])) == 0


def test_expectations():
  outcome = Outcome()
  outcome.add("a", [1.0, 3.0], "two", True)
  outcome.add("b", float("nan"))
  found = outcome.numbers()
  assert found["a"] == 2.0 and found["a_of_seeds"] == [1.0, 3.0]
  assert found["b"] is None and found["expectations_met"] is True
  outcome.expect("b", "a number", False)
  assert outcome.numbers()["expectations_met"] is False
  assert "| b | nan | a number | **NO** |" in outcome.table()
