"""The suite `attention`: what it counts, what it says, who agrees with whom."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from experiments.suites import attention, decoding, jobs, timing, workers
from experiments.suites import attention_tuning as tuning
from multihead import ops
from multihead.ops.attention.mosaic_gpu import blocks, tables
from tests.experiments.scripts import assert_mistakes, run_scripts


def test_operations_of_the_two_products():
  """4, 4096, 16, 128: 549.8 GFLOP forward without a mask."""
  count = lambda *way: attention._case((4, 4096, 16, 128), *way, 20).flops
  assert count(False, False) == 549_755_813_888
  assert count(True, False) == 549_755_813_888 / 2
  assert count(False, True) == 549_755_813_888 * 3.5


def test_tiny_suite_without_torch(tmp_path):
  [(code, out, err)] = run_scripts(
    tmp_path / "cases",
    (
      "benchmark",
      "--suite=attention",
      "--tiny",
      "--repeats=1",
      f"--workdir={tmp_path}/out",
    ),
    hidden=("torch",),
  )
  assert code == 0, err
  assert "torch is not installed" in out
  lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
  lines = [json.loads(line) for line in lines]
  ran = [line for line in lines if "seconds" in line]
  assert {line["contender"] for line in ran} == {
    "multihead",
    "multihead reference",
    "jax.nn",
  }
  rated = [line for line in ran if "flops_per_second" in line]
  assert all(line["flops_per_second"] > 0 for line in rated)
  assert (len(rated), len(ran)) == (4 * 3, 5 * 3)


def agree(names):
  for case in attention.cases(tiny=True):
    found = {}
    for name, prepare in case.contenders.items():
      if name in names:
        found[name] = np.asarray(prepare()())
    assert set(found) == set(names)
    want = found.pop("multihead")
    for name, y in found.items():
      y = y.swapaxes(1, 2) if name == "torch" else y  # [B, N, T, H]
      np.testing.assert_allclose(y, want, atol=2e-5, err_msg=name)


def test_contenders_of_jax_do_the_same():
  agree(("multihead", "multihead reference", "jax.nn"))


@pytest.mark.parity
def test_contenders_of_torch_do_the_same():
  pytest.importorskip("torch", reason="pip install multihead[parity]")
  agree(("multihead", "torch"))


def refused():
  """A job of ours that cannot run on a CPU."""
  arrays = functools.partial(attention.arrays, 1, 32, 2, 8)
  function = functools.partial(ops.attention, implementation="cudnn")
  return jobs.jax_job(arrays, "float32", False, 1, function)


def test_an_implementation_that_refuses_is_unavailable():
  with pytest.raises(timing.Unavailable, match="needs an NVIDIA GPU"):
    refused()()


def test_a_peer_that_fails_is_named_and_stops_nobody():
  def fails():
    raise RuntimeError("no such kernel\nand more")

  case = timing.Case(
    "case", 1, {"multihead": refused, "peer": fails, "fine": lambda: fails}
  )
  ready = timing.prepare(case)
  assert "needs an NVIDIA GPU" in ready.reasons["multihead"]
  assert "RuntimeError: no such kernel" in ready.reasons["peer"]
  assert list(ready.jobs) == ["fine"]
  broken = timing.Case("case", 1, {"multihead": fails})
  with pytest.raises(RuntimeError):
    timing.prepare(broken)


def test_times_and_memory_are_of_one_call():
  case = attention._case((1, 32, 2, 8), False, False, 7)
  assert case.contenders["multihead"]().calls == 7
  [cached] = decoding.cases(tiny=True)
  assert cached.traffic == 2 * 2 * 32 * 2 * 8 * 4


def test_groups_run_in_processes_of_their_own():
  """The same results as here; a process that dies is named."""
  cases = [case for case in attention.cases(tiny=True) if " full " in case.name]
  module = "experiments.suites.attention"
  for _, times in workers.run(module, True, cases, 2, 60.0):
    results = times()
    ran = {r.contender: len(r.seconds) for r in results if r.seconds}
    assert {"multihead", "multihead reference", "jax.nn"} <= set(ran)
    assert set(ran.values()) == {2}
    assert all(r.memory is not None for r in results if r.seconds)
  for _, times in workers.run("experiments.nowhere", True, cases[:1], 1, 60.0):
    assert all("No module named" in result.reason for result in times())


def test_figures_show_what_has_several_lengths(tmp_path):
  results = []
  for length in (32, 64, 128):
    for causal in (False, True):
      for backward in (False, True):
        case = attention._case((1, length, 2, 8), causal, backward, 1)
        results += [
          timing.Result(case, "multihead", seconds=(1e-3,), memory=length),
          timing.Result(case, "peer", seconds=(2e-3,)),
          timing.Result(case, "absent", reason="is not installed"),
        ]
  drawn = attention.figures(results, str(tmp_path / "x"))
  assert [caption.split()[0] for _, caption in drawn] == ["TFLOP/s", "MiB"]
  for path, _ in drawn:
    assert pathlib.Path(path).stat().st_size > 10_000
  assert attention.figures(results[:4], str(tmp_path / "y")) == []


def test_tuning_times_the_kernels_whose_sizes_it_changes(monkeypatch):
  """At head dim 128 the default backward kernel would be another one."""
  asked = []

  def attend(q, k, v, **options):
    asked.append(options)
    return q

  monkeypatch.setattr(tuning.ops, "attention", attend)
  for _, sizes in tuning._candidates("queries", 128):
    tuning._job((1, 64, 2, 128), False, "queries", sizes)()
  assert len(asked) == 4
  for options in asked:
    assert options["deterministic"] and options["causal"]
    assert options["implementation"] == "mosaic_gpu"


def test_tuning_writes_nothing_where_nothing_ran(tmp_path):
  case = next(iter(tuning.cases(tiny=True)))
  results = [timing.Result(case, "as it is", reason="needs a Hopper GPU")]
  assert "needs a Hopper GPU" in tuning.write(results, tmp_path)
  assert not list(tmp_path.iterdir())


def test_tuning_writes_a_table_that_the_kernels_read(tmp_path, monkeypatch):
  """The fastest of each case, beside what was not timed."""
  results = []
  for case in tuning.cases(tiny=True):
    for place, name in enumerate(case.contenders):
      seconds = 1.0 if place == 2 else 2.0
      results.append(timing.Result(case, name, seconds=(seconds,)))
  before = blocks.table()
  text = tuning.write(results, tmp_path)
  assert "| forward 64 full | 2000.000 | 1000.000 |" in text
  kind = jax.devices()[0].device_kind
  assert (tmp_path / tables.file_name(kind)).exists()
  monkeypatch.setattr(tables, "FOLDER", tmp_path)
  wanted = dict(tuning._candidates("forward", 64))
  wanted = wanted[list(wanted)[1]]  # After the sizes of today.
  assert wanted != before.forward[64, True]
  assert blocks.forward(64, 64, True) == wanted
  assert blocks.forward(40, 64, True) == wanted
  assert blocks.forward(128, 128, True) == before.forward[128, True]
  other = blocks.Forward(columns=64, stages=1)
  given = dataclasses.replace(before, forward={(256, True): other})
  with tables.using(given):
    assert blocks.forward(64, 64, True) == other
  path = tmp_path / "broken.json"
  for text, error in (
    ('{"sideways": {}}', "no kernel 'sideways'"),
    ('{"keys": {"64": {}}}', "'64' is no head dim"),
    ('{"keys": {"64 full": {"colums": 1}}}', "keys 64 full.*colums"),
    ('{"keys": 3}', "broken.json.*keys"),
    ("[]", "broken.json"),
    ("{", "broken.json"),
  ):
    path.write_text(text)
    with pytest.raises(ValueError, match=error):
      tables.read(path, before)


def test_tuning_needs_a_gpu_and_kernels(tmp_path):
  assert_mistakes(
    tmp_path / "cases",
    {
      "--tune times kernels of NVIDIA GPUs": (
        "benchmark",
        "--suite=attention",
        "--tune",
      ),
      "has no block sizes to --tune": (
        "benchmark",
        "--suite=hydra",
        "--tune",
      ),
    },
  )
