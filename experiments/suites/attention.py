"""Attention beside what people call instead.

On a GPU the shapes of language and vision models in bfloat16, beside cuDNN
through jax.nn, tokamax, and torch's FlashAttention-2 and cuDNN; on a CPU small
ones in float32. Rates are in floating-point operations of the two products,
half of them with a causal mask, and 3.5 times the forward ones with gradients.
Each contender gets the same numbers, in the layout of its own.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from experiments.suites import jobs
from experiments.suites.timing import OURS, Case, Job, Unavailable
from multihead import ops

# B, T, N, H
_GPU = (
  (8, 2048, 16, 128),
  (4, 4096, 16, 128),
  (1, 16384, 16, 128),
  (4, 4096, 32, 64),
)
_CPU = ((2, 512, 8, 64), (1, 2048, 4, 64))
_TINY = ((1, 32, 2, 8),)


def cases(tiny: bool) -> Iterable[Case]:
  """The cases of the device that JAX uses; `tiny` ones for tests."""
  gpu = jax.default_backend() == "gpu"
  shapes = _TINY if tiny else _GPU if gpu else _CPU
  for shape in shapes:
    for causal in (False, True):
      for backward in (False, True):
        yield _case(shape, causal, backward, 20 if gpu and not tiny else 1)


def _case(
  shape: tuple[int, ...], causal: bool, backward: bool, calls: int
) -> Case:
  batch, length, heads, width = shape
  gpu = jax.default_backend() == "gpu"
  dtype = "bfloat16" if gpu else "float32"
  common = functools.partial(_arrays, *shape), dtype, backward, calls
  make = functools.partial(_jax_job, common)
  theirs = lambda backend: functools.partial(
    jobs.torch_job, *common, functools.partial(_torch, backend, causal)
  )
  ours = functools.partial(ops.attention, causal=causal)
  named = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
  contenders = {OURS: functools.partial(make, ours)}
  for name in ("mosaic_gpu", "triton", "xla") if gpu else ("reference",):
    contenders[f"{OURS} {name}"] = functools.partial(
      make, functools.partial(ours, implementation=name)
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
  return Case(
    f"attention {'forward+backward' if backward else 'forward'} B{batch} "
    f"T{length} N{heads} H{width} {'causal' if causal else 'full'} {dtype}",
    batch * length,
    contenders,
    flops=flops * (3.5 if backward else 1),
  )


def _arrays(
  batch: int, length: int, heads: int, width: int
) -> dict[str, np.ndarray]:
  """q, k, v and the gradient of the output."""
  draw = np.random.default_rng(0).standard_normal
  shape = batch, length, heads, width
  return {name: draw(shape, np.float32) for name in ("q", "k", "v", "dy")}


def _by_position(function, *, q, k, v, **options):
  return function(q, k, v, **options)


def _jax_job(common: tuple[Any, ...], function: Callable[..., Any]) -> Job:
  """A job that is not available where `function` refuses the shapes."""
  job = jobs.jax_job(*common, function)

  def checked():
    try:
      return job()
    except NotImplementedError as error:
      raise Unavailable(str(error)) from None

  checked.peak_memory = job.peak_memory
  return checked


def _tokamax_job(common: tuple[Any, ...], causal: bool, name: str) -> Job:
  function = functools.partial(
    jobs.imported("tokamax").dot_product_attention,
    is_causal=causal,
    implementation=name,
  )
  return _jax_job(common, functools.partial(_by_position, function))


def _torch(
  backend: str | None, causal: bool, **tensors: Any
) -> tuple[dict[str, Any], Callable[..., Any]]:
  """Heads before tokens, and scaled_dot_product_attention by a backend."""
  attention = jobs.imported("torch.nn.attention", "torch")
  functional = jobs.imported("torch.nn.functional", "torch")
  tensors = {name: x.transpose(1, 2) for name, x in tensors.items()}

  def call(q, k, v):
    if backend is None:
      return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
      return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

  return tensors, call
