"""Trains one model from several seeds at once, as one compiled program.

For models so small that one of them leaves a device idle. The seeds are a
leading axis of parameters and optimizer state, computed side by side (vmap) and
split over the mesh's data axis (shard_map); no device needs another. The loss
draws its own batch from a key, so many steps run without the host.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from multihead.errors import UserError
from multihead.parallel import make_mesh
from multihead.train.loop import NonFiniteError

# loss(params, key) -> scalar; draws its batch from the key.
Loss = Callable[[Any, jax.Array], Float[Array, ""]]
Evaluate = Callable[[Any], dict[str, Float[Array, ""]]]


class SeedState(NamedTuple):
  """Every leaf has the seeds as its first axis.

  Attributes:
    params: of the model.
    opt_state: of the optimizer.
    key: key data of each seed, for its batches.
    step: updates made so far, the same number for all.
  """

  params: Any
  opt_state: Any
  key: jax.Array
  step: jax.Array


class SeedResult(NamedTuple):
  """What training from several seeds leaves.

  Attributes:
    params: final parameters, the seeds first, on the host.
    steps: [logs] steps at which there are records.
    history: {name: [logs, seeds]}: "train_loss", the mean since the record
      before, and what `evaluate` gave.
    compilations: programs that were compiled for all of it.
    seconds: of all calls but the first, which compiles.
    steps_per_second: steps of all seeds together, in those calls; NaN if there
      was but one.
  """

  params: Any
  steps: np.ndarray
  history: dict[str, np.ndarray]
  compilations: int
  seconds: float
  steps_per_second: float


def seed_mesh(num_seeds: int, data: int = -1) -> Mesh:
  """The mesh whose data axis splits the seeds evenly.

  Args:
    num_seeds: how many there are.
    data: devices; -1 takes as many as divide the seeds.

  Raises:
    UserError: the devices are not there, or do not divide the seeds.
  """
  devices = jax.devices()
  if data == -1:
    data = max(n for n in range(1, len(devices) + 1) if num_seeds % n == 0)
  if not 1 <= data <= len(devices) or num_seeds % data:
    raise UserError(
      f"config.mesh.data={data} must divide the {num_seeds} seeds and be at "
      f"most the {len(devices)} devices here; -1 chooses"
    )
  return make_mesh(data=data, devices=devices[:data])


def train_seeds(
  init: Callable[[jax.Array], Any],
  loss: Loss,
  optimizer: optax.GradientTransformation,
  *,
  seeds: Sequence[int],
  total_steps: int,
  log_every: int,
  evaluate: Evaluate | None = None,
  trainable: Callable[[tuple[str, ...]], bool] | None = None,
  cycle: int = 0,
  mesh: Mesh | None = None,
  on_log: Callable[[int, dict[str, np.ndarray]], None] | None = None,
) -> SeedResult:
  """Trains from every seed; one compilation for all steps and evaluations.

  A seed's run is that seed's alone: it does not depend on the others.

  Args:
    init: parameters from a key.
    loss: of parameters, and of a key that changes with every step.
    optimizer: makes updates from gradients.
    seeds: one integer for each run.
    total_steps: updates; a multiple of log_every.
    log_every: updates between two records.
    evaluate: numbers of the parameters, computed at every record.
    trainable: whether the parameter of a path is trained; None: all are.
    cycle: batches repeat after this many steps; 0: never.
    mesh: see `seed_mesh`, the default.
    on_log: called with the step and {name: [seeds]} at every record.

  Returns:
    See `SeedResult`.

  Raises:
    UserError: total_steps is no multiple of log_every, or no seeds.
    NonFiniteError: a training loss that is not finite.
  """
  if not seeds or total_steps < 1 or log_every < 1 or total_steps % log_every:
    raise UserError(
      f"config.total_steps={total_steps} must be a positive multiple of "
      f"config.log_every_steps={log_every}, for {len(seeds)} > 0 seeds"
    )
  mesh = seed_mesh(len(seeds)) if mesh is None else mesh

  def start(seed: jax.Array) -> SeedState:
    first, key = jax.random.split(jax.random.key(seed))
    params = init(first)
    step = jnp.zeros((), jnp.int32)
    key = jax.random.key_data(key)
    return SeedState(params, optimizer.init(params), key, step)

  def update(state: SeedState, _: None) -> tuple[SeedState, Array]:
    number = state.step % cycle if cycle else state.step
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), number)
    value, grads = jax.value_and_grad(loss)(state.params, key)
    if trainable is not None:
      grads = jax.tree_util.tree_map_with_path(
        lambda path, g: g if trainable(_names(path)) else jnp.zeros_like(g),
        grads,
      )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state._replace(
      params=params, opt_state=opt_state, step=state.step + 1
    ), value

  def advance(state: SeedState) -> tuple[SeedState, dict[str, Array]]:
    state, losses = jax.lax.scan(update, state, length=log_every)
    found = {"train_loss": jnp.mean(losses)}
    return state, found | (evaluate(state.params) if evaluate else {})

  split = PartitionSpec("data")
  placed = NamedSharding(mesh, split)
  program = jax.jit(
    jax.shard_map(
      jax.vmap(advance), mesh=mesh, in_specs=(split,), out_specs=split
    ),
    in_shardings=placed,
    out_shardings=placed,
    donate_argnums=0,
  )
  start = jax.jit(jax.vmap(start), out_shardings=placed)
  state = start(jnp.asarray(seeds, jnp.uint32))
  records, seconds = [], 0.0
  for number in range(total_steps // log_every):
    began = time.perf_counter()
    state, found = program(state)
    found = jax.device_get(found)
    if number:
      seconds += time.perf_counter() - began
    step = (number + 1) * log_every
    bad = ~np.isfinite(found["train_loss"])
    if bad.any():
      names = ", ".join(str(s) for s, b in zip(seeds, bad, strict=True) if b)
      raise NonFiniteError(
        f"the loss of seed {names} is not finite at step {step}; lower "
        "config.optimizer.lr or set clip_norm"
      )
    records.append(found)
    if on_log is not None:
      on_log(step, found)
  history = {n: np.stack([r[n] for r in records]) for n in records[0]}
  timed = (total_steps - log_every) * len(seeds)
  return SeedResult(
    params=jax.device_get(state.params),
    steps=log_every * (1 + np.arange(len(records))),
    history=history,
    compilations=program._cache_size(),
    seconds=seconds,
    steps_per_second=timed / seconds if timed else math.nan,
  )


def _names(path: Any) -> tuple[str, ...]:
  return tuple(str(getattr(part, "key", part)) for part in path)
