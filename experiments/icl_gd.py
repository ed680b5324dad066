r"""Studies of in-context learning by gradient descent (arXiv 2212.07677).

  python -m experiments.icl_gd --config=configs/icl_gd.py:construct \
    --workdir=runs/construct

trains nothing and checks the constructed weights in seconds. Other variants of
the config train several seeds at once, as one program: one_layer, two_layer,
deep, softmax, anisotropic, real, sine, copy (see configs/icl_gd.py). In
--workdir come metrics.json, figures and report.md, which has the expected value
beside each number, and metrics.jsonl while it runs.
"""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

import jax

from experiments import common
from experiments.in_context import settings as settings_lib
from experiments.in_context import studies
from multihead.errors import UserError
from multihead.train import writers


def read_config(values: Mapping[str, Any]) -> settings_lib.Settings:
  """Reads a config of configs/icl_gd.py strictly."""
  return settings_lib.read(values, studies.STUDIES)


def main() -> None:
  """Runs the study of the config and prints its table."""
  settings = read_config(common.config_values())
  workdir = common.workdir()
  if os.path.exists(os.path.join(workdir, "checkpoints")):
    raise UserError(
      f"--workdir={workdir} is that of a training run; give another folder"
    )
  if jax.process_count() > 1:
    raise UserError(
      "experiments.icl_gd runs in one process, on all devices of its machine; "
      f"there are {jax.process_count()} processes"
    )
  os.makedirs(workdir, exist_ok=True)
  common.say(json.dumps(settings.values, indent=2))
  device = jax.devices()[0]
  common.say(
    f"{jax.device_count()} x {device.device_kind} ({device.platform}), seeds "
    f"{settings.seed_list}"
  )
  began, cpu = time.perf_counter(), time.process_time()
  writer = writers.MetricWriter(workdir)
  # The sums are the point here: no TensorFloat-32 on GPUs.
  with jax.default_matmul_precision("highest"):
    outcome = studies.STUDIES[settings.study](settings, workdir, writer)
  writer.close()
  outcome.add("seconds", time.perf_counter() - began)
  outcome.add("cpu_seconds", time.process_time() - cpu)
  path = outcome.write(settings, workdir)
  common.say(f"\n{outcome.table()}\n\nThe report: {path}")


if __name__ == "__main__":
  common.run(main)
