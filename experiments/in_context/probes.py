"""Looks into trained networks: weights, other tasks, repeated layers."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.in_context import figures, fitting
from experiments.in_context.outcome import Outcome
from experiments.in_context.settings import Settings
from multihead.models import icl_gd
from multihead.tasks.in_context_regression import (
  InContextRegression,
  Tasks,
  squared_loss,
)
from multihead.train import writers

# A trained layer is iterated this often, each time with this share of it.
_REPEATS, _DAMPENING = 50, 0.75


def weights(
  settings: Settings,
  workdir: str,
  outcome: Outcome,
  params: Any,
  rates: dict[str, float],
) -> None:
  """The invariants of one head beside GD's, and the weights between the two."""
  model, family = settings.model, settings.task
  d, o = family.input_size, family.output_size
  descent = icl_gd.gd_weights(d, o, **rates)["layer"]["attention"]
  attention = params["layer"]["attention"]
  kq, pv = jax.vmap(icl_gd.invariants)(attention)
  # One factor moves between the two; with it KQ has a mean diagonal of 1.
  scale = jnp.mean(jnp.diagonal(kq[:, 0, :d, :d], axis1=1, axis2=2), axis=1)
  kq, pv = (
    kq[:, 0] / scale[:, None, None],
    pv[:, 0] * scale[:, None, None],
  )
  # Several layers are GD++, and nothing lies half-way between it and GD.
  if model.num_layers == 1:
    between = jax.vmap(lambda ours: icl_gd.interpolate(ours, descent, d))(
      attention
    )
    between = fitting.of_seeds(model, {"layer": {"attention": between}})
    found = fitting.losses({"loss": between}, family, settings.final_tasks)
    outcome.add(
      *("interpolated_loss", found["loss"]),
      "half trained, half GD: the same loss, within 1%",
      abs(found["loss"].mean() / outcome.mean("loss") - 1) < 0.01,
    )
  off = jnp.abs(kq[:, :d, :d] * (1 - jnp.eye(d))).max((1, 2))
  outcome.add(
    *("kq_largest_off_diagonal", off), "towards 0, beside a diagonal of 1"
  )
  outcome.add(
    "kq_of_targets",
    jnp.abs(kq[:, :d, d:]).max((1, 2)),
    "towards 0: targets are no keys",
  )
  outcome.drawn["Invariants, mean over seeds"] = figures.matrices(
    os.path.join(workdir, "weights.png"),
    {
      "Wq Wk^T, trained": np.asarray(kq.mean(0)),
      "Wq Wk^T, GD": np.asarray(icl_gd.invariants(descent)[0][0]),
      "Wv Wp, trained": np.asarray(pv.mean(0)),
      "Wv Wp, GD": np.asarray(icl_gd.invariants(descent)[1][0]),
    },
  )


def iterate(
  settings: Settings,
  workdir: str,
  outcome: Outcome,
  params: Any,
  rates: dict[str, float],
) -> None:
  """A layer trained to be one step, applied many times (dampened)."""
  layer = settings.model.clone(dampening=_DAMPENING, update_targets_only=True)
  tasks = fitting.draw(
    *(settings.task, fitting.FINAL_KEY, min(2000, settings.eval_tasks))
  )

  @jax.jit
  def medians(params: Any, tasks: Tasks) -> Any:
    def one(params: Any) -> Array:
      def repeat(h: Array, _: None) -> tuple[Array, Array]:
        h = layer.apply({"params": params}, h, method="trace")[1]
        return h, layer.read_out(h)

      _, answers = jax.lax.scan(repeat, tasks.tokens, length=_REPEATS)
      first = layer.read_out(tasks.tokens)[None]
      return _median_loss(jnp.concatenate([first, answers]), tasks)

    zero = _median_loss(jnp.zeros_like(tasks.y_query)[None], tasks)
    descent = icl_gd.gd_predictions(
      *(tasks.x, tasks.y, tasks.x_query),
      jnp.full(_REPEATS, _DAMPENING * rates["step"]),
    )
    return jax.vmap(one)(params), jnp.concatenate(
      [zero, _median_loss(descent, tasks)]
    )

  ours, descent = map(np.asarray, medians(params, tasks))
  outcome.add(
    *("repeated_loss", ours[:, -1]),
    f"median over tasks after {_REPEATS} repeats; GD {descent[-1]:.4g}",
  )
  outcome.add("repeated_gd_loss", descent[-1])
  outcome.drawn["A trained layer, repeated"] = figures.plot(
    os.path.join(workdir, "repeated.png"),
    [
      {
        "x": np.arange(_REPEATS + 1),
        "xlabel": f"repeats, each {_DAMPENING} of the update",
        "ylabel": "median loss",
        "lines": {"transformer": ours.T, "GD": descent},
      }
    ],
    size=(6, 4),
  )


def _median_loss(predictions: Array, tasks: Tasks) -> Array:
  """[L, B, o] to [L]; the mean would be that of the few that diverge."""
  error = jnp.sum((predictions - tasks.y_query) ** 2, axis=-1)
  return jnp.median(error, axis=-1) / 2


def sweeps(
  settings: Settings,
  workdir: str,
  outcome: Outcome,
  params: Any,
  descents: dict[str, dict[str, float]],
) -> None:
  """Out of distribution: other scales, other laws, wrong labels."""
  model, family = settings.model, settings.task
  count = model.num_layers
  predictors = {
    "transformer": fitting.of_seeds(model, params),
    **{
      name: fitting.of_gd(num_layers=count, **rates)
      for name, rates in descents.items()
    },
  }

  def sweep(family: InContextRegression, name: str, values: Any) -> Any:
    run = lambda value: fitting.losses(
      *(predictors, family, min(1000, settings.eval_tasks)), **{name: value}
    )
    return jax.jit(lambda values: jax.lax.map(run, values))(jnp.asarray(values))

  ranges = family.input_range * np.linspace(0.5, 2.0, 13)
  scales = family.weight_scale * np.linspace(0.5, 5.0, 10)
  mixture = dataclasses.replace(family, inputs="mixture", normalize=True)
  norms = np.linspace(0.5, 5.0, 10)
  found = {
    "input_range": (ranges, sweep(family, "input_range", ranges)),
    "weight_scale": (scales, sweep(family, "weight_scale", scales)),
    "other_laws": (norms, sweep(mixture, "input_range", norms)),
  }
  wrong = range(0, family.context_size, 2)
  runs = []
  for number in wrong:
    other = dataclasses.replace(family, distractors=number)
    runs.append(fitting.losses(predictors, other, settings.eval_tasks))
  found["distractors"] = (
    np.array(wrong),
    jax.tree.map(lambda *x: jnp.stack(x), *runs),
  )
  panels = []
  for name, (x, curves) in found.items():
    ours, descent = (np.asarray(curves[k]) for k in ("transformer", "GD"))
    if count == 1 and name != "distractors":
      apart = np.abs(ours.mean(-1) / descent - 1).max()
      outcome.add(
        *(f"{name}_max_relative_difference", apart),
        "of the losses of transformer and GD, at any point of the sweep: "
        "below 5%",
        apart < 0.05,
      )
    panels.append(
      {
        **dict(x=x, xlabel=name.replace("_", " "), ylabel="loss", log=True),
        "lines": {
          k if k == "transformer" else f"{k}, {count}": v
          for k, v in curves.items()
        },
      }
    )
  writers.write_json(
    os.path.join(workdir, "sweeps.json"),
    {
      name: {
        "x": np.asarray(x).tolist(),
        **{label: np.asarray(v).tolist() for label, v in curves.items()},
      }
      for name, (x, curves) in found.items()
    },
  )
  outcome.drawn["Out of distribution"] = figures.plot(
    os.path.join(workdir, "sweeps.png"), panels, size=(4.0, 3.4)
  )


def diabetes(family: InContextRegression, function: str) -> InContextRegression:
  """Tasks of the same size and scale, of rows of the diabetes table."""
  return dataclasses.replace(family, inputs="diabetes", function=function)


def preconditioner_of(tasks: Tasks) -> tuple[Array, float]:
  """The closed-form preconditioner for the inputs of real tasks.

  Their covariance is that of the sample; the noise that makes it fit the labels
  best, over the variance of weights, is found by search.
  """
  n, d = tasks.x.shape[1:]
  x = np.asarray(tasks.x, np.float64).reshape(-1, d)
  noises = np.geomspace(1e-3, 1e3, 25)
  candidates = [
    icl_gd.anisotropic_preconditioner(x.T @ x / len(x), n, noise_variance=noise)
    for noise in noises
  ]

  @jax.jit
  def loss(matrix: Array, tasks: Tasks) -> Array:
    answers = fitting.of_gd(1 / n, preconditioner=matrix)(tasks)
    return squared_loss(answers, tasks.y_query)

  candidates = jnp.asarray(np.stack(candidates), jnp.float32)
  best = int(np.argmin([loss(matrix, tasks) for matrix in candidates]))
  return candidates[best], float(noises[best])


def with_function(
  family: InContextRegression, function: str
) -> InContextRegression:
  """The family with another function."""
  return dataclasses.replace(family, function=function)


def reference_params(
  model: icl_gd.ICLGD, family: InContextRegression, key: jax.Array
) -> Any:
  """An embedding to be trained, and attention that is a step of GD.

  The last channel of the embedding is the target, the others are features; the
  learning rate is 0.1, and initial values have the published spreads.
  """
  params = fitting.initial(model, family, key)
  width = model.embedding_size
  params["layer"] = icl_gd.gd_weights(
    width - 1, step=0.1 / family.context_size
  )["layer"]
  spreads = {"linear": 0.002 / 2, "mlp_in": 0.002 / 2, "mlp_out": 0.002 / width}
  for i, (name, variance) in enumerate(spreads.items()):
    kernel = params["embedding"][name]["kernel"]
    params["embedding"][name]["kernel"] = variance**0.5 * jax.random.normal(
      jax.random.fold_in(key, i), kernel.shape
    )
  return params


def draw_sines(
  path: str, model: icl_gd.ICLGD, family: InContextRegression, results: Any
) -> str:
  """Two tasks, and what the networks make of them, seeds as bands."""
  points = jnp.linspace(-0.5, 0.5, 101) * family.input_range
  tasks = fitting.draw(family, fitting.FINAL_KEY, 2)
  panels = []
  for i in range(2):
    tokens = jnp.repeat(tasks.tokens[i : i + 1], len(points), axis=0)
    tokens = tokens.at[:, -1, 0].set(points)
    amplitude, phase = tasks.latent[i]
    asked = Tasks(tokens, *(None,) * 5)
    lines = {
      label: np.asarray(fitting.of_seeds(model, result.params)(asked))[..., 0].T
      for label, result in results.items()
    }
    lines["truth"] = np.asarray(amplitude * jnp.sin(points + phase))
    panels.append({"x": points, "xlabel": "x", "ylabel": "y", "lines": lines})
  return figures.plot(path, panels)


def first_step(
  steps: np.ndarray, reached: Float[np.ndarray, "T B"]
) -> Float[np.ndarray, "B"]:
  """The step of the first record at which it is so; NaN: it never is.

  Args:
    steps: [T], of the records.
    reached: [T, B], of every seed.
  """
  reached = np.asarray(reached, bool)
  first = steps[reached.argmax(axis=0)].astype(float)
  return np.where(reached.any(axis=0), first, np.nan)


def speed(settings: Settings, outcome: Outcome, trained: Any) -> None:
  """Programs compiled, and updates a second beside the published manner."""
  count = trained.compilations
  outcome.add("compilations", count, "1", count == 1)
  outcome.add(
    *("steps_per_second", trained.steps_per_second),
    "steps of all seeds together, evaluation included",
  )
  if fitting.has_published_rate(settings):
    outcome.add(
      *("published_recipe_steps_per_second", fitting.published_rate(settings)),
      "the same updates in the published manner: a seed alone, a call for data "
      "and one for the update, attention over all tokens",
    )
