"""From arrays as users have them to calls of the kernels, and derivatives."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from multihead.ops import manual_axes, triton_compat
from multihead.ops.ssd import chunk_math, reference

# Tokens of a chunk: a multiple of what a product of matrices spans.
_CHUNK = 64
_F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Launch:
  """How one kernel is launched.

  Attributes:
    width: of the head dim in a program, a power of two.
    warps: warps of a program.
    stages: turns of its loop that are loaded ahead.
  """

  width: int
  warps: int
  stages: int

  def parts(self, width: int) -> int:
    """Programs that share a head."""
    return -(-width // self.width)


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How the kernels cut the work.

  Attributes:
    chunk: tokens of a chunk.
    forward: launch of `kernels.forward`.
    states: launch of `kernels.state_gradients`.
    chunks: launch of `kernels.chunk_gradients`.
  """

  chunk: int
  forward: Launch
  states: Launch
  chunks: Launch


def _blocks(width: int, size: int) -> Blocks:
  """What measured best on an H100, of what leaves states in registers."""
  tile = min(64, max(16, _power_of_two(width)))
  warps = 4 if size <= 128 else 8
  return Blocks(
    _CHUNK,
    Launch(tile, warps, 2),
    Launch(tile, warps, 2),
    Launch(tile, warps, 1),
  )


def run(
  x: jax.Array,
  dt: jax.Array,
  A: jax.Array,
  B: jax.Array,
  C: jax.Array,
  D: jax.Array | None,
  *,
  dt_bias: jax.Array | None,
  dt_softplus: bool,
  dt_limit: tuple[float, float],
  chunk_size: int,
  initial_state: jax.Array | None,
  segment_ids: jax.Array | None,
  return_final_state: bool,
  blocks: Blocks | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `multihead.ops.ssd`; for arguments that `supports` accepts."""
  del chunk_size
  batch, length, heads, width = x.shape
  size = B.shape[3]
  blocks = blocks or _blocks(width, size)
  dtype = x.dtype
  low = jnp.result_type(x, B, C)
  x, B, C = (v.astype(low) for v in (x, B, C))
  dt = reference.effective_dt(dt, dt_bias, dt_softplus, dt_limit).astype(_F32)
  if initial_state is None:
    initial_state = jnp.zeros((batch, heads, width, size), _F32)
  initial_state = initial_state.astype(_F32)
  D = None if D is None else D.astype(_F32)
  runs = None
  if segment_ids is not None:
    runs = chunk_math.number_runs(segment_ids)
  factors = _factors(dt, A.astype(_F32), runs, blocks.chunk)
  if runs is not None:
    runs = jnp.pad(runs, ((0, 0), (0, -length % blocks.chunk)), mode="edge")
  y, final = _ssd(
    blocks, *manual_axes.alike(x, B, C, *factors, D, initial_state, runs)
  )
  y = y.astype(dtype)
  return (y, final) if return_final_state else y


def _factors(dt, A, runs, chunk):
  """dt, cum, start, end [b, N, T] and total [b, N, chunks] of `kernels`."""
  length = dt.shape[1]
  chunks = -(-length // chunk)

  def cut(v):
    return v.reshape(*v.shape[:-1], chunks, chunk)

  # With dt = 0 a token neither decays the state nor enters it.
  dt = jnp.pad(jnp.swapaxes(dt, 1, 2), ((0, 0), (0, 0), (0, -length % chunk)))
  dt = cut(dt)
  # A factor below the smallest number is zero: this bounds the sums.
  least = 1.02 * math.log(jnp.finfo(_F32).smallest_subnormal)
  a = jnp.maximum(dt * A[:, None, None], least)
  cum = chunk_math.sums(a, "inclusive")
  start = jnp.exp(cum)
  end = dt * jnp.exp(cum[..., -1:] - cum)
  if runs is not None:
    past = -length % chunk
    runs = cut(jnp.pad(runs, ((0, 0), (0, past)), mode="edge"))
    before = jnp.pad(runs[:, :-1, -1], ((0, 0), (1, 0)))
    start = jnp.where((runs == before[..., None])[:, None], start, 0)
    end = jnp.where((runs == runs[..., -1:])[:, None], end, 0)
  flat = [v.reshape(*v.shape[:2], -1) for v in (dt, cum, start, end)]
  return (*flat, start[..., -1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(blocks, x, B, C, dt, cum, start, end, total, D, initial, runs):
  arrays = (x, B, C, dt, cum, start, end, total, D, initial, runs)
  y, _, final = _launch_forward(blocks, arrays, keep_states=False)
  return y, final


def _forward(blocks, *arrays):
  y, states, final = _launch_forward(blocks, arrays, keep_states=True)
  return (y, final), (arrays, states)


def _launch_forward(blocks, arrays, *, keep_states):
  from multihead.ops.ssd.triton import kernels

  x, B, C, dt, cum, start, end, total, D, initial, runs = arrays
  batch, length, heads, width = x.shape
  size = B.shape[3]
  kept = (batch, heads, total.shape[2], width, size) if keep_states else (1,)
  struct = jax.ShapeDtypeStruct
  launch = blocks.forward
  return triton_compat.call(
    kernels.forward,
    x,
    B,
    C,
    dt,
    cum,
    start,
    end,
    total,
    cum if D is None else D,
    initial,
    cum if runs is None else runs,
    out=[
      struct(x.shape, x.dtype),
      struct(kept, x.dtype),
      struct(initial.shape, _F32),
    ],
    grid=(batch * heads, launch.parts(width)),
    has_D=D is not None,
    has_runs=runs is not None,
    keep_states=keep_states,
    **_constants(blocks, launch, x, B, total),
  )


def _backward(blocks, residuals, cotangents):
  from multihead.ops.ssd.triton import kernels

  (x, B, C, dt, cum, start, end, total, D, initial, runs), states = residuals
  dy, d_final = cotangents
  dy = dy.astype(x.dtype)
  batch, length, heads, width = x.shape
  groups, size = B.shape[2:]
  chunks = total.shape[2]
  struct = jax.ShapeDtypeStruct
  launch = blocks.states
  d_states, d_total, d_initial = triton_compat.call(
    kernels.state_gradients,
    C,
    start,
    total,
    states,
    dy,
    d_final,
    out=[
      struct(states.shape, states.dtype),
      struct((launch.parts(width), *total.shape), _F32),
      struct(initial.shape, _F32),
    ],
    grid=(batch * heads, launch.parts(width)),
    **_constants(blocks, launch, x, B, total),
  )
  launch = blocks.chunks
  parts = launch.parts(width)
  maps = struct((batch, heads, parts, length, size), B.dtype)
  dx, dB, dC, *sums = triton_compat.call(
    kernels.chunk_gradients,
    x,
    B,
    C,
    dt,
    cum,
    start,
    end,
    cum if D is None else D,
    cum if runs is None else runs,
    states,
    d_states,
    dy,
    out=[
      struct(x.shape, x.dtype),
      maps,
      maps,
      *[struct((parts, *dt.shape), _F32)] * 4,
      struct((parts, *total.shape), _F32),
    ],
    grid=(chunks, batch * heads, parts),
    has_D=D is not None,
    has_runs=runs is not None,
    **_constants(blocks, launch, x, B, total),
  )
  d_dt, d_cum, d_start, d_end, d_D = (jnp.sum(v, axis=0) for v in sums)

  def over_group(v):
    v = v.reshape(batch, groups, heads // groups * parts, length, size)
    v = jnp.sum(v, axis=2, dtype=_F32).astype(v.dtype)
    return jnp.swapaxes(v, 1, 2)

  return (
    dx,
    over_group(dB),
    over_group(dC),
    d_dt,
    d_cum,
    d_start,
    d_end,
    jnp.sum(d_total, axis=0),
    None if D is None else jnp.sum(d_D, axis=(0, 2)),
    d_initial,
    None,
  )


_ssd.defvjp(_forward, _backward)


def _constants(blocks, launch, x, B, total):
  """The constants that all kernels have, and how they are launched."""
  groups, size = B.shape[2:]
  return dict(
    length=x.shape[1],
    chunks=total.shape[2],
    heads=x.shape[2],
    groups=groups,
    width=x.shape[3],
    size=size,
    Q=blocks.chunk,
    HT=launch.width,
    MT=max(16, _power_of_two(size)),
    num_warps=launch.warps,
    num_stages=launch.stages,
  )


def _power_of_two(n: int) -> int:
  return 1 << (n - 1).bit_length()
