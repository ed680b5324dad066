"""The causal convolution on local shards of the mesh in force.

Channels split as their logical names say, the batch over data and fsdp. Over
the sequence axis a shard gets the last W - 1 inputs of the one before it: one
exchange, whose size does not depend on the length.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from multihead import ops
from multihead.parallel import sharded_ops
from multihead.parallel.sharding import BATCH_AXES, RULES, context_axes, split

_AXIS = "sequence"


def causal_conv1d(
  x: Float[Array, "B T ..."],
  kernel: Float[Array, "W ..."],
  bias: Float[Array, "..."] | None = None,
  *,
  axis_names: tuple[str | None, ...],
  initial_state: Float[Array, "B W-1 ..."] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  return_final_state: bool = False,
  **options: Any,
) -> Any:
  """`ops.causal_conv1d` on local shards, over one or more channel axes.

  Args:
    x: [B, T, *channels].
    kernel: [W, *channels].
    bias: [*channels].
    axis_names: the logical name of each channel axis, or None; see
      `sharding.RULES`.
    initial_state: [B, W - 1, *channels].
    segment_ids: [B, T].
    return_final_state: as in `ops.causal_conv1d`.
    **options: its `activation` and `implementation`.

  Returns:
    As `ops.causal_conv1d`, with the channel axes of x.
  """
  arrays = dict(
    x=x,
    kernel=kernel,
    bias=bias,
    initial_state=initial_state,
    segment_ids=segment_ids,
  )
  options["return_final_state"] = return_final_state
  sizes = context_axes()
  if not sizes:
    return _flat(**arrays, **options)
  past = kernel.shape[0] - 1
  batch = split(x.shape[0], BATCH_AXES, sizes)
  sequence = split(x.shape[1], _AXIS, sizes)
  if sequence and x.shape[1] // sizes[_AXIS] < past:
    sequence = None  # a shard would need inputs from beyond its neighbour
  channels = _channel_axes(x.shape[2:], axis_names, sizes)

  def run(**arrays):
    if not sequence:
      return _flat(**arrays, **options)
    arrays["initial_state"] = _entering(past, **arrays)
    out = _flat(**arrays, **options)
    if not return_final_state:
      return out
    y, final = out
    last = lax.axis_index(_AXIS) == lax.axis_size(_AXIS) - 1
    return y, lax.psum(jnp.where(last, final, 0), _AXIS)

  specs = dict(
    x=(batch, sequence, *channels),
    kernel=(None, *channels),
    bias=channels,
    initial_state=(batch, None, *channels),
    segment_ids=(batch, sequence),
  )
  out = PartitionSpec(*specs["x"])
  final = PartitionSpec(*specs["initial_state"])
  return sharded_ops.map_local(
    run, arrays, specs, (out, final) if return_final_state else out
  )


def _channel_axes(shape, names, sizes):
  """The mesh axis of each channel axis; a mesh axis appears once."""
  axes, left = [], dict(sizes)
  for size, name in zip(shape, names, strict=True):
    axis = split(size, RULES[name] or (), left) if name else None
    axes.append(axis)
    for taken in axis or ():
      del left[taken]
  return tuple(axes)


def _flat(*, x, kernel, bias, initial_state, **options):
  """The operation, which knows one channel axis."""
  shape = x.shape[2:]

  def flat(array, lead):
    return None if array is None else array.reshape(*array.shape[:lead], -1)

  out = ops.causal_conv1d(
    flat(x, 2),
    flat(kernel, 1),
    flat(bias, 0),
    initial_state=flat(initial_state, 2),
    **options,
  )
  return jax.tree.map(lambda v: v.reshape(*v.shape[:2], *shape), out)


def _entering(past, *, x, initial_state, segment_ids, **_):
  """The inputs before this shard's first token; zeros of another segment."""
  tail = x[:, x.shape[1] - past :]
  shards = range(lax.axis_size(_AXIS))
  if segment_ids is not None:
    ids = segment_ids[:, x.shape[1] - past :]
    pairs = list(zip(shards[1:], shards[:-1], strict=True))
    next_id = lax.ppermute(segment_ids[:, :1], _AXIS, pairs)
    following = jnp.concatenate([ids[:, 1:], next_id], axis=1)
    # Visible from the next shard if no segment starts from there to its first.
    border = (ids != following).astype(jnp.int32)
    hidden = lax.cumsum(border, axis=1, reverse=True) > 0
    hidden = hidden.reshape(*hidden.shape, *(1,) * (x.ndim - 2))
    tail = jnp.where(hidden, 0, tail)
  pairs = list(zip(shards[:-1], shards[1:], strict=True))
  entering = lax.ppermute(tail, _AXIS, pairs)
  if initial_state is None:
    return entering
  first = lax.axis_index(_AXIS) == 0
  return jnp.where(first, initial_state.astype(x.dtype), entering)
