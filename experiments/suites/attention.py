"""Attention beside what people call instead.

On a GPU the shapes of language and vision models in bfloat16, and lengths from
512 to 16384 of as many tokens in all, beside cuDNN through jax.nn, tokamax, and
torch's FlashAttention-2 and cuDNN; on a CPU small ones in float32. Rates are in
floating-point operations of the two products, half of them with a causal mask,
and 3.5 times the forward ones with gradients. Then a few queries against a long
cache (`decoding`). Each contender gets the same numbers, in the layout of its
own.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.suites import decoding, jobs
from experiments.suites.timing import OURS, Case, Job, Result
from multihead import ops

# B, T, N, H
_GPU = (
  (32, 512, 16, 128),
  (16, 1024, 16, 128),
  (8, 2048, 16, 128),
  (4, 4096, 16, 128),
  (2, 8192, 16, 128),
  (1, 16384, 16, 128),
  (4, 4096, 32, 64),
)
_CPU = ((2, 512, 8, 64), (1, 2048, 4, 64))
_TINY = ((1, 32, 2, 8),)
# Calls before a job waits on a GPU; the plain implementation is far slower.
_CALLS, _CALLS_XLA = 20, 2
# With --tune, this suite instead.
TUNING = "experiments.suites.attention_tuning"


def cases(tiny: bool) -> Iterable[Case]:
  """The cases of the device that JAX uses; `tiny` ones for tests."""
  gpu = jax.default_backend() == "gpu"
  shapes = _TINY if tiny else _GPU if gpu else _CPU
  for shape in shapes:
    for causal in (False, True):
      for backward in (False, True):
        yield _case(shape, causal, backward, _CALLS if gpu and not tiny else 1)
  yield from decoding.cases(tiny)


def _case(
  shape: tuple[int, ...], causal: bool, backward: bool, calls: int
) -> Case:
  batch, length, heads, width = shape
  gpu = jax.default_backend() == "gpu"
  dtype = "bfloat16" if gpu else "float32"
  drawn = functools.partial(arrays, *shape)
  common = drawn, dtype, backward, calls
  make = functools.partial(jobs.jax_job, *common)
  theirs = lambda backend: functools.partial(
    jobs.torch_job, *common, functools.partial(_torch, backend, causal)
  )
  ours = functools.partial(ops.attention, causal=causal)
  named = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
  contenders = {OURS: functools.partial(make, ours)}
  for name in jobs.implementations(ours, shape, shape, dtype):
    few = min(calls, _CALLS_XLA) if name == "xla" else calls
    contenders[f"{OURS} {name}"] = functools.partial(
      jobs.jax_job,
      *(drawn, dtype, backward, few),
      functools.partial(ours, implementation=name),
    )
  if gpu:
    contenders["jax cuDNN"] = functools.partial(
      make, functools.partial(_by_position, named, implementation="cudnn")
    )
    for name in ("mosaic", "triton"):
      contenders[f"tokamax {name}"] = functools.partial(
        _tokamax_job, common, causal, name
      )
    contenders["torch FlashAttention-2"] = theirs("FLASH_ATTENTION")
    contenders["torch cuDNN"] = theirs("CUDNN_ATTENTION")
  else:
    contenders["jax.nn"] = functools.partial(
      make, functools.partial(_by_position, named, implementation="xla")
    )
    contenders["torch"] = theirs(None)
  flops = 4 * batch * heads * length**2 * width * (0.5 if causal else 1)
  seen = "causal" if causal else "full"
  return Case(
    f"attention {'forward+backward' if backward else 'forward'} B{batch} "
    f"T{length} N{heads} H{width} {seen} {dtype}",
    batch * length,
    contenders,
    flops=flops * (3.5 if backward else 1),
    group=f"{shape} {seen}",
  )


@functools.lru_cache(maxsize=1)
def _drawn(
  batch: int, length: int, heads: int, width: int
) -> dict[str, np.ndarray]:
  shape = batch, length, heads, width
  return {n: jobs.normal(shape, i) for i, n in enumerate(("q", "k", "v", "dy"))}


def arrays(*shape: int) -> dict[str, np.ndarray]:
  """q, k, v and the gradient of the output."""
  return dict(_drawn(*shape))


def _by_position(function, *, q, k, v, **options):
  return function(q, k, v, **options)


def _tokamax_job(common: tuple[Any, ...], causal: bool, name: str) -> Job:
  function = functools.partial(
    jobs.imported("tokamax").dot_product_attention,
    is_causal=causal,
    implementation=name,
  )
  return jobs.jax_job(*common, functools.partial(_by_position, function))


def _torch(
  backend: str | None, causal: bool, **tensors: Any
) -> tuple[dict[str, Any], Callable[..., Any]]:
  """Heads before tokens, and scaled_dot_product_attention by a backend."""
  tensors = {name: x.transpose(1, 2) for name, x in tensors.items()}
  return tensors, jobs.torch_attention(backend, is_causal=causal)


_NAME = re.compile(
  r"attention (\S+) B\d+ T(\d+) (N\d+ H\d+) (full|causal) (\S+)$"
)


def figures(results: Sequence[Result], prefix: str) -> list[tuple[str, str]]:
  """Draws rates and memory against length, where there are several lengths.

  Args:
    results: of the suite.
    prefix: of the paths of the images.

  Returns:
    Path and caption of each image.
  """
  lines = {}
  for result in results:
    found = _NAME.match(result.case.name)
    if found and result.seconds:
      direction, length, heads, seen, dtype = found.groups()
      panel = lines.setdefault((heads, dtype), {}).setdefault(
        (direction, seen), {}
      )
      panel.setdefault(result.contender, []).append((int(length), result))
  drawn = []
  for (heads, dtype), panels in lines.items():
    if all(len(x) < 3 for panel in panels.values() for x in panel.values()):
      continue
    name = f"{heads} {dtype}"
    for kind, words, value in (
      ("rates", "TFLOP/s", lambda r: r.flops / 1e12),
      (
        "memory",
        "MiB beside the inputs",
        lambda r: None if r.memory is None else r.memory / 2**20,
      ),
    ):
      path = f"{prefix}-{kind}-{name.replace(' ', '-')}.png"
      _draw(panels, f"attention, {name}", words, value, path)
      drawn.append((path, f"{words} against length, {name}"))
  return drawn


def _draw(
  panels: dict[tuple[str, str], dict[str, list[tuple[int, Result]]]],
  title: str,
  label: str,
  value: Callable[[Result], float | None],
  path: str,
) -> None:
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 7.5), dpi=110)
  grid = figure.subplots(2, 2, sharex=True)
  names = list(dict.fromkeys(n for panel in panels.values() for n in panel))
  for place, direction in enumerate(("forward", "forward+backward")):
    for axes, seen in zip(grid[place], ("full", "causal"), strict=True):
      for name, points in panels.get((direction, seen), {}).items():
        known = [(t, value(r)) for t, r in sorted(points, key=lambda x: x[0])]
        known = [point for point in known if point[1] is not None]
        axes.plot(
          *zip(*known, strict=True) if known else ((), ()),
          marker="o",
          color=f"C{names.index(name)}",
          linewidth=2.5 if name == OURS else 1.2,
          label=name,
        )
      axes.set_xscale("log", base=2)
      axes.set_title(f"{direction}, {seen}")
      axes.set_ylabel(label)
      axes.set_ylim(bottom=0)
      axes.grid(alpha=0.3)
  for axes in grid[1]:
    axes.set_xlabel("length T, as many tokens in all")
  grid[0][0].legend(fontsize=7)
  figure.suptitle(title)
  figure.tight_layout()
  figure.savefig(path)
