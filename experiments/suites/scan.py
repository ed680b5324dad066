"""Selective scan and SSD beside the implementations people use today.

On a GPU the shapes of Mamba models, in milliseconds beside mamba-ssm's CUDA and
Triton kernels; on a CPU small ones, beside mambapy and the path of transformers
that runs without kernels. `associative_scan` and `lax.scan` are what JAX itself
offers. Each contender gets the same numbers, in the layout of its own.
"""

import functools
import importlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.suites import jobs
from experiments.suites.timing import OURS, Case, Unavailable
from multihead import ops

# Of what stays in full precision, whatever the dtype.
_DTYPES = dict.fromkeys(("A", "D", "dt"), "float32")
# (B, T, E, M), dtypes
_SCANS_GPU = (
  ((8, 2048, 1536, 16), ("float32", "bfloat16")),
  ((8, 4096, 384, 16), ("float32", "bfloat16")),
  ((64, 3136, 192, 16), ("float32", "bfloat16")),
  ((1, 65536, 1536, 16), ("bfloat16",)),
)
# (B, T, N, H, G, M), tokens of a chunk
_SSD_GPU = (
  ((4, 4096, 24, 64, 1, 128), 256),
  ((8, 2048, 48, 64, 1, 128), 256),
  ((4, 4096, 24, 128, 1, 256), 256),
)
_SSD_CPU = (((2, 2048, 8, 64, 1, 64), 128),)
# The gradient of transformers' loop copies all states for every token: the
# time grows with the square of T.
_LONGEST_FOR_TRANSFORMERS = 256
# A GPU launches a few kernels for each step.
_LONGEST_FOR_LAX_SCAN = 4096


def cases(tiny: bool) -> Iterable[Case]:
  """The cases of the device that JAX uses; `tiny` ones for tests."""
  calls = 1
  if tiny:
    scans, ssd = [((1, 32, 8, 4), ("float32",))], [((1, 32, 2, 4, 1, 4), 16)]
  elif jax.default_backend() == "cpu":
    shapes = (2, 2048, 256, 16), (2, 256, 256, 16)
    scans, ssd = [(shape, ("float32",)) for shape in shapes], _SSD_CPU
  else:
    scans, ssd, calls = _SCANS_GPU, _SSD_GPU, 20
  for shape, dtypes in scans:
    for dtype in dtypes:
      for backward in (False, True):
        yield _scan_case(shape, dtype, backward, calls)
  for shape, chunk in ssd:
    dtype = "bfloat16" if jax.default_backend() != "cpu" else "float32"
    for backward in (False, True):
      yield _ssd_case(shape, chunk, dtype, backward, calls)


def _scan_case(
  shape: tuple[int, ...], dtype: str, backward: bool, calls: int
) -> Case:
  batch, length, channels, size = shape
  arrays = functools.partial(_scan_arrays, *shape)
  make = functools.partial(
    jobs.jax_job, arrays, dtype, backward, calls, dtypes=_DTYPES
  )
  their = functools.partial(
    jobs.torch_job, arrays, dtype, backward, calls, dtypes=_DTYPES
  )
  contenders = {
    OURS: functools.partial(make, ops.selective_scan),
    "associative_scan": functools.partial(make, _associative_scan),
  }
  if length <= _LONGEST_FOR_LAX_SCAN:
    # A call is long enough to be timed alone.
    contenders["lax.scan"] = functools.partial(
      jobs.jax_job,
      arrays,
      dtype,
      backward,
      1,
      functools.partial(ops.selective_scan, implementation="reference"),
      dtypes=_DTYPES,
    )
  if jax.default_backend() == "gpu":
    contenders["mamba-ssm CUDA"] = functools.partial(their, _mamba_ssm_scan)
  else:
    contenders["mambapy"] = functools.partial(their, _mambapy_scan)
    if length <= _LONGEST_FOR_TRANSFORMERS or not backward:
      contenders["transformers"] = functools.partial(their, _transformers_scan)
  wide, narrow = batch * length * channels, batch * length * size
  # Forward: u, delta and y; B and C. Backward: those again without y, the
  # gradient of y, and that of each input.
  numbers = 3 * wide + 2 * narrow
  if backward:
    numbers += 5 * wide + 4 * narrow
  return Case(
    f"selective_scan {_direction(backward)} B{batch} T{length} E{channels} "
    f"M{size} {dtype}",
    batch * length,
    contenders,
    traffic=numbers * jnp.dtype(dtype).itemsize,
  )


def _ssd_case(
  shape: tuple[int, ...], chunk: int, dtype: str, backward: bool, calls: int
) -> Case:
  batch, length, heads, width, groups, size = shape
  arrays = functools.partial(_ssd_arrays, *shape)
  make = functools.partial(
    jobs.jax_job, arrays, dtype, backward, calls, dtypes=_DTYPES
  )
  contenders = {OURS: functools.partial(make, ops.ssd)}
  if jax.default_backend() == "gpu":
    theirs = functools.partial(_mamba_ssm_ssd, chunk)
    contenders["mamba-ssm Triton"] = functools.partial(
      jobs.torch_job, arrays, dtype, backward, calls, theirs, _DTYPES
    )
  else:
    contenders["lax.scan"] = functools.partial(
      make, functools.partial(ops.ssd, implementation="reference")
    )
  wide = batch * length * heads * width
  narrow = batch * length * groups * size
  numbers = 2 * wide + 2 * narrow
  steps = batch * length * heads  # in float32
  if backward:
    numbers += 3 * wide + 4 * narrow
  return Case(
    f"ssd {_direction(backward)} B{batch} T{length} N{heads} H{width} "
    f"G{groups} M{size} {dtype}",
    batch * length,
    contenders,
    traffic=numbers * jnp.dtype(dtype).itemsize
    + 4 * steps * (3 if backward else 1),
  )


def _direction(backward: bool) -> str:
  return "forward+backward" if backward else "forward"


def _scan_arrays(
  batch: int, length: int, channels: int, size: int
) -> dict[str, np.ndarray]:
  """Inputs by name, and "dy"; A and D stay in float32 whatever the dtype."""
  draw = np.random.default_rng(0).standard_normal
  tokens = (batch, length)
  wide = lambda: draw((*tokens, channels), np.float32)
  return dict(
    u=wide(),
    delta=np.logaddexp(wide() - 3, 0),
    A=-np.exp(draw((channels, size), np.float32)),
    B=draw((*tokens, 1, size), np.float32),
    C=draw((*tokens, 1, size), np.float32),
    D=draw(channels, np.float32),
    dy=wide(),
  )


def _ssd_arrays(
  batch: int, length: int, heads: int, width: int, groups: int, size: int
) -> dict[str, np.ndarray]:
  """As `_scan_arrays`; dt stays in float32 too."""
  draw = np.random.default_rng(0).standard_normal
  tokens = (batch, length)
  return dict(
    x=draw((*tokens, heads, width), np.float32),
    dt=np.logaddexp(draw((*tokens, heads), np.float32) - 3, 0),
    A=-np.exp(draw(heads, np.float32)),
    B=draw((*tokens, groups, size), np.float32),
    C=draw((*tokens, groups, size), np.float32),
    D=draw(heads, np.float32),
    dy=draw((*tokens, heads, width), np.float32),
  )


def _associative_scan(u, delta, A, B, C, D):
  """One group, all states at once, as JAX has it."""
  delta = delta.astype(jnp.float32)
  decay = jnp.exp(delta[..., None] * A)
  drive = (delta * u)[..., None] * B.astype(jnp.float32)

  def combine(first, then):
    return first[0] * then[0], then[0] * first[1] + then[1]

  _, states = lax.associative_scan(combine, (decay, drive), axis=1)
  y = jnp.einsum("btem,btm->bte", states, C[:, :, 0].astype(jnp.float32))
  return (y + D * u).astype(u.dtype)


def _channels_first(tensors: dict[str, Any]) -> dict[str, Any]:
  """[B, E, T] and, without the one group, [B, M, T]."""
  tensors = {
    name: x[:, :, 0] if name in ("B", "C") else x for name, x in tensors.items()
  }
  return {
    name: x.transpose(1, 2) if x.ndim == 3 else x for name, x in tensors.items()
  }


def _mamba_ssm_scan(**tensors):
  module = jobs.imported("mamba_ssm.ops.selective_scan_interface", "mamba-ssm")

  def call(u, delta, A, B, C, D):
    return module.selective_scan_fn(u, delta, A, B, C, D)

  return _channels_first(tensors), call


def _mamba_ssm_ssd(chunk, **tensors):
  module = jobs.imported("mamba_ssm.ops.triton.ssd_combined", "mamba-ssm")

  def call(x, dt, A, B, C, D):
    return module.mamba_chunk_scan_combined(x, dt, A, B, C, chunk, D=D)

  return tensors, call


def _mambapy_scan(**tensors):
  module = jobs.imported("mambapy.mamba")
  tensors |= {name: tensors[name][:, :, 0] for name in ("B", "C")}

  def call(u, delta, A, B, C, D):
    # The method reads nothing of the block that it belongs to.
    return module.MambaBlock.selective_scan(None, u, delta, A, B, C, D)

  return tensors, call


def _transformers_scan(**tensors):
  module = jobs.imported("transformers.models.mamba.modeling_mamba")
  if not hasattr(module, "mamba_selective_scan"):
    raise Unavailable("this transformers has no mamba_selective_scan")
  importlib.import_module("transformers").logging.set_verbosity_error()

  def call(u, delta, A, B, C, D):
    return module.mamba_selective_scan(u, delta, A, B, C, D)

  return _channels_first(tensors), call
