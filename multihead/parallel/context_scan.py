"""State-space scans over a length that is split across devices.

Inside a shard_map over the mesh axis `sequence`, each shard holds a stretch of
the tokens. It scans from zero, which says what it adds to a state that passes
through it; together with the decay over its whole stretch that is its summary.
One exchange of the summaries gives every shard the state that enters it, and a
correction brings that in. The payload is one state and one decay a shard,
whatever the length, and the result that of one device but for rounding.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from multihead import ops
from multihead.ops.selective_scan.reference import effective_delta

_AXIS = "sequence"


def _is_first(reverse: bool) -> Array:
  """Whether this shard is the first to be scanned."""
  return lax.axis_index(_AXIS) == (lax.axis_size(_AXIS) - 1 if reverse else 0)


def joined(
  segment_ids: Int[Array, "B T"] | None,
  shape: tuple[int, int],
  *,
  reverse: bool = False,
) -> Bool[Array, "B T"]:
  """Whether no segment starts between the previous shard and each token.

  Args:
    segment_ids: of this shard's tokens; None for one segment.
    shape: (B, T) of this shard.
    reverse: the scan runs from the last token to the first.

  Returns:
    True where a state that enters the shard still matters; nowhere in the
    first shard, which no other hands a state to.
  """
  same = jnp.ones(shape, bool)
  if segment_ids is not None:
    size, ids = lax.axis_size(_AXIS), segment_ids
    if reverse:
      pairs = [(i + 1, i) for i in range(size - 1)]
      edge = lax.ppermute(ids[:, :1], _AXIS, pairs)
      border = ids != jnp.concatenate([ids[:, 1:], edge], axis=1)
    else:
      pairs = [(i, i + 1) for i in range(size - 1)]
      edge = lax.ppermute(ids[:, -1:], _AXIS, pairs)
      border = ids != jnp.concatenate([edge, ids[:, :-1]], axis=1)
    same = lax.cumsum(border.astype(jnp.int32), axis=1, reverse=reverse) == 0
  return same & ~_is_first(reverse)


def carry_in(
  decay: Float[Array, "B ..."],
  state: Float[Array, "B ..."],
  *,
  reverse: bool = False,
) -> Float[Array, "B ..."]:
  """The state that enters each shard, from the summaries of all shards.

  Args:
    decay: the product of this shard's decays, zero where a segment starts in
      it; it broadcasts to the state.
    state: what this shard alone leaves behind.
    reverse: the scan runs from the last shard to the first.

  Returns:
    What the shards that are scanned before this one hand over.
  """
  index = lax.axis_index(_AXIS)
  decays = lax.all_gather(decay, _AXIS)
  states = lax.all_gather(state, _AXIS)
  carry = jnp.zeros_like(state)
  shards = range(lax.axis_size(_AXIS))
  for shard in reversed(shards) if reverse else shards:
    before = shard > index if reverse else shard < index
    update = decays[shard] * carry + states[shard]
    carry = jnp.where(before, update, carry)
  return carry


def from_last(state: Array, *, reverse: bool = False) -> Array:
  """The state of the shard that is scanned last, on every shard."""
  last = _is_first(not reverse)
  return lax.psum(jnp.where(last, state, 0), _AXIS)


def ssd(
  x: Float[Array, "B T N H"],
  dt: Float[Array, "B T N"],
  A: Float[Array, "N"],
  B: Float[Array, "B T G M"],
  C: Float[Array, "B T G M"],
  D: Float[Array, "N"] | None,
  *,
  initial_state: Float[Array, "B N H M"] | None,
  segment_ids: Int[Array, "B T"] | None,
  **options: Any,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N H M"]]:
  """`ops.ssd` of one shard's tokens; dt is final, in float32.

  The correction is y_t += exp(sum dt A) C_t . (state that enters).

  Args:
    x: as in `ops.ssd`, like the rest, and this shard's part of it.
    dt: without bias, softplus and limits to come.
    A: whole along the sequence axis.
    B: this shard's part.
    C: likewise.
    D: whole along the sequence axis.
    initial_state: before the first token of the first shard.
    segment_ids: this shard's part.
    **options: for `ops.ssd`.

  Returns:
    y of this shard, and the final state of the whole length on every shard.
  """
  if initial_state is not None:
    initial_state = jnp.where(_is_first(False), initial_state, 0.0)
  y, state = ops.ssd(
    x,
    dt,
    A,
    B,
    C,
    D,
    initial_state=initial_state,
    segment_ids=segment_ids,
    return_final_state=True,
    **options,
  )
  reaches = joined(segment_ids, dt.shape[:2])
  cumulated = jnp.cumsum(dt * A.astype(jnp.float32), axis=1)  # [B, T, N]
  decay = jnp.where(reaches[..., None], jnp.exp(cumulated), 0.0)
  passed = decay[:, -1, :, None, None]
  carry = carry_in(passed, state)
  groups, heads = C.shape[2], x.shape[2]
  grouped = carry.reshape(
    carry.shape[0], groups, heads // groups, *carry.shape[2:]
  )
  late = jnp.einsum("btgm,bgnhm->btgnh", C.astype(jnp.float32), grouped)
  y = (y + decay[..., None] * late.reshape(x.shape)).astype(y.dtype)
  return y, from_last(state + passed * carry)


def selective_scan(
  u: Float[Array, "B T E"],
  delta: Float[Array, "B T E"],
  A: Float[Array, "E M"],
  B: Float[Array, "B T G M"],
  C: Float[Array, "B T G M"],
  D: Float[Array, "E"] | None,
  *,
  z: Float[Array, "B T E"] | None,
  delta_bias: Float[Array, "E"] | None,
  delta_softplus: bool,
  initial_state: Float[Array, "B E M"] | None,
  segment_ids: Int[Array, "B T"] | None,
  reverse: bool,
  **options: Any,
) -> tuple[Float[Array, "B T E"], Float[Array, "B E M"]]:
  """`ops.selective_scan` of one shard's tokens.

  The correction is the scan once more, from the state that enters: decays of
  every channel and state at every token are what a scan is made of, and so y
  is rounded once. Both passes count in the gradient too.

  Args:
    u: as in `ops.selective_scan`, like the rest, and this shard's part of it.
    delta: this shard's part.
    A: whole along the sequence axis.
    B: this shard's part.
    C: likewise.
    D: whole along the sequence axis.
    z: this shard's part.
    delta_bias: whole along the sequence axis.
    delta_softplus: as in `ops.selective_scan`.
    initial_state: enters the shard that is scanned first.
    segment_ids: this shard's part.
    reverse: as in `ops.selective_scan`.
    **options: for `ops.selective_scan`.

  Returns:
    y of this shard, and the final state of the whole length on every shard.
  """
  scan = functools.partial(
    ops.selective_scan,
    u,
    delta,
    A,
    B,
    C,
    delta_bias=delta_bias,
    delta_softplus=delta_softplus,
    segment_ids=segment_ids,
    reverse=reverse,
    return_final_state=True,
    **options,
  )
  dtype = jnp.promote_types(u.dtype, jnp.float32)
  size = (u.shape[0], *A.shape)
  first = _is_first(reverse)
  start = jnp.zeros(size, dtype)
  if initial_state is not None:
    start = jnp.where(first, initial_state.astype(dtype), start)
  _, added = scan(initial_state=start)
  steps = effective_delta(delta, delta_bias, delta_softplus).astype(dtype)
  total = jnp.sum(steps, axis=1)[..., None]
  reaches = joined(segment_ids, u.shape[:2], reverse=reverse)
  enters, passes = (reaches[:, i, None, None] for i in _ends(reverse))
  decay = jnp.where(passes, jnp.exp(total * A.astype(dtype)), 0)
  carry = carry_in(decay, added, reverse=reverse)
  start = jnp.where(first, start, jnp.where(enters, carry, 0))
  y, state = scan(D=D, z=z, initial_state=start)
  return y, from_last(state, reverse=reverse)


def _ends(reverse: bool) -> tuple[int, int]:
  """Places of the first and of the last token that is scanned."""
  return (-1, 0) if reverse else (0, -1)
