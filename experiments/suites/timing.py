"""Timing of one job done by several contenders, fairly.

Compilation and warm-up are apart; then the contenders take turns, so that a
busy minute of the machine falls on all of them.
"""

import ctypes
import dataclasses
import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

OURS = "multihead"

# Does the job and returns when it is done. It may have attributes `calls`, how
# many calls it makes before it waits for the device (1 without it), so that
# short ones are not timed by what a single one costs to launch; `compile`, a
# function to call ahead, which compiles and runs nothing; and `peak_memory`, a
# function that does the job once and returns the bytes that it needs beside its
# inputs, or None where nobody knows.
Job = Callable[[], Any]


class Unavailable(Exception):
  """A contender that cannot run here; the text says why."""


@dataclasses.dataclass(frozen=True)
class Case:
  """A job and those who do it; every number is of one call.

  Attributes:
    name: of the job, with its sizes.
    work: how much of `unit` one call does.
    contenders: name -> function that makes everything ready and returns the
      job; our own is called "multihead". One that cannot run raises
      Unavailable, in either step.
    unit: what a rate counts.
    flops: floating-point operations of one call, by the formula of the model
      (recomputation does not count), or those of each contender where they
      differ; None where that says nothing.
    traffic: bytes that one call must read and write at least; None likewise.
    group: on a GPU the cases of a group run in a process of their own, which
      compiles them while others are timed; "" is this process.
  """

  name: str
  work: float
  contenders: Mapping[str, Callable[[], Job]]
  unit: str = "tokens"
  flops: float | Mapping[str, float] | None = None
  traffic: float | None = None
  group: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
  """What one contender needed for one case.

  Attributes:
    case: the case.
    contender: the name.
    first: seconds of the first call, compilation included.
    seconds: of each timed call; empty if it could not run.
    speedup: how many times as fast our own is: the median over the turns; None
      for our own, or where one of the two did not run.
    reason: why it could not run, or "".
    memory: bytes that a call needs beside its inputs; None if unknown.
  """

  case: Case
  contender: str
  first: float = 0.0
  seconds: tuple[float, ...] = ()
  speedup: float | None = None
  reason: str = ""
  memory: int | None = None

  @property
  def median(self) -> float:
    """Seconds of the middle call."""
    return statistics.median(self.seconds)

  @property
  def rate(self) -> float:
    """Units of work a second."""
    return self.case.work / self.median

  @property
  def flops(self) -> float | None:
    """Floating-point operations a second."""
    flops = self.case.flops
    if isinstance(flops, Mapping):
      flops = flops[self.contender]
    return None if flops is None else flops / self.median


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A case whose jobs are ready to run.

  Attributes:
    case: the case.
    jobs: by the contender's name, of those that can run.
    seconds: that each took to compile, which is not running yet.
    reasons: why the others cannot run.
  """

  case: Case
  jobs: dict[str, Job]
  seconds: dict[str, float]
  reasons: dict[str, str]


def prepare(case: Case, map: Callable[..., Any] = map) -> Prepared:
  """Makes all jobs of a case, and compiles what can be compiled ahead.

  Args:
    case: what will be timed.
    map: may do several contenders at a time.
  """

  def make(name):
    start = time.perf_counter()
    try:
      job = case.contenders[name]()
      if hasattr(job, "compile"):
        job.compile()
    except Unavailable as error:
      return str(error), 0.0
    except Exception as error:
      if name.startswith(OURS):
        raise
      # A peer's failure is its own, and no reason to stop.
      return f"{type(error).__name__}: {str(error).strip()[:200]}", 0.0
    return job, time.perf_counter() - start

  found = dict(zip(case.contenders, map(make, case.contenders), strict=True))
  ready = {k: v for k, v in found.items() if not isinstance(v[0], str)}
  return Prepared(
    case,
    jobs={name: job for name, (job, _) in ready.items()},
    seconds={name: seconds for name, (_, seconds) in ready.items()},
    reasons={k: v[0] for k, v in found.items() if k not in ready},
  )


def run(
  case: Case | Prepared, repeats: int, most_seconds: float = math.inf
) -> list[Result]:
  """Times all contenders of a case, turn by turn.

  Args:
    case: what to time, prepared or not.
    repeats: timed calls of each.
    most_seconds: no further turn begins when timed calls have taken so long.

  Returns:
    One result per contender.
  """
  ready = prepare(case) if isinstance(case, Case) else case
  case, jobs, results = ready.case, {}, {}
  for name in case.contenders:
    try:
      if name in ready.reasons:
        raise Unavailable(ready.reasons[name])
      job = ready.jobs.pop(name)
      first = ready.seconds[name] + _clock(job)
      memory = None
      if hasattr(job, "peak_memory"):
        memory = job.peak_memory()
      else:
        job()
    except Unavailable as error:
      logging.info("%s: %s cannot run: %s", case.name, name, error)
      results[name] = Result(case, name, reason=str(error))
      continue
    jobs[name] = job
    results[name] = Result(case, name, first, memory=memory)
  seconds = {name: [] for name in jobs}
  for _ in range(repeats):
    if sum(map(sum, seconds.values())) > most_seconds:
      break
    for name, job in jobs.items():
      seconds[name].append(_clock(job) / getattr(job, "calls", 1))
  jobs.clear()
  gc.collect()
  for name, times in seconds.items():
    speedup = None
    if name != OURS and OURS in seconds:
      turns = zip(times, seconds[OURS], strict=True)
      speedup = statistics.median(theirs / own for theirs, own in turns)
    results[name] = dataclasses.replace(
      results[name], seconds=tuple(times), speedup=speedup
    )
  return list(results.values())


def _clock(job: Job) -> float:
  start = time.perf_counter()
  job()
  return time.perf_counter() - start


def growth(job: Job) -> int | None:
  """Does the job once; returns by how many bytes the process grew meanwhile.

  For libraries that give back what they no longer need. None where the system
  does not tell, or the library is on another device.
  """
  found = None
  try:
    # What earlier jobs left to the allocator would be taken again, unseen.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
      file.write("5")  # The highest mark falls to the present size.
    found = _resident("VmRSS")
  except (OSError, AttributeError):
    pass
  job()
  return None if found is None else max(0, _resident("VmHWM") - found)


def _resident(field: str) -> int:
  with open("/proc/self/status") as file:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", file.read())[1])


def copy_bandwidth() -> float:
  """Bytes a second that a copy reads and writes in all, best of ten."""
  size = 2**25 if jax.default_backend() == "cpu" else 2**29
  x = jnp.zeros((size,), jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  job = lambda: copy(x).block_until_ready()
  _clock(job)
  return 2 * x.nbytes / min(_clock(job) for _ in range(10))


def matmul_peak(dtype: Any) -> float:
  """Operations a second of a large square matrix product, best of ten."""
  size = 1024 if jax.default_backend() == "cpu" else 8192
  key = jax.random.key(0)
  x = jax.random.normal(key, (size, size), jnp.float32).astype(dtype)
  product = jax.jit(lambda x: x @ x)
  job = lambda: product(x).block_until_ready()
  _clock(job)
  return 2 * size**3 / min(_clock(job) for _ in range(10))


def table(
  results: Sequence[Result],
  peak: float | None,
  bandwidth: float | None = None,
) -> str:
  """The results as a Markdown table.

  Args:
    results: of all cases.
    peak: see `matmul_peak`; None leaves its columns out.
    bandwidth: see `copy_bandwidth`; likewise.
  """
  head = ["case", "who", "ms", "min - max", "rate", "first call s"]
  measured = any(result.memory is not None for result in results)
  if measured:
    head.append("peak MiB")
  if bandwidth is not None:
    head += ["traffic floor ms", "TB/s", "of copy"]
  if peak is not None:
    head += ["TFLOP/s", "of peak"]
  head.append(f"{OURS} is faster by")
  rows = []
  for result in results:
    row = [result.case.name, result.contender]
    if not result.seconds:
      rows.append(row + [result.reason] + [""] * (len(head) - 3))
      continue
    low, high = min(result.seconds), max(result.seconds)
    row += [
      f"{1e3 * result.median:.4g}",
      f"{1e3 * low:.4g} - {1e3 * high:.4g}",
      f"{result.rate:,.0f} {result.case.unit}/s",
      f"{result.first:.1f}",
    ]
    if measured:
      known = result.memory is not None
      row.append(f"{result.memory / 2**20:,.1f}" if known else "")
    if bandwidth is not None:
      traffic = result.case.traffic
      floor = None if traffic is None else 1e3 * traffic / bandwidth
      row.append("" if floor is None else f"{floor:.3g}")
      moved = None if traffic is None else traffic / result.median
      row.append("" if moved is None else f"{moved / 1e12:.3g}")
      row.append("" if moved is None else f"{moved / bandwidth:.1%}")
    if peak is not None:
      known = result.flops is not None
      row.append(f"{result.flops / 1e12:.3g}" if known else "")
      row.append(f"{result.flops / peak:.1%}" if known else "")
    row.append("" if result.speedup is None else f"{result.speedup:.2f}x")
    rows.append(row)
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(results: Sequence[Result], path: str) -> bool:
  """Draws the milliseconds of every contender that ran, case by case.

  Args:
    results: of all cases.
    path: of the PNG.

  Returns:
    Whether there was anything to draw.
  """
  # Not pyplot: its backend is the caller's.
  from matplotlib.figure import Figure

  ran = [result for result in results if result.seconds]
  if not ran:
    return False
  names = list(dict.fromkeys(result.contender for result in ran))
  figure = Figure(figsize=(9, 1.2 + 0.3 * len(ran)), dpi=120)
  axes = figure.subplots()
  times = [1e3 * result.median for result in ran]
  axes.barh(
    range(len(ran)),
    times,
    color=[f"C{names.index(result.contender)}" for result in ran],
  )
  for place, value in enumerate(times):
    axes.annotate(f" {value:.3g}", (value, place), va="center", fontsize=7)
  labels = [f"{r.case.name}: {r.contender}" for r in ran]
  axes.set_yticks(range(len(ran)), labels, fontsize=7)
  axes.invert_yaxis()
  axes.set_xscale("log")
  axes.set_xlabel("milliseconds a call, median (logarithmic)")
  axes.grid(axis="x", alpha=0.3)
  figure.tight_layout()
  figure.savefig(path)
  return True
