"""What the kernels take beside queries, keys and values, if it is given.

`Extras` holds the arrays of a call that limit or change single weights, what
they need of shared memory, and how a kernel loads and applies them. A call
without any of it compiles to what it would be without this file.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from multihead.ops import pallas_compat as pc
from multihead.ops.attention import dropout
from multihead.ops.attention.mosaic_gpu import blocks, limits, visibility

_LOG2E = math.log2(math.e)
Refs = dict[str, Any]


class Extras:
  """The operands of a kernel beside its main ones, for tiles of one size.

  Attributes:
    inputs: arrays by name, in the order in which the kernel takes them.
    scratch: shared memory by name, likewise.
    row_copies: copies that come with a warpgroup's rows.
    column_copies: copies that come with a tile of columns.
    segments: whether a masked tile reads ids.
    biased: whether every tile reads a bias.
    tails: whether the last columns come from a copy, see `limits.tail`.
  """

  def __init__(
    self,
    see: visibility.Visibility,
    given: limits.Limits | None,
    batch: int,
    config: blocks.Forward | blocks.Backward,
    *,
    transposed: bool = False,
    keys: tuple[jax.Array, jax.Array] | None = None,
  ):
    """The extras of a call.

    Args:
      see: the visible part (transposed, if the rest is).
      given: the arrays of the call.
      batch: B.
      config: block sizes.
      transposed: whether rows are keys and columns queries.
      keys: keys and values [B, S, K, ...], for kernels that stream them.
    """
    given = given or limits.Limits()
    given = given.transposed() if transposed else given
    W, rows, columns = config.consumers, config.rows, config.columns
    self._see, self._config, self._transposed = see, config, transposed
    self._batch, self._block = batch, W * rows
    self.inputs, self.scratch = {}, {}
    self.row_copies = self.column_copies = 0
    self.segments = given.row_ids is not None
    self.biased = given.bias is not None
    self.tails = given.lengths is not None and keys is not None
    self.lengths = given.lengths is not None
    self.moving = given.moving
    if self.moving:
      self.inputs["bounds"] = limits.bounds(
        see, given, batch, self._block, columns, transposed
      )
    # What is past the end of an array is hidden by position.
    fill = lambda x, size: jnp.pad(
      x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    )
    if self.segments:
      self._per_row("row_ids", fill(given.row_ids, self._block))
      self._per_column("column_ids", fill(given.column_ids, columns))
    if given.states is not None and transposed:
      self._per_column("states", fill(given.states, columns))
    elif given.states is not None:
      self._per_row("states", fill(given.states, self._block))
    if self.biased:
      self._add_bias(given.bias)
    if self.tails:
      for name, x in zip(("k_tail", "v_tail"), keys, strict=True):
        self.inputs[name] = limits.tail(x, given.lengths, columns)

  def _per_row(self, name: str, x: jax.Array) -> None:
    self.inputs[name] = x
    shape = self._config.consumers, self._config.rows
    self.scratch[name] = pc.shared(shape, x.dtype)
    self.row_copies += 1

  def _per_column(self, name: str, x: jax.Array) -> None:
    self.inputs[name] = x
    shape = self._config.stages, self._config.columns
    self.scratch[name] = pc.shared(shape, x.dtype)
    self.column_copies += 1

  def _add_bias(self, bias: jax.Array) -> None:
    """A bias [b, n, t, s], each 1 or full; b may divide B."""
    W, rows, columns = (
      self._config.consumers,
      self._config.rows,
      self._config.columns,
    )
    # One tile's worth of what is the same for all rows, or all columns.
    self._bias_fixed = bias.shape[2] == 1, bias.shape[3] == 1
    for axis, size in ((2, self._block), (3, columns)):
      if bias.shape[axis] == 1:
        bias = jnp.repeat(bias, size, axis=axis)
    # Copies into tiled memory are of arrays of whole tiles, 8 x 128 bytes.
    more = -bias.shape[2] % 8, -bias.shape[3] % 64
    if more != (0, 0):
      bias = jnp.pad(bias, ((0, 0), (0, 0), (0, more[0]), (0, more[1])))
    self.inputs["bias"] = bias
    self.scratch["bias"] = pc.tiled(
      (self._config.stages * W, rows, columns), bias.dtype
    )
    self.column_copies += W

  @property
  def edges(self) -> tuple[bool, bool, bool]:
    """As `visibility.edges`."""
    if not self.moving:
      return visibility.edges(self._see, self._block, self._config.columns)
    more = self._see.right is not None or self.segments
    return True, more, self._see.left is not None or self.segments

  def read_late(self, masked: bool) -> bool:
    """Whether a tile's part of shared memory is read after its scores."""
    return self.biased or (masked and self.segments)

  def split(self, refs: tuple[Any, ...]) -> tuple[Refs, list[Any]]:
    """References to the inputs by name, and the other references."""
    count = len(self.inputs)
    named = dict(zip(self.inputs, refs[:count], strict=True))
    return {f"{name}_g": ref for name, ref in named.items()}, list(refs[count:])

  def split_scratch(
    self, refs: list[Any], named: Refs
  ) -> tuple[Refs, list[Any]]:
    """Likewise of the scratch, added to those of the inputs."""
    count = len(self.scratch)
    more = dict(zip(self.scratch, refs[:count], strict=True))
    more = {f"{name}_s": ref for name, ref in more.items()}
    return named | more, refs[count:]

  # In a kernel.

  def bounds(
    self, refs: Refs, item: jax.Array, row: jax.Array, first: jax.Array
  ) -> limits.Scalars:
    """What a tile of rows visits."""
    if self.moving:
      return limits.read(refs["bounds_g"], item, row)
    tiles = visibility.column_tiles(
      self._see, first, self._block, self._config.columns
    )
    return limits.Scalars([jnp.asarray(x, jnp.int32) for x in tiles])

  def load_rows(
    self,
    refs: Refs,
    w: int,
    place: tuple[jax.Array, jax.Array, jax.Array],
    barrier: Any,
  ) -> None:
    """Starts `row_copies` copies for warpgroup w.

    Args:
      refs: from `split`.
      w: the warpgroup.
      place: batch item, head, and first row of the warpgroup.
      barrier: for their arrival.
    """
    item, head, first = place
    here = pl.ds(first, self._config.rows)
    if self.segments:
      plgpu.copy_gmem_to_smem(
        refs["row_ids_g"].at[item, here], refs["row_ids_s"].at[w], barrier
      )
    if "states" in self.inputs and not self._transposed:
      plgpu.copy_gmem_to_smem(
        refs["states_g"].at[item, head, here], refs["states_s"].at[w], barrier
      )

  def load_columns(
    self,
    refs: Refs,
    slot: jax.Array,
    place: tuple[jax.Array, jax.Array, jax.Array],
    column: jax.Array,
    barrier: Any,
  ) -> None:
    """Starts `column_copies` copies for a tile.

    Args:
      refs: from `split`.
      slot: where in the ring.
      place: batch item, head of the queries, and first row of the tile.
      column: first column of the tile.
      barrier: for their arrival.
    """
    item, head, first = place
    rows, W = self._config.rows, self._config.consumers
    here = pl.ds(column, self._config.columns)
    if self.segments:
      plgpu.copy_gmem_to_smem(
        refs["column_ids_g"].at[item, here],
        refs["column_ids_s"].at[slot],
        barrier,
      )
    if "states" in self.inputs and self._transposed:
      plgpu.copy_gmem_to_smem(
        refs["states_g"].at[item, head, here],
        refs["states_s"].at[slot],
        barrier,
      )
    if self.biased:
      items, heads = self.inputs["bias"].shape[:2]
      rows_fixed, columns_fixed = self._bias_fixed
      item = lax.div(item, jnp.int32(self._batch // items))
      head = head if heads > 1 else 0
      first = 0 if rows_fixed else first
      here = pl.ds(0, self._config.columns) if columns_fixed else here
      for i in range(W):
        plgpu.copy_gmem_to_smem(
          refs["bias_g"].at[item, head, pl.ds(first + i * rows, rows), here],
          refs["bias_s"].at[slot * W + i],
          barrier,
        )

  def load_tail(
    self,
    refs: Refs,
    name: str,
    source: Any,
    place: tuple[jax.Array, jax.Array],
    to: Any,
    barrier: Any,
    ends: jax.Array | None,
  ) -> None:
    """Copies a tile of keys or values, from `limits.tail` where they end."""
    copy = lambda x: plgpu.copy_gmem_to_smem(x, to, barrier)
    if ends is None:
      copy(source)
      return
    item, kv_head = place
    tail = refs[f"{name}_tail_g"]
    pl.when(ends)(lambda: copy(tail.at[item, :, kv_head]))
    pl.when(~ends)(lambda: copy(source))

  def ends(self, scalars: limits.Scalars, tile: jax.Array) -> jax.Array | None:
    """Whether a length ends in a tile of columns; None if there are none."""
    if not self.tails:
      return None
    return tile == lax.div(scalars.length, jnp.int32(self._config.columns))

  def visible(
    self,
    refs: Refs,
    w: jax.Array,
    slot: jax.Array,
    first: jax.Array,
    tile: jax.Array,
    scalars: limits.Scalars,
  ) -> jax.Array:
    """bool [rows, columns]: see `visibility.visible`."""
    more = {}
    if self.moving:
      more["offset"] = scalars.offset
      if not self._transposed:
        more["length"] = scalars.length
    if self.segments:
      more["ids"] = (
        pc.load(refs["row_ids_s"].at[w], layout=pc.WGMMA.reduce(1)),
        self._column(refs["column_ids_s"], slot),
      )
    rows, columns = self._config.rows, self._config.columns
    return visibility.visible(
      self._see, first, tile * columns, rows, columns, **more
    )

  def _column(self, ref: Any, slot: jax.Array) -> jax.Array:
    layout = pc.WGMMA.reduce(0)
    return pc.load(ref.at[slot], layout=layout, optimized=False)

  def biased_logits(
    self, s: jax.Array, refs: Refs, w: jax.Array, slot: jax.Array
  ) -> jax.Array:
    """Logits [rows, columns] in base 2, with bias if there is one."""
    if not self.biased:
      return s
    ref = refs["bias_s"].at[slot * self._config.consumers + w]
    bias = pc.load(ref, layout=pc.WGMMA).astype(jnp.float32)
    return s + bias * _LOG2E

  def kept(
    self,
    rate: float,
    refs: Refs,
    w: jax.Array,
    slot: jax.Array,
    first: jax.Array,
    tile: jax.Array,
  ) -> jax.Array:
    """bool [rows, columns]: the weights that dropout keeps."""
    rows, columns = self._config.rows, self._config.columns
    shape = rows, columns
    axis = 0 if self._transposed else 1
    layout = pc.WGMMA.reduce(1 - axis)
    at = plgpu.broadcasted_iota(jnp.int32, (shape[axis],), 0, layout=layout)
    at = (at + (first if self._transposed else tile * columns)).astype(
      jnp.uint32
    )
    if self._transposed:
      states = pc.widen_rows(self._column(refs["states_s"], slot), shape)
      at = pc.widen(at, shape)
    else:
      states = pc.load(refs["states_s"].at[w], layout=pc.WGMMA.reduce(1))
      states, at = pc.widen(states, shape), pc.widen_rows(at, shape)
    return dropout.bits(states, at) >= jnp.uint32(dropout.threshold(rate))
