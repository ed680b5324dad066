"""Where text comes from: this Python, a file, a folder, a jsonl file."""

import ast
import dataclasses
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

from multihead.errors import UserError, nearest

# What a folder is searched for. A file named directly may end in anything.
TEXT_EXTENSIONS = frozenset(
  ".txt .text .md .markdown .rst .adoc .org .tex .html .htm .xml .csv .log "
  ".py .pyi .c .h .cc .cpp .hpp .cu .cuh .java .js .ts .go .rs .jl .r .sh "
  ".sql .toml .yaml .yml .ini .cfg".split()
)
JSONL_EXTENSIONS = frozenset({".jsonl", ".ndjson"})

# A source that is one document is cut into about this many pieces, of at most
# PIECE_CHARACTERS, so that some of them can be kept for validation.
PIECE_CHARACTERS = 8192
_MIN_PIECE_CHARACTERS = 256
_PIECES = 20
# Where text may be cut, best first: a blank line, a line, a word.
_BORDERS = tuple(
  re.compile(p) for p in (r"\n[ \t\r]*\n(?:[ \t\r]*\n)*", r"\n", r"\s")
)

# Folders of the standard library that hold no documentation of it.
_STDLIB_SKIPPED = frozenset(
  "__pycache__ dist-packages idlelib lib2to3 pydoc_data site-packages test "
  "tests turtledemo".split()
)


@dataclasses.dataclass(frozen=True)
class Document:
  """A piece of text that belongs together; the unit of the split.

  Attributes:
    name: a stable name, unique within its source where the source allows it.
    text: the text, not blank.
  """

  name: str
  text: str

  @property
  def num_bytes(self) -> int:
    """Length of the text in UTF-8 bytes."""
    return len(self.text.encode("utf-8"))


def load_documents(
  path: str | os.PathLike[str] | None = None,
  *,
  text_field: str = "text",
  id_field: str = "id",
) -> list[Document]:
  """Reads a corpus as a list of documents, in a fixed order.

  Args:
    path: what to read.
      None, "" or "stdlib:topics": the documentation of the Python language
        that comes with this Python (pydoc_data.topics), a document a topic.
      "stdlib:docstrings": the docstrings of the standard library, a document a
        module; about three times as much text, read without importing it.
      a .jsonl or .ndjson file: a document a line.
      any other file: one document.
      a folder: every file beneath it with one of TEXT_EXTENSIONS or
        JSONL_EXTENSIONS, sorted; names that begin with a dot are skipped.
      A source that turns out to be a single document is cut into pieces of at
      most ~8 KB, at blank lines where there are some; joined, the pieces give
      the text again.
    text_field: the field of a jsonl line that holds the text.
    id_field: the field of a jsonl line that holds its name; without one the
      document is named by its line.

  Returns:
    The documents; blank ones are left out.

  Raises:
    UserError: nothing at that path, no text in it, not UTF-8 (with the byte
      offset), or a jsonl line that is not an object with that field.
  """
  name = os.fspath(path) if path is not None else ""
  if name.startswith("stdlib:") or not name:
    documents = _load_stdlib(name)
  else:
    documents = list(_load_path(Path(name).expanduser(), text_field, id_field))
  documents = [d for d in documents if d.text.strip()]
  if not documents:
    raise UserError(
      f"{name or 'stdlib:topics'}: no text in it, only blank documents; name a "
      "file, a folder or a .jsonl file that holds text"
    )
  if len(documents) == 1:
    documents = _cut(documents[0])
  return documents


def _load_stdlib(name: str) -> list[Document]:
  sources: dict[str, Callable[[], Iterator[Document]]] = {
    "": _stdlib_topics,
    "stdlib:topics": _stdlib_topics,
    "stdlib:docstrings": _stdlib_docstrings,
  }
  if name not in sources:
    allowed = sorted(filter(None, sources))
    raise UserError(
      f"unknown corpus {name!r}{nearest(name, allowed)}; allowed: "
      f"{', '.join(allowed)}, or the path of a file or folder"
    )
  return list(sources[name]())


def _stdlib_topics() -> Iterator[Document]:
  try:
    from pydoc_data import topics
  except ImportError as error:
    raise UserError(
      "this Python comes without pydoc_data.topics, the default corpus; give "
      "the path of a text file or folder as config.data.path"
    ) from error
  for name, text in sorted(topics.topics.items()):
    yield Document(name, text)


def _stdlib_docstrings() -> Iterator[Document]:
  root = Path(sysconfig.get_path("stdlib"))
  for path in _walk(root, frozenset({".py"}), _STDLIB_SKIPPED):
    try:
      tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
      # A few files of some distributions are templates or of another Python.
      logging.debug("stdlib:docstrings: cannot parse %s", path)
      continue
    docstrings = list(_docstrings(tree))
    if docstrings:
      name = path.relative_to(root).as_posix()
      yield Document(name, "\n\n".join(docstrings) + "\n")


def _docstrings(node: ast.AST) -> Iterator[str]:
  """Docstrings in the order of the file."""
  kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
  if isinstance(node, kinds) and (text := ast.get_docstring(node)):
    # An unpaired surrogate, written as an escape, is not text.
    yield text.encode("utf-8", "ignore").decode("utf-8")
  for child in ast.iter_child_nodes(node):
    if isinstance(child, ast.stmt | ast.ExceptHandler):
      yield from _docstrings(child)


def _load_path(
  path: Path, text_field: str, id_field: str
) -> Iterator[Document]:
  if not path.exists():
    raise UserError(
      f"{path}: no such file or folder (looked for in {Path.cwd()}); give a "
      "text file, a .jsonl file or a folder of them, or leave the path empty "
      "for the documentation text that comes with Python"
    )
  if not path.is_dir():
    yield from _load_file(path, path.name, text_field, id_field)
    return
  extensions = TEXT_EXTENSIONS | JSONL_EXTENSIONS
  files = list(_walk(path, extensions))
  if not files:
    raise UserError(
      f"{path}: no text files in this folder; files that end in "
      f"{' '.join(sorted(extensions))} are read"
    )
  for file in files:
    name = file.relative_to(path).as_posix()
    yield from _load_file(file, name, text_field, id_field)


def _walk(
  root: Path, extensions: frozenset[str], skipped: frozenset[str] = frozenset()
) -> Iterator[Path]:
  """Files beneath root, the same order on every machine."""
  found = []
  for folder, folders, files in os.walk(root):
    folders[:] = [
      f for f in folders if not f.startswith(".") and f not in skipped
    ]
    found += [
      Path(folder, f)
      for f in files
      if not f.startswith(".") and Path(f).suffix.lower() in extensions
    ]
  yield from sorted(found, key=lambda p: p.relative_to(root).as_posix())


def _load_file(
  path: Path, name: str, text_field: str, id_field: str
) -> Iterator[Document]:
  try:
    data = path.read_bytes()
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror})") from error
  try:
    # A byte order mark says how the file is encoded and is not part of it.
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
  except UnicodeDecodeError as error:
    offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
    raise UserError(
      f"{path}: not UTF-8 text: byte 0x{data[offset]:02x} at offset {offset}; "
      "convert it first (iconv -f latin1 -t utf-8), or take it out"
    ) from error
  if path.suffix.lower() in JSONL_EXTENSIONS:
    yield from _parse_jsonl(path, name, text, text_field, id_field)
  else:
    yield Document(name, text)


def _parse_jsonl(
  path: Path, name: str, text: str, text_field: str, id_field: str
) -> Iterator[Document]:
  # Not splitlines: a JSON string may hold U+2028 and its like as they are.
  for number, line in enumerate(text.split("\n"), start=1):
    if not line.strip():
      continue
    where = f"{path}, line {number}"
    try:
      record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
      raise UserError(
        f"{where}: not JSON ({error}); a .jsonl file has one object a line"
      ) from error
    if not isinstance(record, dict):
      raise UserError(
        f"{where}: a {type(record).__name__}, not an object; each line is like "
        f'{{"{text_field}": "..."}}'
      )
    if text_field not in record:
      fields = ", ".join(map(repr, record)) or "none"
      raise UserError(
        f"{where}: no field {text_field!r}{nearest(text_field, record)}; its "
        f"fields: {fields}; name the right one as text_field"
      )
    value = record[text_field]
    if not isinstance(value, str):
      raise UserError(
        f"{where}: field {text_field!r} is a {type(value).__name__}, not a "
        "string"
      )
    try:
      value.encode("utf-8")
    except UnicodeEncodeError as error:
      raise UserError(
        f"{where}: field {text_field!r} holds an unpaired surrogate at "
        f"character {error.start}, which no UTF-8 text can hold"
      ) from error
    label = record.get(id_field)
    suffix = f"line-{number}" if label is None else str(label)
    yield Document(f"{name}#{suffix}", value)


def _cut(document: Document) -> list[Document]:
  """Pieces of one document, which joined give it again."""
  text = document.text
  size = min(max(len(text) // _PIECES, _MIN_PIECE_CHARACTERS), PIECE_CHARACTERS)
  pieces: list[Document] = []
  start = 0
  while start < len(text):
    end = _border(text, start, size)
    # No piece of white space alone, and no scrap at the end.
    while end < len(text) and not text[start:end].strip():
      end = _border(text, end, size)
    if len(text) - end < size // 4 or not text[end:].strip():
      end = len(text)
    pieces.append(Document(f"{document.name}#{len(pieces)}", text[start:end]))
    start = end
  return pieces


def _border(text: str, start: int, size: int) -> int:
  """The end of the piece that begins at start, of at most size characters."""
  limit = start + size
  if limit >= len(text):
    return len(text)
  # The last border in the second half of the piece, the best kind first.
  for border in _BORDERS:
    ends = [m.end() for m in border.finditer(text, start + size // 2, limit)]
    if ends:
      return ends[-1]
  return limit
