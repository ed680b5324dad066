"""The state of a training run, and where it lives on the mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt32

from multihead.parallel import sharding


@struct.dataclass
class TrainState:
  """Everything that a step reads and writes; one pytree, saved as it is.

  Attributes:
    step: updates made so far.
    params: float32 master parameters.
    opt_state: the optimizer's state.
    rng: data of the run's key; a step folds its number into it.
    ema: averaged parameters, or None when averaging is off.
  """

  step: Int[Array, ""]
  params: Any
  opt_state: Any
  rng: UInt32[Array, "..."]
  ema: Any = None

  @property
  def eval_params(self) -> Any:
    """The parameters to evaluate: averaged ones where they are kept."""
    return self.params if self.ema is None else self.ema


def init_state(
  init_params: Callable[[jax.Array, Mesh], Any],
  optimizer: optax.GradientTransformation,
  shardings: TrainState,
  *,
  seed: int,
  mesh: Mesh,
  ema: bool = False,
) -> TrainState:
  """Makes the state of step 0, each part on its own shard.

  Args:
    init_params: makes the parameters from a key, on the mesh.
    optimizer: the transformation whose state is kept.
    shardings: what `state_shardings` returns.
    seed: gives the initial parameters and the run's key.
    mesh: where the state lives.
    ema: keep averaged parameters.
  """
  init_key, run_key = jax.random.split(jax.random.key(seed))
  params = init_params(init_key, mesh)

  def rest(params: Any, rng: jax.Array) -> TrainState:
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=None,
      opt_state=optimizer.init(params),
      rng=rng,
      ema=jax.tree.map(jnp.copy, params) if ema else None,
    )

  make = jax.jit(rest, out_shardings=shardings.replace(params=None))
  state = make(params, jax.random.key_data(run_key))
  return state.replace(params=params)


def abstract_state(
  abstract_params: Any,
  optimizer: optax.GradientTransformation,
  *,
  ema: bool = False,
) -> TrainState:
  """Shapes and dtypes of the state; allocates nothing."""
  return TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32),
    params=abstract_params,
    opt_state=jax.eval_shape(optimizer.init, abstract_params),
    rng=jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))),
    ema=abstract_params if ema else None,
  )


def params_only(abstract_params: Any, *, ema: bool = False) -> TrainState:
  """`abstract_state` without the optimizer's part, to evaluate."""
  return abstract_state(abstract_params, optax.identity(), ema=ema).replace(
    opt_state=None
  )


def state_shardings(
  abstract: TrainState,
  optimizer: optax.GradientTransformation,
  param_shardings: Any,
  mesh: Mesh,
) -> TrainState:
  """A sharding per leaf: the optimizer's moments lie where their weights do."""
  everywhere = sharding.replicated(mesh)
  opt_state = optax.tree.map_params(
    optimizer,
    lambda _, place: place,
    abstract.opt_state,
    param_shardings,
    transform_non_params=lambda _: everywhere,
  )
  return TrainState(
    step=everywhere,
    params=param_shardings,
    opt_state=opt_state,
    rng=everywhere,
    ema=None if abstract.ema is None else param_shardings,
  )


def place(abstract: TrainState, shardings: TrainState) -> TrainState:
  """The shapes with their shardings: what a checkpoint is restored onto."""
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    abstract,
    shardings,
  )
