"""Triton kernels through jax-triton, the same on every pair that works.

Both packages belong to the extra `gpu`. Each release of jax-triton works with
some releases of triton and jax only, and importing one that does not fit raises
anything; so it is imported where a kernel is launched or asked about, and what
goes wrong becomes a reason with the versions to install.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from multihead.ops import manual_axes

# Run on an H100 with jax 0.11.2; the extra `gpu` installs this pair.
_KNOWN = "jax-triton 0.3.1 with triton 3.6.0"


@functools.cache
def refusal() -> str | None:
  """Why Triton kernels cannot run on the default device, or None."""
  if (backend := jax.default_backend()) != "gpu":
    return f"needs an NVIDIA GPU, the default backend is {backend!r}"
  device = jax.devices()[0]
  capability = getattr(device, "compute_capability", None)
  if capability is None or "cuda" not in device.client.platform_version:
    return f"needs an NVIDIA GPU, this one is {device.device_kind}"
  if float(capability) < 8.0:
    return (
      "needs compute capability 8.0 or higher; this GPU, "
      f"{device.device_kind}, has {capability}"
    )
  for package in ("jax-triton", "triton"):
    if _version(package) is None:
      return f"needs {package}: pip install 'multihead[gpu]'"
  try:
    importlib.import_module("jax_triton")
  except Exception as error:
    return _mismatch(error)
  return _try()


def call(
  kernel: Any,
  *inputs: jax.Array,
  out: Sequence[jax.ShapeDtypeStruct],
  grid: tuple[int, ...],
  num_warps: int,
  num_stages: int,
  **constants: Any,
) -> tuple[jax.Array, ...]:
  """Launches a `triton.jit` kernel.

  Args:
    kernel: its parameters are the inputs, the outputs, then constants.
    *inputs: arrays, passed as pointers.
    out: what it writes.
    grid: programs along each axis.
    num_warps: warps of a program.
    num_stages: how many turns of a loop are loaded ahead.
    **constants: the kernel's `tl.constexpr` parameters.

  Returns:
    The outputs.
  """
  import jax_triton

  release = tuple(int(x) for x in _version("jax-triton").split(".")[:2])
  name = "out_type" if release >= (0, 4) else "out_shape"
  # A kernel does not know over which mesh axes its inputs may differ.
  axes = manual_axes.varying(*inputs)
  results = jax_triton.triton_call(
    *inputs,
    kernel=kernel,
    grid=grid,
    num_warps=num_warps,
    num_stages=num_stages,
    **{name: tuple(out)},
    **constants,
  )
  return tuple(manual_axes.cast(x, axes) for x in results)


def mappable(launch: Callable[..., Any]) -> Callable[..., Any]:
  """`launch(arrays, parameters)` that `vmap` may map over either.

  Under `vmap` arrays of shape [A, B, ...] become [A B, ...]; where parameters
  differ too, it launches A times.
  """
  mappable = jax.custom_batching.custom_vmap(launch)

  @mappable.def_vmap
  def rule(size, mapped, arrays, parameters):
    def widen(array, is_mapped):
      if is_mapped:
        return array
      return jnp.broadcast_to(array, (size, *array.shape))

    arrays = jax.tree.map(widen, arrays, mapped[0])
    if any(jax.tree.leaves(mapped[1])):
      parameters = jax.tree.map(widen, parameters, mapped[1])
      out = lax.map(lambda both: mappable(*both), (arrays, parameters))
    else:
      flat = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), arrays)
      out = jax.tree.map(
        lambda v: v.reshape(size, -1, *v.shape[1:]),
        mappable(flat, parameters),
      )
    return out, jax.tree.map(lambda _: True, out)

  return mappable


def _try() -> str | None:
  """Compiles and runs a small kernel: pairs may fail no sooner than that."""
  from multihead.ops import triton_probe

  try:
    with jax.ensure_compile_time_eval():
      return None if triton_probe.works() else _mismatch("a wrong result")
  except Exception as error:
    return _mismatch(error)


def _mismatch(error: Exception | str) -> str:
  text = str(error).strip().splitlines() or [type(error).__name__]
  return (
    f"jax-triton {_version('jax-triton')} does not work with triton "
    f"{_version('triton')} and jax {jax.__version__} ({text[0]}); install "
    f"{_KNOWN}: pip install 'multihead[gpu]'"
  )


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None
