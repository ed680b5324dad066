"""Times a suite, beside its peers where they are installed.

  python -m experiments.benchmark --suite=falcon_h1 --workdir=/tmp/benchmark

Prints a table. In --workdir, metrics.jsonl gets a line per contender of each
run, metrics.json the newest numbers and report.md a table per run, with a
figure. With --tune the suite attention times block sizes instead.
"""

import datetime
import functools
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import flags

from experiments import common, suites
from experiments.suites import timing, workers
from multihead.errors import UserError, nearest

# Peers need room on the same GPU. JAX reads this with its first array.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

_SUITE = flags.DEFINE_string(
  "suite", None, f"What to time: {', '.join(suites.NAMES)}."
)
_FILTER = flags.DEFINE_string(
  "filter", "", "Only the cases whose name this regular expression finds."
)
_REPEATS = flags.DEFINE_integer(
  "repeats", 5, "Timed calls of each contender.", lower_bound=1
)
_TINY = flags.DEFINE_bool(
  "tiny", False, "Tiny shapes, to see that everything runs."
)

_TUNE = flags.DEFINE_bool(
  "tune",
  False,
  "Time block sizes of our own kernels instead, and write the fastest of them "
  "as a table that the kernels read.",
)

# Of timed calls a case, for a peer that is slow here.
_MOST_SECONDS = 60.0
# Load average a core that we do not reach alone: others are in the way.
_BUSY = 1.7
_PACKAGES = (
  *("jax", "jaxlib", "flax", "triton", "jax-triton"),
  *("torch", "transformers", "tokamax"),
)


def main() -> None:
  """Times the cases and writes down what came out."""
  suite = _suite(_SUITE.value)
  if _TUNE.value:
    suite = _tuning(suite)
  workdir = _workdir()
  cases = _cases(suite)
  facts = machine()
  common.say("\n".join(f"{name}: {value}" for name, value in facts.items()))
  peak = None
  if any(case.flops is not None for case in cases):
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    peak = timing.matmul_peak(dtype)
    facts["matrix product"] = f"{peak / 1e12:.3g} TFLOP/s in {dtype}"
    common.say(f"matrix product: {facts['matrix product']}")
  bandwidth = None
  if any(case.traffic is not None for case in cases):
    bandwidth = timing.copy_bandwidth()
    facts["copy"] = f"{bandwidth / 1e9:.4g} GB/s read and written"
    common.say(f"copy: {facts['copy']}")
  loads = [_load()]
  results = []
  now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
  for number, (case, times) in enumerate(_timed(suite, cases), 1):
    common.say(f"{number}/{len(cases)} {case.name} ...")
    found = times()
    loads.append(_load())
    for result in found:
      common.say(f"  {result.contender}: {_told(result)}")
    if workdir is not None:
      # Case by case: what was timed survives a run that is cut short.
      _append(workdir, now, facts | {"load": loads[-1]}, found, peak)
    results += found
  facts["load average a core"] = ", ".join(f"{load:.1f}" for load in loads)
  text = timing.table(results, peak, bandwidth)
  if hasattr(suite, "notes"):
    text += "\n\n" + suite.notes(_TINY.value)
  # Threads that wait by spinning lose most: a ratio would flatter us.
  if max(loads) > _BUSY:
    text += (
      f"\n\nThe machine was busy with other work (load average a core: "
      f"{facts['load average a core']}): do not quote these numbers."
    )
  common.say("\n" + text)
  if _TUNE.value:
    told = suite.write(results, workdir or pathlib.Path())
    common.say("\n" + told)
    text += "\n\n" + told
  if workdir is not None:
    _report(workdir, now, facts, results, text, getattr(suite, "figures", None))


def _timed(
  suite: Any, cases: Sequence[timing.Case]
) -> Iterator[tuple[timing.Case, Callable[[], list[timing.Result]]]]:
  """Every case, and what times it."""
  limits = _REPEATS.value, _MOST_SECONDS
  if workers.wanted(cases):
    yield from workers.run(suite.__name__, _TINY.value, cases, *limits)
    return
  for case in cases:
    yield case, functools.partial(timing.run, case, *limits)


def _told(result: timing.Result) -> str:
  return f"{1e3 * result.median:.4g} ms" if result.seconds else result.reason


def machine() -> dict[str, str]:
  """What the numbers depend on, in words."""
  device = jax.devices()[0]
  versions = []
  for name in _PACKAGES:
    try:
      versions.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
      versions.append(f"{name} not installed")
  return {
    "device": f"{device.device_kind} ({device.platform}), {_cores()} CPU cores",
    "system": f"Python {platform.python_version()}, {platform.platform()}",
    "versions": ", ".join(versions),
  }


def _cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _load() -> float:
  """Of the last minute, for each core; 0 where the system does not say."""
  try:
    return os.getloadavg()[0] / _cores()
  except (AttributeError, OSError):
    return 0.0


def _suite(name: str | None) -> Any:
  if name not in suites.NAMES:
    given = "is missing" if name is None else f"{name!r} does not exist"
    raise UserError(
      f"--suite {given}{nearest(str(name), suites.NAMES)}; the suites are "
      f"{', '.join(suites.NAMES)}"
    )
  return importlib.import_module(f"experiments.suites.{name}")


def _tuning(suite: Any) -> Any:
  """The suite that times block sizes."""
  if not hasattr(suite, "TUNING"):
    raise UserError(
      f"--suite={_SUITE.value} has no block sizes to --tune; attention has"
    )
  if jax.default_backend() != "gpu":
    raise UserError(
      "--tune times kernels of NVIDIA GPUs, and the default backend is "
      f"{jax.default_backend()!r}"
    )
  return importlib.import_module(suite.TUNING)


def _workdir() -> pathlib.Path | None:
  if not flags.FLAGS.workdir:
    return None
  path = pathlib.Path(flags.FLAGS.workdir)
  if (path / "checkpoints").exists():
    raise UserError(
      f"--workdir={path} is that of a training run; give another folder"
    )
  return path


def _cases(suite: Any) -> Sequence[timing.Case]:
  try:
    wanted = re.compile(_FILTER.value)
  except re.error as error:
    raise UserError(
      f"--filter={_FILTER.value!r} is not a regular expression: {error}"
    ) from None
  cases = list(suite.cases(_TINY.value))
  chosen = [case for case in cases if wanted.search(case.name)]
  if not chosen:
    raise UserError(
      f"--filter={_FILTER.value!r} finds none of the cases "
      f"{', '.join(case.name for case in cases)}"
    )
  return chosen


def _append(
  workdir: pathlib.Path,
  now: str,
  facts: dict[str, Any],
  results: Sequence[timing.Result],
  peak: float | None,
) -> None:
  """A line in metrics.jsonl for each contender."""
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / "metrics.jsonl").open("a", encoding="utf-8") as file:
    for result in results:
      case = result.case
      line = {
        "time": now,
        "suite": _SUITE.value,
        "case": case.name,
        "contender": result.contender,
        **facts,
      }
      if result.seconds:
        line |= {
          "seconds": result.seconds,
          "first_call_seconds": result.first,
          f"{case.unit}_per_second": result.rate,
        }
        if result.memory is not None:
          line["peak_bytes"] = result.memory
        if result.flops is not None:
          line |= {"flops_per_second": result.flops, "peak": peak}
        if result.speedup is not None:
          line["speedup_of_multihead"] = result.speedup
      else:
        line["reason"] = result.reason
      file.write(json.dumps(line) + "\n")


def _report(
  workdir: pathlib.Path,
  now: str,
  facts: dict[str, str],
  results: Sequence[timing.Result],
  text: str,
  figures: Callable[..., Sequence[tuple[str, str]]] | None,
) -> None:
  """The newest numbers, the table and its figures."""
  numbers = {}
  for result in results:
    if not result.seconds:
      continue
    case, name = result.case, result.contender
    numbers[f"{case.name}/{name}/{case.unit}_per_second"] = result.rate
    if result.speedup is not None:
      numbers[f"{case.name}/speedup_over_{name}"] = result.speedup
  (workdir / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
  # A run of the same suite does not overwrite the figure of an earlier one.
  prefix = f"{_SUITE.value}-{re.sub(r'[^0-9]', '', now[:19])}"
  images = []
  if timing.plot(results, str(workdir / f"{prefix}.png")):
    images.append((f"{prefix}.png", "milliseconds of each contender"))
  if figures is not None:
    images += figures(results, str(workdir / prefix))
  for path, caption in images:
    text += f"\n\n![{caption}]({pathlib.Path(path).name})"
  with (workdir / "report.md").open("a", encoding="utf-8") as file:
    words = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    file.write(f"# {_SUITE.value}, {now}\n\n{words}\n\n{text}\n\n")


if __name__ == "__main__":
  common.run(main)
