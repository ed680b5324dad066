"""What a run tells while it goes on: records, TensorBoard, a progress bar."""

import json
import math
import os
import sys
import time
from typing import Any

import jax
from absl import logging

METRICS_LOG = "metrics.jsonl"
METRICS_FINAL = "metrics.json"


def is_main_process() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def write_json(path: str, values: Any) -> None:
  """Writes a JSON file that is never half there."""
  temporary = f"{path}.tmp"
  with open(temporary, "w", encoding="utf-8") as file:
    json.dump(values, file, indent=2, sort_keys=True)
    file.write("\n")
  os.replace(temporary, path)


def read_json(path: str) -> dict[str, Any] | None:
  """The contents of a JSON file, or None where it is missing or broken."""
  try:
    with open(path, encoding="utf-8") as file:
      return json.load(file)
  except (OSError, json.JSONDecodeError):
    return None


def read_records(workdir: str) -> list[dict[str, Any]]:
  """The records of a run so far; a line cut short by a kill is left out."""
  path = os.path.join(workdir, METRICS_LOG)
  if not os.path.exists(path):
    return []
  records = []
  with open(path, encoding="utf-8") as file:
    for line in file:
      try:
        records.append(json.loads(line))
      except json.JSONDecodeError:
        continue
  return records


class MetricWriter:
  """Appends records to metrics.jsonl and to TensorBoard event files."""

  def __init__(self, workdir: str, step: int = 0, tensorboard: bool = True):
    """Opens the record after `step`; later entries of a killed run go.

    Args:
      workdir: an existing folder.
      step: the step that the run continues from.
      tensorboard: write event files too, where tensorboardX is installed.
    """
    kept = [r for r in read_records(workdir) if r["step"] <= step]
    path = os.path.join(workdir, METRICS_LOG)
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
      file.writelines(json.dumps(record) + "\n" for record in kept)
    os.replace(f"{path}.tmp", path)
    self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    self._board = None
    if tensorboard:
      try:
        from tensorboardX import SummaryWriter
      except ImportError:
        logging.warning("no TensorBoard files: pip install tensorboardX")
      else:
        logdir = os.path.join(workdir, "tensorboard")
        self._board = SummaryWriter(logdir, purge_step=step + 1)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Records numbers of one step."""
    record = {"step": step, "time": round(time.time(), 3)}
    # JSON knows no NaN and no infinity.
    record |= {
      name: float(value) if math.isfinite(value) else None
      for name, value in values.items()
    }
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    if self._board is not None:
      for name, value in values.items():
        self._board.add_scalar(name, float(value), step)

  def close(self) -> None:
    """Closes the files."""
    self._file.close()
    if self._board is not None:
      self._board.close()


class Progress:
  """A bar on a terminal, lines in a log."""

  def __init__(self, step: int, total: int, unit: str):
    """Begins at `step` of `total`; `unit` is what the rate counts."""
    self._total, self._unit, self._bar = total, unit, None
    self._step = step
    if is_main_process() and sys.stderr.isatty():
      from tqdm import tqdm

      self._bar = tqdm(
        total=total, initial=step, unit="step", dynamic_ncols=True
      )

  def update(self, step: int) -> None:
    """Moves on to a step; costs nothing without a terminal."""
    if self._bar is not None:
      self._bar.update(step - self._step)
    self._step = step

  def show(self, step: int, values: dict[str, float]) -> None:
    """Shows the newest numbers, which are those of `step`."""
    if not is_main_process():
      return
    rate = values[f"{self._unit}_per_second"]
    if self._bar is not None:
      self._bar.set_postfix_str(
        f"loss {values['loss']:.4f}, {rate:,.0f} {self._unit}/s"
      )
      return
    left = (self._total - step) * values["step_seconds"]
    logging.info(
      "step %d/%d  loss %.4f  learning rate %.3g  %s %s/s  %d:%02d left",
      *(step, self._total, values["loss"], values["learning_rate"]),
      *(f"{rate:,.0f}", self._unit, *divmod(round(left), 60)),
    )

  def say(self, text: str) -> None:
    """A line that does not tear the bar."""
    if not is_main_process():
      return
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    else:
      logging.info("%s", text)

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()
