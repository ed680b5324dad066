"""Training and validation text, by document, without repeated passages."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from multihead.data import sources
from multihead.data.sources import Document
from multihead.errors import UserError

SPLITS = ("train", "validation")
# A validation passage that shares a run of this many words with the training
# text is a repeated passage.
SHARED_WORDS = 12
# A passage is a paragraph; one longer than this is taken line by line, a line
# longer than this sentence by sentence.
_PASSAGE_CHARACTERS = 2000
_PASSAGE_BORDERS = tuple(
  re.compile(p) for p in (r"\n(?:[ \t\r]*\n)+", r"\n", r"(?<=[.!?])[ \t]+")
)
# Scripts written without spaces have a word a character; elsewhere a word is
# letters and digits, so that indentation, quotes and dashes make no difference.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")

_NO_KEYS = np.zeros(0, np.uint64)


@dataclasses.dataclass(frozen=True)
class Split:
  """A corpus in two parts that share no document and no passage.

  Attributes:
    train: documents to train on.
    validation: documents to validate on, repeated passages taken out.
    removed_bytes: UTF-8 bytes taken out of the validation documents.
    removed_passages: how many passages that were.
    shared_words: the length of a shared run that makes a passage a repeated
      one; None if repeated passages were left in.
  """

  train: tuple[Document, ...]
  validation: tuple[Document, ...]
  removed_bytes: int = 0
  removed_passages: int = 0
  shared_words: int | None = SHARED_WORDS

  @property
  def train_bytes(self) -> int:
    """UTF-8 bytes of the training text."""
    return sum(d.num_bytes for d in self.train)

  @property
  def validation_bytes(self) -> int:
    """UTF-8 bytes of the validation text, repeated passages not counted."""
    return sum(d.num_bytes for d in self.validation)

  @property
  def removed_fraction(self) -> float:
    """Share of the validation documents' bytes that was taken out."""
    whole = self.validation_bytes + self.removed_bytes
    return self.removed_bytes / whole if whole else 0.0

  def __str__(self) -> str:
    return (
      f"train {len(self.train)} documents, {self.train_bytes:,} bytes; "
      f"validation {len(self.validation)} documents, "
      f"{self.validation_bytes:,} bytes after {self.removed_passages} repeated "
      f"passages ({self.removed_fraction:.1%} of the bytes) were taken out"
    )


def load_split(
  path: str | os.PathLike[str] | None = None,
  *,
  validation_fraction: float = 0.1,
  seed: int = 0,
  shared_words: int | None = SHARED_WORDS,
  text_field: str = "text",
) -> Split:
  """Reads a corpus (see sources.load_documents) and splits it."""
  documents = sources.load_documents(path, text_field=text_field)
  try:
    return split_documents(
      documents,
      validation_fraction=validation_fraction,
      seed=seed,
      shared_words=shared_words,
    )
  except UserError as error:
    raise UserError(f"{path or 'stdlib:topics'}: {error}") from error


def split_documents(
  documents: Sequence[Document],
  *,
  validation_fraction: float = 0.1,
  seed: int = 0,
  shared_words: int | None = SHARED_WORDS,
) -> Split:
  """Splits documents into training and validation.

  The documents are ordered by a hash of seed and name and taken for validation
  from the front until that share of the bytes is reached; one that alone would
  overshoot it is passed over. The order in which they are given, and the
  machine, make no difference. Then the passages that also occur in the training
  documents are taken out of the validation documents (remove_repeated).

  Args:
    documents: at least two, none of them blank.
    validation_fraction: the share of the bytes kept for validation, above 0
      and below 1, before repeated passages are taken out.
    seed: chooses the documents; the seed of the training is another one, so
      that runs with different seeds are measured on the same text.
    shared_words: see remove_repeated; None leaves repeated passages in.

  Raises:
    UserError: fewer than two documents, or nothing left for validation.
  """
  if not 0 < validation_fraction < 1:
    raise UserError(
      f"validation_fraction is {validation_fraction}; it must lie between 0 "
      "and 1, for example 0.1"
    )
  if len(documents) < 2:
    raise UserError(
      f"{len(documents)} document, which cannot be split into training and "
      "validation; give at least two documents, or a longer text"
    )
  ordered = sorted(documents, key=lambda d: _hash(seed, d))
  sizes = [d.num_bytes for d in ordered]
  target = validation_fraction * sum(sizes)
  chosen: set[int] = set()
  taken = 0
  for i, size in enumerate(sizes):
    # Half of the smallest overshoot is better than none at all.
    if taken < target and taken + size <= 1.25 * target:
      chosen.add(i)
      taken += size
  if not chosen:
    # Every document is larger than the share: the smallest one, the first of
    # them by hash, leaves the most to train on.
    chosen.add(int(np.argmin(sizes)))
  train = tuple(d for i, d in enumerate(ordered) if i not in chosen)
  validation = tuple(d for i, d in enumerate(ordered) if i in chosen)
  if not train:
    train, validation = validation[:-1], validation[-1:]
  if shared_words is None:
    return Split(train, validation, shared_words=None)
  kept, removed_bytes, removed_passages = remove_repeated(
    validation, train, shared_words=shared_words
  )
  if not kept:
    raise UserError(
      f"every passage of the {len(validation)} validation documents also "
      f"occurs in the training documents (runs of {shared_words} words); "
      "raise validation_fraction, add text, or turn the removal of repeated "
      "passages off with shared_words=None"
    )
  return Split(
    train, tuple(kept), removed_bytes, removed_passages, shared_words
  )


def _hash(seed: int, document: Document) -> bytes:
  """A place in the order; documents of one name are told apart by text."""
  digest = hashlib.blake2b(f"{seed}\0{document.name}".encode(), digest_size=16)
  text = hashlib.blake2b(document.text.encode("utf-8"), digest_size=16)
  return digest.digest() + text.digest()


def remove_repeated(
  documents: Sequence[Document],
  reference: Iterable[Document],
  *,
  shared_words: int = SHARED_WORDS,
) -> tuple[list[Document], int, int]:
  """Takes out of documents the passages that also occur in the reference.

  A passage is a paragraph (a line of a long paragraph, a sentence of a long
  line). It is repeated if a run of shared_words words that touches it stands in
  a reference document too, or if it has fewer words than that and all of it is
  a passage there. Words are compared without case, punctuation, white space and
  line breaks, so a copy that is indented, quoted or wrapped differently is
  found. Passages without any word go with the passage before them.

  Memory grows with documents, not with the reference, which is read once.

  Args:
    documents: text to take passages out of, for example the validation text.
    reference: text they must not share passages with.
    shared_words: the shortest run of words that counts as shared.

  Returns:
    The documents that still have text in them; the UTF-8 bytes and the number
    of passages taken out.
  """
  if shared_words < 1:
    raise ValueError(f"shared_words is {shared_words}; it must be at least 1")
  passages = [list(_passages(d.text)) for d in documents]
  vocabulary: dict[str, int] = {}
  encoded = [_encode(p, vocabulary) for p in passages]
  marked = [_keys(words, owner, shared_words) for words, owner in encoded]
  wanted = np.unique(np.concatenate([_NO_KEYS, *(keys for keys, *_ in marked)]))
  seen = np.zeros(len(wanted), bool)
  for document in reference:
    words, owner = _encode(list(_passages(document.text)), vocabulary, False)
    keys, *_ = _keys(words, owner, shared_words)
    where = np.searchsorted(wanted, keys)
    where, keys = where[where < len(wanted)], keys[where < len(wanted)]
    seen[where[wanted[where] == keys]] = True

  kept: list[Document] = []
  removed_bytes = removed_passages = 0
  for document, texts, (_, owner), (keys, starts, lengths) in zip(
    documents, passages, encoded, marked, strict=True
  ):
    repeated = np.zeros(len(texts), bool)
    found = seen[np.searchsorted(wanted, keys)]
    for offset in range(shared_words):
      repeated[owner[starts[found & (lengths > offset)] + offset]] = True
    wordless = np.ones(len(texts), bool)
    wordless[owner] = False
    for i in np.flatnonzero(wordless):
      repeated[i] = i > 0 and repeated[i - 1]
    text = "".join(t for t, r in zip(texts, repeated, strict=True) if not r)
    if not text.strip():
      repeated[:], text = True, ""
    removed_passages += int(repeated.sum())
    removed_bytes += document.num_bytes - len(text.encode("utf-8"))
    if text:
      kept.append(Document(document.name, text))
  return kept, removed_bytes, removed_passages


def _passages(text: str, level: int = 0) -> Iterator[str]:
  """The passages of a text with the white space after them; joined: text."""
  start = 0
  borders = [m.end() for m in _PASSAGE_BORDERS[level].finditer(text)]
  for end in [*borders, len(text)]:
    part = text[start:end]
    start = end
    if not part:
      continue
    if len(part) > _PASSAGE_CHARACTERS and level + 1 < len(_PASSAGE_BORDERS):
      yield from _passages(part, level + 1)
    else:
      yield part


def _encode(
  passages: Sequence[str], vocabulary: dict[str, int], grow: bool = True
) -> tuple[np.ndarray, np.ndarray]:
  """Word ids (unknown: -1) and the passage each word stands in."""
  words: list[int] = []
  counts = np.zeros(len(passages), np.int64)
  for i, passage in enumerate(passages):
    found = _WORD.findall(passage.casefold())
    counts[i] = len(found)
    if grow:
      words += [vocabulary.setdefault(w, len(vocabulary)) for w in found]
    else:
      words += [vocabulary.get(w, -1) for w in found]
  return np.asarray(words, np.int64), np.repeat(np.arange(len(counts)), counts)


def _keys(
  words: np.ndarray, owner: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """What two texts share if they share a passage.

  Returns:
    uint64 hashes of every run of `length` words and of every whole passage of
    fewer words; the place of the first word of each; how many words it has.
  """
  # A word becomes 64 well mixed bits (the finaliser of splitmix64); a run, the
  # value of a polynomial in them modulo 2^64. No word, not even the unknown
  # one, becomes 0, which would not show at the end of a run.
  mixed = (words + 2).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
  mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  mixed ^= mixed >> np.uint64(31)
  base = np.uint64(0xD6E8FEB86659FD93)

  count = max(0, len(words) - length + 1)
  runs = np.zeros(count, np.uint64)
  powers = np.cumprod(np.full(length, base))
  for offset in range(length):
    runs += mixed[offset : offset + count] * powers[offset]

  starts = np.flatnonzero(np.diff(owner, prepend=-1))
  lengths = np.diff(starts, append=len(words))
  within = np.arange(len(words)) - np.repeat(starts, lengths)
  terms = mixed * powers[np.minimum(within, length - 1)]
  short = lengths < length
  wholes = np.add.reduceat(terms, starts) if len(words) else _NO_KEYS
  return (
    np.concatenate([runs, wholes[short]]),
    np.concatenate([np.arange(count), starts[short]]),
    np.concatenate([np.full(count, length), lengths[short]]),
  )
