"""What is static in a call of the kernels."""

import math
from typing import NamedTuple


class Options(NamedTuple):
  """Constants of a kernel, which it is compiled for.

  A stride is in elements, 0 along an axis that broadcasts.

  Attributes:
    rows: query rows of a tile.
    columns: keys of a tile.
    T: as in `multihead.ops.attention`; S, N, K, H likewise.
    S: see T.
    N: see T.
    K: see T.
    H: see T.
    V: head dim of values.
    HT: H rounded up to what a tile holds.
    VT: V likewise.
    precision: of the products of float32 tiles.
    scale: of the products of queries and keys.
    softcap: bound of the logits, 0 for none.
    folded: whether logits are multiplied by `factor` only in the exponential.
    factor: scale in base 2 if folded, else 1.
    left: see ../positions.py; -1 for no bound.
    right: likewise.
    offset: position of row 0, where it is static.
    has_offset: whether it is an operand.
    has_lengths: whether there are lengths of keys.
    has_ids: whether there are segments.
    has_bias: whether there is a bias.
    bias_b: stride of the bias along the batch; _n, _t, _s likewise.
    bias_n: see bias_b.
    bias_t: see bias_b.
    bias_s: see bias_b.
    has_mask: whether there is a mask.
    mask_b: as for the bias.
    mask_n: see mask_b.
    mask_t: see mask_b.
    mask_s: see mask_b.
    bounds_b: stride of the bounds along the batch, in rows of tiles.
    bounds_n: likewise along heads.
    masked: whether any visited tile is partly hidden.
    free: whether any is wholly visible.
    dropped: of 2**32 weights so many are dropped.
    kept_scale: what the others are multiplied by.
  """

  rows: int
  columns: int
  T: int
  S: int
  N: int
  K: int
  H: int
  V: int
  HT: int
  VT: int
  precision: str
  scale: float
  softcap: float
  folded: bool
  factor: float
  left: int
  right: int
  offset: int
  has_offset: bool
  has_lengths: bool
  has_ids: bool
  has_bias: bool
  bias_b: int
  bias_n: int
  bias_t: int
  bias_s: int
  has_mask: bool
  mask_b: int
  mask_n: int
  mask_t: int
  mask_s: int
  bounds_b: int
  bounds_n: int
  masked: bool
  free: bool
  dropped: int
  kept_scale: float


def padded(width: int) -> int:
  """The width of a tile: a power of two that a product of matrices takes."""
  return max(16, 1 << (width - 1).bit_length())


def folding(scale: float, softcap: float | None, has_bias: bool):
  """(folded, factor); a maximum moves with a positive factor only."""
  folded = softcap is None and not has_bias and scale > 0
  return folded, scale * math.log2(math.e) if folded else 1.0


def strides(shape: tuple[int, ...] | None) -> tuple[int, int, int, int]:
  """Of a contiguous array of four axes, 0 where one has size 1."""
  if shape is None:
    return 0, 0, 0, 0
  out, stride = [], 1
  for size in reversed(shape):
    out.append(stride if size > 1 else 0)
    stride *= size
  return tuple(reversed(out))
