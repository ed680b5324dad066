"""Tokenizers: bytes, and any tokenizer.json."""

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from multihead.errors import UserError, nearest

# Names that published tokenizers give to the tokens that open and close a
# document, the unambiguous ones first.
BOS_NAMES = (
  "<|begin_of_text|>",
  "<s>",
  "<bos>",
  "<|startoftext|>",
  "<|begin▁of▁sentence|>",
  "[BOS]",
  "[CLS]",
)
EOS_NAMES = (
  "<|end_of_text|>",
  "</s>",
  "<eos>",
  "<|endoftext|>",
  "<|end▁of▁sentence|>",
  "[EOS]",
  "[SEP]",
)


class Tokenizer(Protocol):
  """What the data pipelines, tasks and scripts need of a tokenizer.

  Attributes:
    name: what a person calls it, "byte" or the path it was read from.
    fingerprint: equal for tokenizers that give the same ids.
    vocab_size: one more than the largest id.
    bos_id: the id before the first token of a document.
    eos_id: the id after the last one; may be the same as bos_id.
  """

  name: str
  fingerprint: str
  vocab_size: int
  bos_id: int
  eos_id: int

  def encode(self, text: str) -> Int[np.ndarray, " T"]:
    """Ids of the text alone, int32, without bos and eos."""
    ...

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """encode of each of them."""
    ...

  def decode(self, ids: Iterable[int]) -> str:
    """The text of the ids; special ids are left out."""
    ...


class ByteTokenizer:
  """UTF-8 bytes as ids 0-255, then bos = 256 and eos = 257."""

  name = "byte"
  fingerprint = "byte"
  vocab_size = 258
  bos_id = 256
  eos_id = 257

  def encode(self, text: str) -> Int[np.ndarray, " T"]:
    """The bytes of the text as int32."""
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """encode of each of them."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    """The text of the bytes; what is not UTF-8 becomes U+FFFD."""
    return self.decode_bytes(ids).decode("utf-8", errors="replace")

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """The bytes themselves; ids from 256 on are left out."""
    return bytes(i for i in map(int, ids) if 0 <= i < 256)


class JsonTokenizer:
  """A tokenizer.json, run by the `tokenizers` package.

  Special tokens that are spelled out in a text are encoded as ordinary text,
  so no text can close its own document.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    bos: str | None = None,
    eos: str | None = None,
  ):
    """Reads it.

    Args:
      path: a tokenizer.json, or a folder with one; a tokenizer_config.json
        beside it says which token is bos and which eos.
      bos: the token that opens a document, where it cannot be told.
      eos: the token that closes a document, where it cannot be told.

    Raises:
      UserError: no such file, not a tokenizer.json, or no bos or eos found.
      ImportError: the `tokenizers` package is not installed.
    """
    try:
      import tokenizers
    except ImportError as error:
      raise ImportError(
        "a tokenizer.json needs the tokenizers package: "
        "pip install 'multihead[text]'"
      ) from error
    file = Path(path).expanduser()
    if file.is_dir():
      file = file / "tokenizer.json"
    if not file.is_file():
      raise UserError(
        f"tokenizer {os.fspath(path)!r}: there is no file {file}; allowed: "
        "'byte', the path of a tokenizer.json or of a folder that holds one"
      )
    try:
      content = file.read_text(encoding="utf-8")
      self._tokenizer = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # The package raises plain Exception.
      raise UserError(f"{file}: not a tokenizer.json ({error})") from error
    # The file may say how its model's inputs were cut and padded; a corpus is
    # neither.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True
    self.name = str(file)
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values()) + 1
    added = {
      token.content: i
      for i, token in self._tokenizer.get_added_tokens_decoder().items()
    }
    config = _read_config(file.parent / "tokenizer_config.json")
    # Some tokenizers have one token for both, as GPT-2 does; then it opens the
    # document too.
    self.eos_id = _find(
      file, "eos", (eos, config.get("eos_token")), EOS_NAMES, vocabulary, added
    )
    self.bos_id = _find(
      file,
      "bos",
      (bos, config.get("bos_token")),
      BOS_NAMES,
      vocabulary,
      added,
      default=self.eos_id,
    )
    digest = hashlib.blake2b(content.encode("utf-8"), digest_size=16)
    digest.update(f"{self.bos_id} {self.eos_id}".encode())
    self.fingerprint = digest.hexdigest()

  def encode(self, text: str) -> Int[np.ndarray, " T"]:
    """Ids of the text alone, int32, without bos and eos."""
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return np.asarray(encoding.ids, np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """encode of each of them, on all cores."""
    encodings = self._tokenizer.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [np.asarray(e.ids, np.int32) for e in encodings]

  def decode(self, ids: Iterable[int]) -> str:
    """The text of the ids; bos, eos and other special ids are left out."""
    special = {self.bos_id, self.eos_id}
    kept = [i for i in map(int, ids) if i not in special]
    return self._tokenizer.decode(kept, skip_special_tokens=True)


def load(
  spec: str, *, bos: str | None = None, eos: str | None = None
) -> Tokenizer:
  """The tokenizer of that name.

  Args:
    spec: "byte", or the path of a tokenizer.json or of a folder that holds one.
    bos: the token that opens a document; looked up if None.
    eos: the token that closes a document; looked up if None.

  Raises:
    UserError: see JsonTokenizer.
  """
  if spec == "byte":
    if bos is not None or eos is not None:
      raise UserError(
        "the byte tokenizer has its own bos (256) and eos (257); bos and eos "
        "are given with a tokenizer.json only"
      )
    return ByteTokenizer()
  return JsonTokenizer(spec, bos=bos, eos=eos)


def _read_config(path: Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path}: not JSON ({error})") from error
  return config if isinstance(config, dict) else {}


def _find(
  file: Path,
  kind: str,
  named: Sequence[Any],
  usual: Sequence[str],
  vocabulary: dict[str, int],
  added: dict[str, int],
  default: int | None = None,
) -> int:
  """The id of the bos or eos token: as given, as configured, as usual."""
  for token in named:
    if isinstance(token, dict):  # An AddedToken, as it is written to JSON.
      token = token.get("content")
    if token is None:
      continue
    if token not in vocabulary:
      raise UserError(
        f"{file}: the {kind} token {token!r} is not in its vocabulary"
        f"{nearest(token, added)}; its added tokens: {_listing(added)}"
      )
    return vocabulary[token]
  for token in usual:
    if token in added:
      return added[token]
  if default is not None:
    return default
  raise UserError(
    f"{file}: cannot tell which token is {kind}; give it as {kind}=, one of "
    f"its added tokens: {_listing(added)}"
  )


def _listing(tokens: dict[str, int], most: int = 12) -> str:
  names = [repr(t) for t in tokens]
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return (", ".join(names[:most]) or "it has none") + more


class StreamDecoder:
  """Text of ids that arrive one after another.

  push gives the text that is certain; a character whose bytes are not all there
  yet is held back. All pushes and the flush joined are the tokenizer's decode
  of all ids.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
    # The last ids whose text is emitted, how many they are, and those that
    # wait. The former stay because a decoder treats the start of a text as
    # special: some drop a space there.
    self._ids: list[int] = []
    self._emitted = 0

  def push(self, ids: int | Iterable[int]) -> str:
    """The text that these ids complete; may be empty."""
    if isinstance(ids, int | np.integer) or getattr(ids, "ndim", 1) == 0:
      ids = [ids]
    if isinstance(self._tokenizer, ByteTokenizer):
      return self._bytes.decode(self._tokenizer.decode_bytes(ids))
    return "".join([self._push_one(int(i)) for i in ids])

  def flush(self) -> str:
    """What is held back, as the end of the text; then a new text begins."""
    if isinstance(self._tokenizer, ByteTokenizer):
      text = self._bytes.decode(b"", final=True)
      self._bytes.reset()
      return text
    text = self._waiting_text()
    self._ids, self._emitted = [], 0
    return text

  def _push_one(self, token: int) -> str:
    self._ids.append(token)
    text = self._waiting_text()
    # Decoders write U+FFFD for a character that is not complete.
    if not text or text.endswith("\ufffd"):
      return ""
    self._ids = self._ids[self._emitted :]
    self._emitted = len(self._ids)
    return text

  def _waiting_text(self) -> str:
    emitted = self._tokenizer.decode(self._ids[: self._emitted])
    return self._tokenizer.decode(self._ids)[len(emitted) :]
