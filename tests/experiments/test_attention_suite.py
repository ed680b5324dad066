"""The suite `attention`: what it counts, what it says, who agrees with whom."""

import functools
import json

import numpy as np
import pytest

from experiments.suites import attention, timing
from multihead import ops
from tests.experiments.scripts import run_scripts


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
  assert all(line["flops_per_second"] > 0 for line in ran)
  assert len(ran) == 4 * 3


def agree(names):
  for case in attention.cases(tiny=True):
    found = {}
    for name, prepare in case.contenders.items():
      if name in names:
        found[name] = np.asarray(prepare()())
    assert set(found) == set(names)
    want = found.pop("multihead")
    for name, y in found.items():
      y = y.swapaxes(1, 2) if name == "torch" else y
      np.testing.assert_allclose(y, want, atol=2e-5, err_msg=name)


def test_contenders_of_jax_do_the_same():
  agree(("multihead", "multihead reference", "jax.nn"))


@pytest.mark.parity
def test_contenders_of_torch_do_the_same():
  pytest.importorskip("torch", reason="pip install multihead[parity]")
  agree(("multihead", "torch"))


def test_an_implementation_that_refuses_is_unavailable():
  arrays = functools.partial(attention._arrays, 1, 32, 2, 8)
  job = attention._jax_job(
    (arrays, "float32", False, 1),
    functools.partial(ops.attention, implementation="cudnn"),
  )
  with pytest.raises(timing.Unavailable, match="needs an NVIDIA GPU"):
    job()
