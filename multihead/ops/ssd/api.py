"""The public functions of this package: `ssd` and `ssd_step`."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from multihead.ops import dispatch
from multihead.ops.ssd import reference, triton, xla

_IMPLEMENTATIONS = {"triton": triton, "xla": xla, "reference": reference}
_PREFERENCE = ("triton", "xla", "reference")


def ssd(
  x: Float[Array, "B T N H"],
  dt: Float[Array, "B T N"],
  A: Float[Array, "N"],
  B: Float[Array, "B T G M"],
  C: Float[Array, "B T G M"],
  D: Float[Array, "N"] | None = None,
  *,
  dt_bias: Float[Array, "N"] | None = None,
  dt_softplus: bool = False,
  dt_limit: tuple[float, float] = (0.0, math.inf),
  chunk_size: int = 128,
  initial_state: Float[Array, "B N H M"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  return_final_state: bool = False,
  implementation: dispatch.Implementation = None,
) -> (
  Float[Array, "B T N H"]
  | tuple[Float[Array, "B T N H"], Float[Array, "B N H M"]]
):
  """State space duality, the scan of Mamba-2 (arXiv 2405.21060, section 6).

  With dt := clip(softplus(dt + dt_bias), *dt_limit), for every head n, which
  reads group n // (N // G) of B and C:

    state = exp(dt A) state + dt x (outer) B;    y = state C + D x

  Args:
    x: [B, T, N, H] inputs. Matrix products run in the common dtype of x, B and
      C (on a CPU in float32 at least), at jax's default matmul precision;
      decays, sums and states are in float32 (in float64 if x is).
    dt: [B, T, N] step sizes, before bias, softplus and clipping.
    A: [N], negative for a state that decays.
    B: [B, T, G, M] input maps; G divides N.
    C: [B, T, G, M] output maps.
    D: [N] weight of the direct path from x to y.
    dt_bias: [N], added to dt.
    dt_softplus: whether dt (with its bias) goes through softplus.
    dt_limit: smallest and largest step size.
    chunk_size: number of tokens that one matrix product of "xla" spans at most.
      It changes the speed and the rounding, nothing else; T need not divide by
      it.
    initial_state: [B, N, H, M] before the first token; zeros if None.
    segment_ids: [B, T]. Where the id changes from one token to the next, the
      state is zero before that token. `initial_state` belongs to the first
      segment.
    return_final_state: whether to return the state after the last token too.
    implementation: "triton" (NVIDIA GPUs, 16-bit products, states in
      registers), "xla" (chunked; memory linear in T, no [B, T, N, H, M] and
      no [T, T] array), "reference" (the recurrence), a sequence of names, or
      None for the best.

  Returns:
    y [B, T, N, H] in the dtype of x; with `return_final_state`, also the final
    state [B, N, H, M] in float32 (float64 if x is). Gradients flow through both
    and through `initial_state`.

  Raises:
    ValueError: shapes that do not fit together, an empty dt_limit, a chunk_size
      below 1, or an unknown implementation.
    TypeError: arrays of a wrong kind.
    NotImplementedError: the implementation asked for does not serve this call.
  """
  _check_kinds(
    x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, initial_state=initial_state
  )
  if x.ndim != 4:
    raise ValueError(f"ssd: x must be [B, T, N, H], got shape {x.shape}")
  batch, length, heads, width = x.shape
  if B.ndim != 4:
    raise ValueError(f"ssd: B must be [B, T, G, M], got shape {B.shape}")
  groups, size = B.shape[2:]
  _check_shape("dt", dt, (batch, length, heads), "[B, T, N]", x)
  _check_shape("B", B, (batch, length, groups, size), "[B, T, G, M]", x)
  _check_parameters(A, D, dt_bias, heads, groups, x)
  if C.shape != B.shape:
    raise ValueError(
      f"ssd: B and C must have one shape [B, T, G, M], got B {B.shape} and C "
      f"{C.shape}"
    )
  if initial_state is not None:
    shape = (batch, heads, width, size)
    _check_shape("initial_state", initial_state, shape, "[B, N, H, M]", x)
  if segment_ids is not None:
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
      raise TypeError(
        f"ssd: segment_ids must be integers, got {segment_ids.dtype}"
      )
    _check_shape("segment_ids", segment_ids, (batch, length), "[B, T]", x)
  if length == 0:
    raise ValueError(f"ssd: x has no tokens (T = 0), shape {x.shape}")
  if chunk_size < 1:
    raise ValueError(f"ssd: chunk_size must be at least 1, got {chunk_size}")
  _check_limit(dt_limit)
  args = dict(
    x=x,
    dt=dt,
    A=A,
    B=B,
    C=C,
    D=D,
    dt_bias=dt_bias,
    dt_softplus=dt_softplus,
    dt_limit=tuple(dt_limit),
    chunk_size=chunk_size,
    initial_state=initial_state,
    segment_ids=segment_ids,
    return_final_state=return_final_state,
  )
  module = dispatch.select(
    "ssd", _IMPLEMENTATIONS, _PREFERENCE, implementation, args
  )
  return module.run(**args)


def ssd_step(
  state: Float[Array, "B N H M"],
  x: Float[Array, "B N H"],
  dt: Float[Array, "B N"],
  A: Float[Array, "N"],
  B: Float[Array, "B G M"],
  C: Float[Array, "B G M"],
  D: Float[Array, "N"] | None = None,
  *,
  dt_bias: Float[Array, "N"] | None = None,
  dt_softplus: bool = False,
  dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Float[Array, "B N H"], Float[Array, "B N H M"]]:
  """One token of `ssd`, for decoding with the state it returned.

  Args:
    state: [B, N, H, M] after the token before.
    x: [B, N, H].
    dt: [B, N].
    A: [N].
    B: [B, G, M]; G divides N.
    C: [B, G, M].
    D: [N].
    dt_bias: [N].
    dt_softplus: as in `ssd`.
    dt_limit: as in `ssd`.

  Returns:
    y [B, N, H] in the dtype of x, and the new state [B, N, H, M] in the dtype
    of `state`. The arithmetic is in float32 (float64 if x is).

  Raises:
    ValueError: shapes that do not fit together, or an empty dt_limit.
    TypeError: arrays of a wrong kind.
  """
  _check_kinds(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias)
  if x.ndim != 3:
    raise ValueError(f"ssd_step: x must be [B, N, H], got shape {x.shape}")
  batch, heads, width = x.shape
  if B.ndim != 3 or B.shape != C.shape:
    raise ValueError(
      f"ssd_step: B and C must have one shape [B, G, M], got B {B.shape} and C "
      f"{C.shape}"
    )
  groups, size = B.shape[1:]
  _check_shape("dt", dt, (batch, heads), "[B, N]", x)
  _check_shape("B", B, (batch, groups, size), "[B, G, M]", x)
  _check_shape("state", state, (batch, heads, width, size), "[B, N, H, M]", x)
  _check_parameters(A, D, dt_bias, heads, groups, x)
  _check_limit(dt_limit)
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  dt = reference.effective_dt(dt, dt_bias, dt_softplus, dt_limit).astype(dtype)
  split = (batch, groups, heads // groups)
  inputs = x.astype(dtype).reshape(*split, width)
  old = state.astype(dtype).reshape(*split, width, size)
  B, C = B.astype(dtype), C.astype(dtype)
  decay = jnp.exp(dt * A.astype(dtype)).reshape(*split, 1, 1)
  drive = (inputs * dt.reshape(*split, 1))[..., None]
  new = decay * old + drive * B[:, :, None, None, :]
  y = jnp.einsum("bgrhm,bgm->bgrh", new, C, precision="highest")
  if D is not None:
    y = y + D.astype(dtype).reshape(*split[1:], 1) * inputs
  new = new.astype(state.dtype).reshape(state.shape)
  return y.astype(x.dtype).reshape(x.shape), new


def _check_kinds(**arrays: jax.Array | None) -> None:
  for name, array in arrays.items():
    if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
      raise TypeError(
        f"ssd: {name} must be a real floating point array, got {array.dtype}"
      )


def _check_shape(
  name: str,
  array: jax.Array,
  shape: tuple[int, ...],
  letters: str,
  x: jax.Array,
) -> None:
  if array.shape != shape:
    raise ValueError(
      f"ssd: {name} must be {letters} = {shape} to go with x {x.shape}, got "
      f"{array.shape}"
    )


def _check_parameters(
  A: jax.Array,
  D: jax.Array | None,
  dt_bias: jax.Array | None,
  heads: int,
  groups: int,
  x: jax.Array,
) -> None:
  for name, array in dict(A=A, D=D, dt_bias=dt_bias).items():
    if array is not None:
      _check_shape(name, array, (heads,), "[N]", x)
  if groups < 1 or heads % groups:
    raise ValueError(
      f"ssd: the {groups} groups of B and C do not divide the {heads} heads of "
      f"x {x.shape}"
    )


def _check_limit(dt_limit: tuple[float, float]) -> None:
  if len(dt_limit) != 2 or not dt_limit[0] <= dt_limit[1]:
    raise ValueError(
      f"ssd: dt_limit must be (smallest, largest), got {dt_limit}"
    )
