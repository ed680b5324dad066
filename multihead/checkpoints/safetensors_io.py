"""Lazy reads of weight files through the `safetensors` library."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from multihead.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# What weights may be, by the format's name for it.
DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor of a file, mapped into memory; `data` is the library's slice."""

  name: str
  path: pathlib.Path
  data: Any = dataclasses.field(repr=False)

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.data.get_shape())

  @property
  def dtype(self) -> np.dtype:
    """The numpy dtype; raises UserError for one that holds no weights."""
    if (code := self.data.get_dtype()) not in DTYPES:
      raise UserError(
        f"{self.path}: tensor {self.name!r} is stored as {code}; weights are "
        f"loaded from {', '.join(DTYPES)}. Convert the checkpoint to one of "
        "these (quantised checkpoints are not supported)."
      )
    return DTYPES[code]

  def read(self, *index: slice) -> np.ndarray:
    """Copies a part, one slice of step 1 per axis; reads no more than that."""
    dtype = self.dtype  # refuses a type that the library cannot make either
    bounds = [s.indices(n) for s, n in zip(index, self.shape, strict=True)]
    part = [max(0, stop - start) for start, stop, _ in bounds]
    if 0 in part:  # the library raises for some of these
      return np.empty(part, dtype)
    return self.data[tuple(slice(start, stop) for start, stop, _ in bounds)]


def read_file(path: str | os.PathLike) -> dict[str, StoredTensor]:
  """Opens one file; no values are read yet.

  Raises:
    UserError: the file is missing, torn or is not a safetensors file; the
      text has the path and the reason.
  """
  path = pathlib.Path(path)
  try:
    # The slices keep the mapping; it goes when the last of them does.
    with safe_open(path, framework="np") as file:
      names = file.keys()
      return {n: StoredTensor(n, path, file.get_slice(n)) for n in names}
  except OSError as e:
    raise UserError(f"{path}: cannot be read: {e}.") from e
  except SafetensorError as e:
    with path.open("rb") as f:
      pointer = f.read(64).startswith(b"version https://git-lfs")
    raise UserError(
      f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` there."
      if pointer
      else f"{path}: torn or not a safetensors file: {e}. Download or write "
      "the file again."
    ) from e


def read_directory(path: str | os.PathLike) -> dict[str, StoredTensor]:
  """Opens model.safetensors, or the files that its index names, each once.

  Raises:
    UserError: no safetensors there (a pickled checkpoint is never loaded), a
      missing or torn shard, or an index that contradicts its files.
  """
  path = pathlib.Path(path)
  index = path / INDEX_FILE
  if (path / SINGLE_FILE).exists():
    return read_file(path / SINGLE_FILE)
  if not index.exists():
    there = sorted(p.name for p in path.iterdir())
    raise UserError(
      f"{path}: no {SINGLE_FILE} and no {INDEX_FILE} among its {len(there)} "
      f"files: {shorten(there)}. Pickled weights (*.bin, *.pt) are not loaded, "
      "since reading one can run any code; where you trust them, load them "
      "with transformers and write them with its save_pretrained."
    )
  try:
    owners = json.loads(index.read_text("utf-8"))["weight_map"]
    files = sorted(set(owners.values()))
    outside = [file for file in files if pathlib.Path(file).name != file]
  except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
    raise UserError(
      f"{index}: not an index of safetensors files ({type(e).__name__}: {e}). "
      "Download or write the file again."
    ) from e
  if outside:
    raise UserError(f"{index}: names a file elsewhere: {outside[0]!r}.")
  if missing := [file for file in files if not (path / file).is_file()]:
    raise UserError(
      f"{path}: {len(missing)} of {len(files)} weight files are missing: "
      f"{shorten(missing)}. Download or write the directory again."
    )
  tensors = {}
  for file in files:
    found = read_file(path / file)
    promised = {name for name, owner in owners.items() if owner == file}
    if wrong := sorted(found.keys() ^ promised):
      raise UserError(
        f"{path / file}: holds other tensors than {INDEX_FILE} says: "
        f"{shorten(wrong)}. Download or write the directory again."
      )
    tensors |= found
  return tensors


def shorten(names: Sequence[str], limit: int = 20) -> str:
  """Joins names for an error text, at most `limit` of them."""
  rest = len(names) - limit
  text = ", ".join(names[:limit])
  return f"{text} and {rest} more" if rest > 0 else text
