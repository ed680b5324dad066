"""Jobs of a suite out of functions of arrays, in JAX and in torch."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.suites import timing
from experiments.suites.timing import Job, Unavailable

# Draws the inputs by name, and "dy", the gradient of what the job returns.
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
  arrays = {
    name: jnp.asarray(x, dtypes.get(name, dtype))
    for name, x in arrays().items()
  }
  dy = arrays.pop("dy")

  def call(arrays, dy):
    if not backward:
      return function(**arrays), ()
    y, pull = jax.vjp(lambda arrays: function(**arrays), arrays)
    return y, pull(dy.astype(y.dtype))

  jitted = jax.jit(call)

  def job():
    try:
      for _ in range(calls):
        out = jitted(arrays, dy)
      jax.block_until_ready(out)
    except jax.errors.JaxRuntimeError as error:
      raise _out_of_memory(error) from None
    return out[0]

  def peak_memory():
    job()
    use = jitted.lower(arrays, dy).compile().memory_analysis()
    return use.temp_size_in_bytes + use.output_size_in_bytes

  job.calls = calls
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

  tensors = {name: load(name, x) for name, x in arrays().items()}
  # Contiguous in the layout that the function wants: no copy is timed.
  tensors, function = prepare(**tensors)
  dy = tensors.pop("dy").contiguous()
  tensors = {
    name: x.contiguous().requires_grad_(backward) for name, x in tensors.items()
  }

  def job():
    try:
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
    if not gpu:
      return timing.growth(job)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    job()
    return torch.cuda.max_memory_allocated() - before

  job.calls = calls
  job.peak_memory = peak_memory
  return job


def imported(name: str, package: str | None = None) -> Any:
  """The module `name`; Unavailable, with the package to install, without it."""
  try:
    return importlib.import_module(name)
  except ImportError:
    package = package or name.partition(".")[0]
    raise Unavailable(f"{package} is not installed") from None
