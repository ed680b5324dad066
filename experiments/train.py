r"""Trains a model, or goes on training it.

  python -m experiments.train --config=configs/falcon_h1.py:demo \
    --workdir=/tmp/falcon

The same command, given again, goes on from the last checkpoint in --workdir.
"""

import json

from experiments import common
from multihead import train
from multihead.train import report
from multihead.train import run as run_lib


def main() -> None:
  """Prints what is about to run, trains, prints the result and a sample."""
  config, workdir = common.config(), common.workdir()
  run = run_lib.prepare(config)
  common.say(json.dumps(config.to_dict(), indent=2))
  common.say(run.describe())
  for fact in run.task.facts():
    common.say(fact)
  result = train.train(config, workdir, run=run)
  if not result.finished:
    common.say(
      f"stopped after step {result.step} of {config.total_steps}; the same "
      "command goes on from there"
    )
    return
  numbers, order = result.metrics, getattr(run.task, "higher_is_better", False)
  common.say("\n" + report.table(numbers, numbers, run.task.headline, order))
  if result.sample is not None:
    common.say(f"\nA sample of the model:\n{result.sample}")
  common.say(f"\nThe report: {workdir}/{report.REPORT}")


if __name__ == "__main__":
  common.run(main)
