r"""Which part of the multi-head scan does what (MHS-VM, arXiv 2406.05992).

  python -m experiments.mhs_vm_routes --workdir=runs/routes

Small networks of one shape, SS2D's beside the multi-head scan's with its gates
at thresholds 0 and 0.5, without gates, and with the raster route in all heads,
and an SS2D narrow enough to have the parameters of the multi-head scan. They
segment drawn lesions, and what can be reached from a marker in a maze, where
the order of a scan matters.

In --workdir come report.md, figures, and metrics.json with every number; they
are written anew after every network. --quick is to see that everything runs.
"""

import dataclasses
import os
from typing import Any

import numpy as np
from absl import flags

from experiments import common
from experiments.in_context.figures import half_width
from experiments.scan_studies import figures, fitting
from experiments.scan_studies.fitting import BASELINE, CONTROL, OURS, Fit
from multihead.errors import UserError, nearest
from multihead.train import report, writers

_TASKS = flags.DEFINE_list(
  "tasks", list(fitting.TASKS), f"Some of {', '.join(fitting.TASKS)}."
)
_VARIANTS = flags.DEFINE_list(
  "variants",
  [],
  "Numbers of the variants, from 0, as the report has them; all by default.",
)
_SIZE = flags.DEFINE_integer(
  "size", 64, "Side of the images, a power of two.", lower_bound=16
)
_STEPS = flags.DEFINE_integer("steps", 750, "Updates.", lower_bound=1)
_SEEDS = flags.DEFINE_integer(
  "seeds", 3, "Runs of each variant.", lower_bound=1
)
_QUICK = flags.DEFINE_bool(
  "quick", False, "Tiny sizes, to see that everything runs."
)

# What the paper says, and what of it can be seen here.
_PAPER = (
  "The paper claims that the multi-head scan segments skin lesions better than "
  "VM-UNet trained from scratch, with 17.26 of its 27.43 million parameters "
  "(0.629 of them). It claims that its gate screens out where the scans "
  "disagree: below 2/3 a threshold screens nothing once the scans differ by "
  "more than 1e-5, which the open gates show."
)


def main() -> None:
  """Trains the networks and writes the report."""
  plan = _plan()
  names = _chosen()
  if not _TASKS.value:
    raise UserError(f"--tasks= is empty; there are {', '.join(fitting.TASKS)}")
  for task in _TASKS.value:
    if task not in fitting.TASKS:
      raise UserError(
        f"--tasks={task!r}{nearest(task, fitting.TASKS)}; there are "
        f"{', '.join(fitting.TASKS)}"
      )
  workdir = common.workdir()
  if os.path.exists(os.path.join(workdir, "checkpoints")):
    raise UserError(
      f"--workdir={workdir} is that of a training run; give another folder"
    )
  if os.path.exists(os.path.join(workdir, writers.METRICS_FINAL)):
    raise UserError(
      f"--workdir={workdir} holds the numbers of a study, which this one would "
      "replace; give another folder"
    )
  common.make_folder("workdir", workdir)
  fits: dict[str, dict[str, Fit]] = {task: {} for task in _TASKS.value}
  drawn: dict[str, str] = {}
  for task, found in fits.items():
    data = fitting.load(task, plan)
    for name in names:
      found[name] = _fit(task, name, data, plan)
      drawn |= figures.all_of(workdir, task, found, data[1])
      text = _write(workdir, plan, fits, drawn)
  common.say("\n" + text)
  common.say(f"The report: {os.path.join(workdir, report.REPORT)}")


def _plan() -> fitting.Plan:
  size = _SIZE.value
  if size & (size - 1):
    raise UserError(f"--size={size} must be a power of two, such as 32 or 64")
  steps = _STEPS.value
  plan = fitting.Plan(
    size=size,
    steps=steps,
    log_every=next(n for n in (25, 20, 10, 5, 4, 3, 2, 1) if steps % n == 0),
    seeds=_SEEDS.value,
  )
  if not _QUICK.value:
    return plan
  return dataclasses.replace(
    plan, size=8, examples=20, embed_dim=16, state_size=2, batch_size=4,
    steps=4, log_every=2, seeds=2,
  )  # fmt: skip


def _chosen() -> list[str]:
  names = list(fitting.VARIANTS)
  try:
    chosen = [int(n) for n in _VARIANTS.value]
    if min(chosen, default=0) < 0:
      raise IndexError
    return [names[n] for n in chosen] or names
  except (ValueError, IndexError):
    raise UserError(
      f"--variants={','.join(_VARIANTS.value)}: give numbers of "
      + ", ".join(f"{n} ({name})" for n, name in enumerate(names))
    ) from None


def _fit(task: str, name: str, data: Any, plan: fitting.Plan) -> Fit:
  label = f"{task}, {name}"
  common.say(f"{label}: {plan.seeds} seeds, {plan.steps} steps; compiling")

  def on_log(step: int, found: dict[str, np.ndarray]) -> None:
    common.say(
      f"  {label}: step {step} of {plan.steps}, loss "
      f"{found['train_loss'].mean():.4f}, IoU {found['iou'].mean():.4f}"
    )

  fit = fitting.fit(fitting.network(name, plan), data, plan, on_log)
  common.say(f"{label}: IoU {_shown(fit.iou)}, {fit.seconds:.0f} s")
  return fit


def _shown(values: np.ndarray) -> str:
  return f"{values.mean():.4f} ± {float(half_width(values)):.4f}"


def _table(fits: dict[str, dict[str, Fit]]) -> list[str]:
  tasks = list(fits)
  names = list(dict.fromkeys(name for found in fits.values() for name in found))
  shares = {}
  lines = [
    "| | parameters | of SS2D | "
    + " | ".join(f"IoU, {t}" for t in tasks)
    + " |",
    "|---|---:|---:|" + "---:|" * len(tasks),
  ]
  for name in names:
    count = next(f[name].parameters for f in fits.values() if name in f)
    shares[name] = count
    base = shares.get(BASELINE)
    row = [name, f"{count:,}", f"{count / base:.3f}" if base else ""]
    row += [_shown(f[name].iou) if name in f else "" for f in fits.values()]
    lines.append(f"| {' | '.join(row)} |")
  return lines


def _differences(fits: dict[str, dict[str, Fit]]) -> list[str]:
  """IoU points between pairs of variants, seed by seed."""
  pairs = (
    (OURS, BASELINE, "the paper: better, with fewer parameters"),
    (OURS, CONTROL, "not in the paper: equal parameters"),
    (OURS, "4 heads, sum", "the paper: the gate helps"),
    ("4 heads, t = 0.5", OURS, "the paper: a threshold for each data set"),
    (OURS, "4 heads, all Z, t = 0", "the paper: mixed routes help"),
  )
  lines = [
    "| difference in IoU points | "
    + " | ".join(fits)
    + " | claim |\n|---|"
    + "---:|" * len(fits)
    + "---|"
  ]
  for one, other, claim in pairs:
    cells = []
    for found in fits.values():
      if one not in found or other not in found:
        cells.append("")
        continue
      gap = 100 * (found[one].iou - found[other].iou)
      cells.append(f"{gap.mean():+.2f} ± {float(half_width(gap)):.2f}")
    if any(cells):
      lines.append(f"| {one} - {other} | {' | '.join(cells)} | {claim} |")
  return lines


def _gates(fits: dict[str, dict[str, Fit]]) -> list[str]:
  lines = []
  for task, found in fits.items():
    for name, fit in found.items():
      gates = fit.result.history.get("open_gate")
      if gates is not None:
        first, last = gates[0].mean(), gates[-1].mean()
        lines.append(
          f"- {task}, {name}: open gates {first:.3f} at step "
          f"{fit.result.steps[0]}, {last:.3f} at the end"
        )
  return lines


def _write(
  workdir: str,
  plan: fitting.Plan,
  fits: dict[str, dict[str, Fit]],
  drawn: dict[str, str],
) -> str:
  numbers: dict[str, Any] = {"plan": dataclasses.asdict(plan)}
  for task, found in fits.items():
    for name, fit in found.items():
      entry = dict(
        parameters=fit.parameters,
        iou=float(fit.iou.mean()),
        iou_of_seeds=fit.iou.tolist(),
        seconds=fit.seconds,
      )
      if "open_gate" in fit.result.history:
        gates = fit.result.history["open_gate"].mean(axis=1)
        entry["open_gate_of_heads"] = gates.tolist()
      numbers[f"{task}/{name}"] = entry
  writers.write_json(os.path.join(workdir, writers.METRICS_FINAL), numbers)
  text = "\n".join(_table(fits) + ["", *_differences(fits)])
  lines = [
    "# MHS-VM: heads, gates and routes",
    "",
    f"Means over {plan.seeds} seeds with the half width of their 95% "
    f"confidence interval: {plan.steps} steps of {plan.batch_size} images of "
    f"{plan.size}x{plan.size}, {plan.stages} stages from width "
    f"{plan.embed_dim}; pooled IoU of the validation images.",
    "",
    _PAPER,
    "",
    text,
    "",
    *_gates(fits),
    "",
    *(f"![{title}]({name})\n" for title, name in drawn.items()),
    *report.circumstances(),
  ]
  path = os.path.join(workdir, report.REPORT)
  with open(path, "w", encoding="utf-8") as file:
    file.write("\n".join(lines))
  return text


if __name__ == "__main__":
  common.run(main)
