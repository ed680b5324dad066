"""Block sizes of the Hopper attention kernels against one another.

`experiments.benchmark --suite=attention --tune` times, for head dims, with and
without a causal mask, and each kernel, the sizes below in forward, or forward
and backward together with the other kernels as they are. `write` makes a table
of the fastest.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from experiments.suites import attention, jobs
from experiments.suites.timing import Case, Job, Result
from multihead import ops
from multihead.ops.attention.mosaic_gpu import blocks, tables

# B, T, N, H
_SHAPES = ((4, 4096, 32, 64), (4, 4096, 16, 128), (4, 4096, 8, 256))
_TINY = ((1, 256, 2, 64),)
_KERNELS = ("forward", "queries", "keys")
_PRESENT = "as it is"


def cases(tiny: bool) -> Iterable[Case]:
  """One for each kernel, shape and kind of rows."""
  for shape in _TINY if tiny else _SHAPES:
    for full, kernel in itertools.product((True, False), _KERNELS):
      batch, length, heads, width = shape
      make = functools.partial(_job, shape, full, kernel)
      contenders = {_PRESENT: functools.partial(make, None)}
      for name, sizes in _candidates(kernel, width):
        contenders[name] = functools.partial(make, sizes)
      flops = 4 * batch * heads * length**2 * width * (1 if full else 0.5)
      yield Case(
        f"{kernel} {width} {'full' if full else 'part'}",
        batch * length,
        contenders,
        flops=flops * (1 if kernel == "forward" else 3.5),
        group=f"{shape} {full} {kernel}",
      )


def _candidates(kernel: str, width: int) -> Iterator[tuple[str, Any]]:
  """Sizes that may fit, by what makes them differ."""
  if kernel == "forward":
    kind = blocks.Forward
    choices = dict(
      columns=(64, 128) if width <= 128 else (64,),
      consumers=(2, 3) if width <= 64 else (2,),
      overlap=(True, False),
      persistent=(True, False),
    )
  else:
    kind = blocks.Backward
    choices = dict(
      columns=(64, 128) if width <= 64 else (64,),
      consumers=(2, 3) if width <= 64 else (2,),
      stages=(1, 2),
      persistent=(True, False),
    )
  for values in itertools.product(*choices.values()):
    given = dict(zip(choices, values, strict=True))
    name = ", ".join(f"{key}={value}" for key, value in given.items())
    yield name, kind(**given)


def _job(
  shape: tuple[int, ...], full: bool, kernel: str, sizes: Any | None
) -> Job:
  """A job whose kernel has these sizes, None for those of today."""
  job = jobs.jax_job(
    functools.partial(attention.arrays, *shape),
    "bfloat16",
    kernel != "forward",
    5,
    functools.partial(
      ops.attention,
      causal=not full,
      # Two backward kernels, also where one for all gradients is the default.
      deterministic=True,
      implementation="mosaic_gpu",
    ),
  )
  if sizes is None:
    return job
  compiled = job.compile

  def compile_with_sizes():
    with tables.using(_with(blocks.table(), kernel, shape[-1], full, sizes)):
      return compiled()

  job.compile = compile_with_sizes
  return job


def _with(
  table: blocks.Table, kernel: str, width: int, full: bool, sizes: Any
) -> blocks.Table:
  """The table with one entry changed."""
  entries = {**getattr(table, kernel), (width, full): sizes}
  return dataclasses.replace(table, **{kernel: entries})


def write(results: Sequence[Result], folder: pathlib.Path) -> str:
  """Writes the table of this device as JSON, and says what changed.

  Args:
    results: of the cases.
    folder: where the file goes.

  Returns:
    A Markdown table, and where the file belongs.
  """
  if not any(result.seconds for result in results):
    return f"No table written, for nothing ran: {results[0].reason}"
  table = blocks.table()
  lines = ["| kernel | present, ms | fastest, ms | |", "|---|---|---|---|"]
  by_case = itertools.groupby(results, key=lambda result: result.case.name)
  for name, group in by_case:
    ran = {result.contender: result for result in group if result.seconds}
    if not ran:
      continue
    best = min(ran.values(), key=lambda result: result.median)
    kernel, width, rows = name.split()
    if best.contender != _PRESENT:
      sizes = dict(_candidates(kernel, int(width)))[best.contender]
      table = _with(table, kernel, int(width), rows == "full", sizes)
    before = ran.get(_PRESENT)
    present = "-" if before is None else f"{1e3 * before.median:.3f}"
    lines.append(
      f"| {name} | {present} | {1e3 * best.median:.3f} | {best.contender} |"
    )
  path = folder / tables.file_name(jax.devices()[0].device_kind)
  folder.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(tables.to_json(table), indent=1) + "\n")
  lines += ["", f"{path} holds the table; in {tables.FOLDER} it is read."]
  return "\n".join(lines)
