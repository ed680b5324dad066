"""The operations, run on local shards of the mesh in force.

A custom kernel called with sharded operands would make the compiler gather
them to one device. These wrappers have the signatures of `multihead.ops`, and
call the operation inside a shard_map over the batch, head and sequence axes
of the mesh that `jax.set_mesh` put in force; without one they call it as is.

Batch splits over data and fsdp, heads over tensor, length over sequence. An
axis that does not divide its dimension leaves that dimension whole. Over the
sequence axis, attention gathers keys and values (only there), and the scans
exchange one state a shard (`context_scan`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from multihead import ops
from multihead.ops.attention import checks
from multihead.ops.attention import sinks as sinks_
from multihead.parallel import context_scan
from multihead.parallel.sharding import BATCH_AXES, context_axes, split


def map_local(
  fn: Callable[..., Any],
  arrays: dict[str, jax.Array | None],
  specs: dict[str, tuple],
  out_specs: Any,
) -> Any:
  """Runs fn(**arrays) on local shards; absent (None) arrays stay absent."""
  mesh = jax.sharding.get_abstract_mesh()
  auto = {
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Auto
  }
  present = {k: v for k, v in arrays.items() if v is not None}
  in_specs = {k: PartitionSpec(*specs[k]) for k in present}
  varying = {
    name: {
      axis
      for entry in spec
      for axis in ((entry,) if isinstance(entry, str) else entry or ())
    }
    for name, spec in in_specs.items()
  }
  used = set().union(*varying.values())

  def body(local):
    # Every operand varies over every axis in use, so that scan carries and
    # custom derivatives inside agree; the transpose of the cast is the psum
    # that a replicated operand's gradient needs.
    for name, x in local.items():
      missing = tuple(sorted(used - varying[name]))
      if missing:
        local = {**local, name: jax.lax.pcast(x, missing, to="varying")}
    return fn(**{name: local.get(name) for name in arrays})

  mapped = jax.shard_map(
    body, in_specs=(in_specs,), out_specs=out_specs, axis_names=auto
  )
  return mapped(present)


def _local_heads(x: jax.Array, heads: int, tensor: str | None) -> jax.Array:
  """The key heads (axis 2) that this shard's query heads read.

  Needed where the key heads do not divide by the tensor axis and every shard
  holds them all.

  Args:
    x: [B, S, K, ...], all key heads (or groups).
    heads: query heads on this shard.
    tensor: the mesh axis that splits the query heads.

  Returns:
    [B, S, 1 or heads, ...].
  """
  ways = jax.lax.axis_size(tensor)
  per_key = heads * ways // x.shape[2]
  first = jax.lax.axis_index(tensor) * heads
  if per_key % heads == 0:
    return jax.lax.dynamic_slice_in_dim(x, first // per_key, 1, axis=2)
  return jnp.take(x, (first + jnp.arange(heads)) // per_key, axis=2)


def _spread(shape: tuple[int, ...], axes: tuple) -> tuple:
  """The spec of an operand that broadcasts to the dimensions of `axes`."""
  axes = axes[len(axes) - len(shape) :]
  return tuple(
    None if size == 1 else axis for size, axis in zip(shape, axes, strict=True)
  )


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  q_offset: int | jax.Array | None = None,
  q_segment_ids: jax.Array | None = None,
  kv_segment_ids: jax.Array | None = None,
  kv_lengths: int | jax.Array | None = None,
  sinks: jax.Array | None = None,
  dropout_key: jax.Array | None = None,
  return_lse: bool = False,
  **kwargs: Any,
) -> Any:
  """`ops.attention` on local shards; same arguments and results.

  The weights that dropout keeps depend on the mesh: shards draw on their own.
  """
  sizes = context_axes()
  arrays = dict(
    q=q,
    k=k,
    v=v,
    bias=bias,
    mask=mask,
    q_segment_ids=q_segment_ids,
    kv_segment_ids=kv_segment_ids,
    sinks=sinks,
    dropout_key=dropout_key,
  )
  if not sizes:
    return ops.attention(
      **arrays,
      q_offset=q_offset,
      kv_lengths=kv_lengths,
      return_lse=return_lse,
      **kwargs,
    )
  length, keys = q.shape[1], k.shape[1]
  # Here, so that a message speaks of the arrays as given, not of their shards.
  if sinks is not None:
    arrays["sinks"] = sinks_.check(sinks, q.shape[2])
  if kv_lengths is not None:
    kv_lengths = checks.per_item("kv_lengths", kv_lengths, q.shape[0], keys)
  q_offset = checks.per_item("q_offset", q_offset, q.shape[0], keys - length)
  batch = split(q.shape[0], BATCH_AXES, sizes)
  heads = split(q.shape[2], "tensor", sizes)
  kv_heads = split(k.shape[2], "tensor", sizes) if heads else None
  sequence = split(length, "sequence", sizes)
  sequence = sequence if split(keys, "sequence", sizes) else None
  static = isinstance(q_offset, int)
  if static and sequence:
    q_offset, static = jnp.int32(q_offset), False
  arrays["q_offset"] = None if static else q_offset
  if isinstance(kv_lengths, jax.Array):
    arrays["kv_lengths"] = kv_lengths
  else:
    kwargs["kv_lengths"] = kv_lengths

  def run(*, q, k, v, q_offset, kv_segment_ids, dropout_key, **rest):
    if sequence:
      k, v, kv_segment_ids = jax.tree.map(
        lambda x: jax.lax.all_gather(x, "sequence", axis=1, tiled=True),
        (k, v, kv_segment_ids),
      )
      q_offset += jax.lax.axis_index("sequence") * q.shape[1]
    if heads and not kv_heads:
      k, v = (_local_heads(x, q.shape[2], "tensor") for x in (k, v))
    for axis in varying if dropout_key is not None else ():
      dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index(axis))
    return ops.attention(
      q,
      k,
      v,
      dropout_key=dropout_key,
      q_offset=static_offset if q_offset is None else q_offset,
      kv_segment_ids=kv_segment_ids,
      return_lse=return_lse,
      **rest,
      **kwargs,
    )

  static_offset = q_offset if static else None
  varying = sum((axes for axes in (batch, heads, sequence) if axes), ())
  per_item = lambda x: (None if x.size == 1 else batch,) * x.ndim
  kv = (batch, sequence, kv_heads, None)
  full = (batch, heads, sequence, None)
  specs = dict(
    q=(batch, sequence, heads, None),
    k=kv,
    v=kv,
    q_segment_ids=(batch, sequence),
    kv_segment_ids=(batch, sequence),
    sinks=(heads,),
    dropout_key=(),
  )
  for name in ("q_offset", "kv_lengths"):
    if arrays.get(name) is not None:
      specs[name] = per_item(arrays[name])
  for name, x in (("bias", bias), ("mask", mask)):
    if x is not None:
      specs[name] = _spread(x.shape, full)
  out = PartitionSpec(batch, sequence, heads, None)
  lse = PartitionSpec(batch, heads, sequence)
  return map_local(run, arrays, specs, (out, lse) if return_lse else out)


def ssd(
  x: jax.Array,
  dt: jax.Array,
  A: jax.Array,
  B: jax.Array,
  C: jax.Array,
  D: jax.Array | None = None,
  *,
  dt_bias: jax.Array | None = None,
  dt_softplus: bool = False,
  dt_limit: tuple[float, float] = (0.0, float("inf")),
  chunk_size: int = 128,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  return_final_state: bool = False,
  implementation: Any = None,
) -> Any:
  """`ops.ssd` on local shards; same arguments and results."""
  sizes = context_axes()
  arrays = dict(
    x=x,
    dt=dt,
    A=A,
    B=B,
    C=C,
    D=D,
    dt_bias=dt_bias,
    initial_state=initial_state,
    segment_ids=segment_ids,
  )
  options = dict(chunk_size=chunk_size, implementation=implementation)
  step = dict(dt_softplus=dt_softplus, dt_limit=dt_limit)
  if not sizes:
    return ops.ssd(
      **arrays, **options, **step, return_final_state=return_final_state
    )
  batch = split(x.shape[0], BATCH_AXES, sizes)
  heads = split(x.shape[2], "tensor", sizes)
  groups = split(B.shape[2], "tensor", sizes) if heads else None
  sequence = split(x.shape[1], "sequence", sizes)

  def run(*, x, dt, A, B, C, dt_bias, **rest):
    if heads and not groups:
      B, C = (_local_heads(a, x.shape[2], "tensor") for a in (B, C))
    if not sequence:
      return ops.ssd(
        x,
        dt,
        A,
        B,
        C,
        dt_bias=dt_bias,
        return_final_state=return_final_state,
        **rest,
        **options,
        **step,
      )
    dt = dt.astype(jnp.float32)
    if dt_bias is not None:
      dt += dt_bias
    if dt_softplus:
      dt = jax.nn.softplus(dt)
    dt = jnp.clip(dt, *dt_limit)
    y, state = context_scan.ssd(x, dt, A, B, C, **rest, **options)
    return (y, state) if return_final_state else y

  scan = (batch, sequence, heads, None)
  group = (batch, sequence, groups, None)
  state = (batch, heads, None, None)
  specs = dict(
    x=scan,
    dt=scan[:3],
    A=(heads,),
    B=group,
    C=group,
    D=(heads,),
    dt_bias=(heads,),
    initial_state=state,
    segment_ids=(batch, sequence),
  )
  out = PartitionSpec(*scan)
  final = PartitionSpec(*state)
  return map_local(
    run, arrays, specs, (out, final) if return_final_state else out
  )


def selective_scan(
  u: jax.Array,
  delta: jax.Array,
  A: jax.Array,
  B: jax.Array,
  C: jax.Array,
  D: jax.Array | None = None,
  *,
  z: jax.Array | None = None,
  delta_bias: jax.Array | None = None,
  delta_softplus: bool = False,
  initial_state: jax.Array | None = None,
  reverse: bool = False,
  segment_ids: jax.Array | None = None,
  return_final_state: bool = False,
  implementation: Any = None,
) -> Any:
  """`ops.selective_scan` on local shards; same arguments and results.

  The channels split over tensor, as heads do elsewhere.
  """
  sizes = context_axes()
  arrays = dict(
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
  )
  options = dict(
    delta_softplus=delta_softplus,
    reverse=reverse,
    implementation=implementation,
  )
  if not sizes:
    return ops.selective_scan(
      **arrays, **options, return_final_state=return_final_state
    )
  batch = split(u.shape[0], BATCH_AXES, sizes)
  channels = split(u.shape[2], "tensor", sizes)
  groups = split(B.shape[2], "tensor", sizes) if channels else None
  sequence = split(u.shape[1], "sequence", sizes)

  def run(*, u, delta, A, B, C, **rest):
    if channels and not groups:
      B, C = (_local_heads(a, u.shape[2], "tensor") for a in (B, C))
    if not sequence:
      return ops.selective_scan(
        u,
        delta,
        A,
        B,
        C,
        return_final_state=return_final_state,
        **rest,
        **options,
      )
    y, state = context_scan.selective_scan(u, delta, A, B, C, **rest, **options)
    return (y, state) if return_final_state else y

  scan = (batch, sequence, channels)
  group = (batch, sequence, groups, None)
  state = (batch, channels, None)
  specs = dict(
    u=scan,
    delta=scan,
    A=(channels, None),
    B=group,
    C=group,
    D=(channels,),
    z=scan,
    delta_bias=(channels,),
    initial_state=state,
    segment_ids=(batch, sequence),
  )
  out = PartitionSpec(*scan)
  final = PartitionSpec(*state)
  return map_local(
    run, arrays, specs, (out, final) if return_final_state else out
  )
