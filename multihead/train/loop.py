"""The training loop: runs a task on a mesh, from wherever it was left off."""

import collections
import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from multihead.parallel import sharding
from multihead.train import report, state, writers
from multihead.train.checkpoints import Checkpoints
from multihead.train.config import TrainConfig
from multihead.train.run import (
  IN_FLIGHT,
  Run,
  final_metrics,
  make_evaluator,
  prepare,
)
from multihead.train.step import Metrics, TrainStep


class NonFiniteError(ArithmeticError):
  """Loss or gradient became NaN or infinite; says where and what to do."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """How a call of `train` ended.

  Attributes:
    step: updates made, in this call and before it.
    finished: whether that is all of them; False after SIGTERM or Ctrl-C.
    metrics: the final numbers, as in metrics.json; empty if not finished.
    sample: what the task made with the trained parameters, or None.
  """

  step: int
  finished: bool
  metrics: dict[str, float]
  sample: str | None = None


def train(
  config: TrainConfig,
  workdir: str,
  *,
  run: Run | None = None,
) -> TrainResult:
  """Trains to `config.total_steps`, going on from the workdir's checkpoint.

  Leaves in workdir: config.json, metrics.jsonl, tensorboard/, checkpoints/
  and, when all steps are made, metrics.json, report.md and its figures.
  SIGTERM and Ctrl-C finish the step, save and return.

  Args:
    config: what to train.
    workdir: made if missing; one run lives in it.
    run: what `prepare` made of the config, if the caller has it already.

  Raises:
    UserError: the config cannot be run here, or the checkpoint in workdir is
      torn or of another model.
    NonFiniteError: loss or gradient became NaN or infinite.
  """
  run = prepare(config) if run is None else run
  os.makedirs(workdir, exist_ok=True)
  with jax.set_mesh(run.mesh), contextlib.ExitStack() as stack:
    saved = Checkpoints(
      os.path.join(workdir, "checkpoints"), config.checkpoint.keep
    )
    stack.callback(saved.close)
    done = _finished_before(run, workdir, saved)
    if done is not None:
      return done
    loop = _Loop(run, workdir, saved, stack)
    if not loop.run_steps():
      return TrainResult(loop.step, False, {})
    return loop.finish()


def _finished_before(
  run: Run, workdir: str, saved: Checkpoints
) -> TrainResult | None:
  """What an earlier call left, where it made all steps and reported them."""
  step = saved.latest_step() or 0
  if step < run.config.total_steps:
    return None
  saved.check(step, run.target)
  metrics = writers.read_json(os.path.join(workdir, writers.METRICS_FINAL))
  paths = [os.path.join(workdir, n) for n in (report.REPORT, report.SAMPLE)]
  if not metrics or metrics["steps"] != step or not os.path.exists(paths[0]):
    return None
  logging.info("all %d steps were made and reported already", step)
  sample = None
  if os.path.exists(paths[1]):
    with open(paths[1], encoding="utf-8") as file:
      sample = file.read()
  return TrainResult(step, True, metrics, sample)


class _Loop:
  """One call of `train`: the state, and what has been read of its metrics."""

  def __init__(
    self,
    run: Run,
    workdir: str,
    saved: Checkpoints,
    stack: contextlib.ExitStack,
  ):
    self.run, self.workdir, self.saved = run, workdir, saved
    self.config, self.task = run.config, run.task
    self.main = writers.is_main_process()
    self.iterator = iter(self.task.train_iterator(*run.rows))
    stack.callback(self.iterator.close)
    self.step = saved.latest_step() or 0
    if self.step:
      self._restore()
    else:
      self.state = state.init_state(
        self.task.init_params,
        run.optimizer,
        run.shardings,
        seed=self.config.seed,
        mesh=run.mesh,
        ema=self.config.ema_decay > 0,
      )
    self.first = self.step
    self.train_step = TrainStep(
      self.task.loss_fn,
      run.optimizer,
      run.schedule,
      run.shardings,
      micro_batches=self.config.grad_accum_steps,
      batch_sharding=run.batch_sharding,
      ema_decay=self.config.ema_decay,
      frozen=getattr(self.task, "frozen", None),
    )
    self.evaluate = make_evaluator(run)
    self.writer = None
    if self.main:
      writers.write_json(
        os.path.join(workdir, "config.json"), self.config.to_dict()
      )
      self.writer = writers.MetricWriter(workdir, self.step)
      stack.callback(self.writer.close)
    self.progress = writers.Progress(
      self.step, self.config.total_steps, self.task.unit
    )
    stack.callback(self.progress.close)
    self.stop = _StopSignal()
    self.last: dict[str, float] = {}
    self.pending: collections.deque[tuple[int, Metrics]] = collections.deque()
    self.clock = _Clock()

  def _restore(self) -> None:
    metadata = self.saved.metadata(self.step)
    self.state, position = self.saved.restore(self.step, self.run.target)
    self.iterator.set_state(position)
    logging.info("continuing from step %d in %s", self.step, self.workdir)
    before, now = _flat(metadata["config"]), _flat(self.config.to_dict())
    for key in sorted(before.keys() | now.keys()):
      if before.get(key) != now.get(key):
        logging.warning(
          "config.%s was %r and is %r now", key, before.get(key), now.get(key)
        )

  def run_steps(self) -> bool:
    """Makes the steps that are left; False when told to stop before."""
    with self.stop:
      return self._run_steps()

  def _run_steps(self) -> bool:
    config = self.config
    while self.step < config.total_steps:
      try:
        batch = self.run.place(next(self.iterator))
      except StopIteration:
        raise ValueError(
          f"the training data ended at step {self.step}; a task's "
          "train_iterator must go on for ever"
        ) from None
      self.state, metrics = self.train_step(self.state, batch)
      self.step += 1
      self.pending.append((self.step, metrics))
      if self.step == self.first + 1:
        jax.block_until_ready(metrics)
        self.clock.first_step_done()
      elif len(self.pending) > IN_FLIGHT:
        # Back-pressure: bounds how far the host runs ahead of the devices.
        jax.block_until_ready(self.pending[-1 - IN_FLIGHT][1]["loss"])
      self.progress.update(self.step)
      last = self.step == config.total_steps
      if _due(self.step - IN_FLIGHT, config.log_every_steps):
        # The newest steps are still running; what is read here is done.
        self._read_metrics(leave=IN_FLIGHT)
      if not last and _due(self.step, config.eval.every_steps):
        self._validate(config.eval.max_batches)
      if last or self.step % config.checkpoint.every_steps == 0:
        self._save()
      if self._told_to_stop():
        self._save()
        self.saved.wait()
        self.progress.say(
          f"stopped at step {self.step} and saved it; the same command goes on"
        )
        return last
    return True

  def finish(self) -> TrainResult:
    """Evaluates the whole split and writes metrics.json and the report."""
    self.saved.wait()
    final = self._validate(0)
    params = self.state.eval_params
    for name, value in final_metrics(self.run, params).items():
      final[f"validation_{name}"] = value
    final |= self._last_training_numbers()
    final |= {
      "steps": self.step,
      "parameters": sharding.param_count(self.state.params),
      "devices": self.run.mesh.size,
    }
    baselines, sample, figures = {}, None, {}
    if self.config.eval.baselines and self.main:
      baselines = self.task.baselines()
    # Text is made by one process: with several, `experiments.generate` does it.
    if self.config.eval.sample_tokens and jax.process_count() == 1:
      sample = self.task.sample(
        params,
        prompt=self.config.eval.prompt,
        length=self.config.eval.sample_tokens,
        temperature=self.config.eval.temperature,
        seed=self.config.seed,
      )
    if hasattr(self.task, "export"):
      self.task.export(self.workdir, params)
    if hasattr(self.task, "draw") and jax.process_count() == 1:
      figures = self.task.draw(params, self.workdir)
    if self.main:
      path = os.path.join(self.workdir, writers.METRICS_FINAL)
      writers.write_json(path, {**final, **baselines})
      report.write(
        self.workdir,
        config=self.config.to_dict(),
        metrics=final,
        baselines=baselines,
        headline=self.task.headline,
        higher_is_better=getattr(self.task, "higher_is_better", False),
        figures=figures,
        sample=sample,
        facts=[*self.run.describe().split("\n"), *self.task.facts()],
      )
    return TrainResult(self.step, True, {**final, **baselines}, sample)

  def _last_training_numbers(self) -> dict[str, float]:
    """Loss and speed of this call, or those that metrics.json has kept."""
    if self.first < self.step:
      rate = self.clock.steps_per_second()
      unit = f"{self.task.unit}_per_second"
      return {
        "loss": self.last["loss"],
        unit: rate * self.task.units_per_step,
        "first_step_seconds": self.clock.first_step,
        "train_seconds": self.clock.spent(),
        "step_compilations": self.train_step.compilations,
      }
    records = [r for r in writers.read_records(self.workdir) if "loss" in r]
    keep = ("loss", f"{self.task.unit}_per_second")
    return {k: records[-1][k] for k in keep if records and k in records[-1]}

  def _read_metrics(self, leave: int) -> None:
    """Fetches the metrics of all but the newest `leave` steps.

    A record is the mean over the steps since the last multiple of
    `log_every_steps`, or since the last checkpoint if that is nearer.
    """
    ready = []
    while len(self.pending) > leave:
      ready.append(self.pending.popleft())
    if not ready:
      return
    steps = [step for step, _ in ready]
    values = jax.device_get([metrics for _, metrics in ready])
    seconds = self.clock.per_step(steps)
    for step, metrics in zip(steps, values, strict=True):
      if not metrics["finite"]:
        self._refuse(step, metrics)
    begin = 0
    for end, step in enumerate(steps, start=1):
      if step % self.config.log_every_steps == 0 or end == len(steps):
        self._record(step, values[begin:end], seconds)
        begin = end

  def _record(
    self, step: int, values: list[dict[str, Any]], seconds: float | None
  ) -> None:
    means = {
      name: float(np.mean([v[name] for v in values]))
      for name in values[0]
      if name not in ("finite", "weight", "learning_rate")
    }
    means["learning_rate"] = float(values[-1]["learning_rate"])
    if seconds is not None:
      rate = self.task.units_per_step / seconds
      means["step_seconds"] = seconds
      means[f"{self.task.unit}_per_second"] = rate
      self.progress.show(step, means)
    self.last = means
    if self.writer is not None:
      self.writer.write(step, means)

  def _refuse(self, step: int, metrics: dict[str, Any]) -> None:
    self.saved.wait()
    kept = self.saved.latest_step()
    good = f"step {kept} in {self.saved.directory}" if kept else "none yet"
    raise NonFiniteError(
      f"step {step}: loss {metrics['loss']}, gradient norm "
      f"{metrics['gradient_norm']}; its update was not applied. Last good "
      f"checkpoint: {good}. Lower config.optimizer.lr, set clip_norm, "
      "lengthen the warm-up, or look at the data of that step; then start again"
    )

  def _validate(self, max_batches: int) -> dict[str, float]:
    if self.pending:
      # Else the steps under way would count as part of the pause.
      jax.block_until_ready(self.pending[-1][1])
    with self.clock.paused():
      found = self.evaluate(self.state.eval_params, max_batches)
    values = {f"validation_{name}": value for name, value in found.items()}
    if self.writer is not None:
      self.writer.write(self.step, values)
    text = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    self.progress.say(f"step {self.step}: validation {text}")
    return values

  def _save(self) -> None:
    """Saves, once every step up to here is known to be finite."""
    self._read_metrics(leave=0)
    with self.clock.paused():
      self.saved.save(
        self.step,
        self.state,
        self.iterator.get_state(),
        self.config.to_dict(),
      )

  def _told_to_stop(self) -> bool:
    if jax.process_count() == 1:
      return self.stop.received
    # All processes must stop at the same step, so they ask one another.
    if self.step % self.config.log_every_steps:
      return False
    votes = multihost_utils.process_allgather(np.int32(self.stop.received))
    return bool(np.any(votes))


class _StopSignal:
  """Notes SIGTERM and the first Ctrl-C; a second Ctrl-C interrupts."""

  def __init__(self):
    self.received = False
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "_StopSignal":
    # Only the main thread may set handlers; elsewhere nothing is caught.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._before.items():
      # None: it was not set from Python, and cannot be set again from here.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)

  def _note(self, number: int, _: Any) -> None:
    if self.received and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.received = True


class _Clock:
  """Times steps, without the first one (compilation) and without pauses."""

  def __init__(self):
    self._begun = self._mark = time.perf_counter()
    self._started: float | None = None
    self._marked_step: int | None = None
    self._pauses = 0.0
    self._steps = 0
    self.first_step = 0.0

  def _now(self) -> float:
    return time.perf_counter() - self._pauses

  def first_step_done(self) -> None:
    """The first step has run; the rest is timed from here."""
    self.first_step = self._now() - self._begun
    self._started = self._mark = self._now()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Time in here does not count."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self._pauses += time.perf_counter() - start

  def per_step(self, steps: list[int]) -> float | None:
    """Seconds per step since the last call; None for the first step alone."""
    count = len(steps)
    if self._steps == 0:
      count -= 1
    self._steps += len(steps)
    now = self._now()
    seconds, self._mark = now - self._mark, now
    return seconds / count if count > 0 else None

  def spent(self) -> float:
    """Seconds of training after the first step."""
    return self._mark - (self._started or self._mark)

  def steps_per_second(self) -> float:
    """Over everything after the first step; 0 if that is nothing."""
    spent = self.spent()
    return (self._steps - 1) / spent if spent > 0 and self._steps > 1 else 0.0


def _due(step: int, every: int) -> bool:
  return every > 0 and step > 0 and step % every == 0


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(values, dict):
    return {prefix: list(values) if isinstance(values, tuple) else values}
  flat = {}
  for key, value in values.items():
    flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
  return flat
