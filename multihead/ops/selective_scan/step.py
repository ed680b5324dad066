"""The public function `selective_scan_step`: one token, for decoding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from multihead.ops.selective_scan import checks, reference

_OP = "selective_scan_step"


def selective_scan_step(
  state: Float[Array, "B E M"],
  u: Float[Array, "B E"],
  delta: Float[Array, "B E"],
  A: Float[Array, "E M"],
  B: Float[Array, "B G M"],
  C: Float[Array, "B G M"],
  D: Float[Array, "E"] | None = None,
  *,
  z: Float[Array, "B E"] | None = None,
  delta_bias: Float[Array, "E"] | None = None,
  delta_softplus: bool = False,
) -> tuple[Float[Array, "B E"], Float[Array, "B E M"]]:
  """One token of `selective_scan`, for decoding with the state it returned.

  Args:
    state: [B, E, M] after the token before.
    u: [B, E].
    delta: [B, E].
    A: [E, M].
    B: [B, G, M]; G divides E.
    C: [B, G, M].
    D: [E].
    z: [B, E].
    delta_bias: [E].
    delta_softplus: as in `selective_scan`.

  Returns:
    y [B, E] in the dtype of u, and the new state [B, E, M] in the dtype of
    `state`. The arithmetic is in float32 (float64 if u is).

  Raises:
    ValueError: shapes that do not fit together.
    TypeError: arrays of a wrong kind.
  """
  checks.check_kinds(
    _OP,
    state=state,
    u=u,
    delta=delta,
    A=A,
    B=B,
    C=C,
    D=D,
    z=z,
    delta_bias=delta_bias,
  )
  if u.ndim != 2:
    raise ValueError(f"{_OP}: u must be [B, E], got shape {u.shape}")
  batch, channels = u.shape
  groups, size = checks.check_maps(_OP, B, C, "[B, G, M]", u)
  checks.check_shape(_OP, "B", B, (batch, groups, size), "[B, G, M]", u)
  checks.check_shape(_OP, "delta", delta, u.shape, "[B, E]", u)
  checks.check_shape(_OP, "z", z, u.shape, "[B, E]", u)
  checks.check_parameters(_OP, A, D, delta_bias, size, u)
  shape = (batch, channels, size)
  checks.check_shape(_OP, "state", state, shape, "[B, E, M]", u)
  dtype = jnp.promote_types(u.dtype, jnp.float32)
  delta = reference.effective_delta(delta, delta_bias, delta_softplus)
  delta = delta.astype(dtype)[..., None]
  x = u.astype(dtype)
  B, C = (
    jnp.repeat(v.astype(dtype), channels // groups, axis=1) for v in (B, C)
  )
  new = jnp.exp(delta * A.astype(dtype)) * state.astype(dtype)
  new += delta * x[..., None] * B
  y = jnp.sum(new * C, axis=-1)
  if D is not None:
    y += D.astype(dtype) * x
  if z is not None:
    y *= jax.nn.silu(z.astype(dtype))
  return y.astype(u.dtype), new.astype(state.dtype)
