"""Timing of one job done by several contenders, fairly.

Compilation and warm-up are apart; then the contenders take turns, so that a
busy minute of the machine falls on all of them.
"""

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

OURS = "multihead"

# Does the job once and returns when it is done.
Job = Callable[[], Any]


class Unavailable(Exception):
  """A contender that cannot run here; the text says why."""


@dataclasses.dataclass(frozen=True)
class Case:
  """A job and those who do it.

  Attributes:
    name: of the job, with its sizes.
    work: how much of `unit` one call does.
    contenders: name -> function that makes everything ready and returns the
      job; our own is called "multihead". One that cannot run raises
      Unavailable, in either step.
    unit: what a rate counts.
    flops: floating-point operations of one call, by the formula of the model
      (recomputation does not count); None where that says nothing.
  """

  name: str
  work: float
  contenders: Mapping[str, Callable[[], Job]]
  unit: str = "tokens"
  flops: float | None = None


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
  """

  case: Case
  contender: str
  first: float = 0.0
  seconds: tuple[float, ...] = ()
  speedup: float | None = None
  reason: str = ""

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
    return None if flops is None else flops / self.median


def run(
  case: Case, repeats: int, most_seconds: float = math.inf
) -> list[Result]:
  """Times all contenders of a case, turn by turn.

  Args:
    case: what to time.
    repeats: timed calls of each.
    most_seconds: no further turn begins when timed calls have taken so long.

  Returns:
    One result per contender.
  """
  jobs, results = {}, {}
  for name, prepare in case.contenders.items():
    try:
      job = prepare()
      first = _clock(job)
      _clock(job)
    except Unavailable as error:
      logging.info("%s: %s cannot run: %s", case.name, name, error)
      results[name] = Result(case, name, reason=str(error))
      continue
    jobs[name] = job
    results[name] = Result(case, name, first)
  seconds = {name: [] for name in jobs}
  for _ in range(repeats):
    if sum(map(sum, seconds.values())) > most_seconds:
      break
    for name, job in jobs.items():
      seconds[name].append(_clock(job))
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


def matmul_peak(dtype: Any) -> float:
  """Operations a second of a large square matrix product, best of ten."""
  size = 1024 if jax.default_backend() == "cpu" else 8192
  key = jax.random.key(0)
  x = jax.random.normal(key, (size, size), jnp.float32).astype(dtype)
  product = jax.jit(lambda x: x @ x)
  job = lambda: product(x).block_until_ready()
  _clock(job)
  return 2 * size**3 / min(_clock(job) for _ in range(10))


def table(results: Sequence[Result], peak: float | None) -> str:
  """The results as a Markdown table.

  Args:
    results: of all cases.
    peak: see `matmul_peak`; None leaves its columns out.
  """
  head = ["case", "who", "ms", "min - max", "rate", "first call s"]
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
    if peak is not None:
      known = result.flops is not None
      row.append(f"{result.flops / 1e12:.3g}" if known else "")
      row.append(f"{result.flops / peak:.1%}" if known else "")
    row.append("" if result.speedup is None else f"{result.speedup:.2f}x")
    rows.append(row)
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)
