"""The studies: each trains, measures, draws, and says what was to be expected.

A study is a function of (settings, workdir, writer) that returns an Outcome.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.in_context import (
  constructions,
  figures,
  fitting,
  probes,
  token_studies,
)
from experiments.in_context.outcome import Outcome
from experiments.in_context.settings import Settings
from multihead.errors import UserError
from multihead.models import icl_gd
from multihead.tasks.in_context_regression import squared_loss


def layers(settings: Settings, workdir: str, writer: Any) -> Outcome:
  """Linear layers beside as many steps of gradient descent (section 3).

  One layer shall be one step; several shall be GD++.
  """
  model, family = settings.model, settings.task
  count = model.num_layers
  outcome = Outcome()
  descents = {
    "GD": dict(step=fitting.search_step(family, settings.eval_tasks, count))
  }
  if count > 1:
    step, curvature, gdpp_loss = fitting.search_gdpp(
      family, 4 * settings.eval_tasks, count
    )
    descents["GD++"] = dict(step=step, curvature=curvature)
  trained = _fit_beside_gd(settings, workdir, writer, outcome, descents)
  predictors = {
    "loss": fitting.of_seeds(model, trained.params),
    "zero_loss": lambda tasks: jnp.zeros_like(tasks.y_query),
    **{
      name: fitting.of_gd(num_layers=count, **rates)
      for name, rates in descents.items()
    },
  }
  found = fitting.losses(predictors, family, settings.final_tasks)
  loss, gd_loss = found["loss"], found["GD"]
  if count > 1:
    outcome.add(
      *("loss", loss),
      f"below {count} steps of GD and within 10% of GD++, {gd_loss:.4f} and "
      f"{gdpp_loss:.4f}",
      loss.max() < gd_loss and loss.mean() < 1.1 * gdpp_loss,
    )
    outcome.add("gd_loss", gd_loss, "the best step for all layers, by search")
    outcome.add(
      *("gdpp_loss", gdpp_loss),
      "the best step and curvature for all layers, from spectra of S",
    )
    outcome.add("gdpp_same_tasks_loss", found["GD++"], "likewise, same tasks")
    outcome.add("gdpp_step", step)
    outcome.add("gdpp_curvature", curvature)
  else:
    outcome.add("gd_loss", gd_loss, "one step of GD on the same tasks")
    _expect_one_step(settings, outcome, trained.params, loss)
  outcome.add("zero_loss", found["zero_loss"])
  outcome.add("gd_step", descents["GD"]["step"])
  probes.speed(settings, outcome, trained)
  if model.recurrent and model.num_heads == 1:
    probes.weights(settings, workdir, outcome, trained.params, descents["GD"])
  # Where a layer's output is again what it reads.
  if count == 1 and model.positions == "none" and not model.embedding_size:
    probes.iterate(settings, workdir, outcome, trained.params, descents["GD"])
  probes.sweeps(settings, workdir, outcome, trained.params, descents)
  return outcome


def _expect_one_step(
  settings: Settings, outcome: Outcome, params: Any, loss: Any
) -> None:
  """One layer: the closed form says loss and step."""
  family = settings.task
  variance, fourth = family.moments()
  step, best = icl_gd.optimal_step_and_loss(
    *(family.input_size, family.context_size, variance, fourth),
    output_size=family.output_size,
    weight_variance=family.weight_scale**2,
    noise_variance=family.noise**2,
    distractors=family.distractors,
  )
  outcome.add(
    *("loss", loss),
    f"within 2% of the closed form, {best:.4f}",
    abs(loss.mean() / best - 1) < 0.02,
  )
  outcome.add("optimal_loss", best, "closed form")
  outcome.add("optimal_step", step, "closed form")
  learned = jax.vmap(
    lambda p: (
      jnp.trace(
        icl_gd.learned_preconditioner(
          p["layer"]["attention"], family.input_size, family.output_size
        )
      )
      / family.input_size
    )
  )(params)
  outcome.add(
    *("learned_step", learned),
    f"within 5% of {step:.4f}; mean diag(KQ) times -PV of the targets",
    bool((abs(learned / step - 1) < 0.05).all()),
  )


def _fit_beside_gd(
  settings: Settings,
  workdir: str,
  writer: Any,
  outcome: Outcome,
  descents: dict[str, dict[str, float]],
) -> Any:
  """Trains, with three measures of alignment with each descent on the way."""
  model, family = settings.model, settings.task
  count = model.num_layers
  prefixes = {"GD": "", "GD++": "gdpp_"}

  def evaluate(params: Any) -> dict[str, Any]:
    tasks = fitting.eval_tasks(settings, family)
    found = {}
    for name, rates in descents.items():
      parts = fitting.aligned_with_gd(model, params, tasks, **rates)
      found |= {f"{prefixes[name]}{n}": value for n, value in parts.items()}
    return found

  trained = fitting.fit(
    *(settings, "transformer"),
    model=model,
    family=family,
    writer=writer,
    evaluate=evaluate,
  )
  descent_loss = lambda rates: fitting.losses(
    {"loss": fitting.of_gd(num_layers=count, **rates)},
    *(family, settings.eval_tasks),
    key=jax.random.key(fitting.EVAL_KEY),
  )["loss"]
  history, steps = trained.history, trained.steps
  panels = [
    {
      **dict(x=steps, xlabel="training step", ylabel="loss"),
      "lines": {
        "transformer": history["loss"],
        **{
          f"{name}, {count}": descent_loss(rates)
          for name, rates in descents.items()
        },
      },
    }
  ]
  for name in descents:
    of = lambda key, name=name: history[f"{prefixes[name]}{key}"]
    panels.append(
      {
        **dict(x=steps, xlabel="training step", ylabel=f"beside {name}"),
        "lines": {
          "model cosine": of("cosine"),
          "model difference": of("difference"),
          "prediction difference": of("prediction_difference"),
        },
      }
    )
    cosine = of("cosine")[-1]
    single = count == 1
    outcome.add(
      *(f"{prefixes[name]}model_cosine", cosine),
      "above 0.995" if single else f"with {name}",
      (cosine > 0.995).all() if single else None,
    )
    for key in ("difference", "prediction_difference"):
      full = f"model_{key}" if key == "difference" else key
      outcome.add(f"{prefixes[name]}{full}", of(key)[-1], "towards 0")
  outcome.drawn["Loss and alignment while training"] = figures.plot(
    os.path.join(workdir, "training.png"), panels
  )
  return trained


def softmax(settings: Settings, workdir: str, writer: Any) -> Outcome:
  """One softmax head cannot be linear; the difference of two nearly is."""
  outcome, family = Outcome(), settings.task
  step = fitting.search_step(family, settings.eval_tasks)
  heads = settings.model.num_heads
  if heads < 2:
    raise UserError(
      "config.model.num_heads must be at least 2 in the softmax study, which "
      "trains one head beside them"
    )
  curves, predictors = {}, {"gd_loss": fitting.of_gd(step)}
  for prefix, number in (("one_head_", 1), ("", heads)):
    model = settings.model.clone(num_heads=number)

    def evaluate(params: Any, model: Any = model) -> dict[str, Any]:
      tasks = fitting.eval_tasks(settings, family)
      found = fitting.aligned_with_gd(model, params, tasks, step)
      return {"cosine": found["cosine"]}

    label = "one_head" if number == 1 else f"{number}_heads"
    trained = fitting.fit(
      *(settings, label),
      model=model,
      family=family,
      writer=writer,
      evaluate=evaluate,
    )
    curves[label] = trained
    predictors[f"{prefix}loss"] = fitting.of_seeds(model, trained.params)
    outcome.add(f"{prefix}model_cosine", trained.history["cosine"][-1])
  found = fitting.losses(predictors, family, settings.final_tasks)
  zero = family.moments()[0] * family.input_size / 2
  gap = zero - found["gd_loss"]
  for name, expected, holds in (
    ("one_head_loss", "fails: less than 3/4 of the way from 0 to GD",
     found["one_head_loss"].mean() > zero - 0.75 * gap),
    ("loss", f"{heads} heads align: within 10% of GD",
     found["loss"].mean() < 1.1 * found["gd_loss"]),
    ("gd_loss", "one step of GD on the same tasks", None),
  ):  # fmt: skip
    outcome.add(name, found[name], expected, holds)
  outcome.add("zero_loss", zero, "closed form")
  cosine = outcome.mean("model_cosine")
  outcome.expect("one_head_model_cosine", "lower than that of more heads")
  outcome.expect("model_cosine", "above 0.9", cosine > 0.9)
  probes.speed(settings, outcome, trained)
  steps = trained.steps
  outcome.drawn["One and more softmax heads"] = figures.plot(
    os.path.join(workdir, "training.png"),
    [
      {
        **dict(x=steps, xlabel="training step", ylabel="loss"),
        "lines": {
          **{label: t.history["loss"] for label, t in curves.items()},
          "GD": found["gd_loss"],
        },
      },
      {
        **dict(x=steps, xlabel="training step", ylabel="model cosine with GD"),
        "lines": {label: t.history["cosine"] for label, t in curves.items()},
      },
    ],
  )
  return outcome


def anisotropic(settings: Settings, workdir: str, writer: Any) -> Outcome:
  """One layer on correlated inputs: the optimum is preconditioned GD."""
  outcome, model, family = Outcome(), settings.model, settings.task
  covariance = family.input_range**2 * family.covariance
  d, n = family.input_size, family.context_size
  best = icl_gd.anisotropic_preconditioner(covariance, n)

  def learned(params: Any) -> Any:
    return n * icl_gd.learned_preconditioner(params["layer"]["attention"], d)

  def error(matrix: Any) -> Any:
    return jnp.linalg.norm(matrix - best) / jnp.linalg.norm(best)

  trained = fitting.fit(
    *(settings, "transformer"),
    model=model,
    family=family,
    writer=writer,
    evaluate=lambda params: {"preconditioner_error": error(learned(params))},
  )
  step = fitting.search_step(family, settings.eval_tasks)
  predictors = {
    "loss": fitting.of_seeds(model, trained.params),
    "gd_loss": fitting.of_gd(step),
    "preconditioned_gd_loss": fitting.of_gd(
      1 / n, preconditioner=jnp.asarray(best, jnp.float32)
    ),
  }
  found = fitting.losses(predictors, family, settings.final_tasks)
  optimal = icl_gd.anisotropic_loss(covariance, n)
  errors = trained.history["preconditioner_error"][-1]
  outcome.add(
    *("preconditioner_error", errors),
    "KQ PV N within 5% of the closed form (relative, Frobenius)",
    (errors < 0.05).all(),
  )
  outcome.add(
    *("loss", found["loss"]),
    f"within 2% of the closed form, {optimal:.4f}",
    abs(found["loss"].mean() / optimal - 1) < 0.02,
  )
  outcome.add(
    *("preconditioned_gd_loss", found["preconditioned_gd_loss"]),
    "one step with the closed-form preconditioner, same tasks",
  )
  outcome.add("gd_loss", found["gd_loss"], "one plain step, same tasks")
  outcome.add("optimal_loss", optimal, "closed form")
  probes.speed(settings, outcome, trained)
  outcome.drawn["Loss and distance from the closed form"] = figures.plot(
    os.path.join(workdir, "training.png"),
    [
      {
        **dict(x=trained.steps, xlabel="training step", ylabel="loss"),
        "lines": {
          "transformer": trained.history["loss"],
          "GD": found["gd_loss"],
          "preconditioned GD": optimal,
        },
      },
      {
        **dict(x=trained.steps, xlabel="training step", log=True),
        "ylabel": "relative error of the preconditioner",
        "lines": {"transformer": trained.history["preconditioner_error"]},
      },
    ],
  )
  mean = np.mean([learned(jax.tree.map(lambda x, i=i: x[i], trained.params))
                  for i in range(settings.seeds)], axis=0)  # fmt: skip
  outcome.drawn["The preconditioner"] = figures.matrices(
    os.path.join(workdir, "preconditioner.png"),
    {
      "learned": mean,
      "closed form": best,
      "10 x difference": 10 * (mean - best),
    },
  )
  return outcome


def real(settings: Settings, workdir: str, writer: Any) -> Outcome:
  """Trained on synthetic tasks, tested on patients of the diabetes table."""
  outcome, model, family = Outcome(), settings.model, settings.task
  step = fitting.search_step(family, settings.eval_tasks)
  descents = {"GD": dict(step=step)}
  trained = _fit_beside_gd(settings, workdir, writer, outcome, descents)
  outcome.rows.clear()
  for prefix, function in (("", "linear"), ("measured_", "measured")):
    # The same variance of a coordinate as in training, another covariance.
    rows = probes.diabetes(family, function)
    tasks = fitting.draw(rows, fitting.SEARCH_KEY, settings.eval_tasks)
    best, noise = probes.preconditioner_of(tasks)
    penalty, _, _ = icl_gd.best_rates(
      lambda exponent, _, tasks: squared_loss(
        icl_gd.ridge_predictions(tasks.x, tasks.y, tasks.x_query, 10**exponent),
        tasks.y_query,
      ),
      *(tasks, (-6.0, 2.0)),
    )
    retuned = fitting.search_step(rows, settings.eval_tasks)
    predictors = {
      "loss": fitting.of_seeds(model, trained.params),
      "gd_loss": fitting.of_gd(step),
      "retuned_gd_loss": fitting.of_gd(retuned),
      "preconditioned_gd_loss": fitting.of_gd(
        1 / rows.context_size, preconditioner=best
      ),
      "ridge_loss": lambda t, penalty=penalty: icl_gd.ridge_predictions(
        *(t.x, t.y, t.x_query), 10**penalty
      ),
      "zero_loss": lambda t: jnp.zeros_like(t.y_query),
    }
    found = fitting.losses(predictors, rows, settings.final_tasks)
    about = "random linear labels" if not prefix else "measured progression"
    ours, gd = found["loss"].mean(), found["gd_loss"]
    for name, expected, holds in (
      ("loss", f"{about}: as GD with the step of training, within 5%",
       abs(ours / gd - 1) < 0.05),
      ("gd_loss", "the step of training", None),
      ("retuned_gd_loss", f"the best step for these rows, {retuned:.3f}",
       found["retuned_gd_loss"] <= gd * 1.02),
      ("preconditioned_gd_loss",
       f"the preconditioner of these rows' covariance and noise {noise:.2g}",
       found["preconditioned_gd_loss"] <= found["retuned_gd_loss"] * 1.02),
      ("ridge_loss", f"the best penalty, 10^{penalty:.2f}",
       found["ridge_loss"] <= ours),
      ("zero_loss", "predicting 0", None),
    ):  # fmt: skip
      outcome.add(f"{prefix}{name}", found[name], expected, holds)
  probes.speed(settings, outcome, trained)
  return outcome


STUDIES = {
  "construct": constructions.construct,
  "layers": layers,
  "softmax": softmax,
  "anisotropic": anisotropic,
  "real": real,
  "sine": token_studies.sine,
  "copy": token_studies.copy,
}
