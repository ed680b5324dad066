r"""Studies of Hydra's branches (arXiv 2309.06922): which of them learns what.

  python -m experiments.hydra --workdir=runs/hydra

linear_teacher: LoRA, SeqLoRA and Hydra at equal parameters learn a changed
  linear map from few or many examples.
transfer: a small ViT, pre-trained on five digits, learns five others from five
  examples each; and how much of each branch's update lies in the principal
  subspace of the weight it changes.

In --workdir come report.md, figures, and metrics.json with every number.
"""

import os
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import common
from experiments.hydra_studies import linear_teacher, transfer
from experiments.in_context import figures
from multihead.errors import UserError, nearest
from multihead.train import report, writers

STUDIES = ("linear_teacher", "transfer")
_STUDY = flags.DEFINE_string(
  "study", "all", f"Which study: {', '.join(STUDIES)} or all."
)
_TINY = flags.DEFINE_bool(
  "tiny", False, "Tiny sizes, to see that everything runs."
)


def main() -> None:
  """Runs the studies and writes the report."""
  if _STUDY.value not in (*STUDIES, "all"):
    raise UserError(
      f"--study={_STUDY.value!r}{nearest(_STUDY.value, STUDIES)}; it must be "
      f"{', '.join(STUDIES)} or all"
    )
  workdir = common.workdir()
  if os.path.exists(os.path.join(workdir, "checkpoints")):
    raise UserError(
      f"--workdir={workdir} is that of a training run; give another folder"
    )
  os.makedirs(workdir, exist_ok=True)
  chosen = STUDIES if _STUDY.value == "all" else (_STUDY.value,)
  numbers: dict[str, Any] = {}
  lines = ["# Hydra: parallel and sequential low-rank branches", ""]
  for name in chosen:
    began = time.perf_counter()
    made = {"linear_teacher": _linear_teacher, "transfer": _transfer}[name](
      workdir, _TINY.value
    )
    numbers[name], text = made
    lines += [*text, "", f"({time.perf_counter() - began:.0f} s)", ""]
  lines += report.circumstances()
  path = os.path.join(workdir, report.REPORT)
  with open(path, "w", encoding="utf-8") as file:
    file.write("\n".join(lines))
  writers.write_json(os.path.join(workdir, writers.METRICS_FINAL), numbers)
  common.say("\n".join(lines))
  common.say(f"The report: {path}")


def _shown(values: np.ndarray, form: str = ".3f") -> str:
  """Mean and half width of its 95% confidence interval."""
  values = np.asarray(values, float)
  return f"{values.mean():{form}} ± {float(figures.half_width(values)):{form}}"


def _linear_teacher(workdir: str, tiny: bool) -> tuple[Any, list[str]]:
  plan = linear_teacher.TINY if tiny else linear_teacher.Plan()
  found = linear_teacher.run(plan, common.say)
  figure = figures.plot(
    os.path.join(workdir, "linear_teacher.png"),
    [
      {
        "x": np.log2(plan.samples),
        "xlabel": "log2 of the number of examples",
        "ylabel": "excess risk / that of the base",
        "title": f"teacher: {kind}",
        "lines": found[kind],
        "log": True,
      }
      for kind in linear_teacher.TEACHERS
    ],
  )
  names = [name for name, _ in plan.students]
  counts = {n: linear_teacher.count(plan, ranks) for n, ranks in plan.students}
  text = [
    "## A linear teacher",
    "",
    f"A map from {plan.d_in} to {plan.d_out} with singular values 1/k is "
    "changed by a teacher; students see n noisy examples. Excess risk as a "
    f"share of the base's, mean and 95% interval over {plan.seeds} seeds. The "
    "paper claims that the parallel branch learns what is new, the sequential "
    "one what recombines pre-trained features, and both together are best "
    "where both are asked for.",
    "",
    "| teacher | n | "
    + " | ".join(f"{name} ({counts[name]})" for name in names)
    + " |",
    "|---|---:|" + "---:|" * len(names),
  ]
  for kind in linear_teacher.TEACHERS:
    for row, n in enumerate(plan.samples):
      cells = [_shown(found[kind][name][row]) for name in names]
      text.append(f"| {kind} | {n} | {' | '.join(cells)} |")
  text += ["", f"![Excess risk]({figure})", ""]
  # Containment: Hydra's functions are some of the larger LoRA's.
  errors = found["training error"]
  mixed = errors["Hydra"].mean(axis=1)
  larger = errors[names[-1]].mean(axis=1)
  text.append(
    "Every Hydra is a LoRA of rank r_par + r_seq, which has "
    f"{counts[names[-1]]} parameters instead of {counts['Hydra']}: with "
    "teacher both, its training error and Hydra's are "
    + ", ".join(
      f"{b:.2g} and {a:.2g} (n = {n})"
      for n, a, b in zip(plan.samples, mixed, larger, strict=True)
    )
    + "."
  )
  numbers = {
    kind: {name: risks.tolist() for name, risks in students.items()}
    for kind, students in found.items()
  }
  return {**numbers, "samples": plan.samples, "parameters": counts}, text


def _transfer(workdir: str, tiny: bool) -> tuple[Any, list[str]]:
  plan = transfer.TINY if tiny else transfer.Plan()
  found = transfer.run(plan, common.say)
  hydra = found.overlap["Hydra"]
  figure = figures.plot(
    os.path.join(workdir, "subspace_overlap.png"),
    [
      {
        "x": np.asarray(found.ks),
        "xlabel": "k",
        "ylabel": "share in the top k directions",
        "title": f"{target}, {side} side",
        "lines": {
          "sequential": hydra[target][side]["seq"],
          "parallel": hydra[target][side]["par"],
          "random": found.chance[target][side],
        },
        "top": 1.0,
      }
      for side in transfer.SIDES
      for target in transfer.TARGETS
    ],
    size=(3.8, 3.4),
  )
  middle = len(found.ks) // 2
  k = found.ks[middle]
  text = [
    "## Few-shot transfer",
    "",
    f"ViT of width {plan.dim} and depth {plan.depth}, pre-trained on digits "
    f"0-4 with turns ({found.pretrained:.1%} of held-out images right); then "
    f"digits 5-9 from {plan.shots} examples each. Mean and 95% interval over "
    f"{plan.seeds} seeds; the rate of each method was chosen on "
    f"{plan.selection_seeds} other seeds. Overlap: share of the update in the "
    f"top {k} input directions of the weight, the MLP's second "
    f"map (a random update: {found.chance['mlp/down']['input'][middle]:.3f}).",
    "",
    "| method | parameters besides the head | rate | training loss | accuracy "
    "| overlap, parallel | overlap, sequential |",
    "|---|---:|---:|---:|---:|---:|---:|",
  ]
  for name in transfer.METHODS:
    branches = found.overlap.get(name, {}).get("mlp/down", {})
    branches = branches.get("input", {})
    cells = [
      _shown(branches[b][middle]) if b in branches else ""
      for b in ("par", "seq")
    ]
    text.append(
      f"| {name} | {found.counts[name]:,} | {found.rates[name]:g} | "
      f"{_shown(found.train_loss[name], '.4f')} | "
      f"{_shown(found.accuracy[name])} | {' | '.join(cells)} |"
    )
  text += [
    "",
    "Without any network, the nearest class mean of the pixels: "
    f"{_shown(transfer.class_means(plan))}.",
    "",
    "The paper claims that both branches beat either at equal parameters, and "
    "that the sequential update overlaps the weight's principal subspace while "
    "the parallel one is nearly orthogonal to it.",
    "",
    f"![Subspace overlap]({figure})",
  ]
  numbers = {
    "pretrained_accuracy": found.pretrained,
    "accuracy": {n: v.tolist() for n, v in found.accuracy.items()},
    "train_loss": {n: v.tolist() for n, v in found.train_loss.items()},
    "rates": found.rates,
    "parameters": found.counts,
    "ks": found.ks,
    "overlap": jax.tree.map(lambda v: v.tolist(), found.overlap),
  }
  return numbers, text


if __name__ == "__main__":
  common.run(main)
