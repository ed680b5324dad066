"""Cases in processes of their own, which compile while others are timed.

Compiling takes longer than timing, and most of it is in Python. So each group
of cases has a process; a few are at work at a time, and when one has compiled
all of its cases it waits for its turn on the device. One that dies or hangs
takes no other with it.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from experiments.suites import timing
from experiments.suites.timing import Case, Result

# Groups that compile or wait, beside the one that is timed: each holds some
# hundred MB of the GPU.
_AHEAD = 9
_THREADS = 3  # that compile in a process
_MOST_SECONDS = 240.0  # to start and compile


def wanted(cases: Sequence[Case]) -> bool:
  """Whether cases name groups, and there is a device that is worth it."""
  return jax.default_backend() == "gpu" and any(case.group for case in cases)


def run(
  module: str,
  tiny: bool,
  cases: Sequence[Case],
  repeats: int,
  most_seconds: float,
) -> Iterator[tuple[Case, Callable[[], list[Result]]]]:
  """Times cases as `timing.run` does, group by group.

  Args:
    module: the suite's, whose `cases` gives these, too.
    tiny: its argument.
    cases: what to time.
    repeats: see `timing.run`.
    most_seconds: likewise.

  Yields:
    Each case, with a function that waits for its results.
  """
  groups = {}
  for case in cases:
    groups.setdefault(case.group, []).append(case)
  waiting, started = list(groups.values()), []
  try:
    while waiting or started:
      while waiting and len(started) <= _AHEAD:
        group = waiting.pop(0)
        names = [case.name for case in group]
        args = module, tiny, names, repeats, most_seconds
        started.append((group, _Worker(args)))
      group, worker = started[0]
      for case in group:
        yield case, functools.partial(worker.results, case, most_seconds)
      worker.stop()
      started.pop(0)
  finally:
    for _, worker in started:
      worker.stop()


class _Worker:
  """A process with the cases of a group, and what became of it."""

  def __init__(self, args: tuple[Any, ...]):
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(
      target=_work, args=(theirs, *args), daemon=True
    )
    self._process.start()
    theirs.close()
    self._error = ""
    self._ready = False

  def results(self, case: Case, most_seconds: float) -> list[Result]:
    """Those of the next case."""
    if not self._ready:
      self._ask(_MOST_SECONDS)
      self._ready = True
    found = self._ask(most_seconds + 60)
    if self._error:
      return [Result(case, n, reason=self._error) for n in case.contenders]
    return [dataclasses.replace(result, case=case) for result in found]

  def stop(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.join()
    self._pipe.close()

  def _ask(self, most_seconds: float) -> Any:
    """Says go on, and waits for the answer."""
    if self._error:
      return None
    try:
      self._pipe.send("go on")
      if not self._pipe.poll(most_seconds):
        self._error = f"no answer for {most_seconds:.0f} s"
        return None
      answer = self._pipe.recv()
    except (EOFError, OSError):
      self._process.join(5)
      self._error = f"its process ended with code {self._process.exitcode}"
      return None
    if isinstance(answer, str):
      self._error = answer
    return answer


def _work(
  pipe: Any,
  module: str,
  tiny: bool,
  names: Sequence[str],
  repeats: int,
  most_seconds: float,
) -> None:
  """What a process does: compiles, and times a case whenever it is told to."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  # An interrupt from the keyboard reaches every process; the parent ends this.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    cases = importlib.import_module(module).cases(tiny)
    cases = [case for case in cases if case.name in names]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      ready = [timing.prepare(case, pool.map) for case in cases]
    pipe.recv()
    pipe.send(None)
    for case in ready:
      pipe.recv()
      found = timing.run(case, repeats, most_seconds)
      pipe.send([dataclasses.replace(result, case=None) for result in found])
  except Exception as error:
    pipe.send(f"{type(error).__name__}: {str(error).strip()[:300]}")
