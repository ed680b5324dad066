"""Attention for TPUs, by the splash attention kernels that jax has.

They skip the blocks of keys that causal and window empty, and compute the
weights again in the backward pass. Around them stands here what makes them the
attention of the other implementations: any length of queries and keys and
kv_lengths (by segment ids of their own), zeros for rows that see nothing, the
gradient of lse, and shards whose types jax.shard_map checks. For the last three
it takes functions that jax does not document: `supports` refuses where they
have changed.
"""

import functools
import inspect
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from multihead.ops import manual_axes
from multihead.ops.attention import positions

# Rows and keys of a block: at most, and what they are a multiple of.
_BLOCK = 512
_LANES = 128
# Head dims whose blocks surely fit into a core's memory.
_WIDEST = 256
# The kernels give a hidden key a logit of -2.4e38: so low is the lse of a row
# that sees nothing, and of no other.
_EMPTY = -2.0e38
# What is called in the backward pass, and with which options beside the arrays.
_BACKWARD = {
  "_splash_attention_bwd_dkv": {"bq", "bkv", "bkv_compute", "mask_info"},
  "_splash_attention_bwd_dq": {"bq", "bkv", "mask_info", "mask_function"},
}


def supports(args: dict[str, Any]) -> str | None:
  """None if the kernels compute exactly this call, else the first limit."""
  if (backend := jax.default_backend()) != "tpu":
    return f"needs a TPU, the default backend is {backend!r}"
  if (reason := _version_limit()) is not None:
    return reason
  return _limit(args)


@functools.cache
def _version_limit() -> str | None:
  kernels = _kernels()
  for name, options in _BACKWARD.items():
    function = getattr(kernels, name, None)
    if function is None or not options <= set(
      inspect.signature(function).parameters
    ):
      return f"was written for another jax than {jax.__version__}"
  if not hasattr(_config(), "_check_vma"):
    return f"was written for another jax than {jax.__version__}"
  return None


def _kernels() -> ModuleType:
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
  )

  return splash_attention_kernel


def _config() -> ModuleType:
  from jax._src import config

  return config


def _limit(args: dict[str, Any]) -> str | None:
  q, k = args["q"], args["k"]
  if q.dtype.name not in ("bfloat16", "float32"):
    return f"computes in bfloat16 and float32, the inputs are {q.dtype}"
  for name in ("bias", "mask"):
    if args[name] is not None:
      return f"has no {name}; xla has it"
  if args["dropout_rate"]:
    return "has no dropout; xla has it"
  if not isinstance(args["q_offset"], int):
    return (
      "needs q_offset to be known while tracing, got an array; xla takes one"
    )
  for name, width in (("H", q.shape[3]), ("Hv", args["v"].shape[3])):
    if width > _WIDEST:
      return f"takes head dims up to {_WIDEST}, got {name}={width}"
  T, S = q.shape[1], k.shape[1]
  left, right = _sides(args)
  ahead = -(T - 1) - args["q_offset"], S - 1 - args["q_offset"]
  if (right is not None and right < ahead[0]) or (
    left is not None and -left > ahead[1]
  ):
    return "has no row that sees a key by its position; xla gives its zeros"
  return manual_axes.refusal()


def _sides(args: dict[str, Any]) -> tuple[int | None, int | None]:
  T, S = args["q"].shape[1], args["k"].shape[1]
  return positions.bounds(
    args["causal"], args["window"], args["q_offset"], T, S
  )


class _Static(NamedTuple):
  """What is static in a call; left, right and offset as in positions.py."""

  scale: float
  softcap: float | None
  left: int | None
  right: int | None
  offset: int
  interpret: bool


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  scale: float,
  softcap: float | None,
  q_offset: int,
  q_segment_ids: jax.Array | None,
  kv_segment_ids: jax.Array | None,
  kv_lengths: jax.Array | None,
  return_lse: bool,
  interpret: bool = False,
  **rest: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `multihead.ops.attention`; for arguments that `supports` accepts.

  `interpret` runs the kernels on a CPU.
  """
  T, S = q.shape[1], k.shape[1]
  left, right = _sides(dict(q=q, k=k, q_offset=q_offset, **rest))
  static = _Static(scale, softcap, left, right, q_offset, interpret)
  ids = _ids(q_segment_ids, kv_segment_ids, kv_lengths, q.shape[0], T, S)
  rows, keys = -T % _block(T), -S % _block(S)
  pad = lambda x, n: jnp.pad(x, ((0, 0), (0, 0), (0, n), (0, 0)))
  # The kernels hold heads first.
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  q, k, v = pad(q, rows), pad(k, keys), pad(v, keys)
  out, lse = _attention(static, *manual_axes.alike(q, k, v, *ids))
  out, lse = out[:, :, :T].swapaxes(1, 2), lse[:, :, :T]
  return (out, lse) if return_lse else out


def _block(length: int) -> int:
  return min(_BLOCK, -(-length // _LANES) * _LANES)


def _ids(
  q_ids: jax.Array | None,
  kv_ids: jax.Array | None,
  lengths: jax.Array | None,
  B: int,
  T: int,
  S: int,
) -> tuple[jax.Array | None, jax.Array | None]:
  """Segment ids [B, T] and [B, S], padded, that hide all but what is seen.

  Keys past a length, and those that pad the last block, get an id that no query
  has. None if nothing is to be hidden.
  """
  if q_ids is None and lengths is None and S % _block(S) == 0:
    return None, None
  if q_ids is None:
    q_ids, kv_ids = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
  q_ids, kv_ids = q_ids.astype(jnp.int32), kv_ids.astype(jnp.int32)
  nobodys = jnp.min(q_ids, axis=1, keepdims=True) - 1
  if lengths is None:
    lengths = jnp.full(B, S)
  keys = S + -S % _block(S)
  kv_ids = jnp.pad(kv_ids, ((0, 0), (0, keys - S)))
  seen = jnp.arange(keys) < lengths[:, None]
  rows = ((0, 0), (0, -T % _block(T)))
  return jnp.pad(q_ids, rows, mode="edge"), jnp.where(seen, kv_ids, nobodys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
  static: _Static,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Output [B, N, T, Hv] and lse [B, N, T]."""
  kernel = _kernel(static, q.shape, k.shape[2])

  def attend(q, k, v, *ids):
    out, (lse,) = kernel(q, k, v, _segment_ids(ids))
    return out, lse

  out, lse = _launch(attend, _scaled(static, q), k, v, *ids)
  empty = lse < _EMPTY
  # Of such a row the kernels give the mean of what they visited.
  out = jnp.where(empty[..., None], 0, out)
  return out, jnp.where(empty, -jnp.inf, lse)


def _forward(static: _Static, *arrays: jax.Array | None) -> tuple[Any, Any]:
  out, lse = _attention(static, *arrays)
  # So that a rematerialisation policy can keep these two by name.
  out = checkpoint_name(out, "attention_out")
  lse = checkpoint_name(lse, "attention_lse")
  return (out, lse), (arrays, out, lse)


def _backward(
  static: _Static, residuals: Any, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
  (q, k, v, *ids), out, lse = residuals
  d_out, d_lse = cotangents
  f32 = jnp.float32
  delta = jnp.sum(out.astype(f32) * d_out.astype(f32), axis=-1) - d_lse
  # exp(logit - inf) is zero: an empty row has no weights.
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
  kernel = _kernel(static, q.shape, k.shape[2])
  kernels, block = _kernels(), kernel.kwargs["block_sizes"]
  minor = kernels.QKVLayout.HEAD_DIM_MINOR
  options = dict(
    {name: kernel.kwargs[name] for name in ("is_mqa", "mask_value")},
    attn_logits_soft_cap=static.softcap,
    mask_function=kernel.kwargs["mask_function"],
    q_layout=minor,
    k_layout=minor,
    v_layout=minor,
    interpret=static.interpret,
  )

  def gradients(q, k, v, lse, d_out, delta, *ids):
    arrays = q, k, v, _segment_ids(ids), None, lse, d_out, delta
    _, d_k, d_v = kernels._splash_attention_bwd_dkv(
      *arrays,
      bq=block.block_q_dkv,
      bkv=block.block_kv_dkv,
      bkv_compute=block.block_kv_dkv_compute,
      mask_info=kernel.dkv_mask_info,
      use_fused_bwd_kernel=False,
      **options,
    )
    d_q = kernels._splash_attention_bwd_dq(
      *arrays,
      bq=block.block_q_dq,
      bkv=block.block_kv_dq,
      mask_info=kernel.dq_mask_info,
      **options,
    )
    return d_q, d_k, d_v

  d_q, d_k, d_v = _launch(
    gradients, _scaled(static, q), k, v, lse, d_out, delta, *ids
  )
  return _scaled(static, d_q), d_k, d_v, *(None for _ in ids)


_attention.defvjp(_forward, _backward)


def _scaled(static: _Static, q: jax.Array) -> jax.Array:
  """The kernels know no scale: it goes to the queries, and is rounded there."""
  return (static.scale * q.astype(jnp.float32)).astype(q.dtype)


def _kernel(static: _Static, q_shape: tuple[int, ...], S: int) -> Any:
  """jax's kernel for one item of the batch: q [N, T, H] and S keys."""
  from jax.experimental.pallas.ops.tpu import splash_attention

  _, N, T, _ = q_shape
  if static.left is None and static.right is None:
    mask = splash_attention.FullMask((T, S))
  else:
    window = static.left, static.right
    mask = _mask_type()((T, S), window, static.offset)
  rows, keys = _block(T), _block(S)
  return splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([mask] * N),
    block_sizes=splash_attention.BlockSizes(
      block_q=rows,
      block_kv=keys,
      block_q_dkv=rows,
      block_kv_dkv=keys,
      block_q_dq=rows,
      block_kv_dq=keys,
    ),
    save_residuals=True,
    attn_logits_soft_cap=static.softcap,
    interpret=static.interpret,
  )


@functools.cache
def _mask_type() -> type:
  """jax's mask of a window, told apart by blocks.

  The host reads each block of the mask, T * S logits in all: that took minutes
  where most blocks are seen whole or not at all, which their corners show.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention

  whole = functools.cache(np.full)

  class Window(splash_attention.LocalMask):
    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
      rows, columns = index
      shape = rows.stop - rows.start, columns.stop - columns.start
      # How far a key lies ahead of a query, at least and at most.
      first = columns.start - (rows.stop - 1) - self.offset
      last = columns.stop - 1 - rows.start - self.offset
      left, right = self.window_size
      if (left is None or first >= -left) and (right is None or last <= right):
        return whole(shape, True)
      if (left is not None and last < -left) or (
        right is not None and first > right
      ):
        return whole(shape, False)
      return super().__getitem__(index)

  return Window


def _segment_ids(ids: tuple[jax.Array | None, ...]) -> Any:
  return None if ids[0] is None else _kernels().SegmentIds(*ids)


def _launch(function: Any, *arrays: jax.Array | None) -> Any:
  """`function` of every item of the batch.

  The kernels do not say how their results vary over a mesh, as jax.shard_map
  asks of them: that check is off inside, and the results get the set of mesh
  axes that the arrays have.
  """
  with _config()._check_vma(False):
    results = jax.vmap(function)(*arrays)
  axes = manual_axes.varying(*arrays)
  return jax.tree.map(lambda x: manual_axes.cast(x, axes), results)
