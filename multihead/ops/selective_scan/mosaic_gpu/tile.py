"""The tile of one program, and the sums across its lanes.

A program is one warpgroup and holds the states of 32 channels, an array
[4, 8, M]: warp, channel of the warp, state. A lane holds M / 4 states of one
channel, so that each step of the recurrence is arithmetic within a lane. Sums
over states (y, and two gradients) and over channels (the gradients of B and C)
cross lanes. They are taken of several arrays at once: in each exchange a lane
keeps one half of the arrays and gives the other half away, so that n sums over
n lanes cost n - 1 exchanges and not n log n, and each lane ends with one sum.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from multihead.ops import pallas_compat

CHANNELS = 32
WARPS = 4
LANES = 8  # that hold different channels
# Steps whose sums are taken together.
STEPS = 4

_LAYOUT = plgpu.Layout.TILED
_PLACES = dict(warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)


def state_layout(size: int):
  """Registers of [4, 8, size] states: size 8 or a multiple of 16."""
  if size % 16:
    tiling = plgpu.Tiling(((WARPS, LANES, size), (size // 4,)))
  else:
    tiling = plgpu.Tiling(((WARPS, LANES, 16), (4,)))
  return _LAYOUT(tiling, **_PLACES)


def token_layout():
  """Registers of [8, 32]: 8 tokens of 32 channels, two numbers a lane."""
  tiling = plgpu.Tiling(((8, 32), (2, 32), (2,)))
  return _LAYOUT(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def sums_layout(size: int):
  """Registers of [blocks, 4, M] sums over channels, by token and state."""
  across = min(size, 16)
  tiling = plgpu.Tiling(((32 // across, STEPS, across), (1,)))
  return _LAYOUT(tiling, warp_dims=(-3,), lane_dims=(-4, -2), vector_dim=-1)


def load(ref, layout):
  """Reads a reference of plain order into registers of `layout`."""
  return pallas_compat.load(ref, layout=layout, optimized=False)


def load_state(ref, layout):
  """Reads what becomes the carry of a loop.

  Inside shard_map the type of a reference names mesh axes, which arithmetic in
  a kernel does not; the product leaves the number as it is and drops them.
  """
  return load(ref, layout) * 1.0


def put_state_sums(pairs, interpret) -> None:
  """Of each (ref, arrays): ref [4, 32] = sums over states of four [4, 8, M].

  All are computed before any is stored, since no store moves past another.
  """
  refs, arrays = zip(*pairs, strict=True)
  if interpret is not None:
    for ref, four in pairs:
      ref[...] = jnp.stack([x.sum(-1).reshape(CHANNELS) for x in four])
    return
  layout = state_layout(arrays[0][0].shape[-1])

  @plgpu.inline_mgpu(
    arg_types=(
      (plgpu.RefType(),) * len(refs),
      ((layout,) * STEPS,) * len(refs),
    )
  )
  def put(_, refs, arrays):
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, memref

    lane, warp = _lane_and_warp()
    sums = [[_total(x) for x in four] for four in arrays]
    mine = [_exchange(four, (2, 1), lane)[0] for four in sums]
    index = functools.partial(arith.index_cast, ir.IndexType.get())
    four = _constant(4)
    channel = arith.addi(
      arith.muli(warp, _constant(LANES)), arith.divui(lane, four)
    )
    row = arith.remui(lane, four)
    for ref, value in zip(refs, mine, strict=True):
      memref.store(value, ref, [index(row), index(channel)])

  put(refs, arrays)


def channel_sums(arrays, interpret) -> jax.Array:
  """[4, 8, M]: at place k, the sums over a warp's channels of array k of 8."""
  if interpret is not None:
    return jnp.stack([x.sum(1) for x in arrays], axis=1)
  shape = arrays[0].shape
  layout = state_layout(shape[-1])

  @plgpu.inline_mgpu(
    arg_types=(layout,) * LANES,
    return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout),
  )
  def sums(_, *arrays):
    import jax.experimental.mosaic.gpu as mgpu
    import numpy as np

    lane, _ = _lane_and_warp()
    registers = [x.registers for x in arrays]
    out = np.empty_like(registers[0])
    for place in np.ndindex(out.shape):
      (out[place],) = _exchange([r[place] for r in registers], (16, 8, 4), lane)
    return mgpu.FragmentedArray(
      _registers=out, _layout=arrays[0].layout, _is_signed=None
    )

  return sums(*arrays)


def _constant(value):
  from jax._src.lib.mlir import ir
  from jax._src.lib.mlir.dialects import arith

  i32 = ir.IntegerType.get_signless(32)
  return arith.constant(i32, ir.IntegerAttr.get(i32, value))


def _lane_and_warp():
  """Lane of the thread in its warp, and warp in its warpgroup."""
  from jax._src.lib.mlir import ir
  from jax._src.lib.mlir.dialects import arith, gpu

  i32 = ir.IntegerType.get_signless(32)
  thread = arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x))
  lane = arith.remui(thread, _constant(32))
  warp = arith.remui(arith.divui(thread, _constant(32)), _constant(WARPS))
  return lane, warp


def _exchange(values, distances, lane):
  """Sums of values over lanes that differ by distances, one for each lane.

  The lane whose bits at `distances` read k, the first distance being the most
  significant, ends with the sum of values[k].
  """
  from jax._src.lib.mlir.dialects import arith
  from jax.experimental.mosaic.gpu import utils

  for distance in distances:
    bit = arith.andi(lane, _constant(distance))
    high = arith.cmpi(arith.CmpIPredicate.ne, bit, _constant(0))
    half = len(values) // 2
    pairs = zip(values[:half], values[half:], strict=True)
    values = [
      arith.addf(
        arith.select(high, b, a),
        utils.shfl_bfly(arith.select(high, a, b), distance),
      )
      for a, b in pairs
    ]
  return values


def _total(array):
  """Sum of all numbers that the thread holds of `array`."""
  from jax._src.lib.mlir.dialects import arith, vector

  terms = []
  for register in array.registers.flat:
    for i in range(register.type.shape[0]):
      terms.append(vector.extract(register, [], [i]))
  return functools.reduce(arith.addf, terms)


def softplus(x):
  """log(1 + exp(x)) to rounding, of what lowers: log1p(e) = 2 artanh(e/(2+e)).

  With e = exp(-|x|) the argument is below 1/3, where six terms are enough.
  """
  e = jnp.exp(-jnp.abs(x))
  s = e / (2 + e)
  q = s * s
  series = 1 / 11
  for odd in (9, 7, 5, 3, 1):
    series = 1 / odd + q * series
  return jnp.maximum(x, 0) + 2 * s * series
