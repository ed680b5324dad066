r"""Evaluates a model on its validation split, beside simple methods.

  python -m experiments.evaluate --workdir=/tmp/falcon
  python -m experiments.evaluate --checkpoint=Falcon-H1-0.5B-Base \
    --config=configs/falcon_h1.py:0.5b --config.sequence_length=2048

Of a language model these are gzip and Markov models; bits per byte compare
models of any tokenizer. The result is printed as a table
and written to <workdir>/evaluation.json, or to --output.
"""

import dataclasses
import os

import jax
from absl import flags

from experiments import common
from multihead import tasks
from multihead.errors import UserError
from multihead.parallel import sharding
from multihead.train import config as config_lib
from multihead.train import report, writers
from multihead.train import run as run_lib

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A Hugging Face directory, in place of --workdir."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "The JSON file to write; <workdir>/evaluation.json if unset."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size",
  None,
  "Sequences at a time; that of the training if unset.",
  lower_bound=1,
)


def main() -> None:
  """Loads, evaluates, prints, writes."""
  output = _OUTPUT.value
  if _CHECKPOINT.value is None:
    run, params = _from_workdir(common.workdir())
    output = output or os.path.join(common.workdir(), "evaluation.json")
  else:
    run, params = _from_directory(_CHECKPOINT.value)
  common.say(run.describe())
  for fact in run.task.facts():
    common.say(fact)
  found = run_lib.evaluate(run, params)
  found |= run_lib.final_metrics(run, params)
  result = {f"validation_{name}": value for name, value in found.items()}
  result["parameters"] = sharding.param_count(params)
  if jax.process_index() != 0:
    return
  result |= run.task.baselines()
  order = getattr(run.task, "higher_is_better", False)
  common.say("\n" + report.table(result, result, run.task.headline, order))
  for name, value in found.items():
    common.say(f"{name}: {value:.4f}")
  if output:
    writers.write_json(output, result)
    common.say(f"\nwritten to {output}")


def _from_workdir(workdir: str) -> tuple[run_lib.Run, object]:
  if common.has_config():
    config = common.config()
  else:
    config = config_lib.read_json(os.path.join(workdir, "config.json"))
  config = _here(config)
  # An adapter comes merged into its base's weights: the task is the plain one.
  plain = dataclasses.replace(config, adapter=config_lib.AdapterConfig())
  run = run_lib.prepare(plain)
  _, params = run_lib.load_params(config, workdir, run.mesh)
  return run, params


def _from_directory(path: str) -> tuple[run_lib.Run, object]:
  config = common.config() if common.has_config() else config_lib.TrainConfig()
  config = _here(config)
  mesh = run_lib.make_mesh(config)
  model, params, tokenizer = common.load_model(
    path, mesh=mesh, dtype=config.dtype
  )
  longest = getattr(model, "max_position_embeddings", config.sequence_length)
  if config.sequence_length > longest:
    raise UserError(
      f"config.sequence_length={config.sequence_length} is longer than the "
      f"{longest} positions of the model in {path}"
    )
  data = config.data
  reads_text = tokenizer is not None and hasattr(data, "tokenizer")
  if reads_text and tokenizer.name != "byte" and data.tokenizer == "byte":
    data = dataclasses.replace(data, tokenizer=tokenizer.name)
  task = tasks.create(
    config.task,
    model,
    data,
    sequence_length=config.sequence_length,
    batch_size=config.batch_size,
    seed=config.seed,
  )
  return run_lib.prepare(config, task=task), params


def _here(config: config_lib.TrainConfig) -> config_lib.TrainConfig:
  """The config with a mesh and a batch for the devices that are here."""
  devices = jax.device_count()
  size = _BATCH_SIZE.value or config.batch_size
  size = -(-size // devices) * devices
  mesh = config_lib.MeshConfig()
  return dataclasses.replace(
    config, mesh=mesh, batch_size=size, grad_accum_steps=1
  )


if __name__ == "__main__":
  common.run(main)
