"""What the kernels are compiled for."""

from typing import NamedTuple


class Options(NamedTuple):
  """Constants of both kernels.

  Attributes:
    B: items.
    T: queries of an item.
    N: query heads.
    K: key heads.
    H: head dim of queries and keys.
    Hv: that of values.
    S: keys that there is room for in an item.
    pool: pages in the pools.
    page: keys in a page, 0 without pages.
    pages: numbers in an item's row of the table.
    scale: of the logits.
    softcap: of the logits, or None.
    left: keys that a query sees before its own position, or None for all.
    precision: of the products.
    parts: how many the keys of the batch are cut into.
    items: a power of two, at least B.
    together: key heads of a program.
    rows: of a program, each a query of a head.
    keys: of a tile.
    columns: a power of two, at least that of `together` heads of H.
    v_columns: likewise of Hv.
    most: a power of two, at least `parts`.
    step: parts that are merged at a time, a divisor of `most`.
  """

  B: int
  T: int
  N: int
  K: int
  H: int
  Hv: int
  S: int
  pool: int
  page: int
  pages: int
  scale: float
  softcap: float | None
  left: int | None
  precision: str | None
  parts: int
  items: int
  together: int
  rows: int
  keys: int
  columns: int
  v_columns: int
  most: int
  step: int
