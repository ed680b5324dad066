"""Labelled examples: selecting classes, splitting, batches.

A set of examples is whatever a source gives (images.py, labelled_text.py) with
a name, which must be stable, and a label for each. The split is by a hash of
the names, class by class, so that it does not depend on the order of the files
or on the machine.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from multihead.data.order import Order
from multihead.data.text import TextIterator
from multihead.errors import UserError, nearest

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Selection:
  """Which examples are used, and as what.

  Attributes:
    train: numbers of the training examples.
    validation: those of the validation examples.
    labels: of all examples, as numbers of `classes`; -1 for those left out.
    classes: names of the classes.
  """

  train: np.ndarray
  validation: np.ndarray
  labels: np.ndarray
  classes: tuple[str, ...]


def select(
  names: Sequence[str],
  labels: np.ndarray,
  classes: Sequence[str],
  *,
  validation: np.ndarray | None = None,
  validation_fraction: float = 0.2,
  seed: int = 0,
  only: str = "",
  train_per_class: int = 0,
) -> Selection:
  """Chooses classes and splits the examples.

  Args:
    names: of the examples, stable and distinct.
    labels: of the examples, numbers of `classes`.
    classes: names of the classes.
    validation: whether each example is for validation, where the source says
      so; None: `validation_fraction` of every class is.
    validation_fraction: above 0 and below 1; at least one example of a class.
    seed: chooses them; the seed of the training is another one, so that runs
      with different seeds are measured on the same examples.
    only: names of classes to keep, separated by commas; "": all of them.
    train_per_class: training examples of each class, chosen by the same hash;
      0: all that are left.

  Raises:
    UserError: a class that is not there, or one without examples for both
      splits.
  """
  if only:
    kept = [name.strip() for name in only.split(",")]
    for name in kept:
      if name not in classes:
        raise UserError(
          f"no class {name!r}{nearest(name, classes)}; the classes are "
          f"{', '.join(classes)}"
        )
    if len(set(kept)) < len(kept):
      raise UserError(f"a class stands twice in {only!r}")
    number = {classes.index(name): i for i, name in enumerate(kept)}
    labels = np.array([number.get(int(label), -1) for label in labels])
    classes = kept
  if validation is None and not 0 < validation_fraction < 1:
    raise UserError(
      f"validation_fraction is {validation_fraction}; it must lie between 0 "
      "and 1, for example 0.2"
    )
  train, held = [], []
  for label, title in enumerate(classes):
    members = np.flatnonzero(labels == label)
    members = members[np.argsort([rank(seed, names[i]) for i in members])]
    if validation is None:
      count = max(1, round(validation_fraction * len(members)))
      here, there = members[:count], members[count:]
    else:
      here, there = members[validation[members]], members[~validation[members]]
    if train_per_class:
      there = there[:train_per_class]
    if not len(there) or (validation is None and not len(here)):
      raise UserError(
        f"class {title!r} has {len(members)} examples, of which "
        f"{len(here)} are for validation and {len(there)} for training; it "
        "needs one for each"
      )
    train.append(there)
    held.append(here)
  train, held = np.sort(np.concatenate(train)), np.sort(np.concatenate(held))
  return Selection(train, held, labels, tuple(classes))


def rank(seed: int, name: str) -> bytes:
  """By which names are put in an order that knows neither files nor machine."""
  digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16)
  return digest.digest()


class Examples:
  """Batches of examples by their number: a random-access source for grain.

  Every batch gets `labels` int32 and `weights` float32, 1 for an example and 0
  for the rows that fill up the last batch of a validation split.
  """

  def __init__(
    self,
    make: Callable[[np.ndarray, np.random.Generator | None], Batch],
    members: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    rows: slice,
    seed: int | None,
  ):
    """Plans the batches.

    Args:
      make: the inputs of these examples [b]; with a generator whose draws are
        for a whole batch, it augments (the generator is None in validation).
      members: the examples of the split.
      labels: of all examples.
      batch_size: rows of the global batch.
      rows: the rows of it that are made.
      seed: of order and augmentation, for training; None: once, in order.
    """
    self._make = make
    self._members = members
    self._labels = labels
    self._order = Order(len(members), batch_size, rows, seed)

  def __len__(self) -> int:
    return len(self._order)

  def __repr__(self) -> str:
    return f"Examples({len(self._members)} in batches)"

  def __getitem__(self, batch: int) -> Batch:
    records = self._order.records(batch)
    real = records >= 0
    members = self._members[np.where(real, records, 0)]
    rng = None
    if self._order.seed is not None:
      # Another stream than the one that orders the epochs.
      key = np.random.SeedSequence([self._order.seed, batch, 1])
      rng = np.random.Generator(np.random.Philox(key))
    return {
      **self._make(members, _Rows(rng, self._order) if rng else None),
      "labels": self._labels[members].astype(np.int32),
      "weights": real.astype(np.float32),
    }


class _Rows:
  """Draws for every row of the global batch, and gives those of some rows.

  So the batch is the same on any number of processes.
  """

  def __init__(self, rng: np.random.Generator, order: Order):
    self._rng, self._order = rng, order

  def random(self) -> np.ndarray:
    """Uniform numbers in [0, 1), one for each row that is made."""
    return self._rng.random(self._order.batch_size)[self._order.rows]


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Batches of one split for this process.

  Attributes:
    source: makes batch number i.
    num_batches: in one iteration; None if endless.
    identity: what a saved position depends on.
    prefetch: batches made ahead in threads.
  """

  source: Examples
  num_batches: int | None
  identity: Mapping[str, Any]
  prefetch: int = 2

  def __iter__(self) -> Iterator[Batch]:
    options = grain.ReadOptions(
      num_threads=self.prefetch, prefetch_buffer_size=self.prefetch
    )
    dataset = grain.MapDataset.source(self.source).to_iter_dataset(options)
    return TextIterator(iter(dataset), dict(self.identity))


def build(
  make: Callable[[np.ndarray, Any], Batch],
  selection: Selection,
  split: str,
  *,
  batch_size: int,
  seed: int,
  fingerprint: str,
  process_index: int = 0,
  process_count: int = 1,
  prefetch: int = 2,
) -> Dataset:
  """The batches of a split for one process.

  Args:
    make: see Examples.
    selection: what is in the split.
    split: "train" or "validation".
    batch_size: rows of the global batch; a multiple of process_count.
    seed: of order and augmentation.
    fingerprint: of the data and all that is done to it, for saved positions.
    process_index: which part of every batch is made.
    process_count: into how many parts batches are cut.
    prefetch: batches made ahead.
  """
  training = split == "train"
  members = selection.train if training else selection.validation
  rows = batch_size // process_count
  source = Examples(
    make,
    members,
    selection.labels,
    batch_size=batch_size,
    rows=slice(process_index * rows, (process_index + 1) * rows),
    seed=seed if training else None,
  )
  digest = hashlib.blake2b(fingerprint.encode(), digest_size=16)
  digest.update(members.astype(np.int64).tobytes())
  return Dataset(
    source=source,
    num_batches=None if training else len(source),
    identity={
      "split": split,
      "examples": digest.hexdigest(),
      "batch_size": batch_size,
      "seed": seed if training else 0,
    },
    prefetch=prefetch,
  )
