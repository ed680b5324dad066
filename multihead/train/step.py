"""The compiled training step: gradients, accumulation, guard, update."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from multihead.train.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# loss_fn(params, batch, rng, train) -> (loss, metrics). The loss is a weighted
# mean and metrics["weight"] its denominator; the other metrics are means with
# that same weight.
LossFn = Callable[[Any, Batch, jax.Array, bool], tuple[jax.Array, Metrics]]


def gradients(
  loss_fn: LossFn,
  params: Any,
  batch: Batch,
  rng: jax.Array,
  *,
  micro_batches: int = 1,
  batch_sharding: NamedSharding | None = None,
) -> tuple[Any, Metrics]:
  """Gradient and metrics of the mean loss over the batch.

  Micro-batches run one after another and count by their weights, so the result
  is that of the whole batch, also where they hold different numbers of tokens.

  Args:
    loss_fn: see LossFn.
    params: the parameters to differentiate by.
    batch: arrays [B, ...].
    rng: the step's key; each micro-batch folds its number into it.
    micro_batches: how many equal parts the batch is cut into.
    batch_sharding: where the batch lives; its micro-batches stay there.

  Returns:
    The gradients, and the metrics with "loss" and the total "weight".
  """
  compute = jax.value_and_grad(loss_fn, has_aux=True)

  def part(rng: jax.Array, batch: Batch) -> tuple[Any, Metrics]:
    (loss, metrics), grads = compute(params, batch, rng, True)
    return grads, {**metrics, "loss": loss}

  if micro_batches == 1:
    return part(rng, batch)

  def cut(array: jax.Array) -> jax.Array:
    # Every device's rows are dealt out to all micro-batches (row r goes to
    # micro-batch r mod n), so that no row has to change its device.
    shape = (array.shape[0] // micro_batches, micro_batches, *array.shape[1:])
    array = jnp.swapaxes(array.reshape(shape), 0, 1)
    if batch_sharding is not None:
      spec = PartitionSpec(None, *batch_sharding.spec[: array.ndim - 1])
      where = NamedSharding(batch_sharding.mesh, spec)
      array = jax.lax.with_sharding_constraint(array, where)
    return array

  def body(sums: Any, item: Any) -> tuple[Any, None]:
    index, micro = item
    grads, metrics = part(jax.random.fold_in(rng, index), micro)
    weight = metrics.pop("weight")
    sums = jax.tree.map(
      lambda total, value: total + weight * value, sums, (grads, metrics, 1.0)
    )
    return sums, None

  micros = jax.tree.map(cut, batch)
  first = jax.tree.map(lambda array: array[0], micros)
  shapes = jax.eval_shape(part, rng, first)
  shapes[1].pop("weight")
  zeros = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (*shapes, jnp.zeros(()))
  )
  sums, _ = jax.lax.scan(body, zeros, (jnp.arange(micro_batches), micros))
  grads, metrics, weight = sums
  # No scored token at all: every sum is zero, and so is the mean.
  scale = 1.0 / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
  grads, metrics = jax.tree.map(lambda total: total * scale, (grads, metrics))
  return grads, {**metrics, "weight": weight}


class TrainStep:
  """`state, metrics = step(state, batch)`, compiled once; state is donated.

  A step whose loss or gradient is not finite leaves parameters, optimizer
  state and average as they were and says so in metrics["finite"]; nothing
  waits for that answer.
  """

  def __init__(
    self,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shardings: TrainState,
    *,
    micro_batches: int = 1,
    batch_sharding: NamedSharding | None = None,
    ema_decay: float = 0.0,
    frozen: Any = None,
  ):
    """Builds the step; compilation happens at its first call.

    Args:
      loss_fn: see LossFn.
      optimizer: makes updates from gradients.
      schedule: the optimizer's learning rate, for the record.
      shardings: of the state, kept from step to step.
      micro_batches: gradient accumulation.
      batch_sharding: where batches live.
      ema_decay: decay of the average, where the state has one.
      frozen: arrays that the loss takes as `frozen=` besides the parameters. An
        argument of the program, so neither copied into it nor donated.
    """
    self._frozen = frozen

    def step(
      state: TrainState, batch: Batch, frozen: Any
    ) -> tuple[TrainState, Metrics]:
      key = jax.random.wrap_key_data(state.rng)
      loss = loss_fn
      if frozen is not None:
        loss = functools.partial(loss_fn, frozen=frozen)
      grads, metrics = gradients(
        loss,
        state.params,
        batch,
        jax.random.fold_in(key, state.step),
        micro_batches=micro_batches,
        batch_sharding=batch_sharding,
      )
      norm = optax.tree.norm(grads)
      finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
      updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params
      )
      params = optax.apply_updates(state.params, updates)
      ema = state.ema
      if ema is not None:
        ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
      new = (params, opt_state, ema)
      old = (state.params, state.opt_state, state.ema)
      params, opt_state, ema = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), new, old
      )
      metrics |= {
        "gradient_norm": norm,
        "learning_rate": schedule(state.step),
        "finite": finite,
      }
      state = state.replace(
        step=state.step + 1, params=params, opt_state=opt_state, ema=ema
      )
      return state, metrics

    everywhere = NamedSharding(shardings.step.mesh, PartitionSpec())
    self._step = jax.jit(
      step, donate_argnums=0, out_shardings=(shardings, everywhere)
    )

  def __call__(
    self, state: TrainState, batch: Batch
  ) -> tuple[TrainState, Metrics]:
    return self._step(state, batch, self._frozen)

  @property
  def compilations(self) -> int:
    """How many programs the calls so far have needed."""
    return self._step._cache_size()

  def lower(self, state: TrainState, batch: Batch) -> Any:
    """The step lowered for these shapes, to look into its HLO."""
    return self._step.lower(state, batch, self._frozen)
