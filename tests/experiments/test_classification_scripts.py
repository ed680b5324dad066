"""Classifiers from the outside: train, go on, evaluate, and mistakes."""

import json

import pytest

from tests.experiments.scripts import assert_mistakes, run_scripts

NAMES = ("vit", "bert")


def config(name, *changes):
  return [f"--config=configs/{name}.py:tiny", *changes]


def test_train_go_on_and_evaluate(tmp_path):
  pytest.importorskip("sklearn", reason="pip install 'multihead[vision]'")
  runs = {name: f"--workdir={tmp_path}/{name}" for name in NAMES}
  short = "--config.total_steps=6"
  found = run_scripts(
    tmp_path / "cases",
    *(("train", *config(n, short), runs[n]) for n in NAMES),
    # The same command with more steps goes on.
    ("train", *config("vit", "--config.total_steps=9"), runs["vit"]),
  )
  # Another process: two scripts may have a flag of the same name.
  found += run_scripts(
    tmp_path / "evaluated", *(("evaluate", runs[n]) for n in NAMES)
  )
  for code, _, errors in found:
    assert code == 0, errors
  assert "continuing from step 6" in found[2][2]
  for name, (_, out, _), baseline in zip(
    NAMES, found[3:5], ("nearest class mean", "naive bayes"), strict=True
  ):
    assert baseline in out and "**this model**" in out
    assert "matthews" in out
    metrics = json.loads((tmp_path / name / "metrics.json").read_text())
    assert 0 <= metrics["validation_error"] <= 1
    assert metrics["step_compilations"] == 1
    report = (tmp_path / name / "report.md").read_text()
    assert "classes" in report and "![Loss](loss.png)" in report
  ((code, _, errors),) = run_scripts(
    tmp_path / "generated", ("generate", runs["vit"], "--prompt=a")
  )
  assert code == 2 and "makes no text" in errors


def test_mistakes_get_one_line_and_exit_code_2(tmp_path):
  pytest.importorskip("sklearn", reason="pip install 'multihead[vision]'")
  new = f"--workdir={tmp_path}/new"
  cases = {
    "set config.model.num_classes=10": ("vit", "--config.model.num_classes=7"),
    "no such folder": ("vit", "--config.data.path=/nowhere"),
    "did you mean 'imagenet'": ("vit", "--config.data.normalise=imagnet"),
    "no class 'asyncoi' (did you mean 'asyncio'?)": (
      "bert",
      "--config.data.classes=asyncoi,xml",
    ),
    "no package 'no_such_package' is installed here": (
      "bert",
      "--config.data.tokenizer=package:no_such_package/model",
    ),
  }
  assert_mistakes(
    tmp_path / "cases",
    {
      text: ("train", *config(name, *changes), new)
      for text, (name, *changes) in cases.items()
    },
  )
