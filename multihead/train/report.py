"""report.md and its figures: what a finished run leaves to be read."""

import json
import os
import platform
import time
from collections.abc import Sequence
from typing import Any

import jax

from multihead.train import writers
from multihead.train.checkpoints import versions

REPORT = "report.md"
SAMPLE = "sample.txt"


def write(
  workdir: str,
  *,
  config: dict[str, Any],
  metrics: dict[str, float],
  baselines: dict[str, float],
  headline: str,
  sample: str | None,
  facts: list[str],
  higher_is_better: bool = False,
  figures: dict[str, str] | None = None,
) -> str:
  """Writes report.md, loss.png, learning_rate.png and sample.txt.

  Args:
    workdir: the run's folder, with its metrics.jsonl.
    config: the resolved config.
    metrics: final numbers of this run.
    baselines: the same number as `headline` for other methods, by names that
      end in "_" + headline.
    headline: the metric to compare by, e.g. "bits_per_byte".
    sample: text made by the trained model, or None.
    facts: lines on what ran where.
    higher_is_better: of the headline.
    figures: title -> name of a PNG file in workdir, shown after the others.

  Returns:
    The path of the report.
  """
  records = writers.read_records(workdir)
  figures = plot(workdir, records) | (figures or {})
  model = f"{config['model']['name']} {config['model']['variant'] or ''}"
  lines = [f"# {model.strip()}: {metrics['steps']} steps", ""]
  lines += [table(metrics, baselines, headline, higher_is_better), ""]
  for title, name in figures.items():
    lines += [f"![{title}]({name})", ""]
  if sample is not None:
    with open(os.path.join(workdir, SAMPLE), "w", encoding="utf-8") as file:
      file.write(sample)
    # A fence longer than any run of backticks in the text cannot be closed
    # by it.
    fence = "`" * max(3, _longest_run(sample, "`") + 1)
    lines += ["## Sample", "", f"{fence}text", sample, fence, ""]
  lines += ["## Numbers", "", "| | |", "|---|---|"]
  lines += [f"| {name} | {show(metrics[name])} |" for name in sorted(metrics)]
  lines += ["", *circumstances(facts), "## Config", "", "```json"]
  lines += [json.dumps(config, indent=2, sort_keys=True), "```", ""]
  path = os.path.join(workdir, REPORT)
  with open(path, "w", encoding="utf-8") as file:
    file.write("\n".join(lines))
  return path


def circumstances(facts: Sequence[str] = ()) -> list[str]:
  """The section of a report on what ran where, as lines of Markdown.

  Args:
    facts: what stands first in it; the devices, if there are none.
  """
  device = jax.devices()[0]
  devices = f"{jax.device_count()} x {device.device_kind} ({device.platform})"
  facts = [
    *(facts or [devices]),
    f"{platform.platform()}, Python {platform.python_version()}",
    ", ".join(f"{name} {found}" for name, found in versions().items()),
    time.strftime("finished %Y-%m-%d %H:%M:%S UTC", time.gmtime()),
  ]
  lines = [f"- {fact}" for fact in facts]
  return ["## Where and with what", "", *lines, ""]


def table(
  metrics: dict[str, float],
  baselines: dict[str, float],
  headline: str,
  higher_is_better: bool = False,
) -> str:
  """The headline metric of this model among the baselines, best first.

  Args:
    metrics: with "validation_<headline>".
    baselines: names that end in "_<headline>".
    headline: the metric.
    higher_is_better: of it.
  """
  rows = {
    name.removesuffix(f"_{headline}").replace("_", " "): value
    for name, value in baselines.items()
    if name.endswith(f"_{headline}") and name != f"validation_{headline}"
  }
  rows["**this model**"] = metrics[f"validation_{headline}"]
  width = max(len(name) for name in rows)
  title = f"{headline.replace('_', ' ')}, validation"
  lines = [f"| {'':{width}} | {title} |"]
  lines.append(f"|{'-' * (width + 2)}|{'-' * (len(title) + 1)}:|")
  lines += [
    f"| {name:{width}} | {value:{len(title)}.4f} |"
    for name, value in sorted(
      rows.items(), key=lambda row: row[1], reverse=higher_is_better
    )
  ]
  return "\n".join(lines)


def show(value: float) -> str:
  """A number as people read it."""
  if float(value).is_integer() and abs(value) < 1e15:
    return f"{int(value):,}"
  return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def plot(workdir: str, records: list[dict[str, Any]]) -> dict[str, str]:
  """Draws the loss and the learning rate; returns title -> file name."""
  # Not pyplot: its backend is the caller's, in a notebook say.
  from matplotlib.figure import Figure

  figures = {}
  for title, name, curves in (
    ("Loss", "loss.png", {"loss": "train", "validation_loss": "validation"}),
    ("Learning rate", "learning_rate.png", {"learning_rate": None}),
  ):
    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    for key, label in curves.items():
      points = [
        (record["step"], record[key])
        for record in records
        if record.get(key) is not None
      ]
      if points:
        # A validation curve of few points shows where it was measured.
        marker = "o" if label == "validation" else None
        axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    axes.set_xlabel("step")
    axes.set_ylabel(title.lower())
    axes.grid(alpha=0.3)
    if len(curves) > 1:
      axes.legend()
    figure.tight_layout()
    figure.savefig(os.path.join(workdir, name))
    figures[title] = name
  return figures


def _longest_run(text: str, character: str) -> int:
  longest = run = 0
  for each in text:
    run = run + 1 if each == character else 0
    longest = max(longest, run)
  return longest
