"""The public function `selective_scan`."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from multihead.ops import dispatch
from multihead.ops.selective_scan import checks, mosaic_gpu, reference, xla

_OP = "selective_scan"
_IMPLEMENTATIONS = {
  "mosaic_gpu": mosaic_gpu,
  "xla": xla,
  "reference": reference,
}
_PREFERENCE = ("mosaic_gpu", "xla", "reference")


def selective_scan(
  u: Float[Array, "B T E"],
  delta: Float[Array, "B T E"],
  A: Float[Array, "E M"],
  B: Float[Array, "B T G M"],
  C: Float[Array, "B T G M"],
  D: Float[Array, "E"] | None = None,
  *,
  z: Float[Array, "B T E"] | None = None,
  delta_bias: Float[Array, "E"] | None = None,
  delta_softplus: bool = False,
  initial_state: Float[Array, "B E M"] | None = None,
  reverse: bool = False,
  segment_ids: Int[Array, "B T"] | None = None,
  return_final_state: bool = False,
  implementation: dispatch.Implementation = None,
) -> (
  Float[Array, "B T E"] | tuple[Float[Array, "B T E"], Float[Array, "B E M"]]
):
  """The selective scan of Mamba-1 (arXiv 2312.00752, algorithm 2).

  With delta := softplus(delta + delta_bias), for every channel e, which reads
  group e // (E // G) of B and C:

    h = exp(delta A) h + delta u B;    y = (h . C + D u) silu(z)

  Args:
    u: [B, T, E] inputs.
    delta: [B, T, E] step sizes, before bias and softplus. They are not negative
      after it.
    A: [E, M], negative for a state that decays.
    B: [B, T, G, M] input maps; G divides E.
    C: [B, T, G, M] output maps.
    D: [E] weight of the direct path from u to y.
    z: [B, T, E] gates; none if None.
    delta_bias: [E], added to delta.
    delta_softplus: whether delta (with its bias) goes through softplus.
    initial_state: [B, E, M] before the first token; zeros if None.
    reverse: run from the last token to the first. y stays at the places of u;
      `initial_state` enters at the last token, and the final state is that
      after the first.
    segment_ids: [B, T]. Where the id changes from one token to the next, the
      state is zero before that token. `initial_state` belongs to the segment
      that is run first.
    return_final_state: whether to return the state after the last step too.
    implementation: "mosaic_gpu" (Hopper GPUs; as "xla", states in registers),
      "xla" (chunked; memory linear in T, without the factor M of
      the states), "reference" (the recurrence, differentiated as it stands), a
      sequence of names, or None for the best.

  Returns:
    y [B, T, E] in the dtype of u; with `return_final_state`, also the final
    state [B, E, M] in float32 (float64 if u is). All arithmetic is in that
    dtype. Gradients flow through both and through `initial_state`.

  Raises:
    ValueError: shapes that do not fit together, or an unknown implementation.
    TypeError: arrays of a wrong kind.
    NotImplementedError: the implementation asked for does not serve this call.
  """
  checks.check_kinds(
    _OP,
    u=u,
    delta=delta,
    A=A,
    B=B,
    C=C,
    D=D,
    z=z,
    delta_bias=delta_bias,
    initial_state=initial_state,
  )
  if u.ndim != 3:
    raise ValueError(f"{_OP}: u must be [B, T, E], got shape {u.shape}")
  batch, length, channels = u.shape
  if length == 0:
    raise ValueError(f"{_OP}: u has no tokens (T = 0), shape {u.shape}")
  groups, size = checks.check_maps(_OP, B, C, "[B, T, G, M]", u)
  maps = (batch, length, groups, size)
  checks.check_shape(_OP, "B", B, maps, "[B, T, G, M]", u)
  checks.check_shape(_OP, "delta", delta, u.shape, "[B, T, E]", u)
  checks.check_shape(_OP, "z", z, u.shape, "[B, T, E]", u)
  checks.check_parameters(_OP, A, D, delta_bias, size, u)
  state = (batch, channels, size)
  checks.check_shape(_OP, "initial_state", initial_state, state, "[B, E, M]", u)
  if segment_ids is not None:
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
      raise TypeError(
        f"{_OP}: segment_ids must be integers, got {segment_ids.dtype}"
      )
    tokens = (batch, length)
    checks.check_shape(_OP, "segment_ids", segment_ids, tokens, "[B, T]", u)
  args = dict(
    u=u,
    delta=delta,
    A=A,
    B=B,
    C=C,
    D=D,
    z=z,
    delta_bias=delta_bias,
    initial_state=initial_state,
    segment_ids=segment_ids,
    delta_softplus=delta_softplus,
    reverse=reverse,
    return_final_state=return_final_state,
  )
  module = dispatch.select(
    _OP, _IMPLEMENTATIONS, _PREFERENCE, implementation, args
  )
  y, final = module.run(**args)
  return (y, final) if return_final_state else y
