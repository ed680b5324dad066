"""The study of scan routes: what it compares, and that it runs."""

import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import mhs_vm_routes
from experiments.scan_studies import fitting
from tests.experiments.scripts import run_scripts


def test_variants_differ_in_their_scans_alone():
  plan = fitting.Plan()
  nets = {name: fitting.network(name, plan) for name in fitting.VARIANTS}
  counts = {name: fitting.parameters(net) for name, net in nets.items()}
  ours = counts[fitting.OURS]
  assert {n for name, n in counts.items() if name.startswith("4")} == {ours}
  assert 0.6 < ours / counts[fitting.BASELINE] < 0.7
  # A width is a multiple of four, so equal means nearly so.
  assert 0.8 < counts[fitting.CONTROL] / ours < 1.2
  assert nets[fitting.CONTROL].heads == nets[fitting.BASELINE].heads == 0


@pytest.mark.parametrize("task", fitting.TASKS)
def test_data_have_both_kinds_of_pixels(task):
  train, held = fitting.load(task, fitting.Plan(size=32, examples=50))
  assert len(train.images) + len(held.images) == 50
  for part in (train, held):
    assert part.images.shape[1:] == (32, 32, 3)
    assert set(np.unique(part.masks)) == {0, 1}


def test_pooled_iou_counts_pixels_of_all_images():
  predicted = np.array([[1, 1, 0], [1, 0, 0]], bool)
  truth = np.array([[1, 0, 0], [1, 1, 0]], bool)
  assert float(fitting.pooled_iou(predicted, truth)) == 2 / 4


def test_differences_are_points_seed_by_seed():
  fit = lambda *iou: types.SimpleNamespace(iou=np.array(iou))
  fits = {
    "maze": {
      fitting.OURS: fit(0.6, 0.5), fitting.BASELINE: fit(0.4, 0.4),
    }
  }  # fmt: skip
  _, row = mhs_vm_routes._differences(fits)
  assert row.startswith(f"| {fitting.OURS} - {fitting.BASELINE} | +15.00 ± ")


def test_images_and_masks_turn_alike():
  x = jnp.asarray(np.random.default_rng(0).random((2, 8, 8, 3)))
  seen = set()
  for seed in range(16):
    images, masks = fitting._turned((x, x[..., 0]), jax.random.key(seed))
    np.testing.assert_array_equal(images[..., 0], masks)
    seen.add(np.asarray(masks).tobytes())
  assert len(seen) > 4


def test_quick_study_and_mistakes(tmp_path):
  out = tmp_path / "out"
  results = run_scripts(
    tmp_path / "cases",
    (
      "mhs_vm_routes",
      "--quick",
      "--tasks=lesions",
      "--variants=1",
      f"--workdir={out}",
    ),
    ("mhs_vm_routes", "--tasks=mase", f"--workdir={out}"),
    ("mhs_vm_routes", "--variants=9", f"--workdir={out}"),
    ("mhs_vm_routes", "--size=48", f"--workdir={out}"),
    ("mhs_vm_routes", "--variants=-1", f"--workdir={out}"),
    ("mhs_vm_routes", "--tasks=", f"--workdir={out}"),
    ("mhs_vm_routes", "--quick", f"--workdir={out}"),
    ("mhs_vm_routes", "--quick", f"--workdir={out}/report.md"),
  )
  code, _, err = results[0]
  assert code == 0, err
  numbers = json.loads((out / "metrics.json").read_text())
  found = numbers[f"lesions/{fitting.OURS}"]
  assert len(found["iou_of_seeds"]) == 2
  assert np.shape(found["open_gate_of_heads"]) == (2, 4)
  report = (out / "report.md").read_text()
  for name in re.findall(r"\]\((\S+\.png)\)", report):
    assert (out / name).read_bytes().startswith(b"\x89PNG")
  assert "lesions_routes.png" in report
  for (code, _, err), text in zip(
    results[1:], (
      "did you mean 'maze'", "give numbers of", "a power of two",
      "give numbers of", "--tasks= is empty", "which this one would replace",
      "cannot be made",
    ),
    strict=True,
  ):  # fmt: skip
    assert code == 2 and text in err
