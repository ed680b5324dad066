"""Pallas on Mosaic GPU, the same on every release of jax that is supported.

The names of Mosaic GPU change from one release to the next; kernels here call
them through this module wherever two releases differ. A Pallas "thread" is a
warpgroup of 128 CUDA threads.

What cannot run in the interpreter (a matrix product with its left operand in
registers) goes through `product`, so that what is tested on a CPU differs from
what runs on a GPU in one function.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from multihead.ops import manual_axes

VERSION = tuple(int(x) for x in jax.__version__.split(".")[:2])
# Row r of a block of 64 stands in 4 lanes, which hold pairs of its columns.
WGMMA = plgpu.Layout.WGMMA
# What one program may hold, in bytes.
SHARED_MEMORY = 232_448
# Registers of a thread that computes and of one that loads, by the number of
# warpgroups that compute. A program starts with the same number for all, 65536
# shared out and rounded down to a multiple of 8; who asks for more than the
# others have given back waits forever.
REGISTERS = {2: (240, 24), 3: (160, 32)}
# What lowering without a GPU assumes.
HOPPER = "NVIDIA H100 80GB HBM3"
HOPPER_CORES = 132


def refusal() -> str | None:
  """Why kernels for Hopper cannot run on the default device, or None."""
  backend = jax.default_backend()
  if backend != "gpu":
    return (
      f"needs an NVIDIA GPU of compute capability 9.0; the default backend is "
      f"{backend!r}"
    )
  device = jax.devices()[0]
  found = getattr(device, "compute_capability", None)
  if found is None or "cuda" not in device.client.platform_version:
    return f"needs an NVIDIA GPU, this one is {device.device_kind}"
  if str(found) != "9.0":
    return (
      "is written for compute capability 9.0 (Hopper); this GPU, "
      f"{device.device_kind}, has {found}"
    )
  return None


def cores() -> int:
  """Streaming multiprocessors of the default device; an H100's elsewhere."""
  if jax.default_backend() != "gpu":
    return HOPPER_CORES
  return getattr(jax.devices()[0], "core_count", None) or HOPPER_CORES


def kernel(
  body: Callable[..., None],
  *,
  out: Any,
  scratch: Any,
  grid: dict[str, int],
  warpgroups: int = 1,
  cluster: dict[str, int] | None = None,
  warpgroup_semantics: bool = False,
  auto_barriers: bool = True,
  interpret: Any = None,
) -> Callable[..., Any]:
  """A Mosaic GPU kernel, ready to be called with its input arrays.

  Args:
    body: called with references to inputs, outputs and scratch;
      `lax.axis_index` gives the place in `grid` and, as "wg", the warpgroup.
    out: tree of jax.ShapeDtypeStruct.
    scratch: tree of `shared`, `tiled` and `barriers`.
    grid: size of each axis by name; programs that differ in the first one
      start next to one another.
    warpgroups: warpgroups of a program.
    cluster: size of each axis of a cluster by name.
    warpgroup_semantics: whether the compiler chooses the layouts of registers;
      otherwise the body does, and a mismatch is an error.
    auto_barriers: whether barriers go around every access to shared memory.
    interpret: None to compile for the GPU, or `interpreter()`.
  """
  semantics = plgpu.LoweringSemantics
  options = {}
  if cluster:
    options.update(
      cluster=tuple(cluster.values()), cluster_names=tuple(cluster)
    )
  if interpret is not None:
    options["interpret"] = interpret
  call = plgpu.kernel(
    body,
    out_type=out,
    scratch_types=scratch,
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    num_threads=warpgroups,
    thread_name="wg",
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=(
        semantics.Warpgroup if warpgroup_semantics else semantics.Lane
      ),
      unsafe_no_auto_barriers=not auto_barriers,
    ),
    **options,
  )

  def run(*inputs):
    # A kernel does not know over which mesh axes its inputs may differ.
    axes = manual_axes.varying(*inputs)
    return jax.tree.map(lambda x: manual_axes.cast(x, axes), call(*inputs))

  return run


def shared(shape: Sequence[int], dtype: jax.typing.DTypeLike) -> Any:
  """Scratch in shared memory, row by row."""
  return plgpu.SMEM(tuple(shape), dtype)


def tiled(
  shape: Sequence[int],
  dtype: jax.typing.DTypeLike,
  swizzle: int | None = None,
) -> Any:
  """Scratch in shared memory in the order that matrix products read.

  Args:
    shape: the last axis a multiple of 32 bytes, the one before it of 8.
    dtype: of 16 or 32 bits.
    swizzle: bytes, 32, 64 or 128; None is the largest that the last axis
      allows. The operands of one product have the same.
  """
  bits = jnp.dtype(dtype).itemsize * 8
  swizzle = swizzle or plgpu.find_swizzle(shape[-1] * bits)
  return plgpu.SMEM(
    tuple(shape),
    dtype,
    transforms=(
      plgpu.TilingTransform((8, 8 * swizzle // bits)),
      plgpu.SwizzleTransform(swizzle),
    ),
  )


def tiled_bytes(shape: Sequence[int], dtype: jax.typing.DTypeLike) -> int:
  """Bytes that `tiled` and `shared` take, at their alignment of 1024."""
  size = math.prod(shape) * jnp.dtype(dtype).itemsize
  return -(-size // 1024) * 1024


def barriers(count: int, arrivals: int = 1) -> Any:
  """`count` barriers, taken with `.at[i]`.

  Each completes a phase with `arrivals` arrivals: one per copy or warpgroup.
  Phases and waits alternate strictly: a phase nobody waits for is a deadlock.
  """
  return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def load(ref: Any, *, layout: Any = None, optimized: bool = True) -> jax.Array:
  """Reads shared or global memory into registers of a layout."""
  if VERSION >= (0, 11):
    return plgpu.load(ref, layout=layout, optimized=optimized)
  return plgpu.load(ref, (), layout=layout, optimized=optimized)


def transposed(ref: Any) -> Any:
  """The transposed view of a reference of two axes."""
  if VERSION >= (0, 11):
    return ref.transpose((1, 0))
  return plgpu.transpose_ref(ref, (1, 0))


def register_full(
  shape: Sequence[int], value: float, dtype: jax.typing.DTypeLike, layout: Any
) -> jax.Array:
  """An array of one value in registers of a layout."""
  return plgpu.layout_cast(jnp.full(tuple(shape), value, dtype), layout)


def widen(row: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Repeats one number per row along the columns."""
  return lax.broadcast_in_dim(row, tuple(shape), [0])


def widen_rows(column: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Repeats one number per column along the rows."""
  return lax.broadcast_in_dim(column, tuple(shape), [1])


def roles(
  warpgroup: jax.Array,
  consumers: int,
  consume: Callable[[], Any],
  produce: Callable[[], Any],
) -> None:
  """Runs `consume` in the first warpgroups, `produce` in the one after them.

  Registers go from the one that loads to those that compute; what they stored
  to global memory is there at the end.

  Args:
    warpgroup: the index of this one.
    consumers: 1 to 3.
    consume: the work of a consumer.
    produce: the work of the producer.
  """
  most, least = REGISTERS.get(consumers, (None, None))

  @pl.when(warpgroup < consumers)
  def _():
    if most:
      plgpu.set_max_registers(most, action="increase")
    consume()
    plgpu.wait_smem_to_gmem(0)

  @pl.when(warpgroup == consumers)
  def _():
    if least:
      plgpu.set_max_registers(least, action="decrease")
    produce()


def product(
  acc: jax.Array, left: jax.Array, right: Any, interpret: Any = None
) -> jax.Array:
  """acc + left @ right, with acc and left in registers, right shared memory.

  Waits until it is done.
  """
  if interpret is not None:
    f32 = jnp.float32
    return acc + jnp.dot(left.astype(f32), right[...].astype(f32))
  run = pl.run_state(lambda ref: plgpu.wgmma(ref, left, right))
  return run(plgpu.ACC.init(acc))


def interpreter() -> Any:
  """What `kernel(interpret=)` takes to run on a CPU.

  Raises:
    NotImplementedError: this release of jax interprets too little.
  """
  if VERSION < (0, 11):
    raise NotImplementedError(
      "kernels for Mosaic GPU are interpreted on jax 0.11 and newer; this is "
      f"jax {jax.__version__}"
    )
  return plgpu.InterpretGPUParams(inline_mgpu="ignore")


@contextlib.contextmanager
def pretended_hopper():
  """Within it, programs lower for an H100 on a machine that has none."""
  from jax._src import mesh

  device = mesh.AbstractDevice(
    device_kind=HOPPER, num_cores=HOPPER_CORES, platform="gpu"
  )
  abstract = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(abstract):
    yield


def lower(f: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> Any:
  """`f` lowered for CUDA, without a GPU: checks layouts, shapes and memory."""
  return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",))
