"""What a study is told, read strictly from a config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from multihead import models
from multihead.errors import UserError
from multihead.models.icl_gd import ICLGD
from multihead.tasks.in_context_regression import InContextRegression
from multihead.train import config as config_lib
from multihead.train import optimizers
from multihead.train.config import OptimizerConfig
from multihead.train.seeds import seed_mesh

# Keys of a config -> fields of Settings, where the two differ.
_SECTIONS = ("model", "task", "optimizer", "reference", "mesh")


@dataclasses.dataclass(frozen=True)
class Settings:
  """All that a study is told.

  Attributes:
    study: which one, a key of `studies.STUDIES`.
    model: the network.
    task: the family of tasks that it learns.
    optimizer: of the network.
    reference: of what is trained beside it (the MLP under fixed gradient
      descent of the sine study).
    total_steps: updates, a multiple of log_every_steps.
    log_every_steps: updates between two points of the curves.
    batch_size: tasks of an update.
    seeds: how many runs, side by side.
    seed: of the first; the others count on.
    eval_tasks: fixed tasks of the curves, and of searches for rates.
    final_tasks: of the numbers at the end.
    cycle_data: batches repeat after this many steps; 0: never.
    mesh_data: devices that the seeds are split over; -1: as many as divide.
    values: the config itself, for the report.
  """

  study: str
  model: ICLGD
  task: InContextRegression
  optimizer: OptimizerConfig
  reference: OptimizerConfig
  total_steps: int
  log_every_steps: int
  batch_size: int
  seeds: int
  seed: int
  eval_tasks: int
  final_tasks: int
  cycle_data: int
  mesh_data: int
  values: Mapping[str, Any]

  @property
  def seed_list(self) -> list[int]:
    """Every run's seed."""
    return [self.seed + i for i in range(self.seeds)]


def read(values: Mapping[str, Any], studies: Mapping[str, Any]) -> Settings:
  """Reads a config of configs/icl_gd.py.

  Args:
    values: a ConfigDict or nested dicts.
    studies: the studies there are.

  Raises:
    UserError: a key that nothing reads, or a value that cannot be.
  """
  given = _plain(values)
  if given.pop("script", None) != "icl_gd":
    raise UserError(
      "this config is not one of experiments.icl_gd; give "
      "--config=configs/icl_gd.py:one_layer, for example"
    )
  known = [field.name for field in dataclasses.fields(Settings)]
  plain = [n for n in known if n not in (*_SECTIONS, "mesh_data", "values")]
  _check_keys(given, [*plain, *_SECTIONS], "")
  missing = [name for name in plain if name not in given]
  if missing:
    raise UserError(f"config.{missing[0]} is missing")
  if given["study"] not in studies:
    raise UserError(
      f"config.study is {given['study']!r}; the studies are "
      f"{', '.join(studies)}"
    )
  for name in plain[1:]:
    least = 0 if name in ("seed", "cycle_data") else 1
    if type(given[name]) is not int or given[name] < least:
      raise UserError(
        f"config.{name} is {given[name]!r}; it must be an integer of at least "
        f"{least}"
      )
  if given["total_steps"] % given["log_every_steps"]:
    raise UserError(
      f"config.total_steps={given['total_steps']} must be a positive multiple "
      f"of config.log_every_steps={given['log_every_steps']}"
    )
  mesh = given.get("mesh", {})
  _check_keys(mesh, ["data"], "mesh.")
  settings = Settings(
    model=_model(_set(given.get("model", {}))),
    task=_section(InContextRegression, _set(given.get("task", {})), "task."),
    optimizer=_section(OptimizerConfig, given.get("optimizer"), "optimizer."),
    reference=_section(
      OptimizerConfig,
      given.get("optimizer", {}) | _set(given.get("reference", {})),
      "reference.",
    ),
    mesh_data=mesh.get("data", -1),
    values=_plain(values),
    **{name: given[name] for name in plain},
  )
  # What can be wrong with these is better said before a search for rates.
  for optimizer in (settings.optimizer, settings.reference):
    optimizers.make_optimizer(optimizer, settings.total_steps)
  seed_mesh(settings.seeds, settings.mesh_data)
  return settings


def _model(given: dict[str, Any]) -> ICLGD:
  return models.create("icl_gd", given.pop("variant", None), **given)


def _set(values: dict[str, Any]) -> dict[str, Any]:
  """Without the keys that a config names but leaves open."""
  return {key: value for key, value in values.items() if value is not None}


def _section(kind: Any, values: dict[str, Any] | None, path: str) -> Any:
  values = values or {}
  _check_keys(values, [f.name for f in dataclasses.fields(kind)], path)
  return kind(**values)


def _check_keys(values: dict[str, Any], allowed: list[str], path: str) -> None:
  for key in values:
    if key not in allowed:
      raise UserError(
        config_lib.unknown_key(f"{path}{key}", [f"{path}{a}" for a in allowed])
      )


def _plain(value: Any) -> Any:
  """ConfigDicts as dicts, lists as tuples."""
  if hasattr(value, "items"):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return tuple(_plain(item) for item in value)
  return value
