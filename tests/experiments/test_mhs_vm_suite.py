"""The suite `mhs_vm`: what it counts, and that it runs."""

import json
import math

import jax
import pytest
from jax.extend.core import jaxprs_in_params

from experiments.suites import mhs_vm
from tests.experiments.scripts import run_scripts

# Parameters, and 1e9 multiply-adds at 256x256: convolutions and linear maps,
# einsums, scans. Counted in the authors' modules.
PUBLISHED = {
  "multihead": (17_257_129, 2.346, 0.969, 1.482),
  "3 heads": (17_386_153, 2.346, 0.988, 1.482),
  "no projection": (14_121_577, 1.780, 0.969, 1.482),
  "SS2D": (27_427_561, 4.068, 1.221, 2.965),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
  model = mhs_vm.networks({}, "float32")[name]
  parameters, *work = PUBLISHED[name]
  assert mhs_vm.parameters(model) == parameters
  found = [round(1e-9 * n, 3) for n in mhs_vm.forward_macs(model).values()]
  assert found == work


def dots(jaxpr):
  """Multiply-adds of all products of a program, loops left out."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contract, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      size = math.prod(equation.outvars[0].aval.shape)
      total += size * math.prod(left[i] for i in contract)
    if equation.primitive.name == "scan":
      continue
    for inner in jaxprs_in_params(equation.params):
      total += dots(inner)
  return total


@pytest.mark.parametrize("name", ("multihead", "3 heads", "SS2D"))
def test_counts_are_those_of_the_program(name):
  """The products that run are those counted; the convolution is a sum here."""
  model = mhs_vm.networks(dict(embed_dim=24, img_size=64), "float32")[name]
  params = mhs_vm.sharding.abstract_params(model)
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), "float32")
  call = lambda params, image: model.apply({"params": params}, image)
  found = dots(jax.make_jaxpr(call)(params, image).jaxpr)
  work = mhs_vm.forward_macs(model)
  convolutions = 0
  for level, blocks in enumerate((3, 4, 4, 4)):
    inner = (24 << level) * (1 if model.heads else 2)
    convolutions += blocks * 9 * inner * (16 >> level) ** 2
  assert found == work["layers"] + work["einsum"] - convolutions


def test_tiny_suite(tmp_path):
  [(code, out, err)] = run_scripts(
    tmp_path / "cases",
    (
      "benchmark",
      "--suite=mhs_vm",
      "--tiny",
      "--repeats=1",
      f"--workdir={tmp_path}/out",
    ),
  )
  assert code == 0, err
  lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
  lines = {line["contender"]: line for line in map(json.loads, lines)}
  assert set(lines) == {"multihead", "SS2D"}
  assert all(line["peak_bytes"] > 0 for line in lines.values())
  # Each rate is of the contender's own operations.
  work = {
    name: line["flops_per_second"] / line["images_per_second"]
    for name, line in lines.items()
  }
  assert work["multihead"] < work["SS2D"]
  assert "conv + linear" in (tmp_path / "out" / "report.md").read_text()
