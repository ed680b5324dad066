"""What the kernels have in common: their options, and a chunk of tokens."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from multihead.ops import pallas_compat
from multihead.ops.selective_scan.mosaic_gpu import tile

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Options:
  """What a scan is, apart from its arrays.

  Attributes:
    delta_softplus: whether delta goes through softplus.
    reverse: whether the last token comes first.
    chunk: tokens between two states that are kept, a multiple of 8.
    unroll: steps written out one after another, a multiple of 4.
    exchange: whether sums over states are taken of four steps at once.
    interpret: None, or what interprets the kernels on a CPU.
  """

  delta_softplus: bool
  reverse: bool
  chunk: int
  unroll: int
  exchange: bool
  interpret: object = None

  def count(self, length: int) -> int:
    """Chunks of `length` tokens."""
    return -(-length // self.chunk)


class Chunks:
  """The chunks of a scan, as one program of 32 channels meets them.

  Chunk i is the i-th in the order of the scan, and so is step s of a chunk;
  `place` and `token` say where they stand along the tokens.
  """

  def __init__(self, options: Options, length: int, size: int):
    self.options = options
    self.length = length
    self.size = options.chunk
    self.count = options.count(length)
    self.rows = range(0, options.chunk, 8)
    self.shape = (tile.WARPS, tile.LANES, size)
    self.layout = tile.state_layout(size)
    self.token_layout = tile.token_layout()

  def place(self, i):
    """Where chunk i stands along the tokens."""
    return self.count - 1 - i if self.options.reverse else i

  def token(self, step):
    """The token of its chunk that a step meets."""
    return self.size - 1 - step if self.options.reverse else step

  def tokens(self, i):
    """The tokens of chunk i."""
    return pl.ds(self.place(i) * self.size, self.size)

  def zeros(self):
    """States of zero."""
    return pallas_compat.register_full(
      self.shape, 0.0, jnp.float32, self.layout
    )

  def by_channel(self, x):
    """[4, 8] -> [4, 8, M]."""
    x = lax.broadcast_in_dim(x, self.shape, [0, 1])
    return plgpu.layout_cast(x, self.layout)

  def by_state(self, x):
    """[M] -> [4, 8, M]."""
    x = lax.broadcast_in_dim(x, self.shape, [2])
    return plgpu.layout_cast(x, self.layout)

  def by_token(self, x):
    """[32] -> [8, 32]."""
    x = lax.broadcast_in_dim(x, (8, tile.CHANNELS), [1])
    return plgpu.layout_cast(x, self.token_layout)

  def per_channel(self, ref, channels):
    """The part of an array [E] that belongs to these channels; or None."""
    if ref is None:
      return None
    return tile.load(ref.at[channels], self.token_layout.reduce(0))

  def read(self, ref, row):
    """Eight tokens of ref [chunk, 32], from `row` on, in float32."""
    x = tile.load(ref.at[pl.ds(row, 8)], self.token_layout)
    return x.astype(jnp.float32)

  def channel_row(self, ref, token):
    """One token of ref [chunk, 32], for the states of each channel."""
    if self.options.interpret is not None:
      x = ref[token].reshape(tile.WARPS, tile.LANES)
    else:
      view = ref.reshape(self.size, tile.WARPS, tile.LANES).at[token]
      x = tile.load(view, self.layout.reduce(2))
    return self.by_channel(x)

  def put_channel_row(self, ref, token, x):
    """One token of ref [chunk, 32] = x [4, 8]."""
    if self.options.interpret is not None:
      ref[token] = x.reshape(tile.CHANNELS)
    else:
      ref.reshape(self.size, tile.WARPS, tile.LANES)[token] = x

  def state_row(self, ref, token):
    """One token of ref [chunk, M], for the states of all channels."""
    return self.by_state(tile.load(ref.at[token], self.layout.reduce((0, 1))))

  def decay(self, delta, A2, keep, token):
    """What a step leaves of the state before it."""
    decay = jnp.exp2(delta * A2)
    return decay if keep is None else decay * keep[token]

  def delta(self, raw, bias, row, i):
    """Final step sizes of eight tokens; past T, where nothing happens, zero."""
    delta = raw
    if bias is not None:
      delta = delta + self.by_token(bias)
    if self.options.delta_softplus:
      delta = tile.softplus(delta)
    return self.real(delta, row, i)

  def real(self, x, row, i):
    """x with zeros for tokens past T."""
    if self.length % self.size == 0:
      return x
    index = plgpu.broadcasted_iota(
      jnp.int32, (8, tile.CHANNELS), 0, layout=self.token_layout
    )
    index = index + (self.place(i) * self.size + row)
    return jnp.where(index < self.length, x, 0.0)


def split_channels(x: jax.Array) -> jax.Array:
  """[.., E, M] -> [.., E / 8, 8, M], as the kernels hold states."""
  *outer, channels, size = x.shape
  return x.reshape(*outer, channels // tile.LANES, tile.LANES, size)


def join_channels(x: jax.Array) -> jax.Array:
  """The inverse of `split_channels`."""
  *outer, warps, lanes, size = x.shape
  return x.reshape(*outer, warps * lanes, size)
