"""Launches the kernels, and says what a derivative or `vmap` of them is."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from multihead.ops import manual_axes, triton_compat
from multihead.ops.decode_attention import pages, reference
from multihead.ops.decode_attention.triton.options import Options

_F32 = jnp.float32
_MOST_ROWS = 64  # of a program
_SHARED_MEMORY = 200 * 2**10  # bytes for tiles on their way


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How the keys are cut.

  Attributes:
    keys: of a tile, a power of two, at least 16.
    heads: neighbouring key heads of a program, a power of two. Their tiles are
      one piece of memory; the products are as many times as wide.
    warps: groups of 32 threads of a program.
    stages: tiles on their way at a time.
    programs: of a multiprocessor, for which parts are cut.
  """

  keys: int = 64
  heads: int = 1
  warps: int = 4
  stages: int = 4
  programs: int = 2


@dataclasses.dataclass(frozen=True)
class _Options:
  scale: float
  softcap: float | None
  left: int | None
  blocks: Blocks | None


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  kv_lengths: jax.Array | None,
  scale: float,
  window: tuple[int | None, int | None],
  softcap: float | None,
  page_table: jax.Array | None,
  return_lse: bool,
  blocks: Blocks | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `multihead.ops.decode_attention`, for what `supports` accepts."""
  if kv_lengths is None:
    # Of numpy: a constant of the program, that no kernel has to make.
    kv_lengths = np.full(q.shape[0], pages.length(k, page_table), np.int32)
    kv_lengths = jnp.asarray(kv_lengths)
  options = _Options(scale, softcap, window[0], blocks)
  arrays = manual_axes.alike(q, k, v, kv_lengths, page_table)
  out, lse = _decode(options, *arrays)
  return (out, lse) if return_lse else out


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _decode(options, q, k, v, kv_lengths, page_table):
  """Output [B, T, N, Hv] and lse [B, N, T]."""
  launch = triton_compat.mappable(functools.partial(_launch, options))
  if page_table is None:
    return launch((q, k, v, kv_lengths, None), ())
  # Items share the pools: one launch serves all that share them.
  return launch((q, None, None, kv_lengths, page_table), (k, v))


@_decode.defjvp
def _derivative(options, primals, tangents):
  return reference.derivative(
    primals,
    tangents,
    scale=options.scale,
    left=options.left,
    softcap=options.softcap,
  )


def _launch(options, arrays, pools):
  from multihead.ops.decode_attention.triton import kernels

  q, k, v, lengths, table = arrays
  k, v = pools or (k, v)
  batch, queries, q_heads, width = q.shape
  heads, v_width = v.shape[2:]
  blocks = _fit(options.blocks or _blocks(q, v), q, v)
  each = q_heads // heads * queries
  rows = min(max(_power_of_two(each * blocks.heads), 16), _MOST_ROWS)
  row_tiles = -(-each * blocks.heads // rows)
  groups = heads // blocks.heads * row_tiles
  S = pages.length(k, table)
  tiles = batch * -(-S // blocks.keys)
  parts = max(min(blocks.programs * _cores() // groups, tiles), 1)
  # An item whose share is less than a part gets one.
  slots = parts + batch
  most = _power_of_two(parts)
  o = Options(
    B=batch,
    T=queries,
    N=q_heads,
    K=heads,
    H=width,
    Hv=v_width,
    S=S,
    pool=k.shape[0],
    page=0 if table is None else k.shape[1],
    pages=0 if table is None else table.shape[1],
    scale=options.scale,
    softcap=options.softcap,
    left=options.left,
    precision="ieee" if q.dtype == _F32 else None,
    parts=parts,
    items=_power_of_two(batch),
    together=blocks.heads,
    rows=rows,
    keys=blocks.keys,
    columns=_columns(width, blocks),
    v_columns=_columns(v_width, blocks),
    most=most,
    step=min(most, 32),
  )
  struct = jax.ShapeDtypeStruct
  outs, lses = triton_compat.call(
    kernels.attend,
    *(q, k, v, lengths, lengths if table is None else table),
    out=[
      struct((slots, heads, each, v_width), _F32),
      struct((slots, heads, each), _F32),
    ],
    grid=(groups, slots),
    num_warps=blocks.warps,
    num_stages=blocks.stages,
    o=o,
  )
  return triton_compat.call(
    kernels.merge,
    *(outs, lses, lengths),
    out=[
      struct((batch, queries, q_heads, v_width), q.dtype),
      struct((batch, q_heads, queries), _F32),
    ],
    grid=(q_heads * queries, batch),
    num_warps=4,
    num_stages=1,
    o=o,
  )


def _blocks(q: jax.Array, v: jax.Array) -> Blocks:
  """What measured best on an H100 at head dim 128 in bfloat16."""
  del q, v
  return Blocks()


def _fit(blocks: Blocks, q: jax.Array, v: jax.Array) -> Blocks:
  """Blocks that the kernels can use for these arrays."""
  widths = q.shape[3], v.shape[3]
  rows = q.shape[1] * q.shape[2] // v.shape[2] * blocks.heads
  joined = (
    v.shape[2] % blocks.heads == 0
    and all(width == _power_of_two(width) for width in widths)
    and rows <= _MOST_ROWS
  )
  if not joined:
    blocks = dataclasses.replace(blocks, heads=1)
  of_key = sum(_columns(width, blocks) for width in widths) * q.dtype.itemsize
  keys = blocks.keys
  while blocks.stages * keys * of_key > _SHARED_MEMORY and keys > 16:
    keys //= 2
  return dataclasses.replace(blocks, keys=keys)


def _columns(width: int, blocks: Blocks) -> int:
  return max(_power_of_two(width * blocks.heads), 16)


def _power_of_two(n: int) -> int:
  """The smallest one that is at least n."""
  return 1 << max(math.ceil(math.log2(n)), 0)


def _cores() -> int:
  """Multiprocessors of the default device."""
  return getattr(jax.devices()[0], "core_count", None) or 132
