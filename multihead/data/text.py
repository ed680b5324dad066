"""Documents to batches of windows for language modelling.

The documents are tokenised once into one flat array, [bos] tokens [eos] for
each. A record is a window of sequence_length + 1 tokens that begins at a
multiple of sequence_length, so that every token is a target exactly once. A
batch is a pure function of its number: batch b holds the records at places
b * batch_size and following of an endless order, a new permutation each epoch.
Hence a run resumes at the exact record by a number, and on any number of
processes: each takes its rows of the same global batch.

Grain reads the batches ahead and keeps the position. The order and the windows
are computed here for a whole batch at once, because grain's own shuffle and
batch work record by record (~30 us each, ~1 ms in a corpus of a few records).
"""

import dataclasses
import functools
import hashlib
import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import logging

from multihead.data import order, splits, tokenizers
from multihead.data.sources import Document
from multihead.data.tokenizers import Tokenizer
from multihead.errors import UserError, nearest

Batch = dict[str, np.ndarray]

_ENCODE_DOCUMENTS = 1024  # Documents given to the tokenizer at a time.
_LOSSLESS_DOCUMENTS = 16  # Documents decoded again to see if text is lost.


@dataclasses.dataclass(frozen=True)
class TokenArray:
  """Tokenised documents, one after another.

  Attributes:
    tokens: [N] uint16, or uint32 for more than 65536 ids; [bos] text [eos] for
      each document. May be a memory map.
    starts: [documents] int64, where each document's bos stands.
    num_bytes: UTF-8 bytes of the text.
    fingerprint: equal for equal text and tokenizer.
  """

  tokens: np.ndarray
  starts: np.ndarray
  num_bytes: int
  fingerprint: str

  @property
  def num_text_tokens(self) -> int:
    """Tokens that carry text: all but bos and eos."""
    return len(self.tokens) - 2 * len(self.starts)


def tokenise(
  documents: Sequence[Document],
  tokenizer: Tokenizer,
  cache_dir: str | os.PathLike[str] | None = None,
) -> TokenArray:
  """Tokenises documents into one array.

  Args:
    documents: at least one.
    tokenizer: see tokenizers.Tokenizer.
    cache_dir: a folder that keeps the array, as a .npy file named by a hash of
      the text and the tokenizer; a later call maps it instead of tokenising.
  """
  if not documents:
    raise UserError("there are no documents to tokenise; give at least one")
  digest = hashlib.blake2b(tokenizer.fingerprint.encode(), digest_size=16)
  num_bytes = 0
  for document in documents:
    data = document.text.encode("utf-8")
    num_bytes += len(data)
    digest.update(len(data).to_bytes(8, "little") + data)
  fingerprint = digest.hexdigest()
  if cache_dir is None:
    tokens, starts = _encode(documents, tokenizer)
    return TokenArray(tokens, starts, num_bytes, fingerprint)

  folder = Path(cache_dir).expanduser()
  files = [
    folder / f"{fingerprint}.{part}.npy" for part in ("tokens", "starts")
  ]
  if not all(file.is_file() for file in files):
    folder.mkdir(parents=True, exist_ok=True)
    for file, array in zip(files, _encode(documents, tokenizer), strict=True):
      # Written beside and moved, so that no other process sees half a file.
      partial = file.with_suffix(f".{uuid.uuid4().hex}.partial")
      with partial.open("wb") as stream:
        np.save(stream, array)
      partial.replace(file)
    logging.info("tokens kept in %s", files[0])
  tokens, starts = (np.load(file, mmap_mode="r") for file in files)
  return TokenArray(tokens, np.asarray(starts), num_bytes, fingerprint)


def _encode(
  documents: Sequence[Document], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
  dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
  bos = np.asarray([tokenizer.bos_id], dtype)
  eos = np.asarray([tokenizer.eos_id], dtype)
  parts: list[np.ndarray] = []
  lengths: list[int] = []
  for first in range(0, len(documents), _ENCODE_DOCUMENTS):
    chunk = documents[first : first + _ENCODE_DOCUMENTS]
    for ids in tokenizer.encode_batch([d.text for d in chunk]):
      parts += [bos, ids.astype(dtype), eos]
      lengths.append(len(ids) + 2)
  ends = np.cumsum(np.asarray(lengths, np.int64))
  return np.concatenate(parts), np.concatenate([[0], ends[:-1]])


class Windows:
  """Batches of windows by their number: a random-access source for grain.

  For the meaning of a batch see TextDataset. len is the number of batches;
  endless for training.
  """

  def __init__(
    self,
    array: TokenArray,
    *,
    sequence_length: int,
    batch_size: int,
    rows: slice,
    seed: int | None,
    overlap: int = 0,
  ):
    """Plans the windows.

    Args:
      array: the tokenised documents.
      sequence_length: T.
      batch_size: rows of the global batch.
      rows: the rows of it that are made.
      seed: of the order of the records, for training; None for validation: in
        order, once, padded at the end.
      overlap: validation only: so many tokens at the start of each window but
        the first are there as context and not scored again.
    """
    self._array = array
    self._length = sequence_length
    self._batch_size = batch_size
    self._rows = np.arange(batch_size)[rows]
    self._seed = seed
    self._overlap = overlap
    self._stride = sequence_length - overlap
    pairs = len(array.tokens) - 1
    more = max(0, pairs - sequence_length)
    self.num_records = 1 + -(-more // self._stride)
    # Two: a batch, or the batches read ahead, may lie across two epochs.
    self._order = functools.lru_cache(maxsize=2)(self._make_order)

  def __len__(self) -> int:
    if self._seed is not None:
      return sys.maxsize
    return -(-self.num_records // self._batch_size)

  def __repr__(self) -> str:
    return f"Windows({self.num_records} records of {self._length} tokens)"

  def __getitem__(self, batch: int) -> Batch:
    places = batch * self._batch_size + self._rows
    if self._seed is None:
      return self._make(np.where(places < self.num_records, places, -1))
    epochs, within = np.divmod(places, self.num_records)
    records = np.empty_like(places)
    for epoch in np.unique(epochs):
      here = epochs == epoch
      records[here] = self._order(int(epoch))[within[here]]
    return self._make(records)

  def _make_order(self, epoch: int) -> np.ndarray:
    return order.epoch_order(self._seed, epoch, self.num_records)

  def _make(self, records: np.ndarray) -> Batch:
    """The windows of these records [b]; record -1 is a row of padding."""
    tokens, length = self._array.tokens, self._length
    first = records * self._stride
    if self._seed is not None:
      # The last window ends with the text instead of being padded: it repeats
      # some of the window before it.
      first = np.minimum(first, len(tokens) - 1 - length)
    window = np.zeros((len(records), length + 1), np.int32)
    # Where documents begin, one column past the window: the token before a
    # beginning is an eos.
    begins = np.zeros((len(records), length + 2), bool)
    bounds = np.searchsorted(
      self._array.starts, np.stack([first, first + length + 2])
    )
    for row, (start, record) in enumerate(zip(first, records, strict=True)):
      if record >= 0:
        part = tokens[start : start + length + 1]
        window[row, : len(part)] = part
        begins[row, self._array.starts[slice(*bounds[:, row])] - start] = True
    # Where each target stands in the array, and whether there is one.
    places = first[:, None] + np.arange(1, length + 1)
    real = (places < len(tokens)) & (records >= 0)[:, None]
    segments = np.cumsum(begins[:, :length], axis=1) + ~begins[:, :1]
    scored = real & ~begins[:, 1:-1]
    if self._seed is None:
      scored &= ~begins[:, 2:] & (places < len(tokens) - 1)
      scored[first > 0, : self._overlap] = False
    return {
      "tokens": np.where(real, window[:, :-1], 0),
      "targets": np.where(real, window[:, 1:], 0),
      "segment_ids": np.where(real, segments, 0).astype(np.int32),
      "weights": scored.astype(np.float32),
    }


class TextIterator:
  """Iterates over the batches of a TextDataset; knows its position."""

  def __init__(self, batches: grain.DatasetIterator, identity: dict[str, Any]):
    self._batches = batches
    self._identity = identity

  def __iter__(self) -> "TextIterator":
    return self

  def __next__(self) -> Batch:
    return next(self._batches)

  def get_state(self) -> dict[str, Any]:
    """The position: what JSON can hold, the same on every process.

    It is the number of the next batch, with what must be the same for it to be
    the same batch.
    """
    return {**self._batches.get_state(), **self._identity}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a position that get_state gave.

    The number of processes may be another one than then.

    Raises:
      UserError: the state belongs to other text or other settings.
    """
    state = dict(state)
    for key, now in self._identity.items():
      then = state.pop(key, None)
      if then != now:
        raise UserError(
          f"cannot continue at the saved position in the data: {key} was "
          f"{then!r} then and is {now!r} now; use the same corpus, tokenizer "
          "and data settings, or begin in a new workdir"
        )
    self._batches.set_state(state)

  def close(self) -> None:
    """Stops reading ahead."""
    self._batches.close()


@dataclasses.dataclass(frozen=True)
class TextDataset:
  """Batches of one split for this process.

  iter() begins at batch 0: endless for training, once over the text for
  validation. A batch is a dict of arrays [b, T], b = batch_size / processes:
    tokens       int32, the input.
    targets      int32, the tokens that follow.
    segment_ids  int32, which document of the window the input belongs to,
                 counted from 1; 0 is padding.
    weights      float32, 1 where the target counts, else 0. Padding and bos
                 never count; bos follows another document. eos counts in
                 training alone: it says where documents end but carries no
                 text. In validation each token of the text counts exactly once.
  Process p of P has the rows p * b to (p + 1) * b of the global batch.

  Bits per byte of a model on the whole validation split: the sum of weights *
  nll over all batches, / ln 2 / num_bytes.

  Attributes:
    source: makes batch number i; indexable.
    batch_size: rows of the global batch.
    sequence_length: T.
    num_records: windows in the text.
    num_documents: documents.
    num_tokens: tokens with bos and eos.
    num_text_tokens: tokens without bos and eos; with the byte tokenizer,
      bytes.
    num_bytes: UTF-8 bytes of the text.
    num_batches: batches in one iteration; None if endless.
    identity: what a saved position depends on.
    prefetch: batches made ahead in a thread.
  """

  source: Windows
  batch_size: int
  sequence_length: int
  num_records: int
  num_documents: int
  num_tokens: int
  num_text_tokens: int
  num_bytes: int
  num_batches: int | None
  identity: Mapping[str, Any]
  prefetch: int = 2

  @property
  def bytes_per_token(self) -> float:
    """UTF-8 bytes of the text per token of the text."""
    return self.num_bytes / self.num_text_tokens

  def __iter__(self) -> Iterator[Batch]:
    options = grain.ReadOptions(
      num_threads=min(1, self.prefetch), prefetch_buffer_size=self.prefetch
    )
    dataset = grain.MapDataset.source(self.source).to_iter_dataset(options)
    return TextIterator(iter(dataset), dict(self.identity))

  def __str__(self) -> str:
    return (
      f"{self.num_documents:,} documents, {self.num_bytes:,} bytes, "
      f"{self.num_tokens:,} tokens, {self.num_records:,} windows of "
      f"{self.sequence_length:,}"
    )


def build(
  path: str | os.PathLike[str] | splits.Split | None,
  tokenizer: Tokenizer | str = "byte",
  sequence_length: int = 512,
  batch_size: int = 32,
  seed: int = 0,
  split: str = "train",
  validation_fraction: float = 0.1,
  process_index: int = 0,
  process_count: int = 1,
  *,
  split_seed: int = 0,
  shared_words: int | None = splits.SHARED_WORDS,
  text_field: str = "text",
  overlap: int = 0,
  cache_dir: str | os.PathLike[str] | None = None,
  prefetch: int = 2,
) -> TextDataset:
  """The batches of a corpus for one process.

  Args:
    path: see sources.load_documents; or a Split that is made already.
    tokenizer: a tokenizer or what tokenizers.load takes.
    sequence_length: T.
    batch_size: rows of the global batch; a multiple of process_count.
    seed: of the order of the training records.
    split: "train" or "validation".
    validation_fraction: see splits.split_documents.
    process_index: which process this is.
    process_count: how many there are.
    split_seed: chooses the validation documents; another one than seed, so that
      runs with different seeds are measured on the same text.
    shared_words: see splits.remove_repeated; None leaves repeated passages in.
    text_field: the field of a jsonl line that holds the text.
    overlap: validation only: each window but the first begins with so many
      tokens that were scored already, as context.
    cache_dir: see tokenise.
    prefetch: batches made ahead in a thread; 0 makes each when it is asked for.

  Raises:
    UserError: a setting out of its range, or a text shorter than a window.
  """
  if split not in splits.SPLITS:
    raise UserError(
      f"unknown split {split!r}{nearest(split, splits.SPLITS)}; allowed: "
      f"{', '.join(splits.SPLITS)}"
    )
  training = split == "train"
  _check(sequence_length >= 1, f"sequence_length is {sequence_length}", "1")
  _check(batch_size >= 1, f"batch_size is {batch_size}", "1")
  _check(seed >= 0, f"seed is {seed}", "0")
  _check(prefetch >= 0, f"prefetch is {prefetch}", "0")
  if not 0 <= process_index < process_count:
    raise UserError(
      f"process_index is {process_index} of {process_count} processes; it must "
      f"lie between 0 and {process_count - 1}"
    )
  if batch_size % process_count:
    raise UserError(
      f"batch_size {batch_size} cannot be shared evenly by {process_count} "
      f"processes; use a multiple of {process_count}"
    )
  if overlap and (training or not 0 <= overlap < sequence_length):
    raise UserError(
      f"overlap is {overlap} for split {split!r}; it is for validation, from 0 "
      f"to sequence_length - 1 = {sequence_length - 1}"
    )
  if isinstance(tokenizer, str):
    tokenizer = tokenizers.load(tokenizer)
  if not isinstance(path, splits.Split):
    path = splits.load_split(
      path,
      validation_fraction=validation_fraction,
      seed=split_seed,
      shared_words=shared_words,
      text_field=text_field,
    )
    logging.info("%s", path)
  documents = path.train if training else path.validation
  array = tokenise(documents, tokenizer, cache_dir)
  if training and len(array.tokens) <= sequence_length:
    raise UserError(
      f"sequence_length is {sequence_length}, but the training text has only "
      f"{len(array.tokens)} tokens ({len(documents)} documents); use at most "
      f"{len(array.tokens) - 1}, or more text"
    )
  if not training:
    _warn_if_lossy(documents, tokenizer)
  local = batch_size // process_count
  source = Windows(
    array,
    sequence_length=sequence_length,
    batch_size=batch_size,
    rows=slice(process_index * local, (process_index + 1) * local),
    seed=seed if training else None,
    overlap=overlap,
  )
  dataset = TextDataset(
    source=source,
    batch_size=batch_size,
    sequence_length=sequence_length,
    num_records=source.num_records,
    num_documents=len(documents),
    num_tokens=len(array.tokens),
    num_text_tokens=array.num_text_tokens,
    num_bytes=array.num_bytes,
    num_batches=None if training else len(source),
    identity={
      "split": split,
      "corpus": array.fingerprint,
      "sequence_length": sequence_length,
      "batch_size": batch_size,
      "overlap": overlap,
      "seed": seed if training else 0,
    },
    prefetch=prefetch,
  )
  logging.info("%s split: %s", split, dataset)
  return dataset


def _check(holds: bool, what: str, least: str) -> None:
  if not holds:
    raise UserError(f"{what}; it must be at least {least}")


def _warn_if_lossy(documents: Sequence[Document], tokenizer: Tokenizer) -> None:
  """Says that bits per byte mean little if the tokens do not give the text."""
  for document in documents[:_LOSSLESS_DOCUMENTS]:
    if tokenizer.decode(tokenizer.encode(document.text)) != document.text:
      logging.warning(
        "tokenizer %s does not give document %r back as it was, so bits per "
        "byte do not measure all of the text",
        tokenizer.name,
        document.name,
      )
      return
