"""Runs that train an adapter or chosen parameters: base, start, way back.

`run` calls this where `config.adapter` says so; the task that results is
`multihead.tasks.adaptation`.
"""

import dataclasses
import os
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
from absl import logging
from jax.sharding import Mesh

from multihead import adapters, checkpoints
from multihead.adapters.linear_maps import flatten
from multihead.errors import UserError
from multihead.parallel import sharding
from multihead.tasks.adaptation import Adaptation, divide
from multihead.train import config as config_lib
from multihead.train.config import AdapterConfig, TrainConfig

_REGEX = set(".*+?[](){}|^$\\")


def adapt(
  config: TrainConfig, task: Any, mesh: Mesh
) -> tuple[TrainConfig, Adaptation]:
  """Loads the base and wraps a task, so that a part of its model is trained.

  Args:
    config: with an active `adapter` section.
    task: of the whole model.
    mesh: where the base goes.

  Returns:
    The config with the base's fingerprint in it, and the task.

  Raises:
    UserError: no such base, one that does not fit the model or is another than
      the config's fingerprint says; targets that are not there.
  """
  fresh = jax.random.split(jax.random.key(config.seed))[0]
  init = lambda: task.init_params(fresh, mesh)
  adapted = _assemble(config, task, init, mesh)
  settings = dataclasses.replace(config.adapter, fingerprint=adapted.base)
  return dataclasses.replace(config, adapter=settings), adapted


def _assemble(
  config: TrainConfig, task: Any, init: Any, mesh: Mesh
) -> Adaptation:
  """The adapted task over its base, which is loaded and checked."""
  settings, model = config.adapter, task.model
  shapes = sharding.abstract_params(model)
  frozen_shapes, start_shapes = divide(shapes, settings.trained)
  adapter = _adapter(settings, model)
  if adapter is not None:
    adapter.select(frozen_shapes)  # mistakes show before anything is loaded
  params = _base(settings, model, init, set(flatten(start_shapes)), mesh)
  frozen, start = divide(params, settings.trained)
  base = adapters.fingerprint(frozen)
  if settings.fingerprint not in (None, base):
    raise UserError(
      f"the base in {settings.base} has changed: its frozen parameters have "
      f"the fingerprint {base}, those of this run "
      f"{settings.fingerprint}; give the base that it was trained over as "
      "config.adapter.base"
    )
  if adapter is not None:
    adapter.bind(frozen)
  return Adaptation(task, adapter, frozen, start, base)


def _adapter(
  settings: AdapterConfig, model: nn.Module
) -> adapters.Hydra | None:
  if settings.targets is None:
    return None
  targets: Any = settings.targets
  if targets != "all-linear" and not _REGEX & set(targets):
    targets = [name.strip() for name in targets.split(",")]
  own = {"base", "targets", "trained", "fingerprint"}
  choices = {
    field.name: getattr(settings, field.name)
    for field in dataclasses.fields(settings)
    if field.name not in own
  }
  maps = adapters.linear_maps(model)
  return adapters.Hydra(targets, **choices, maps=maps)


def _base(
  settings: AdapterConfig,
  model: nn.Module,
  init: Any,
  trained: set[str],
  mesh: Mesh,
) -> Any:
  """The model's parameters, from the base wherever it has them."""
  if settings.base is None:
    return init()
  found = flatten(_read(settings.base, mesh))
  wanted = flatten(sharding.abstract_params(model))
  places = flatten(sharding.param_shardings(model, mesh))
  fits = {
    path
    for path, leaf in wanted.items()
    if path in found and found[path].shape == leaf.shape
  }
  missing = sorted(wanted.keys() - fits - trained)
  if missing:
    path = missing[0]
    there = list(found[path].shape) if path in found else "not there"
    raise UserError(
      f"config.adapter.base={settings.base!r} does not fit the model: "
      f"{len(missing)} parameters differ, e.g. {path}, {there} in the base and "
      f"{list(wanted[path].shape)} here; set config.model to the base's shape, "
      "or name what is new in config.adapter.trained"
    )
  if unused := sorted(found.keys() - wanted.keys()):
    logging.warning(
      "%d parameters of the base are not in this model and are left out: %s",
      len(unused),
      ", ".join(unused[:5]),
    )
  made = {
    path: jax.device_put(found[path].astype(wanted[path].dtype), places[path])
    for path in fits
  }
  if fresh := wanted.keys() - fits:
    logging.info("new parameters: %s", ", ".join(sorted(fresh)))
    initial = flatten(init())
    made |= {path: initial[path] for path in fresh}
  return flax.traverse_util.unflatten_dict(made, sep="/")


def _read(path: str, mesh: Mesh) -> Any:
  from multihead.train import run as run_lib

  if os.path.isdir(os.path.join(path, "checkpoints")):
    found = config_lib.read_json(os.path.join(path, "config.json"))
    return run_lib.load_params(found, path, mesh)[1]
  return checkpoints.from_pretrained(path, "float32", mesh)[1]


def load_merged(
  config: TrainConfig, model: nn.Module, workdir: str, mesh: Mesh
) -> Any:
  """The parameters of a model that a run adapted, the adapter folded in.

  Args:
    config: of the run, with its base's fingerprint.
    model: its model.
    workdir: of the run.
    mesh: where the parameters shall live.

  Raises:
    UserError: no checkpoint, or the base is missing or has changed.
  """
  from multihead.train import run as run_lib

  rng = jax.random.split(jax.random.key(config.seed))[0]
  init = lambda: sharding.init_params(model, rng, mesh)
  task = _assemble(config, _Bare(model), init, mesh)
  params = run_lib.restore_params(
    config, workdir, task.abstract_params(), task.param_shardings(mesh), mesh
  )
  return task.merged(params)


@dataclasses.dataclass(frozen=True, eq=False)
class _Bare:
  """A model without data, where a task would need some."""

  model: nn.Module

  def param_shardings(self, mesh: Mesh) -> Any:
    return sharding.param_shardings(self.model, mesh)
