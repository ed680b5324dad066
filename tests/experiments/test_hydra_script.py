"""The studies of Hydra at tiny sizes, its suite, and the mistakes of a user."""

import json

import numpy as np
import pytest

from experiments.hydra_studies import linear_teacher, transfer
from experiments.suites import hydra
from multihead.parallel import sharding
from tests.experiments import scripts


def test_students_have_equally_many_parameters():
  plan = linear_teacher.Plan()
  counts = {n: linear_teacher.count(plan, ranks) for n, ranks in plan.students}
  assert {counts[n] for n in ("LoRA", "SeqLoRA", "Hydra")} == {512}
  model = transfer._model(transfer.Plan(), 5)
  params = sharding.abstract_params(model)
  found = {
    sum(transfer.adapter_of(name, model).counts(params).values())
    for name in transfer.ADAPTERS
  }
  assert found == {4 * 1792}


@pytest.mark.parametrize("kind", linear_teacher.TEACHERS)
def test_a_short_problem_is_the_long_one(kind):
  plan = linear_teacher.Plan(d_in=7, d_out=5)
  for n in (3, 20):
    kernel, target, x, y = linear_teacher.problem(1, kind, n, plan)
    assert x.shape == (7, 7) and y.shape == (7, 5)
    np.testing.assert_allclose(np.linalg.norm(target - kernel), 1.0)
    rank = np.linalg.matrix_rank(target - kernel)
    assert rank == {"sequential": 4, "novel": 2, "both": 5}[kind]
    # A sequential change puts out nothing that W0 does not.
    inside = kernel @ np.linalg.pinv(kernel) @ (target - kernel)
    outside = np.abs(inside - (target - kernel)).max()
    assert (outside < 1e-9) == (kind == "sequential")
    # Differences of squared errors are those of n examples drawn again.
    rng = np.random.default_rng(1)
    draw = rng.standard_normal
    for shape in ((7, 5), (5, 5), (7, 2), (2, 5), (5, 4), (4, 5)):
      draw(shape)
    inputs = draw((n, 7))
    outputs = inputs @ target + plan.noise * draw((n, 5))
    whole = lambda w: np.sum((inputs @ w - outputs) ** 2) / n
    short = lambda w: np.sum((x @ w - y) ** 2)
    np.testing.assert_allclose(
      whole(kernel) - whole(target), short(kernel) - short(target)
    )


def test_script_and_mistakes(tmp_path):
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  tiny = ("hydra", "--study=linear_teacher", "--tiny")
  ((code, out, errors),) = scripts.run_scripts(
    tmp_path / "ours", (*tiny, f"--workdir={tmp_path}/work")
  )
  assert code == 0, errors
  numbers = json.loads((tmp_path / "work" / "metrics.json").read_text())
  shape = np.shape(numbers["linear_teacher"]["both"]["Hydra"])
  assert shape == (len(linear_teacher.TINY.samples), linear_teacher.TINY.seeds)
  text = (tmp_path / "work" / "report.md").read_text()
  assert "| both | 32 |" in text and text.strip() in out
  assert (tmp_path / "work" / "linear_teacher.png").stat().st_size > 10_000
  scripts.assert_mistakes(
    tmp_path / "mistakes",
    {
      "(did you mean 'transfer'?)": ["hydra", "--study=transfers"],
      "--workdir is missing": ["hydra", "--tiny"],
      "is that of a training run": [*tiny, f"--workdir={tmp_path}/run"],
    },
  )


def test_suite_without_peers(tmp_path):
  ((code, out, errors),) = scripts.run_scripts(
    tmp_path / "suite",
    ("benchmark", "--suite=hydra", "--tiny", "--repeats=1", "--filter=forward"),
    hidden=("torch", "transformers", "peft"),
  )
  assert code == 0, errors
  rows = [line for line in out.splitlines() if line.startswith("| ")]
  for who in ("multihead", "base", "unmerged"):
    assert any(f"| {who} |" in row for row in rows)


def test_a_step_of_the_suite():
  job = hydra._our_step(hydra.TINY, 2, "hydra")
  state, metrics = job()
  assert metrics["finite"] and metrics["loss"] > 0
  trained = sharding.param_count(state.params)
  assert trained == 2 * (2 * 32) + 2 * (16 + 32) + 2 * 32
  # Weights, moments and activations, and not a second copy of the weights.
  params = sharding.abstract_params(hydra._model(hydra.TINY))
  weights = 4 * sharding.param_count(params)
  assert weights < job.peak_memory() < 3 * weights
