"""Labelled texts: docstrings by package, a .jsonl, a folder per class.

Nothing is downloaded: the default is the standard library of this Python.
"""

import ast
import collections
import dataclasses
import hashlib
import json
import math
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from multihead.data import labelled, sources
from multihead.data.tokenizers import Tokenizer
from multihead.errors import UserError, nearest

STDLIB = "stdlib:packages"
# Packages of the standard library with more than a hundred docstrings that
# every release since 3.11 has, on every platform.
PACKAGES = (
  "asyncio", "email", "http", "importlib", "logging", "multiprocessing",
  "unittest", "urllib", "xml",
)  # fmt: skip
_MIN_CHARACTERS = 20
_VALIDATION = ("validation", "val", "valid", "dev", "test")


@dataclasses.dataclass(frozen=True)
class TextSet:
  """Texts, or pairs of texts, with labels.

  Attributes:
    texts: the texts.
    pairs: the second text of each; None: there are none.
    labels: numbers of `classes`.
    classes: their names.
    validation: whether each is for validation; None: the source does not say.
    title: of the source, for people.
  """

  texts: tuple[str, ...]
  pairs: tuple[str, ...] | None
  labels: np.ndarray
  classes: tuple[str, ...]
  validation: np.ndarray | None
  title: str

  @property
  def names(self) -> tuple[str, ...]:
    """What tells the examples apart: their text."""
    if self.pairs is None:
      return self.texts
    return tuple(map("\0".join, zip(self.texts, self.pairs, strict=True)))

  @property
  def fingerprint(self) -> str:
    """Equal for equal texts and labels."""
    digest = hashlib.blake2b(digest_size=16)
    for name, label in zip(self.names, self.labels, strict=True):
      digest.update(f"{name}\0{label}\0".encode("utf-8", "replace"))
    return digest.hexdigest()


def load_texts(
  path: str | os.PathLike[str] | None = None,
  *,
  text_field: str = "text",
  pair_field: str | None = None,
  label_field: str = "label",
) -> TextSet:
  """Reads labelled texts; each text once.

  Texts that differ in case and white space alone count as one. Where such ones
  have different labels, none is kept; where the source gives the split, one of
  the training split that is in the validation split too is left out.

  Args:
    path: what to read.
      None or "stdlib:packages": the docstrings of nine packages of the standard
        library (`PACKAGES`); the label is the package. About 2,000.
      a .jsonl file: an object a line.
      a folder with train.jsonl and validation.jsonl (or val, valid, dev, test).
      a folder with one folder per class, of text files.
    text_field: the field of a line that holds the text.
    pair_field: the field of a second text, for tasks on pairs.
    label_field: the field of the label, a text or an integer.

  Raises:
    UserError: nothing there, or not what is described above.
  """
  name = os.fspath(path) if path is not None else STDLIB
  fields = (text_field, pair_field, label_field)
  if name.startswith("stdlib:"):
    if name != STDLIB:
      raise UserError(
        f"unknown source {name!r}{nearest(name, [STDLIB])}; allowed are "
        f"{STDLIB!r}, or the path of a .jsonl file or a folder"
      )
    return _collect(_docstrings(), None, "docstrings of this Python")
  where = Path(name).expanduser()
  if where.is_file():
    return _collect(_lines(where, *fields), None, name)
  if not where.is_dir():
    raise UserError(
      f"{name}: no such file or folder; give a .jsonl file, a folder of them, "
      f"a folder with one folder of texts per class, or {STDLIB!r}"
    )
  files = {p.stem: p for p in sorted(where.iterdir()) if p.suffix == ".jsonl"}
  if not files:
    return _collect(_folders(where), None, name)
  held = [files[stem] for stem in _VALIDATION if stem in files]
  if "train" not in files or not held:
    raise UserError(
      f"{name}: has {', '.join(p.name for p in files.values())}; the files of "
      "a split are train.jsonl and validation.jsonl"
    )
  return _collect(
    _lines(files["train"], *fields), _lines(held[0], *fields), name
  )


# (text, second text or None, label)
_Example = tuple[str, str | None, str]


def _collect(
  train: Iterator[_Example], validation: Iterator[_Example] | None, title: str
) -> TextSet:
  """Removes repetitions and numbers the classes."""
  found: dict[str, list[tuple[_Example, bool]]] = collections.defaultdict(list)
  for held, examples in ((False, train), (True, validation or ())):
    for example in examples:
      plain = "\0".join(" ".join((t or "").split()) for t in example[:2])
      found[plain.casefold()].append((example, held))
  kept = []
  for group in found.values():
    if len({example[2] for example, _ in group}) == 1:
      kept.append(max(group, key=lambda item: item[1]))  # validation, if any
  labels = sorted({example[2] for (example, _) in kept}, key=_natural)
  if len(labels) < 2:
    raise UserError(
      f"{title}: texts of {len(labels)} classes; there must be two or more"
    )
  number = {label: i for i, label in enumerate(labels)}
  pairs = tuple(example[1] or "" for example, _ in kept)
  return TextSet(
    texts=tuple(example[0] for example, _ in kept),
    pairs=pairs if any(pairs) else None,
    labels=np.array([number[example[2]] for example, _ in kept]),
    classes=tuple(labels),
    validation=np.array([h for _, h in kept]) if validation else None,
    title=title,
  )


def _natural(label: str) -> tuple:
  """Sorts numbers as numbers."""
  return (0, int(label), "") if label.isdigit() else (1, 0, label)


def _docstrings() -> Iterator[_Example]:
  root = Path(sysconfig.get_path("stdlib"))
  for package in PACKAGES:
    for file in sorted((root / package).rglob("*.py")):
      if "test" in file.relative_to(root).parts:
        continue
      tree = ast.parse(file.read_bytes())
      for node in ast.walk(tree):
        if isinstance(
          node,
          ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
        ):
          text = ast.get_docstring(node) or ""
          if len(text) >= _MIN_CHARACTERS:
            yield text, None, package


def _lines(
  path: Path, text_field: str, pair_field: str | None, label_field: str
) -> Iterator[_Example]:
  if path.suffix.lower() not in sources.JSONL_EXTENSIONS:
    raise UserError(f"{path}: labelled texts in one file must be a .jsonl file")
  for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1):
    if not line.strip():
      continue
    where = f"{path}, line {number}"
    try:
      record = json.loads(line)
    except ValueError as error:
      raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
      raise UserError(f"{where}: a {type(record).__name__}, not an object")
    text = _field(record, text_field, where, str)
    pair = pair_field and _field(record, pair_field, where, str)
    yield text, pair, str(_field(record, label_field, where, str | int))


def _field(record: Mapping, name: str, where: str, kind: type) -> str | int:
  if name not in record:
    raise UserError(
      f"{where}: no field {name!r}{nearest(name, record)}; its fields: "
      f"{', '.join(map(repr, record)) or 'none'}"
    )
  value = record[name]
  if not isinstance(value, kind) or isinstance(value, bool):
    raise UserError(
      f"{where}: field {name!r} is {value!r}; it must be "
      f"{'a string' if kind is str else 'a string or an integer'}"
    )
  return value


def _folders(root: Path) -> Iterator[_Example]:
  for folder in sorted(p for p in root.iterdir() if p.is_dir()):
    for file in sorted(folder.rglob("*")):
      if file.suffix.lower() in sources.TEXT_EXTENSIONS:
        try:
          text = file.read_text("utf-8")
        except UnicodeDecodeError as error:
          raise UserError(f"{file}: not UTF-8 text: {error}") from error
        if text.strip():
          yield text, None, folder.name


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Texts as ids, without padding.

  Attributes:
    tokens: [bos] text [eos], or [bos] text [eos] second text [eos], of each
      example, cut to the length.
    seconds: where the second text begins; the length where there is none.
    cut: how many examples lost something.
  """

  tokens: tuple[np.ndarray, ...]
  seconds: np.ndarray
  cut: int

  def batch(self, members: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Pads these examples to [b, length].

    Returns:
      tokens int32, mask bool (True: a real token) and token_types int32 (1 from
      the second text on).
    """
    tokens = np.zeros((len(members), length), np.int32)
    mask = np.zeros((len(members), length), bool)
    for row, i in enumerate(members):
      ids = self.tokens[i]
      tokens[row, : len(ids)] = ids
      mask[row, : len(ids)] = True
    types = np.arange(length) >= self.seconds[members][:, None]
    return {"tokens": tokens, "mask": mask, "token_types": (types & mask) + 0}


def encode(texts: TextSet, tokenizer: Tokenizer, length: int) -> Encoded:
  """Turns texts into ids of at most `length`.

  Of a pair, the longer text is cut first.
  """
  if length < 4:
    raise UserError(f"sequence_length is {length}; it must be at least 4")
  bos, eos = tokenizer.bos_id, tokenizer.eos_id
  first = tokenizer.encode_batch(texts.texts)
  second = [None] * len(first)
  if texts.pairs is not None:
    second = tokenizer.encode_batch(texts.pairs)
  tokens, starts, cut = [], [], 0
  for a, b in zip(first, second, strict=True):
    room = length - (2 if b is None else 3)
    before = len(a) + (0 if b is None else len(b))
    if b is None:
      a = a[:room]
    else:
      fair = room // 2
      a, b = (
        a[: max(fair, room - len(b))],
        b[: max(room - fair, room - len(a))],
      )
    cut += before > len(a) + (0 if b is None else len(b))
    parts = [[bos], a, [eos], *([] if b is None else [b, [eos]])]
    tokens.append(np.concatenate(parts).astype(np.int32))
    starts.append(length if b is None else len(a) + 2)
  return Encoded(tuple(tokens), np.array(starts), cut)


def naive_bayes_error(
  texts: TextSet, selection: labelled.Selection, smoothing: float = 1.0
) -> float:
  """Share of validation texts that a naive Bayes model of words gets wrong.

  Multinomial, over lower-case words, with additive smoothing: what counting
  words achieves.

  Args:
    texts: the texts.
    selection: classes and splits.
    smoothing: added to every count.
  """
  words = [re.findall(r"\w+", name.lower()) for name in texts.names]
  labels = selection.labels
  counts = [collections.Counter() for _ in selection.classes]
  sizes = collections.Counter()
  for i in selection.train:
    counts[labels[i]].update(words[i])
    sizes[int(labels[i])] += 1
  vocabulary = set().union(*counts)
  totals = [sum(c.values()) + smoothing * len(vocabulary) for c in counts]

  def score(label: int, found: list[str]) -> float:
    prior = math.log(sizes[label] / len(selection.train))
    return prior + sum(
      math.log((counts[label][word] + smoothing) / totals[label])
      for word in found
      if word in vocabulary
    )

  wrong = 0
  for i in selection.validation:
    scores = [score(c, words[i]) for c in range(len(counts))]
    wrong += int(np.argmax(scores)) != labels[i]
  return wrong / len(selection.validation)
