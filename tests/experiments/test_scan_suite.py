"""The suite `scan`: what it counts, what it says, who agrees with whom."""

import json

import numpy as np
import pytest

from experiments.suites import scan, timing
from tests.experiments.scripts import run_scripts


def test_traffic_counts_every_array_once():
  """8,2048,1536,16 in bfloat16: 150 MiB of u, delta, y, B and C."""
  case = scan._scan_case((8, 2048, 1536, 16), "bfloat16", False, 20)
  wide, narrow = 8 * 2048 * 1536, 8 * 2048 * 16
  assert case.traffic == 2 * (3 * wide + 2 * narrow)
  both = scan._scan_case((8, 2048, 1536, 16), "bfloat16", True, 20)
  # The backward pass reads u, delta, B, C, dy and writes four gradients.
  assert both.traffic - case.traffic == 2 * (5 * wide + 4 * narrow)


def test_tiny_suite_without_peers(tmp_path):
  [(code, out, err)] = run_scripts(
    tmp_path / "cases",
    (
      "benchmark",
      "--suite=scan",
      "--tiny",
      "--repeats=1",
      f"--workdir={tmp_path}/out",
    ),
    hidden=("torch", "mambapy", "transformers"),
  )
  assert code == 0, err
  assert "mambapy | torch is not installed" in out
  lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
  lines = [json.loads(line) for line in lines]
  ran = {line["contender"] for line in lines if "seconds" in line}
  assert ran == {"multihead", "associative_scan", "lax.scan"}
  kinds = {" ".join(line["case"].split()[:2]) for line in lines}
  assert kinds == {
    f"{op} {way}"
    for op in ("selective_scan", "ssd")
    for way in ("forward", "forward+backward")
  }
  report = (tmp_path / "out" / "report.md").read_text()
  [figure] = (tmp_path / "out").glob("scan-*.png")
  assert f"]({figure.name})" in report
  assert figure.read_bytes().startswith(b"\x89PNG")


def outputs(case):
  """y of every contender that is installed."""
  found = {}
  for name, prepare in case.contenders.items():
    try:
      found[name] = np.asarray(prepare()())
    except timing.Unavailable:
      continue
  return found


def agree(found):
  want = found.pop("multihead")
  for name, y in found.items():
    # transformers has the channels before the tokens.
    y = y.swapaxes(1, 2) if y.shape != want.shape else y
    np.testing.assert_allclose(y, want, rtol=2e-4, atol=2e-5, err_msg=name)


def test_contenders_of_jax_do_the_same():
  for case in scan.cases(tiny=True):
    if "backward" not in case.name:
      continue
    found = outputs(case)
    assert len(found) >= 2
    agree(found)


@pytest.mark.parity
def test_contenders_of_torch_do_the_same():
  for name in ("torch", "transformers", "mambapy"):
    pytest.importorskip(name, reason="pip install multihead[parity]")
  for case in scan.cases(tiny=True):
    found = outputs(case)
    if case.name.startswith("selective_scan"):
      assert {"mambapy", "transformers"} <= set(found)
    agree(found)
