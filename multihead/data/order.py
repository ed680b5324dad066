"""Which records stand in a batch: a pure function of its number."""

import functools
import sys

import numpy as np


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
  """A permutation of `count` records, the same with every numpy.

  Sorts a bit generator's raw output, whose stream numpy promises to keep,
  unlike that of Generator.permutation: a resumed run may have another numpy.
  """
  bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
  return np.argsort(bits.random_raw(count), kind="stable")


class Order:
  """The records of each batch: endless and shuffled, or once and in order.

  Batch b holds the records at places b * batch_size and following of an endless
  order, a new permutation each epoch. len is the number of batches.
  """

  def __init__(
    self, num_records: int, batch_size: int, rows: slice, seed: int | None
  ):
    """Plans the batches.

    Args:
      num_records: how many records there are.
      batch_size: rows of the global batch.
      rows: the rows of it that are wanted.
      seed: of the order; None: once, in order, padded at the end.
    """
    self.num_records = num_records
    self.batch_size = batch_size
    self.rows = np.arange(batch_size)[rows]
    self.seed = seed
    # Two: a batch, or the batches read ahead, may lie across two epochs.
    self._epoch = functools.lru_cache(maxsize=2)(
      lambda epoch: epoch_order(seed, epoch, num_records)
    )

  def __len__(self) -> int:
    if self.seed is not None:
      return sys.maxsize
    return -(-self.num_records // self.batch_size)

  def records(self, batch: int) -> np.ndarray:
    """Numbers of the records of these rows of a batch; -1 is padding."""
    places = batch * self.batch_size + self.rows
    if self.seed is None:
      return np.where(places < self.num_records, places, -1)
    epochs, within = np.divmod(places, self.num_records)
    records = np.empty_like(places)
    for epoch in np.unique(epochs):
      here = epochs == epoch
      records[here] = self._epoch(int(epoch))[within[here]]
    return records
