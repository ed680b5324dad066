"""Jobs of a suite out of functions of arrays, in JAX and in torch."""

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.suites import timing
from experiments.suites.timing import Job, Unavailable
from multihead import ops

# Draws the inputs by name, and "dy", the gradient of what the job returns. A
# job puts them on the device when it first runs.
Arrays = Callable[[], dict[str, np.ndarray]]


def jax_job(
  arrays: Arrays,
  dtype: str,
  backward: bool,
  calls: int,
  function: Callable[..., jax.Array],
  dtypes: Mapping[str, str] | None = None,
) -> Job:
  """`calls` calls of function(**arrays); the job returns y.

  Args:
    arrays: see `Arrays`.
    dtype: of all arrays but those that `dtypes` names.
    backward: whether a call computes also the gradients of all arrays.
    calls: how many before the job waits.
    function: what is timed, compiled.
    dtypes: by name of an array.
  """
  dtypes = dtypes or {}
  drawn = arrays()

  def call(arrays, dy):
    if not backward:
      return function(**arrays), ()
    y, pull = jax.vjp(lambda arrays: function(**arrays), arrays)
    return y, pull(dy.astype(y.dtype))

  @functools.cache
  def compiled():
    shapes = {
      name: jax.ShapeDtypeStruct(x.shape, dtypes.get(name, dtype))
      for name, x in drawn.items()
    }
    dy = shapes.pop("dy")
    try:
      return jax.jit(call).lower(shapes, dy).compile()
    except NotImplementedError as error:
      raise Unavailable(str(error)) from None
    except jax.errors.JaxRuntimeError as error:
      raise _out_of_memory(error) from None

  @functools.cache
  def placed():
    found = {
      name: jnp.asarray(x, dtypes.get(name, dtype)) for name, x in drawn.items()
    }
    drawn.clear()
    return found, found.pop("dy")

  def job():
    run = compiled()
    try:
      inputs = placed()
      for _ in range(calls):
        out = run(*inputs)
      jax.block_until_ready(out)
    except jax.errors.JaxRuntimeError as error:
      raise _out_of_memory(error) from None
    return out[0]

  def peak_memory():
    job()
    use = compiled().memory_analysis()
    return use.temp_size_in_bytes + use.output_size_in_bytes

  job.calls = calls
  job.compile = compiled
  job.peak_memory = peak_memory
  return job


def _out_of_memory(error: Exception) -> Exception:
  """Unavailable where memory did not suffice, else the error itself."""
  if "RESOURCE_EXHAUSTED" in str(error):
    return Unavailable("out of memory")
  return error


def torch_job(
  arrays: Arrays,
  dtype: str,
  backward: bool,
  calls: int,
  prepare: Callable[..., tuple[dict[str, Any], Callable[..., Any]]],
  dtypes: Mapping[str, str] | None = None,
) -> Job:
  """Like `jax_job`; `prepare` gives the arrays as the function takes them."""
  torch = imported("torch")
  gpu = jax.default_backend() == "gpu"
  if gpu and not torch.cuda.is_available():
    raise Unavailable("this torch has no CUDA")
  device = "cuda" if gpu else "cpu"

  def load(name, x):
    kind = (dtypes or {}).get(name, dtype)
    return torch.from_numpy(x).to(device, getattr(torch, kind))

  drawn = arrays()

  @functools.cache
  def ready():
    tensors = {name: load(name, x) for name, x in drawn.items()}
    drawn.clear()
    # Contiguous in the layout that the function wants: no copy is timed.
    tensors, function = prepare(**tensors)
    dy = tensors.pop("dy").contiguous()
    tensors = {
      name: x.contiguous().requires_grad_(backward)
      for name, x in tensors.items()
    }
    return tensors, function, dy

  def job():
    try:
      tensors, function, dy = ready()
      with torch.set_grad_enabled(backward):
        for _ in range(calls):
          y = function(**tensors)
          if backward:
            torch.autograd.grad(y, list(tensors.values()), dy)
      if gpu:
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
      torch.cuda.empty_cache()
      raise Unavailable("out of memory") from None
    return y.detach()

  def peak_memory():
    ready()
    if not gpu:
      return timing.growth(job)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    job()
    return torch.cuda.max_memory_allocated() - before

  job.calls = calls
  job.peak_memory = peak_memory
  return job


def implementations(
  op: Callable[..., Any],
  q: tuple[int, ...],
  k: tuple[int, ...],
  dtype: str,
) -> list[str]:
  """Those of ours that serve a call with arrays of these shapes.

  On a GPU without the reference, whose memory is that of all logits, and
  without cuDNN, which is a contender by itself; on a CPU the reference alone.
  """
  if jax.default_backend() != "gpu":
    return ["reference"]
  struct = jax.ShapeDtypeStruct
  arrays = struct(q, dtype), struct(k, dtype), struct(k, dtype)
  name, options = op, {}
  if isinstance(op, functools.partial):
    name, options = op.func, op.keywords
  reasons = ops.describe(name, *arrays, **options).reasons
  return [
    name
    for name, reason in reasons.items()
    if reason is None and name not in ("cudnn", "reference")
  ]


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
  """Normal numbers in float32, which repeat after a few million."""
  size = math.prod(shape)
  draw = np.random.default_rng(seed).standard_normal
  return np.resize(draw(min(size, 2**22 + 1), np.float32), shape)


def torch_attention(backend: str | None, **options: Any) -> Callable[..., Any]:
  """scaled_dot_product_attention(q, k, v) by a backend; None is any."""
  attention = imported("torch.nn.attention", "torch")
  functional = imported("torch.nn.functional", "torch")
  function = functional.scaled_dot_product_attention

  def call(q, k, v):
    if backend is None:
      return function(q, k, v, **options)
    with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
      return function(q, k, v, **options)

  return call


def imported(name: str, package: str | None = None) -> Any:
  """The module `name`; Unavailable, with the package to install, without it."""
  try:
    return importlib.import_module(name)
  except ImportError:
    package = package or name.partition(".")[0]
    raise Unavailable(f"{package} is not installed") from None
