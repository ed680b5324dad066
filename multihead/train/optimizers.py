"""Optimizers and learning-rate schedules, through optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from multihead.errors import UserError, nearest
from multihead.train.config import OptimizerConfig

OPTIMIZERS = ("adamw", "lion", "sgd")
SCHEDULES = ("constant", "linear", "cosine", "wave", "wsd", "power")

# Parameters that are not matrices of a linear map, by the last part of their
# path. Decay would pull an SSM's time scales (A_log, dt_bias) and skip (D)
# towards values that mean nothing.
NO_DECAY = ("bias", "scale", "A_log", "D", "dt_bias")


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
  """The learning rate as a function of the number of updates made so far.

  All schedules rise linearly from lr / warmup_steps, so that the first update
  already moves, to lr over the warm-up. Then
    constant: lr.
    linear, cosine: fall to end_factor * lr over decay_steps (0: the rest of
      the run), and stay there.
    wave: fall likewise along a cosine, and rise again: back at lr after
      2 decay_steps, and so on without end.
    wsd: stay at lr, then fall exponentially to end_factor * lr over the last
      decay_steps of the run (0: a tenth of it).
    power: lr * (t / warmup_steps)^-power, with t the number of the update.

  Raises:
    UserError: unknown schedule, or a warm-up and decay longer than the run.
  """
  _check("schedule", config.schedule, SCHEDULES)
  lr, warmup = config.lr, config.warmup_steps
  decay = config.decay_steps
  if decay == 0:
    whole = max(total_steps - warmup, 1)
    decay = max(total_steps // 10, 1) if config.schedule == "wsd" else whole
  decays = config.schedule in ("linear", "cosine", "wsd")
  if warmup + (config.decay_steps if decays else 0) > total_steps:
    raise UserError(
      f"config.optimizer.warmup_steps={warmup} and decay_steps="
      f"{config.decay_steps} do not fit into total_steps={total_steps}"
    )
  if config.schedule == "wsd" and config.end_factor <= 0:
    raise UserError(
      "config.optimizer.end_factor must be above 0 for wsd: its decay is "
      "exponential"
    )
  start = total_steps - decay if config.schedule == "wsd" else warmup

  def schedule(count: Any) -> jax.Array:
    t = jnp.asarray(count, jnp.float32) + 1.0
    rise = jnp.minimum(t / max(warmup, 1), 1.0)
    # The decay begins with the first update after `start`.
    share = jnp.clip((t - start) / decay, 0.0, 1.0)
    match config.schedule:
      case "constant":
        factor = 1.0
      case "linear":
        factor = 1.0 + (config.end_factor - 1.0) * share
      case "cosine":
        wave = 0.5 * (1.0 + jnp.cos(jnp.pi * share))
        factor = config.end_factor + (1.0 - config.end_factor) * wave
      case "wave":
        # Its first update is made at lr itself.
        wave = 0.5 * (1.0 + jnp.cos(jnp.pi * (t - 1.0 - start) / decay))
        factor = config.end_factor + (1.0 - config.end_factor) * wave
        factor = jnp.where(t > start, factor, 1.0)
      case "wsd":
        factor = jnp.exp(share * jnp.log(config.end_factor))
      case "power":
        past = jnp.maximum(t, max(warmup, 1)) / max(warmup, 1)
        factor = past**-config.power
    return jnp.asarray(lr * rise * factor, jnp.float32)

  return schedule


def decay_mask(params: Any) -> Any:
  """True for each parameter that weight decay shrinks, by its path."""

  def decays(path: Any, _: Any) -> bool:
    return str(getattr(path[-1], "key", path[-1])) not in NO_DECAY

  return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
  config: OptimizerConfig, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimizer with clipping, decoupled weight decay and its schedule.

  An update is -rate * (direction + decay * parameter). With the power schedule
  the decay falls as the rate does (both ~ t^-power), which keeps the ratio of
  the two, and with it the balance that weight norms settle at.

  Returns:
    The transformation, and the schedule for the record.

  Raises:
    UserError: unknown optimizer or schedule.
  """
  _check("name", config.name, OPTIMIZERS)
  schedule = make_schedule(config, total_steps)
  match config.name:
    case "adamw":
      direction = optax.scale_by_adam(config.b1, config.b2, config.eps)
    case "lion":
      direction = optax.scale_by_lion(config.b1, config.b2)
    case "sgd":
      direction = optax.trace(config.b1)
  decay = config.weight_decay
  if config.schedule == "power" and config.lr > 0:

    def decay(count: Any) -> jax.Array:
      return config.weight_decay * schedule(count) / config.lr

  steps = [direction, optax.scale_by_learning_rate(schedule)]
  if config.weight_decay > 0:
    mask = None if config.decay_all else decay_mask
    steps.insert(1, optax.add_decayed_weights(decay, mask=mask))
  if config.clip_norm > 0:
    steps.insert(0, optax.clip_by_global_norm(config.clip_norm))
  return optax.chain(*steps), schedule


def _check(key: str, value: str, allowed: tuple[str, ...]) -> None:
  if value not in allowed:
    raise UserError(
      f"config.optimizer.{key} is {value!r}{nearest(value, allowed)}; it must "
      f"be one of {', '.join(allowed)}"
    )
