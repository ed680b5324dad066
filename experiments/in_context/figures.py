"""Figures in the paper's form: means over seeds, with confidence bands."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# 97.5% points of Student's t for 1, 2, ... degrees of freedom.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
COLORS = ("C0", "C1", "C2", "C3", "C4", "C5")


def half_width(values: np.ndarray) -> np.ndarray:
  """Half of the 95% confidence interval of the mean over the last axis."""
  n = values.shape[-1]
  if n < 2:
    return np.zeros(values.shape[:-1])
  t = _STUDENT[n - 2] if n - 2 < len(_STUDENT) else 1.96 + 2.5 / (n - 1)
  return t * values.std(axis=-1, ddof=1) / np.sqrt(n)


def plot(
  path: str,
  panels: Sequence[Mapping[str, Any]],
  size: tuple[float, float] = (4.6, 3.6),
) -> str:
  """Draws panels side by side.

  Args:
    path: of the PNG.
    panels: each with "x", "xlabel", "ylabel" and "lines", {label: values}.
      Values are [points, seeds], drawn as mean and 95% band, [points], or a
      number, drawn as a dashed level. Optional: "title", "log" (of y), "top"
      (of y), "vertical" {label: x}.
    size: of a panel in inches.

  Returns:
    The file's name.
  """
  # Not pyplot: its backend is the caller's, in a notebook say.
  from matplotlib.figure import Figure

  figure = Figure(figsize=(size[0] * len(panels), size[1]), dpi=120)
  grid = figure.subplots(1, len(panels), squeeze=False)[0]
  for axes, panel in zip(grid, panels, strict=True):
    for color, (label, values) in zip(
      COLORS, panel["lines"].items(), strict=False
    ):
      values = np.asarray(values, float)
      if values.ndim == 0:
        axes.axhline(float(values), color=color, linestyle="--", label=label)
        continue
      mean = values if values.ndim == 1 else values.mean(-1)
      style = "--" if values.ndim == 1 else "-"
      axes.plot(panel["x"], mean, style, color=color, label=label)
      if values.ndim == 2:
        band = half_width(values)
        axes.fill_between(
          panel["x"], mean - band, mean + band, color=color, alpha=0.25
        )
    for label, x in panel.get("vertical", {}).items():
      axes.axvline(x, color="0.5", linestyle=":", label=label)
    axes.set_xlabel(panel["xlabel"])
    axes.set_ylabel(panel["ylabel"])
    axes.set_title(panel.get("title", ""))
    if panel.get("log"):
      axes.set_yscale("log")
    elif "top" in panel:
      axes.set_ylim(0, panel["top"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
  figure.tight_layout()
  figure.savefig(path)
  return os.path.basename(path)


def matrices(path: str, panels: Mapping[str, np.ndarray]) -> str:
  """Draws matrices side by side, all with one scale of colours.

  Args:
    path: of the PNG.
    panels: {title: [rows, columns]}.

  Returns:
    The file's name.
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=(3.4 * len(panels) + 0.8, 3.2), dpi=120)
  grid = figure.subplots(1, len(panels), squeeze=False)[0]
  most = max(float(np.abs(matrix).max()) for matrix in panels.values())
  for axes, (title, matrix) in zip(grid, panels.items(), strict=True):
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-most, vmax=most)
    axes.set_title(title, fontsize="medium")
  figure.colorbar(image, ax=list(grid), shrink=0.8)
  figure.savefig(path, bbox_inches="tight")
  return os.path.basename(path)
