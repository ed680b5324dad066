"""Studies in which pairs (x, y) are not given, but have to be made."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.in_context import figures, fitting, probes
from experiments.in_context.outcome import Outcome
from experiments.in_context.settings import Settings
from multihead.errors import UserError
from multihead.metrics import alignment
from multihead.tasks.in_context_regression import squared_loss

# Tokens that a token after the first layer may depend on.
_PLACES = ("own", "next", "other")


def sine(settings: Settings, workdir: str, writer: Any) -> Outcome:
  """An MLP in front of one layer, beside an MLP in front of GD (section 4)."""
  outcome, model = Outcome(), settings.model
  if not model.embedding_mlp or model.num_layers != 1:
    raise UserError(
      "the sine study needs config.model.embedding_mlp and one layer"
    )
  panels = []
  for prefix, function in (("", "sine"), ("independent_", "sine_independent")):
    family = probes.with_function(settings.task, function)
    trained = fitting.fit(
      *(settings, f"{prefix}transformer"),
      model=model,
      family=family,
      writer=writer,
    )
    # MLP + GD: the features are learned, the step on the last channel is not.
    reference = fitting.fit(
      *(settings, f"{prefix}reference"),
      model=model,
      family=family,
      writer=writer,
      optimizer=settings.reference,
      init=lambda key, family=family: probes.reference_params(
        model, family, key
      ),
      trainable=lambda path: path[0] == "embedding",
    )
    tasks = fitting.eval_tasks(settings, family)
    ours, theirs = (
      fitting.of_seeds(model, result.params)(tasks)
      for result in (trained, reference)
    )
    zero = squared_loss(jnp.zeros_like(tasks.y_query), tasks.y_query)
    loss = trained.history["loss"][-1]
    reference_loss = reference.history["loss"][-1]
    published = function == "sine"
    about = (
      f"amplitude and phase {'as published' if published else 'independent'}"
    )
    outcome.add(
      *(f"{prefix}loss", loss),
      f"{about}: below {'half of ' * published}predicting 0, {zero:.4f}",
      loss.mean() < (zero / 2 if published else zero),
    )
    outcome.add(
      *(f"{prefix}reference_loss", reference_loss),
      "MLP + GD, trained as long",
      loss.mean() < 1.1 * reference_loss.mean() if published else None,
    )
    outcome.add(f"{prefix}zero_loss", zero)
    outcome.add(
      *(f"{prefix}prediction_difference", jnp.abs(ours - theirs).mean((1, 2))),
      "mean |transformer - reference|, pairs of seeds",
    )
    panels.append(
      {
        **dict(x=trained.steps, xlabel="training step", ylabel="loss"),
        "title": about,
        "lines": {
          "MLP + linear attention": trained.history["loss"],
          "MLP + GD": reference.history["loss"],
          "predicting 0": zero,
        },
      }
    )
    outcome.drawn[f"Predictions, {about}"] = probes.draw_sines(
      os.path.join(workdir, f"{function}.png"),
      *(model, family, {"transformer": trained, "MLP + GD": reference}),
    )
  probes.speed(settings, outcome, trained)
  path = os.path.join(workdir, "training.png")
  drawn = {"Loss while training": figures.plot(path, panels)}
  outcome.drawn = drawn | outcome.drawn
  return outcome


def copy(settings: Settings, workdir: str, writer: Any) -> Outcome:
  """Tokens x, y, x, y: a first layer learns to copy, abruptly (section 5)."""
  outcome, model, family = Outcome(), settings.model, settings.task
  if family.layout == "concat" or model.num_layers != 2 or model.recurrent:
    raise UserError(
      "the copy study needs config.task.layout='classic' or 'classic_wide' and "
      "two layers of their own (config.model.recurrent=False)"
    )

  def evaluate(params: Any) -> dict[str, Any]:
    tasks = family.sample(jax.random.key(fitting.SEARCH_KEY), 64)

    def first_layer(tokens: Any, share: float) -> Any:
      h = model.apply({"params": params}, tokens, method="trace")
      return h[1] - share * h[0]

    found = {}
    for prefix, share in (("", 0.0), ("update_", 1.0)):
      of = alignment.copy_sensitivity(
        lambda tokens, share=share: first_layer(tokens, share), tasks.tokens
      )
      found |= {f"{prefix}{n}": v for n, v in of._asdict().items()}
    return found

  trained = fitting.fit(
    *(settings, "transformer"),
    model=model,
    family=family,
    writer=writer,
    evaluate=evaluate,
  )
  step = fitting.search_step(family, settings.eval_tasks)
  found = fitting.losses(
    {
      "loss": fitting.of_seeds(model, trained.params),
      "gd_loss": fitting.of_gd(step),
      "zero_loss": lambda tasks: jnp.zeros_like(tasks.y_query),
    },
    *(family, settings.final_tasks),
  )
  gd, zero = float(found["gd_loss"]), float(found["zero_loss"])
  history = trained.history
  drop = probes.first_step(trained.steps, history["loss"] < (gd + zero) / 2)
  crossing = _crossing(trained, "update_")
  loss = found["loss"]
  outcome.add(
    *("loss", loss),
    "at or below 110% of one step of GD",
    loss.mean() < 1.1 * gd,
  )
  outcome.add("gd_loss", gd, "one step of GD on pairs (x, y), same tasks")
  outcome.add("zero_loss", zero, "predicting 0: the plateau")
  outcome.add(
    *("drop_step", drop),
    "where the loss passes the middle between plateau and GD",
    np.isfinite(drop).all(),
  )
  outcome.add(
    *("crossing_step", crossing),
    "where what layer 1 adds is most sensitive to the next token: by the drop",
    (crossing <= drop).all(),
  )
  outcome.add(
    *("published_crossing_step", _crossing(trained, "")),
    "likewise with the token itself, whose own part never falls below that of "
    "the residual",
  )
  for prefix, about in (("update_", "what layer 1 adds"), ("", "after it")):
    for name in _PLACES:
      outcome.add(
        f"{prefix}sensitivity_{name}",
        history[f"{prefix}{name}"][-1],
        f"at the end, of {about}",
      )
  probes.speed(settings, outcome, trained)
  outcome.drawn["The drop, and what the first layer looks at"] = figures.plot(
    os.path.join(workdir, "training.png"),
    [
      {
        **dict(x=trained.steps, xlabel="training step", ylabel="loss"),
        "lines": {"transformer": history["loss"], "GD": gd, "zero": zero},
      },
      *(
        {
          **dict(x=trained.steps, xlabel="training step", ylabel="sensitivity"),
          "title": title,
          "lines": {n: history[f"{prefix}{n}"] for n in _PLACES},
        }
        for prefix, title in (
          ("update_", "what layer 1 adds"),
          ("", "tokens after layer 1"),
        )
      ),
    ],
  )
  return outcome


def _crossing(trained: Any, prefix: str) -> Any:
  """The first recorded step at which the next token counts most."""
  own, following, other = (
    trained.history[f"{prefix}{name}"] for name in _PLACES
  )
  ahead = (following > own) & (following > other)
  return probes.first_step(trained.steps, ahead)
