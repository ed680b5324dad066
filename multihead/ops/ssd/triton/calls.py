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
    forward: launch of `kernels.forward`, or None for its two halves.
    states: launch of `kernels.state_pass` and `kernels.state_gradients`.
    outputs: launch of `kernels.chunk_outputs`.
    gradients: launch of `kernels.chunk_gradients`.
  """

  chunk: int
  forward: Launch | None
  states: Launch
  outputs: Launch
  gradients: Launch


def _blocks(width: int, size: int) -> Blocks:
  """What measured best on an H100, of what leaves states in registers."""
  whole = max(16, _power_of_two(width))
  half = min(64, whole)
  if size <= 128:
    return Blocks(
      _CHUNK,
      Launch(half, 4, 2),
      Launch(half, 4, 2),
      Launch(half, 4, 1),
      Launch(half, 4, 1),
    )
  return Blocks(
    _CHUNK,
    None,
    Launch(max(16, half // 2), 4, 2),
    Launch(whole, 4, 1),
    Launch(whole, 8, 2),
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
  arrays = (x, B, C, dt, cum, start, end, total, initial, runs)
  launch = functools.partial(_launch_forward, blocks, False)
  y, _, final = triton_compat.mappable(launch)(arrays, D)
  return y, final


def _forward(blocks, *args):
  y, states, final = _with_states(blocks, *args)
  return (y, final), (args, states)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_states(blocks, *args):
  """What `_forward` launches, so that it has derivatives of its own."""
  *arrays, D, initial, runs = args
  launch = functools.partial(_launch_forward, blocks, True)
  return triton_compat.mappable(launch)((*arrays, initial, runs), D)


def _with_states_forward(blocks, *args):
  y, states, final = _with_states(blocks, *args)
  return (y, states, final), (args, states)


def _with_states_backward(blocks, residuals, cotangents):
  # `_gradients` has no use for the states beyond the arrays.
  dy, _, d_final = cotangents
  return _backward(blocks, residuals, (dy, d_final))


def _backward(blocks, residuals, cotangents):
  args, states = residuals
  return (*_gradients(blocks, *args, states, *cotangents), None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(blocks, *args):
  """Gradients of all but `runs`, from the states before each chunk."""
  *arrays, D, initial, runs, states, dy, d_final = args
  launch = functools.partial(_launch_gradients, blocks)
  *gradients, d_D, d_initial = triton_compat.mappable(launch)(
    (*arrays, initial, runs, states, dy, d_final), D
  )
  d_D = None if D is None else jnp.sum(d_D, axis=0)
  return (*gradients, d_D, d_initial)


def _launch_forward(blocks, keep_states, arrays, D):
  """y, the states before each chunk (None unless they are kept), the last."""
  from multihead.ops.ssd.triton import kernels

  x, B, C, dt, cum, start, end, total, initial, runs = arrays
  batch, _, heads, width = x.shape
  size, chunks = B.shape[3], total.shape[2]
  struct = jax.ShapeDtypeStruct
  whole = struct((batch, heads, chunks, width, size), x.dtype)
  y, final = struct(x.shape, x.dtype), struct(initial.shape, _F32)
  optional = dict(has_D=D is not None, has_runs=runs is not None)
  D = cum if D is None else D
  runs = cum if runs is None else runs
  if (launch := blocks.forward) is not None:
    y, states, final = triton_compat.call(
      kernels.forward,
      *(x, B, C, dt, cum, start, end, total, D, initial, runs),
      out=[y, whole if keep_states else struct((1,), x.dtype), final],
      grid=(batch * heads, launch.parts(width)),
      keep_states=keep_states,
      **optional,
      **_constants(blocks, launch, x, B, total),
    )
    return y, states if keep_states else None, final
  launch = blocks.states
  states, final = triton_compat.call(
    kernels.state_pass,
    *(x, B, end, total, initial),
    out=[whole, final],
    grid=(batch * heads, launch.parts(width)),
    **_constants(blocks, launch, x, B, total),
  )
  launch = blocks.outputs
  (y,) = triton_compat.call(
    kernels.chunk_outputs,
    *(x, B, C, dt, cum, start, D, runs, states),
    out=[y],
    grid=(chunks, batch * heads, launch.parts(width)),
    **optional,
    **_constants(blocks, launch, x, B, total),
  )
  return y, states if keep_states else None, final


def _launch_gradients(blocks, arrays, D):
  """Gradients of x to total, of D for each row [b, N], and of initial."""
  from multihead.ops.ssd.triton import kernels

  x, B, C, dt, cum, start, end, total, initial, runs, *rest = arrays
  states, dy, d_final = rest
  dy = dy.astype(x.dtype)
  batch, length, heads, width = x.shape
  groups, size = B.shape[2:]
  chunks = total.shape[2]
  struct = jax.ShapeDtypeStruct
  launch = blocks.states
  d_states, d_total, d_initial = triton_compat.call(
    kernels.state_gradients,
    *(C, start, total, states, dy, d_final),
    out=[
      struct(states.shape, states.dtype),
      struct((launch.parts(width), *total.shape), _F32),
      struct(initial.shape, _F32),
    ],
    grid=(batch * heads, launch.parts(width)),
    **_constants(blocks, launch, x, B, total),
  )
  launch = blocks.gradients
  parts = launch.parts(width)
  maps = struct((batch, heads, parts, length, size), B.dtype)
  dx, dB, dC, *sums = triton_compat.call(
    kernels.chunk_gradients,
    *(x, B, C, dt, cum, start, end),
    cum if D is None else D,
    cum if runs is None else runs,
    *(states, d_states, dy),
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
  *per_token, d_D = (jnp.sum(v, axis=0) for v in sums)

  def over_group(v):
    v = v.reshape(batch, groups, heads // groups * parts, length, size)
    v = jnp.sum(v, axis=2, dtype=_F32).astype(v.dtype)
    return jnp.swapaxes(v, 1, 2)

  d_total = jnp.sum(d_total, axis=0)
  d_D = jnp.sum(d_D, axis=2)
  maps = over_group(dB), over_group(dC)
  return (dx, *maps, *per_token, d_total, d_D, d_initial)


def _gradients_forward(blocks, *args):
  return _gradients(blocks, *args), args


def _gradients_backward(blocks, args, cotangents):
  """Second derivatives, which are rare, are those of the plain form."""
  *arrays, runs, states, dy, d_final = args

  def gradients(arrays, dy, d_final):
    # The states are a function of the arrays, so nothing is lost.
    def value(*arrays):
      return _plain(blocks, *arrays, runs)

    return jax.vjp(value, *arrays)[1]((dy, d_final))

  again, d_dy, d_d_final = jax.vjp(gradients, arrays, dy, d_final)[1](
    tuple(cotangents)
  )
  return (*again, None, jnp.zeros_like(states), d_dy, d_d_final)


_ssd.defvjp(_forward, _backward)
_with_states.defvjp(_with_states_forward, _with_states_backward)
_gradients.defvjp(_gradients_forward, _gradients_backward)


def _plain(blocks, x, B, C, dt, cum, start, end, total, D, initial, runs):
  """What the kernels compute, as products of whole arrays."""
  batch, length, heads, width = x.shape
  groups, size = B.shape[2:]
  chunk, chunks = blocks.chunk, total.shape[2]
  past = ((0, 0), (0, -length % chunk), (0, 0), (0, 0))

  def cut(v):
    v = jnp.pad(v.astype(_F32), past)
    return v.reshape(batch, chunks, chunk, groups, -1, v.shape[-1])

  def by_head(v):
    return v.reshape(batch, groups, -1, chunks, *v.shape[3:])

  xs, Bs, Cs = cut(x), cut(B)[..., 0, :], cut(C)[..., 0, :]
  dt, cum, start, end = (
    by_head(v.reshape(batch, heads, chunks, chunk))
    for v in (dt, cum, start, end)
  )
  seen = jnp.tri(chunk, dtype=bool)[None, None, None, None]
  if runs is not None:
    run = runs.reshape(batch, 1, 1, chunks, chunk)
    seen &= run[..., :, None] == run[..., None, :]
  exponents = cum[..., :, None] - cum[..., None, :]
  weights = jnp.exp(jnp.where(seen, exponents, -jnp.inf)) * dt[..., None, :]
  product = functools.partial(jnp.einsum, precision="highest")
  scores = product("bclgm,bcsgm->bgcls", Cs, Bs)
  y = product("bgcls,bgrcls,bcsgrh->bclgrh", scores, weights, xs)
  added = product("bcsgrh,bgrcs,bcsgm->cbgrhm", xs, end, Bs)
  factors = jnp.moveaxis(by_head(total), 3, 0)[..., None, None]
  first = initial.reshape(batch, groups, -1, width, size)

  def step(state, now):
    factor, added = now
    return factor * state + added, state

  final, states = jax.lax.scan(step, first, (factors, added))
  y = y + product("bclgm,cbgrhm,bgrcl->bclgrh", Cs, states, start)
  if D is not None:
    y = y + D.reshape(groups, -1, 1) * xs
  y = y.reshape(batch, -1, heads, width)[:, :length]
  return y.astype(x.dtype), final.reshape(initial.shape)


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
