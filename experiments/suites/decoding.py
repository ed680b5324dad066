"""A query against a long cache beside what people call instead.

Part of the suite `attention`. The work is reading keys and values, so the rate
that counts is that of their bytes.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.suites import jobs
from experiments.suites.timing import OURS, Case
from multihead import ops

# B, S, N, K, H
_GPU = (
  (8, 32768, 32, 8, 128),
  (16, 8192, 32, 8, 128),
  (1, 131072, 32, 8, 128),
)
_CPU = ((4, 4096, 8, 2, 64),)
_TINY = ((2, 32, 4, 2, 8),)


def cases(tiny: bool) -> Iterable[Case]:
  """The cases of the device that JAX uses; `tiny` ones for tests."""
  gpu = jax.default_backend() == "gpu"
  for shape in _TINY if tiny else _GPU if gpu else _CPU:
    yield _case(shape, 20 if gpu and not tiny else 1)


def _case(shape: tuple[int, ...], calls: int) -> Case:
  batch, length, heads, kv_heads, width = shape
  gpu = jax.default_backend() == "gpu"
  dtype = "bfloat16" if gpu else "float32"
  common = functools.partial(_arrays, *shape), dtype, False, calls
  make = functools.partial(jobs.jax_job, *common)
  theirs = lambda backend: functools.partial(
    jobs.torch_job, *common, functools.partial(_torch, backend)
  )
  contenders = {OURS: functools.partial(make, ops.decode_attention)}
  query, cache = (batch, 1, heads, width), (batch, length, kv_heads, width)
  for name in jobs.implementations(ops.decode_attention, query, cache, dtype):
    contenders[f"{OURS} {name}"] = functools.partial(
      make, functools.partial(ops.decode_attention, implementation=name)
    )
  for name in ("cudnn", "xla") if gpu else ("xla",):
    label = {"cudnn": "jax cuDNN", "xla": "jax.nn"}[name]
    contenders[label] = functools.partial(
      make, functools.partial(_jax_nn, implementation=name)
    )
  if gpu:
    contenders["torch FlashAttention-2"] = theirs("FLASH_ATTENTION")
    contenders["torch cuDNN"] = theirs("CUDNN_ATTENTION")
  else:
    contenders["torch"] = theirs(None)
  itemsize = jnp.dtype(dtype).itemsize
  return Case(
    f"decode_attention B{batch} S{length} N{heads} K{kv_heads} H{width} "
    f"{dtype}",
    batch,
    contenders,
    traffic=2 * batch * length * kv_heads * width * itemsize,
    group=f"decode {shape}",
  )


@functools.lru_cache(maxsize=1)
def _drawn(
  batch: int, length: int, heads: int, kv_heads: int, width: int
) -> dict[str, np.ndarray]:
  return {
    "q": jobs.normal((batch, 1, heads, width), 0),
    "k": jobs.normal((batch, length, kv_heads, width), 1),
    "v": jobs.normal((batch, length, kv_heads, width), 2),
    "dy": jobs.normal((batch, 1, heads, width), 3),
  }


def _arrays(*shape: int) -> dict[str, np.ndarray]:
  """A query, and a cache that is full."""
  return dict(_drawn(*shape))


def _jax_nn(*, q, k, v, implementation):
  return jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def _torch(
  backend: str | None, **tensors: Any
) -> tuple[dict[str, Any], Callable[..., Any]]:
  """Heads before tokens, as torch's caches are."""
  tensors = {name: x.transpose(1, 2) for name, x in tensors.items()}
  return tensors, jobs.torch_attention(backend, enable_gqa=True)
