"""Where a model meets its batches; the training loop knows only a task.

A task is a frozen dataclass with
  data_config: the dataclass of its `config.data` section;
  create(model, data, *, sequence_length, batch_size, seed): makes it;
  unit, units_per_step: what a rate counts, e.g. "tokens" and how many a step
    takes;
  headline: the metric of its report, lower is better unless it has
    higher_is_better = True;
  init_params(rng, mesh), abstract_params(), param_shardings(mesh);
  init_batch(): a batch of the right shapes and dtypes;
  loss_fn(params, batch, rng, train) -> (loss, metrics): the loss is a weighted
    mean and metrics["weight"] its denominator;
  eval_fn(params, batch) -> sums, and summarise(sums) -> {name: number};
  train_iterator(index, count): endless, with get_state, set_state and close;
  eval_iterator(index, count): the validation split once, as many batches on
    every process;
  baselines() -> {"<name>_<headline>": number};
  sample(params, *, prompt, length, temperature, seed) -> text or None;
  facts() -> lines on its data for the report.
It may have, for what is done once, at the end, by a job of one process,
  final_metrics(params) -> {name: number}: what no sum over batches gives;
  draw(params, workdir) -> {title: name of a PNG file there}.
"""

from typing import Any

import flax.linen as nn

from multihead.errors import UserError, nearest
from multihead.tasks.classification import (
  ImageClassification,
  TextClassification,
)
from multihead.tasks.language_modelling import LanguageModelling
from multihead.tasks.segmentation import Segmentation

TASKS: dict[str, type] = {
  "image_classification": ImageClassification,
  "language_modelling": LanguageModelling,
  "segmentation": Segmentation,
  "text_classification": TextClassification,
}


def create(name: str, model: nn.Module, data: Any, **settings: Any) -> Any:
  """Makes a task.

  Args:
    name: a key of TASKS.
    model: the network it trains.
    data: an instance of that task's `data_config`.
    **settings: sequence_length, batch_size and seed.

  Raises:
    UserError: unknown name, or data that cannot be used.
  """
  if name not in TASKS:
    raise UserError(
      f"unknown task {name!r}{nearest(name, TASKS)}; the tasks are "
      f"{', '.join(TASKS)}"
    )
  return TASKS[name].create(model, data, **settings)


__all__ = [
  "TASKS",
  "ImageClassification",
  "LanguageModelling",
  "Segmentation",
  "TextClassification",
  "create",
]
