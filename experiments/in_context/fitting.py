"""Trains the networks of a study, and measures predictors on the same tasks."""

import math
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.in_context.settings import Settings
from multihead.metrics import alignment
from multihead.models import icl_gd
from multihead.tasks.in_context_regression import (
  InContextRegression,
  Tasks,
  squared_loss,
)
from multihead.train import optimizers, writers
from multihead.train.config import OptimizerConfig
from multihead.train.seeds import SeedResult, seed_mesh, train_seeds

# Tasks of the curves come from one key, as do those of the numbers at the end.
EVAL_KEY, FINAL_KEY, SEARCH_KEY = 5, 6, 7
# Tasks that are held at once when many are measured.
_CHUNK = 5000

Predict = Callable[[Tasks], Float[Array, "B o"]]


def fit(
  settings: Settings,
  label: str,
  *,
  model: icl_gd.ICLGD,
  family: InContextRegression,
  writer: writers.MetricWriter | None = None,
  optimizer: OptimizerConfig | None = None,
  evaluate: Callable[[Any], dict[str, Array]] | None = None,
  init: Callable[[jax.Array], Any] | None = None,
  trainable: Callable[[tuple[str, ...]], bool] | None = None,
) -> SeedResult:
  """Trains one network from all seeds.

  Args:
    settings: steps, batch, seeds.
    label: of its curves and of its lines.
    model: the network.
    family: its tasks.
    writer: gets a record for each point of the curves.
    optimizer: the settings' own if None.
    evaluate: more numbers of the parameters, beside the loss.
    init: initial parameters; None: the model's.
    trainable: see `train_seeds`.
  """
  transformation, schedule = optimizers.make_optimizer(
    optimizer or settings.optimizer, settings.total_steps
  )

  def loss(params: Any, key: jax.Array) -> Array:
    tasks = family.sample(key, settings.batch_size)
    return squared_loss(predict(model, params, tasks), tasks.y_query)

  def numbers(params: Any) -> dict[str, Array]:
    tasks = eval_tasks(settings, family)
    found = {"loss": squared_loss(predict(model, params, tasks), tasks.y_query)}
    return found | (evaluate(params) if evaluate else {})

  total, runs = settings.total_steps, settings.seeds
  progress = writers.Progress(0, total, "tasks")
  progress.say(f"{label}: {runs} seeds, {total} steps of {settings.batch_size}")
  began = last = time.perf_counter()

  def on_log(step: int, found: dict[str, np.ndarray]) -> None:
    nonlocal last
    now = time.perf_counter()
    means = {name: float(value.mean()) for name, value in found.items()}
    seconds = (now - last) / settings.log_every_steps
    last = now
    progress.update(step)
    progress.show(
      step,
      {
        "loss": means["loss"],
        "learning_rate": float(schedule(step - 1)),
        "step_seconds": seconds,
        "tasks_per_second": runs * settings.batch_size / seconds,
      },
    )
    if writer is not None:
      writer.write(step, {f"{label}/{name}": v for name, v in means.items()})

  result = train_seeds(
    init or (lambda key: initial(model, family, key)),
    loss,
    transformation,
    seeds=settings.seed_list,
    total_steps=total,
    log_every=settings.log_every_steps,
    evaluate=numbers,
    trainable=trainable,
    cycle=settings.cycle_data,
    mesh=seed_mesh(runs, settings.mesh_data),
    on_log=on_log,
  )
  progress.close()
  progress.say(f"{label}: {time.perf_counter() - began:.0f} s")
  return result


def initial(
  model: icl_gd.ICLGD, family: InContextRegression, key: jax.Array
) -> Any:
  """Initial parameters for the tokens of a family."""
  tokens = jnp.zeros((1, family.length, family.token_size))
  return nn.meta.unbox(model.init(key, tokens)["params"])


def predict(
  model: icl_gd.ICLGD, params: Any, tasks: Tasks
) -> Float[Array, "B o"]:
  """The network's answers."""
  return model.apply({"params": params}, tasks.tokens)


def draw(family: InContextRegression, seed: int, count: int) -> Tasks:
  """Fixed tasks, in one program and not operation by operation."""
  return jax.jit(family.sample, static_argnums=1)(jax.random.key(seed), count)


def eval_tasks(settings: Settings, family: InContextRegression) -> Tasks:
  """The fixed tasks of the curves."""
  return family.sample(jax.random.key(EVAL_KEY), settings.eval_tasks)


def losses(
  predictors: dict[str, Predict],
  family: InContextRegression,
  count: int,
  *,
  key: jax.Array | None = None,
  **scales: Any,
) -> dict[str, Array]:
  """Mean loss of several predictors on the same tasks.

  Args:
    predictors: functions of tasks; a predictor of several seeds gives
      [seeds, B, o] and gets a loss for each.
    family: the tasks.
    count: how many, rounded up to whole chunks.
    key: of the tasks; None: those of the numbers at the end.
    **scales: input_range and weight_scale, see `InContextRegression.sample`.
  """
  key = jax.random.key(FINAL_KEY) if key is None else key
  size = min(count, _CHUNK)
  chunks = math.ceil(count / size)

  def chunk(key: jax.Array) -> dict[str, Array]:
    tasks = family.sample(key, size, **scales)
    half = lambda p: 0.5 * jnp.sum((p - tasks.y_query) ** 2, -1).mean(-1)
    return {name: half(f(tasks)) for name, f in predictors.items()}

  def mean(key: jax.Array) -> dict[str, Array]:
    found = jax.lax.map(chunk, jax.random.split(key, chunks))
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), found)

  return jax.jit(mean)(key)


def of_seeds(model: icl_gd.ICLGD, params: Any) -> Predict:
  """The answers of every seed's network, [seeds, B, o]."""
  return lambda tasks: jax.vmap(lambda p: predict(model, p, tasks))(params)


def of_gd(step: Any, num_layers: int = 1, **options: Any) -> Predict:
  """The answers after some steps of gradient descent, all of one rate."""
  return lambda tasks: icl_gd.gd_predictions(
    *(tasks.x, tasks.y, tasks.x_query),
    jnp.full(num_layers, step),
    **{
      name: jnp.full(num_layers, value) if name == "curvature" else value
      for name, value in options.items()
    },
  )[-1]


def search_step(
  family: InContextRegression, count: int, num_layers: int = 1
) -> float:
  """The best rate of gradient descent on a sample, found by search."""
  tasks = draw(family, SEARCH_KEY, count)
  step, _, _ = icl_gd.best_rates(
    lambda step, _, tasks: squared_loss(
      of_gd(step, num_layers)(tasks), tasks.y_query
    ),
    *(tasks, (0.0, _largest_step(tasks))),
  )
  return step


def search_gdpp(
  family: InContextRegression, count: int, num_layers: int
) -> tuple[float, float, float]:
  """Step, curvature and loss of GD++ at its best, from spectra alone."""
  tasks = draw(family, SEARCH_KEY, count)
  spectra = icl_gd.gram_eigenvalues(tasks.x)
  variance, _ = family.moments()
  # With curvature the input shrinks, and larger steps than GD's are stable.
  most = 5 * _largest_step(tasks)
  loss = lambda step, gamma, spectra: jnp.mean(
    icl_gd.k_step_loss(
      spectra,
      jnp.full(num_layers, step),
      variance,
      curvature=jnp.full(num_layers, gamma),
      output_size=family.output_size,
      weight_variance=family.weight_scale**2,
    )
  )
  return icl_gd.best_rates(
    *(loss, spectra, (0.0, most), (0.0, most / 8)), rounds=7
  )


def _largest_step(tasks: Tasks) -> float:
  """A step beyond which most tasks diverge: 2 over a typical eigenvalue."""
  top = icl_gd.gram_eigenvalues(tasks.x[:1000])[:, -1]
  return float(2 / jnp.median(top))


def aligned_with_gd(
  model: icl_gd.ICLGD, params: Any, tasks: Tasks, step: Any, **options: Any
) -> dict[str, Array]:
  """How alike a network and gradient descent are, as functions of the query.

  Args:
    model: on concatenated tokens.
    params: of one seed.
    tasks: where to compare them.
    step: of gradient descent, which makes as many as the network has layers.
    **options: curvature, for GD++; see `of_gd`.

  Returns:
    The fields of `metrics.alignment.Alignment`.
  """
  d = tasks.x.shape[-1]
  ours = alignment.query_gradients(
    lambda tokens: model.apply({"params": params}, tokens), tasks.tokens, d
  )
  descent = alignment.query_gradients(
    lambda tokens: of_gd(step, model.num_layers, **options)(
      tasks._replace(x_query=tokens[:, -1, :d])
    ),
    *(tasks.tokens, d),
  )
  return alignment.align(ours, descent)._asdict()


def has_published_rate(settings: Settings) -> bool:
  """Whether `published_rate` knows this network."""
  model = settings.model
  plain = not (model.embedding_size or model.mlp_widening or model.layer_norm)
  linear = model.recurrent and model.attention == "linear"
  return plain and linear and settings.task.layout == "concat"


def published_rate(settings: Settings, steps: int = 100) -> float:
  """Steps per second in the manner of the published code, on this machine.

  One seed; for every step one call that draws the tasks and one that updates;
  attention over all tokens, projected and read out one after the other. Only
  where `has_published_rate`.
  """
  model, family = settings.model, settings.task
  optimizer, _ = optimizers.make_optimizer(settings.optimizer, steps)
  params = initial(model, family, jax.random.key(0))
  opt_state = optimizer.init(params)
  draw = jax.jit(lambda key: family.sample(key, settings.batch_size))

  def loss(params: Any, tasks: Tasks) -> Array:
    w, h = params["layer"]["attention"], tasks.tokens
    for _ in range(model.num_layers):
      q = jnp.einsum("btd,dnh->btnh", h, w["query"])
      k = jnp.einsum("btd,dnh->btnh", h[:, :-1], w["key"])
      v = jnp.einsum("btd,dnh->btnh", h[:, :-1], w["value"])
      scores = jnp.einsum("btnh,bsnh->bnts", q, k)
      y = jnp.einsum("bnts,bsnh->btnh", scores, v)
      h = h + jnp.einsum("btnh,nhd->btd", y, w["output"])
    return squared_loss(model.read_out(h), tasks.y_query)

  @jax.jit
  def update(params: Any, opt_state: Any, tasks: Tasks) -> Any:
    value, grads = jax.value_and_grad(loss)(params, tasks)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = jax.tree.map(jnp.add, params, updates)
    return params, opt_state, value

  def run(first: int) -> None:
    nonlocal params, opt_state
    for i in range(first, first + steps):
      tasks = draw(jax.random.key(i))
      params, opt_state, _ = update(params, opt_state, tasks)
    jax.block_until_ready(params)

  run(0)
  began = time.perf_counter()
  run(steps)
  return steps / (time.perf_counter() - began)
