"""A config made concrete on the devices that are here."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from multihead import tasks
from multihead.errors import UserError
from multihead.parallel import mesh as mesh_lib
from multihead.parallel import sharding
from multihead.train import adaptation, batches, optimizers, state
from multihead.train.checkpoints import Checkpoints
from multihead.train.config import TrainConfig, build_model

# Programs that may be under way before the host waits for the oldest of them.
IN_FLIGHT = 4


@dataclasses.dataclass(frozen=True)
class Run:
  """A config made concrete on the devices that are here.

  Attributes:
    mesh: all devices of the job.
    task: the task with its model.
    optimizer: the transformation.
    schedule: its learning rate.
    shardings: of the state.
    target: shapes with shardings, to restore onto.
    batch_sharding: of the batches.
    rows: (index, count), the part of each batch that this process reads.
  """

  config: TrainConfig
  mesh: Mesh
  task: Any
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  shardings: state.TrainState
  target: state.TrainState
  batch_sharding: NamedSharding
  rows: tuple[int, int]

  def batches(self, iterator: Iterator[Any]) -> Iterator[Any]:
    """Puts what an iterator gives onto the mesh."""
    for batch in iterator:
      yield self.place(batch)

  def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts one batch onto the mesh."""
    size = self.config.batch_size
    return batches.to_global(batch, self.batch_sharding, size)

  def describe(self) -> str:
    """Devices, mesh and size in two lines."""
    device = self.mesh.devices.flat[0]
    axes = ", ".join(f"{name}={n}" for name, n in self.mesh.shape.items())
    count = sharding.param_count(self.target.params)
    name = f"{self.config.model.name} {self.config.model.variant or ''}"
    return (
      f"devices: {self.mesh.size} x {device.device_kind} ({device.platform}), "
      f"{jax.process_count()} process(es); mesh: {axes}\n"
      f"model: {name.strip()}, {count:,} parameters, {self.config.dtype}"
    )


def make_mesh(
  config: TrainConfig, devices: list[jax.Device] | None = None
) -> Mesh:
  """The mesh that the config asks for."""
  return mesh_lib.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)


def prepare(
  config: TrainConfig,
  *,
  task: Any = None,
  devices: list[jax.Device] | None = None,
) -> Run:
  """Builds the mesh, the task and the shapes of the state.

  Allocates nothing, but with `config.adapter` the base, which is loaded.

  Args:
    config: what to build.
    task: a task made by the caller; None makes the one the config names.
    devices: the devices to use, all of them by default.

  Raises:
    UserError: the config cannot be run on these devices.
  """
  mesh = make_mesh(config, devices)
  batches.check_batch(
    config.batch_size,
    mesh.shape["data"] * mesh.shape["fsdp"],
    config.grad_accum_steps,
    (config.sequence_length, mesh.shape["sequence"]),
  )
  optimizer, schedule = optimizers.make_optimizer(
    config.optimizer, config.total_steps
  )
  if task is None:
    task = tasks.create(
      config.task,
      build_model(config),
      config.data,
      sequence_length=config.sequence_length,
      batch_size=config.batch_size,
      seed=config.seed,
    )
    if config.adapter.active:
      config, task = adaptation.adapt(config, task, mesh)
  abstract = state.abstract_state(
    task.abstract_params(), optimizer, ema=config.ema_decay > 0
  )
  shardings = state.state_shardings(
    abstract, optimizer, task.param_shardings(mesh), mesh
  )
  batch_sharding = sharding.batch_sharding(mesh)
  rows = batches.process_rows(
    batch_sharding, config.batch_size, config.sequence_length
  )
  return Run(
    config=config,
    mesh=mesh,
    task=task,
    optimizer=optimizer,
    schedule=schedule,
    shardings=shardings,
    target=state.place(abstract, shardings),
    batch_sharding=batch_sharding,
    rows=rows,
  )


def load_params(
  config: TrainConfig, workdir: str, mesh: Mesh | None = None
) -> tuple[Any, Any]:
  """The model of a run and its trained parameters, without its data.

  Args:
    config: of the run, see `config.read_json`.
    workdir: of the run.
    mesh: where the parameters shall live; None: one device.

  Returns:
    (model, params); averaged parameters where the run kept them.

  Raises:
    UserError: there is no checkpoint, or it is torn or of another model.
  """
  model = build_model(config)
  if mesh is None:
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  if config.adapter.active:
    return model, adaptation.load_merged(config, model, workdir, mesh)
  params = sharding.abstract_params(model)
  places = sharding.param_shardings(model, mesh)
  return model, restore_params(config, workdir, params, places, mesh)


def restore_params(
  config: TrainConfig, workdir: str, params: Any, places: Any, mesh: Mesh
) -> Any:
  """What a run trained, from its newest checkpoint.

  Args:
    config: of the run.
    workdir: of the run.
    params: shapes of what it trains.
    places: a sharding for each.
    mesh: that of the shardings.

  Raises:
    UserError: there is no checkpoint, or it is torn or of another model.
  """
  everywhere = sharding.replicated(mesh)
  ema = config.ema_decay > 0
  target = state.place(
    state.params_only(params, ema=ema),
    state.TrainState(
      step=everywhere,
      params=places,
      opt_state=None,
      rng=everywhere,
      ema=places if ema else None,
    ),
  )
  saved = open_checkpoints(workdir)
  try:
    found, _ = saved.restore(saved.latest_step(), target)
  finally:
    saved.close()
  return found.eval_params


def open_checkpoints(workdir: str) -> Checkpoints:
  """The checkpoints of a run that must exist.

  Raises:
    UserError: there are none.
  """
  path = os.path.join(workdir, "checkpoints")
  if os.path.isdir(path):
    saved = Checkpoints(path)
    if saved.latest_step() is not None:
      return saved
    saved.close()
  raise UserError(
    f"no checkpoint in {path}; give the --workdir of a run of "
    "experiments.train that has saved one"
  )


def final_metrics(run: Run, params: Any) -> dict[str, float]:
  """What the task computes once, at the end; nothing with several processes."""
  compute = getattr(run.task, "final_metrics", None)
  if compute is None or jax.process_count() > 1:
    return {}
  with jax.set_mesh(run.mesh):
    return compute(params)


def evaluate(run: Run, params: Any, max_batches: int = 0) -> dict[str, float]:
  """The task's numbers over the validation split (or its first batches)."""
  with jax.set_mesh(run.mesh):
    return make_evaluator(run)(params, max_batches)


def make_evaluator(run: Run) -> Callable[[Any, int], dict[str, float]]:
  """`evaluate` as a function that compiles once."""
  compute = jax.jit(
    run.task.eval_fn, out_shardings=sharding.replicated(run.mesh)
  )
  # What a task keeps frozen is an argument, so that it is not compiled in.
  frozen = getattr(run.task, "frozen", None)
  extra = {} if frozen is None else {"frozen": frozen}

  def evaluate(params: Any, max_batches: int = 0) -> dict[str, float]:
    iterator = run.task.eval_iterator(*run.rows)
    sums = []
    for index, batch in enumerate(run.batches(iterator)):
      sums.append(compute(params, batch, **extra))
      if index >= IN_FLIGHT:
        jax.block_until_ready(sums[index - IN_FLIGHT])
      if max_batches and index + 1 >= max_batches:
        break
    # Sums over a whole split are added in double precision.
    sums = jax.tree.map(
      lambda *parts: np.sum(np.asarray(parts, np.float64), axis=0),
      *jax.device_get(sums),
    )
    return run.task.summarise(sums)

  return evaluate
