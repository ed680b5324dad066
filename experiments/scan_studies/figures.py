"""Figures of the study of scan routes."""

import os
from collections.abc import Mapping

import numpy as np

from experiments.in_context import figures
from experiments.scan_studies.fitting import OURS, Fit, Images, routes_of
from multihead.layers.multi_head_scan import scan_route_gate
from multihead.layers.scan_routes import ROUTES
from multihead.tasks.segmentation_figures import to_rgb

_SCANS = ("path 0", "path 0 backwards", "path 1", "path 1 backwards")
_BLOCK = "encoder_0_0"


def curves(path: str, fits: Mapping[str, Fit], title: str) -> str:
  """IoU and loss of every variant, and the open gates of each head.

  Args:
    path: of the PNG.
    fits: of one task.
    title: its name.

  Returns:
    The file's name.
  """
  first = next(iter(fits.values()))
  shared = dict(x=first.result.steps, xlabel="step")
  history = {name: fit.result.history for name, fit in fits.items()}
  gates = {
    name: found["open_gate"].mean(-1)
    for name, found in history.items()
    if "open_gate" in found
  }
  panels = [
    dict(
      shared,
      ylabel="pooled IoU, validation",
      title=title,
      lines={name: found["iou"] for name, found in history.items()},
    ),
    dict(
      shared,
      ylabel="loss, validation",
      lines={name: found["loss"] for name, found in history.items()},
    ),
  ]
  if gates:
    panels.append(dict(shared, ylabel="open gates", lines=gates, top=1.05))
  return figures.plot(path, panels)


def heat_maps(path: str, fit: Fit, image: np.ndarray) -> str:
  """What each scan of the first block adds to the mean of its head's four.

  All four hold the pixel itself (D u), which hides the rest. Drawn is the mean
  over channels of the size of the difference, each head on a scale of its own,
  and of the gate; of the first seed.

  Args:
    path: of the PNG.
    fit: of a multi-head scan.
    image: [S, S, 3], normalised.

  Returns:
    The file's name.
  """
  from matplotlib.figure import Figure

  ys = routes_of(fit.model, _first(fit.result.params), image, _BLOCK)
  routes = fit.model.routes or ROUTES[: len(ys)]
  gate = np.asarray(
    scan_route_gate(np.moveaxis(ys, 1, 0), fit.model.threshold or 0.0)
  ).mean(-1)
  sizes = np.abs(ys - ys.mean(axis=1, keepdims=True)).mean(-1)
  figure = Figure(figsize=(11, 1.9 * len(ys)), dpi=110)
  grid = figure.subplots(len(ys), 6, squeeze=False)
  for head, row in enumerate(grid):
    row[0].imshow(to_rgb(image))
    row[0].set_ylabel(f"head {routes[head]}")
    for axes, scan, name in zip(row[1:5], sizes[head], _SCANS, strict=True):
      axes.imshow(scan, vmin=0, vmax=sizes[head].max())
      axes.set_title(name if not head else "", fontsize="small")
    shown = row[5].imshow(gate[head], cmap="magma")
    row[5].set_title("gate" if not head else "", fontsize="small")
    figure.colorbar(shown, ax=row[5], shrink=0.8)
    for axes in row:
      axes.set_xticks([])
      axes.set_yticks([])
  figure.tight_layout()
  figure.savefig(path)
  return os.path.basename(path)


def predictions(
  path: str, fits: Mapping[str, Fit], data: Images, count: int = 4
) -> str:
  """Images, their masks and the first seeds' probabilities.

  Args:
    path: of the PNG.
    fits: of one task.
    data: validation images.
    count: how many.

  Returns:
    The file's name.
  """
  import jax
  from matplotlib.figure import Figure

  count = min(count, len(data.images))
  panels = {"image": [to_rgb(x) for x in data.images[:count]]}
  panels["truth"] = list(data.masks[:count])
  for name, fit in fits.items():
    params = _first(fit.result.params)
    logits = fit.model.apply({"params": params}, data.images[:count])
    panels[name] = list(np.asarray(jax.nn.sigmoid(logits[..., 0])))
  figure = Figure(figsize=(1.8 * len(panels), 1.9 * count), dpi=110)
  grid = figure.subplots(count, len(panels), squeeze=False)
  for column, (name, pictures) in zip(grid.T, panels.items(), strict=True):
    column[0].set_title(name, fontsize="small")
    for axes, picture in zip(column, pictures, strict=True):
      axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
      axes.axis("off")
  figure.tight_layout()
  figure.savefig(path)
  return os.path.basename(path)


def all_of(
  workdir: str, task: str, fits: Mapping[str, Fit], data: Images
) -> dict[str, str]:
  """Draws everything of a task; returns {title: file}."""
  path = lambda name: os.path.join(workdir, f"{task}_{name}.png")
  drawn = {
    f"{task}: curves": curves(path("curves"), fits, task),
    f"{task}: predictions": predictions(path("predictions"), fits, data),
  }
  if OURS in fits:
    image = data.images[0]
    drawn[f"{task}: routes and gates of the first block, {OURS}"] = heat_maps(
      path("routes"), fits[OURS], image
    )
  return drawn


def _first(params: object) -> object:
  import jax

  return jax.tree.map(lambda x: x[0], params)
