"""Safetensors files, read through a memory map and written tensor by tensor.

The format is eight bytes of header length, a JSON header with name, dtype,
shape and byte range of each tensor, then the raw little-endian values. It is
read here without a copy, so that a reader takes just the bytes of its shard,
and written as a stream, so that one tensor at a time is in host memory. A file
written here is what the `safetensors` library reads, and the reverse.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Sequence

import ml_dtypes
import numpy as np

from multihead.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# Sizes of the types that are not loaded, to find torn files all the same.
_OTHER_BITS = {
  "F64": 64, "I64": 64, "U64": 64, "C64": 64, "I32": 32, "U32": 32, "I16": 16,
  "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
}  # fmt: skip
_BITS = {k: 8 * v.itemsize for k, v in _DTYPES.items()} | _OTHER_BITS
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """One tensor of a file: where it lies, read only when it is sliced.

  Attributes:
    name: name in the file.
    code: dtype code of the format, e.g. "BF16".
    shape: shape in the file.
    path: the file.
    data: its bytes in the mapped file.
  """

  name: str
  code: str
  shape: tuple[int, ...]
  path: pathlib.Path
  data: np.ndarray = dataclasses.field(repr=False)

  @property
  def dtype(self) -> np.dtype:
    """The numpy dtype; raises UserError for one that holds no weights."""
    if self.code not in _DTYPES:
      raise UserError(
        f"{self.path}: tensor {self.name!r} is stored as {self.code}; weights "
        f"are loaded from {', '.join(_DTYPES)}. Convert the checkpoint to one "
        "of these (quantised checkpoints are not supported)."
      )
    return _DTYPES[self.code]

  def view(self) -> np.ndarray:
    """A read-only view of the mapped file; slicing it reads that part."""
    return self.data.view(self.dtype).reshape(self.shape)


def read_header(path: str | os.PathLike) -> dict[str, StoredTensor]:
  """Reads the header of one file and checks it against the file's size.

  Raises:
    UserError: the file is missing, torn or is not a safetensors file; the
      text has the path and the reason.
  """
  path = pathlib.Path(path)
  try:
    return _read_header(path)
  except OSError as e:
    raise UserError(f"{path}: cannot be read: {e.strerror or e}.") from e


def _read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
  def torn(reason: str) -> UserError:
    return UserError(
      f"{path}: torn or not a safetensors file: {reason}. Download or write "
      "the file again."
    )

  size = path.stat().st_size
  with path.open("rb") as f:
    start = f.read(64)
    if start.startswith(b"version https://git-lfs"):
      raise UserError(
        f"{path}: a Git LFS pointer, not the weights. Run `git lfs pull` in "
        f"{path.parent}."
      )
    if len(start) < _LENGTH.size:
      raise torn(f"it has {size} bytes")
    (length,) = _LENGTH.unpack(start[: _LENGTH.size])
    if length > _MAX_HEADER_BYTES:
      raise torn(f"it announces a header of {length} bytes")
    f.seek(_LENGTH.size)
    raw = f.read(length)
  if len(raw) < length:
    raise torn(f"the header has {length} bytes but the file ends after {size}")
  try:
    header = json.loads(raw)
    header.pop("__metadata__", None)
    entries = sorted(
      ((name, *_entry(spec)) for name, spec in header.items()),
      key=lambda entry: entry[3],
    )
  except (ValueError, TypeError, KeyError, AttributeError) as e:
    raise torn(f"the header is not valid ({type(e).__name__}: {e})") from e
  values = np.asarray(np.memmap(path, np.uint8, "r"))[_LENGTH.size + length :]
  position = 0
  tensors = {}
  for name, code, shape, begin, end in entries:
    bits = math.prod(shape) * _BITS.get(code, 0)
    if code in _BITS and 8 * (end - begin) != bits:
      raise torn(
        f"tensor {name!r} of shape {list(shape)} and dtype {code} has "
        f"{end - begin} bytes"
      )
    if begin != position or end < begin:
      raise torn(f"tensor {name!r} starts at byte {begin}, not at {position}")
    position = end
    tensors[name] = StoredTensor(name, code, shape, path, values[begin:end])
  if len(values) != position:
    raise torn(
      f"{position} bytes of values are announced, {len(values)} are there"
    )
  return tensors


def _entry(spec: dict) -> tuple[str, tuple[int, ...], int, int]:
  begin, end = (int(offset) for offset in spec["data_offsets"])
  return str(spec["dtype"]), tuple(int(n) for n in spec["shape"]), begin, end


def read_directory(path: str | os.PathLike) -> dict[str, StoredTensor]:
  """Finds all tensors of a checkpoint directory, in one file or in shards.

  Args:
    path: a directory with model.safetensors, or with
      model.safetensors.index.json and the files it names.

  Returns:
    Name to tensor; no values are read yet.

  Raises:
    UserError: no safetensors there (a pickled checkpoint is never loaded), a
      missing or torn shard, or an index that contradicts its files.
  """
  path = pathlib.Path(path)
  if (path / SINGLE_FILE).exists():
    return read_header(path / SINGLE_FILE)
  if not (path / INDEX_FILE).exists():
    raise _no_weights(path)
  index_path = path / INDEX_FILE
  try:
    weight_map = json.loads(index_path.read_text("utf-8"))["weight_map"]
    files = sorted(set(weight_map.values()))
  except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
    raise UserError(
      f"{index_path}: not an index of safetensors files "
      f"({type(e).__name__}: {e}). Download or write the file again."
    ) from e
  outside = [file for file in files if pathlib.Path(file).name != file]
  if outside:
    raise UserError(f"{index_path}: names a file elsewhere: {outside[0]!r}.")
  missing = [file for file in files if not (path / file).is_file()]
  if missing:
    raise UserError(
      f"{path}: {len(missing)} of {len(files)} weight files are missing: "
      f"{shorten(missing)}. Download or write the directory again."
    )
  tensors = {}
  for file in files:
    header = read_header(path / file)
    promised = {name for name, owner in weight_map.items() if owner == file}
    if header.keys() != promised:
      wrong = sorted(header.keys() ^ promised)
      raise UserError(
        f"{path / file}: holds other tensors than {INDEX_FILE} says: "
        f"{shorten(wrong)}. Download or write the directory again."
      )
    tensors |= header
  return tensors


def _no_weights(path: pathlib.Path) -> UserError:
  pickles = sorted(p.name for p in path.glob("*.bin"))
  pickles += sorted(p.name for p in path.glob("*.pt*"))
  if pickles:
    return UserError(
      f"{path}: only pickled weights ({shorten(pickles)}); pickles are not "
      "loaded, since reading one can run any code. Convert them where you "
      "trust them: `python -c \"import transformers as t; d = '"
      f"{path}'; t.AutoModelForCausalLM.from_pretrained(d, dtype='auto')"
      '.save_pretrained(d)"` writes model.safetensors.'
    )
  there = sorted(p.name for p in path.iterdir())
  return UserError(
    f"{path}: no {SINGLE_FILE} and no {INDEX_FILE}; the directory has "
    f"{shorten(there) if there else 'no files'}."
  )


def shorten(names: Sequence[str], limit: int = 20) -> str:
  """Joins names for an error text, at most `limit` of them."""
  rest = len(names) - limit
  text = ", ".join(names[:limit])
  return f"{text} and {rest} more" if rest > 0 else text


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
  """A tensor that is made when its turn to be written comes.

  Attributes:
    name: name in the file.
    dtype: numpy dtype; float32, float16 or bfloat16.
    shape: shape in the file.
    make: returns the values, of this dtype and shape.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_file(
  path: str | os.PathLike | None, tensors: Iterable[TensorToWrite]
) -> None:
  """Writes one file, each tensor made, written and dropped in turn.

  Args:
    path: the file; None makes every tensor and writes nothing, which is what
      the other processes of a job do while the first one writes.
    tensors: what goes in, in this order.
  """
  tensors = list(tensors)
  header: dict[str, object] = {"__metadata__": {"format": "pt"}}
  position = 0
  for tensor in tensors:
    header[tensor.name] = {
      "dtype": _code(tensor),
      "shape": list(tensor.shape),
      "data_offsets": [position, position + tensor.size],
    }
    position += tensor.size
  raw = json.dumps(header, separators=(",", ":")).encode()
  raw += b" " * (-len(raw) % 8)  # values start at a multiple of eight
  if path is None:
    for tensor in tensors:
      tensor.make()
    return
  with open(path, "wb") as f:
    f.write(_LENGTH.pack(len(raw)))
    f.write(raw)
    for tensor in tensors:
      values = np.asarray(tensor.make(), tensor.dtype, order="C")
      if values.shape != tensor.shape:
        raise ValueError(
          f"{tensor.name}: made shape {values.shape}, announced {tensor.shape}"
        )
      f.write(values.reshape(-1).view(np.uint8).data)
    f.flush()
    os.fsync(f.fileno())


def _code(tensor: TensorToWrite) -> str:
  dtype = np.dtype(tensor.dtype)
  if dtype not in _CODES:
    raise UserError(
      f"{tensor.name}: dtype {dtype} cannot be saved; allowed are "
      f"{', '.join(d.name for d in _CODES)}. Cast the parameters first."
    )
  return _CODES[dtype]


def split_into_shards(
  tensors: Iterable[TensorToWrite], max_shard_size: int
) -> dict[str, list[TensorToWrite]]:
  """Spreads tensors over files of at most `max_shard_size` bytes of values.

  A tensor larger than that has a file of its own. Returns file name to its
  tensors, in order; one file is named model.safetensors.
  """
  shards: list[list[TensorToWrite]] = [[]]
  room = max_shard_size
  for tensor in tensors:
    if shards[-1] and tensor.size > room:
      shards.append([])
      room = max_shard_size
    shards[-1].append(tensor)
    room -= tensor.size
  if len(shards) == 1:
    return {SINGLE_FILE: shards[0]}
  n = len(shards)
  return {
    f"model-{i:05d}-of-{n:05d}.safetensors": shard
    for i, shard in enumerate(shards, 1)
  }


def index_of(shards: dict[str, list[TensorToWrite]]) -> dict[str, object]:
  """The content of model.safetensors.index.json for these shards."""
  total = sum(t.size for shard in shards.values() for t in shard)
  weight_map = {t.name: file for file, shard in shards.items() for t in shard}
  return {"metadata": {"total_size": total}, "weight_map": weight_map}
