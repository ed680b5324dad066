"""What a study leaves: metrics.json, figures, report.md."""

import dataclasses
import json
import math
import os
from typing import Any

import numpy as np

from experiments.in_context import figures
from experiments.in_context.settings import Settings
from multihead.train import report, writers


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the report's table.

  Attributes:
    name: the key of metrics.json.
    expected: in words, with where it comes from.
    holds: whether the number is as expected; None where that is no question.
  """

  name: str
  expected: str
  holds: bool | None = None


@dataclasses.dataclass
class Outcome:
  """Numbers, and what is said and drawn of them.

  Attributes:
    metrics: by name; of several seeds as a list.
    rows: of the report's table.
    drawn: {title: file} of the figures.
    notes: further sentences of the report.
  """

  metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
  rows: list[Row] = dataclasses.field(default_factory=list)
  drawn: dict[str, str] = dataclasses.field(default_factory=dict)
  notes: list[str] = dataclasses.field(default_factory=list)

  def add(
    self, name: str, value: Any, expected: str = "", holds: Any = None
  ) -> None:
    """Takes a number, or one for each seed, and what it should be.

    Args:
      name: the key.
      value: a number, or [seeds].
      expected: in words; "" leaves the number out of the table.
      holds: whether it is so.
    """
    self.metrics[name] = np.asarray(value, float)
    if expected:
      self.expect(name, expected, holds)

  def expect(self, name: str, expected: str, holds: Any = None) -> None:
    """Puts a number that was taken into the table."""
    known = None if holds is None else bool(holds)
    self.rows.append(Row(name, expected, known))

  def mean(self, name: str) -> float:
    """The mean over seeds of a number taken before."""
    return float(np.mean(self.metrics[name]))

  def numbers(self) -> dict[str, Any]:
    """For metrics.json: means, and a list of seeds beside each that has one."""
    found = {}
    for name, value in self.metrics.items():
      found[name] = _json(value.mean())
      if value.ndim:
        found[f"{name}_of_seeds"] = [_json(v) for v in value]
        found[f"{name}_half_width"] = _json(figures.half_width(value))
    found["expectations_met"] = all(row.holds is not False for row in self.rows)
    return found

  def table(self) -> str:
    """Measured beside expected, as Markdown."""
    lines = ["| | measured | expected | |", "|---|---:|---|---|"]
    for row in self.rows:
      value = self.metrics[row.name]
      shown = report.show(float(value.mean()))
      if value.ndim and len(value) > 1:
        shown += f" ± {float(figures.half_width(value)):.2g}"
      mark = {None: "", True: "yes", False: "**NO**"}[row.holds]
      lines.append(f"| {row.name} | {shown} | {row.expected} | {mark} |")
    return "\n".join(lines)

  def write(self, settings: Settings, workdir: str) -> str:
    """Writes metrics.json and report.md; returns the report's path."""
    writers.write_json(
      os.path.join(workdir, writers.METRICS_FINAL), self.numbers()
    )
    lines = [
      f"# In-context learning by gradient descent: {settings.study}",
      "",
      "Means over seeds with the half width of their 95% confidence interval.",
      "",
      self.table(),
      "",
      *(f"{note}\n" for note in self.notes),
      *(f"![{title}]({name})\n" for title, name in self.drawn.items()),
      *report.circumstances(),
      "## Config",
      "",
      "```json",
      json.dumps(settings.values, indent=2, sort_keys=True),
      "```",
      "",
    ]
    path = os.path.join(workdir, report.REPORT)
    with open(path, "w", encoding="utf-8") as file:
      file.write("\n".join(lines))
    return path


def _json(value: Any) -> float | None:
  value = float(value)
  return value if math.isfinite(value) else None
