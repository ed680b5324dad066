"""`experiments.benchmark`: fair turns, honest tables, mistakes in one line."""

import json
import types

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import benchmark
from experiments.suites import falcon_h1, timing
from multihead import models
from multihead.parallel import sharding
from tests.experiments.scripts import assert_mistakes, run_scripts


class Clock:
  """A time that passes only when a job takes some."""

  def __init__(self, monkeypatch):
    self.now, self.log = 0.0, []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

  def contender(self, name, seconds):
    """A contender whose calls take these seconds, the last one for ever."""
    times = list(seconds)

    def job():
      self.now += times.pop(0) if len(times) > 1 else times[0]
      self.log.append(name)

    return lambda: job


def test_contenders_take_turns_after_a_warm_up(monkeypatch):
  clock = Clock(monkeypatch)
  case = timing.Case(
    "case",
    100,
    {
      "multihead": clock.contender("multihead", [9, 5, 1, 1, 2]),
      "peer": clock.contender("peer", [7, 5, 3, 4, 4]),
    },
    flops=1e12,
  )
  ours, theirs = timing.run(case, repeats=3)
  assert clock.log == [
    *["multihead"] * 2,
    *["peer"] * 2,
    *["multihead", "peer"] * 3,
  ]
  assert (ours.first, ours.seconds, ours.speedup) == (9, (1, 1, 2), None)
  assert (theirs.first, theirs.seconds) == (7, (3, 4, 4))
  assert theirs.speedup == 3  # of 3, 4 and 2
  assert (ours.rate, theirs.rate) == (100, 25)
  assert ours.flops == 1e12


def test_a_long_case_ends_early_with_whole_turns(monkeypatch):
  clock = Clock(monkeypatch)
  contenders = {
    name: clock.contender(name, [20]) for name in ("multihead", "peer")
  }
  results = timing.run(
    timing.Case("case", 1, contenders), repeats=9, most_seconds=100
  )
  assert [len(result.seconds) for result in results] == [3, 3]


def test_numbers_are_of_one_call(monkeypatch):
  clock = Clock(monkeypatch)

  def prepare():
    job = clock.contender("multihead", [8])()
    job.calls = 4
    return job

  case = timing.Case("case", 6, {"multihead": prepare}, traffic=3e9)
  [result] = timing.run(case, repeats=2)
  assert (result.seconds, result.rate) == ((2, 2), 3)
  head, _, row = timing.table([result], None, bandwidth=1e9).splitlines()
  place = head.split("|").index(" traffic floor ms ")
  assert float(row.split("|")[place]) == 3000


def test_growth_is_what_a_call_adds():
  held = [np.ones(2**22)]  # 32 MiB that were there before

  def job():
    np.ones(2**23)  # 64 MiB, given back
    held.append(np.ones(2**20))  # and 8 that stay

  found = timing.growth(job)
  if found is None:
    pytest.skip("this system does not tell how much memory a process has")
  assert 63 <= found / 2**20 <= 80


def test_a_job_may_know_its_memory(monkeypatch):
  clock = Clock(monkeypatch)

  def knows():
    job = clock.contender("knows", [1])()
    job.peak_memory = lambda: job() or 3 * 2**20
    return job

  contenders = {"knows": knows, "does not": clock.contender("does not", [1])}
  results = timing.run(timing.Case("case", 1, contenders), repeats=1)
  assert [result.memory for result in results] == [3 * 2**20, None]
  assert clock.log == ["knows"] * 2 + ["does not"] * 2 + ["knows", "does not"]
  head, _, first, second = timing.table(results, None).splitlines()
  place = head.split("|").index(" peak MiB ")
  cells = [row.split("|")[place].strip() for row in (first, second)]
  assert cells == ["3.0", ""]


def test_one_that_cannot_run_is_named_with_its_reason(monkeypatch):
  clock = Clock(monkeypatch)

  def missing():
    raise timing.Unavailable("nothing is not installed")

  def breaks():
    def job():
      raise timing.Unavailable("out of memory")

    return job

  case = timing.Case(
    "case",
    1,
    {
      "multihead": clock.contender("multihead", [1]),
      "absent": missing,
      "large": breaks,
    },
  )
  results = timing.run(case, repeats=2)
  assert [result.reason for result in results] == [
    "",
    "nothing is not installed",
    "out of memory",
  ]
  text = timing.table(results, None)
  assert "| case | absent | nothing is not installed |" in text
  rows = text.splitlines()
  assert len({row.count("|") for row in rows}) == 1
  assert len(rows) == 5


def test_operations_agree_with_the_published_parameter_counts():
  for name in ("0.5b", "7b"):
    model = models.create("falcon_h1", name)
    count = sharding.param_count(sharding.abstract_params(model))
    embedding = model.vocab_size * model.hidden_size
    scan = model.mamba_n_heads * model.mamba_d_head
    groups = model.mamba_n_groups * model.mamba_d_state
    width = model.num_attention_heads * model.head_dim
    batch, length = 3, 1024
    layers = model.num_hidden_layers
    wanted = 2 * (count - embedding) + 4 * (length / 2) * width * layers
    wanted += layers * (
      2 * model.mamba_chunk_size * (groups + scan)
      + 4 * model.mamba_d_state * scan
    )
    found = falcon_h1.forward_flops(model, batch, length)
    assert found == pytest.approx(batch * length * wanted, rel=2e-3)
    # Logits of one position in place of all.
    less = falcon_h1.forward_flops(model, batch, length, scored=1)
    assert found - less == 2 * batch * (length - 1) * embedding


def test_tiny_suite_without_peers(tmp_path):
  arguments = [
    "benchmark",
    "--suite=falcon_h1",
    "--tiny",
    "--repeats=2",
    f"--workdir={tmp_path}/out",
  ]
  first, second = run_scripts(
    tmp_path / "cases",
    arguments,
    [*arguments, "--filter=prefill"],
    hidden=("torch",),
  )
  for code, out, err in (first, second):
    assert code == 0, err
    assert "| prefill B2 T16 | transformers | torch is not installed |" in out
  lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
  lines = [json.loads(line) for line in lines]
  cases = ["train_step", "prefill", "generate", "generate", "prefill"]
  found = [(line["case"].split()[0], line["contender"]) for line in lines]
  assert found == [
    (case, who) for case in cases for who in ("multihead", "transformers")
  ]
  assert all(len(line["seconds"]) == 2 for line in lines[::2])
  assert all("not installed" in line["reason"] for line in lines[1::2])
  assert all("jax" in line["versions"] for line in lines)
  report = (tmp_path / "out" / "report.md").read_text()
  assert report.count("# falcon_h1, ") == 2
  numbers = json.loads((tmp_path / "out" / "metrics.json").read_text())
  assert list(numbers) == ["prefill B2 T16/multihead/tokens_per_second"]


def test_what_was_timed_survives_an_interruption(tmp_path, monkeypatch):
  def interrupted():
    raise KeyboardInterrupt

  cases = [
    timing.Case("first", 1, {"multihead": lambda: lambda: None}),
    timing.Case("second", 1, {"multihead": lambda: interrupted}),
  ]
  suite = types.SimpleNamespace(cases=lambda tiny: cases)
  monkeypatch.setattr(benchmark, "_suite", lambda name: suite)
  flags.FLAGS.mark_as_parsed()
  with (
    flagsaver.flagsaver(workdir=str(tmp_path / "out"), repeats=2),
    pytest.raises(KeyboardInterrupt),
  ):
    benchmark.main()
  [line] = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
  line = json.loads(line)
  assert (line["case"], len(line["seconds"])) == ("first", 2)


def test_mistakes_get_one_line_and_exit_code_2(tmp_path):
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  suite = "--suite=falcon_h1"
  cases = {
    "--suite is missing; the suites are falcon_h1": [],
    "(did you mean 'falcon_h1'?)": ["--suite=falcon"],
    "is not a regular expression": [suite, "--tiny", "--filter=("],
    "finds none of the cases train_step": [suite, "--tiny", "--filter=xyz"],
    "is that of a training run": [suite, f"--workdir={tmp_path}/run"],
    "repeats": [suite, "--repeats=0"],
  }
  assert_mistakes(
    tmp_path / "cases",
    {text: ("benchmark", *arguments) for text, arguments in cases.items()},
  )


@pytest.mark.parity
def test_tiny_suite_beside_transformers(tmp_path):
  pytest.importorskip("transformers", reason="pip install multihead[parity]")
  [(code, out, err)] = run_scripts(
    tmp_path / "cases",
    ("benchmark", "--suite=falcon_h1", "--tiny", "--repeats=1"),
  )
  assert code == 0, err
  rows = [row for row in out.splitlines() if "| transformers |" in row]
  assert len(rows) == 4
  assert all(row.rstrip(" |").endswith("x") for row in rows), out
