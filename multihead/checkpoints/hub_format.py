"""Moves parameters between our trees and a Hugging Face weight directory.

A family (one file per model family beside this one) states its key map, as
entries of key_map.py. This file turns a key map into reads that go straight to
the shard that wants them, and into writes that gather one file at a time.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors.numpy import save_file

from multihead.checkpoints.key_map import Entry, Tensor, resolve
from multihead.checkpoints.safetensors_io import (
  DTYPES,
  INDEX_FILE,
  SINGLE_FILE,
  StoredTensor,
  read_directory,
  shorten,
)
from multihead.errors import UserError
from multihead.parallel import sharding as sharding_lib

# Buffers that some exporters keep; the config determines them.
_DERIVED = (
  ".rotary_emb.inv_freq",
  ".mamba.mup_vector",
  "embeddings.position_ids",
)


def _flatten(tree: Any) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(tree, sep="/")


def check_names(
  path: pathlib.Path,
  expected: Mapping[str, tuple[int, ...]],
  found: Mapping[str, tuple[int, ...]],
  hint: str = "",
) -> None:
  """Raises one UserError with every missing, unexpected or mis-shaped name."""
  problems = []
  if missing := [name for name in expected if name not in found]:
    problems.append(f"{len(missing)} missing: {shorten(missing)}")
  if unexpected := [name for name in found if name not in expected]:
    problems.append(f"{len(unexpected)} unexpected: {shorten(unexpected)}")
  wrong = [
    f"{name} is {list(found[name])}, not {list(shape)}"
    for name, shape in expected.items()
    if name in found and found[name] != shape
  ]
  if wrong:
    problems.append(f"{len(wrong)} of another shape: {shorten(wrong)}")
  if problems:
    raise UserError(
      f"{path}: the tensors do not fit the model: {'; '.join(problems)}.{hint}"
    )


def load_params(
  path: str | os.PathLike,
  model: Any,
  entries: Sequence[Entry],
  *,
  dtype: np.dtype | None = None,
  mesh: Mesh | None = None,
  copies: Mapping[str, str] | None = None,
  rename: Callable[[str], str | None] = str,
) -> Any:
  """Reads a directory's safetensors into a parameter tree of the model.

  Args:
    path: the directory.
    model: says shapes and shardings.
    entries: the family's key map.
    dtype: of the parameters; None keeps each as it is stored.
    mesh: each device reads its own shard; None puts all on the default device.
    copies: stored names that may be there as copies of another stored tensor
      (tied weights); they are compared and dropped.
    rename: a stored name to that in the key map; None drops the tensor.

  Returns:
    The parameters. In host memory there is never more than one parameter's
    shards for the devices of this process, and one layer's part of it as it is
    stored.

  Raises:
    UserError: files missing or torn; tensors missing, unexpected, of another
      shape or type; a copy that differs.
  """
  path = pathlib.Path(path)
  shapes = {
    name: leaf.shape
    for name, leaf in _flatten(sharding_lib.abstract_params(model)).items()
  }
  tensors = resolve(entries, shapes, model.num_hidden_layers)
  stored = {
    rename(name): tensor
    for name, tensor in read_directory(path).items()
    if not name.endswith(_DERIVED) and rename(name) is not None
  }
  dropped = {
    name: stored.pop(name)
    for name, original in (copies or {}).items()
    if name in stored and original in stored
  }
  hint = ""
  names = {tensor.name for tensor in tensors}
  if "lm_head.weight" in names - stored.keys() and not copies:
    hint = " A checkpoint without lm_head needs tie_word_embeddings true."
  check_names(
    path,
    {tensor.name: tensor.shape for tensor in tensors},
    {name: tensor.shape for name, tensor in stored.items()},
    hint,
  )
  for name, copy in dropped.items():
    _check_copy(path, copy, stored[copies[name]])
  sources = _sources(tensors, stored)
  shardings = (
    {} if mesh is None else _flatten(sharding_lib.param_shardings(model, mesh))
  )
  params = {
    name: _place(name, sources[name], shapes[name], dtype, shardings.get(name))
    for name in shapes
  }
  return flax.traverse_util.unflatten_dict(params, sep="/")


def _check_copy(
  path: pathlib.Path, copy: StoredTensor, original: StoredTensor
) -> None:
  same = copy.shape == original.shape and copy.dtype == original.dtype
  # Bit for bit and some rows at a time: both may be gigabytes.
  step = 64
  same = same and all(
    copy.read(slice(i, i + step), slice(None)).tobytes()
    == original.read(slice(i, i + step), slice(None)).tobytes()
    for i in range(0, copy.shape[0], step)
  )
  if not same:
    raise UserError(
      f"{path}: tie_word_embeddings is true but {copy.name} differs from "
      f"{original.name}. Set it to false in config.json to load both."
    )


@dataclasses.dataclass(frozen=True)
class _Source:
  """Where a parameter, or one layer's slice of it, is stored.

  Attributes:
    tensor: the stored tensor, which may hold other parameters too.
    entry: its entry of the key map.
    row: where the parameter begins on the tensor's first axis.
    shape: of the parameter.
  """

  tensor: StoredTensor
  entry: Entry
  row: int
  shape: tuple[int, ...]

  def read(self, index: tuple[slice, ...]) -> np.ndarray:
    """The part of the parameter at `index`, a slice of step 1 per axis."""
    (rows, *others), inner, shape = self.entry.window(index, self.shape)
    rows = slice(self.row + rows.start, self.row + rows.stop)
    stored = self.tensor.read(rows, *others)
    return self.entry.from_stored(stored, shape)[inner]


def _sources(
  tensors: Sequence[Tensor], stored: Mapping[str, StoredTensor]
) -> dict[str, list[_Source]]:
  """Where each parameter is stored: one place per layer if it is stacked."""
  sources: dict[str, list[_Source]] = collections.defaultdict(list)
  for tensor in tensors:
    row = 0
    for part in tensor.parts:
      source = _Source(stored[tensor.name], tensor.entry, row, part.shape)
      sources[part.path].append(source)
      row += tensor.entry.stored_shape(part.shape)[0]
  return sources


def _place(
  name: str,
  sources: Sequence[_Source],
  shape: tuple[int, ...],
  dtype: np.dtype | None,
  sharding: NamedSharding | None,
) -> jax.Array:
  """Reads one parameter: each shard for itself if there is a sharding."""
  stacked = len(shape) == len(sources[0].shape) + 1
  kinds = {source.tensor.dtype for source in sources}
  if dtype is None and len(kinds) > 1:
    raise UserError(
      f"{name}: its layers are stored as {sorted(k.name for k in kinds)}; say "
      "which one to load with dtype=."
    )
  dtype = np.dtype(dtype or sources[0].tensor.dtype)

  def read(index: tuple[slice, ...]) -> np.ndarray:
    if not stacked:
      return np.asarray(sources[0].read(index), dtype, order="C")
    part = [len(range(n)[s]) for s, n in zip(index, shape, strict=True)]
    out = np.empty(part, dtype)
    for i, source in enumerate(sources[index[0]]):
      out[i] = source.read(index[1:])
    return out

  if sharding is None:
    return jax.device_put(read((slice(None),) * len(shape)))

  # Devices that hold the same part share one reading of it.
  seen: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

  def shard(index: tuple[slice, ...]) -> np.ndarray:
    key = tuple(s.indices(n) for s, n in zip(index, shape, strict=True))
    if key not in seen:
      seen[key] = read(index)
    return seen[key]

  return jax.make_array_from_callback(shape, sharding, shard)


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
  """A tensor whose values `make` gathers when its file is written."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def tensors_to_write(
  model: Any,
  params: Any,
  entries: Sequence[Entry],
  dtype: np.dtype | None = None,
) -> list[TensorToWrite]:
  """The stored tensors of a parameter tree, each gathered when it is made.

  Args:
    model: the model of the parameters.
    params: its tree, on the host, on one device or sharded.
    entries: the family's key map.
    dtype: stored dtype; None keeps the dtype of each parameter.

  Raises:
    UserError: the tree is not this model's, or holds what is not float.
  """
  leaves = _flatten(params)
  expected = _flatten(sharding_lib.abstract_params(model))
  shapes = {name: leaf.shape for name, leaf in expected.items()}
  check_names(
    pathlib.Path("params"),
    shapes,
    {name: tuple(np.shape(leaf)) for name, leaf in leaves.items()},
  )

  def write(tensor: Tensor) -> TensorToWrite:
    kinds = {np.dtype(leaves[part.path].dtype) for part in tensor.parts}
    if dtype is None and len(kinds) > 1:
      raise UserError(
        f"{tensor.name} joins parameters of {sorted(k.name for k in kinds)}; "
        "cast them to one dtype, or pass dtype=."
      )
    kind = np.dtype(dtype or kinds.pop())
    if kind not in DTYPES.values():
      raise UserError(
        f"{tensor.name}: dtype {kind} cannot be saved; allowed are "
        f"{', '.join(d.name for d in DTYPES.values())}. Pass dtype=."
      )

    def make() -> np.ndarray:
      parts = [_fetch(leaves[part.path], part.layer) for part in tensor.parts]
      parts = [tensor.entry.to_stored(part) for part in parts]
      return np.concatenate(parts).astype(kind, copy=False)

    return TensorToWrite(tensor.name, kind, tensor.shape, make)

  tensors = resolve(entries, shapes, model.num_hidden_layers)
  return [write(tensor) for tensor in tensors]


@functools.lru_cache(maxsize=256)
def _picker(stacked: bool, sharding: NamedSharding | None) -> Any:
  """A compiled read of one layer; the layer's number is not part of it."""

  def pick(leaf: jax.Array, layer: int) -> jax.Array:
    if not stacked:
      return leaf
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)

  return jax.jit(pick, out_shardings=sharding)


def _fetch(leaf: Any, layer: int | None) -> np.ndarray:
  """One parameter, or one layer of it, in host memory of this process."""
  if not isinstance(leaf, jax.Array):
    return np.asarray(leaf if layer is None else leaf[layer])
  if leaf.is_fully_addressable:
    if layer is None:
      return np.asarray(leaf)
    return np.asarray(_picker(True, None)(leaf, layer))
  # Other processes hold a part of it: all of them take part in this gather.
  everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
  return np.asarray(_picker(layer is not None, everywhere)(leaf, layer or 0))


def split_into_shards(
  tensors: Sequence[TensorToWrite], max_shard_size: int
) -> dict[str, list[TensorToWrite]]:
  """File name to its tensors, at most `max_shard_size` bytes of values each.

  A larger tensor has a file of its own; one file is named model.safetensors.
  """
  shards: list[list[TensorToWrite]] = []
  room = 0
  for tensor in tensors:
    if not shards or tensor.size > room:
      shards.append([])
      room = max_shard_size
    shards[-1].append(tensor)
    room -= tensor.size
  n = len(shards)
  if n == 1:
    return {SINGLE_FILE: shards[0]}
  return {
    f"model-{i:05d}-of-{n:05d}.safetensors": shard
    for i, shard in enumerate(shards, 1)
  }


def write_directory(
  path: str | os.PathLike,
  tensors: Sequence[TensorToWrite],
  documents: Mapping[str, Mapping[str, Any]],
  *,
  max_shard_size: int,
  files: Sequence[pathlib.Path] = (),
) -> None:
  """Writes a checkpoint directory; a killed run leaves no readable half.

  All files are written under temporary names. Then config.json is removed,
  the others are renamed into place, and config.json comes last: a directory
  without it is refused by every reader.

  Args:
    path: the directory, made if needed. Weights of an earlier save are
      replaced.
    tensors: what to store.
    documents: JSON files by name, config.json among them.
    max_shard_size: bytes of values per weight file, all of them in host memory
      while the file is written.
    files: further files to copy, under their own names.
  """
  path = pathlib.Path(path)
  writer = jax.process_index() == 0
  shards = split_into_shards(tensors, max_shard_size)
  documents = dict(documents)
  if len(shards) > 1:
    documents[INDEX_FILE] = {
      "metadata": {"total_size": sum(tensor.size for tensor in tensors)},
      "weight_map": {t.name: file for file in shards for t in shards[file]},
    }
  if not writer:
    for tensor in tensors:
      tensor.make()  # takes part in the gathering
  else:
    _write_files(path, shards, documents, files)
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(f"saved {path}")


def write_file(path: pathlib.Path, tensors: Sequence[TensorToWrite]) -> None:
  """Writes one weight file; UserError if that fails, e.g. for want of space."""
  # The library writes memory as it lies and takes no note of strides.
  values = {t.name: np.asarray(t.make(), t.dtype, order="C") for t in tensors}
  path.touch()
  mode = path.stat().st_mode & 0o777  # the library's own is private
  try:
    save_file(values, path, metadata={"format": "pt"})
  except SafetensorError as e:
    raise UserError(f"{path}: cannot be written: {e}.") from e
  path.chmod(mode)
  with path.open("rb") as f:
    os.fsync(f.fileno())


def _write_files(
  path: pathlib.Path,
  shards: Mapping[str, Sequence[TensorToWrite]],
  documents: Mapping[str, Mapping[str, Any]],
  files: Sequence[pathlib.Path],
) -> None:
  if path.exists() and not path.is_dir():
    raise UserError(f"{path}: is a file; give a directory to save into.")
  path.mkdir(parents=True, exist_ok=True)
  partial = path / ".partial"
  shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
  partial.mkdir()
  try:
    for name, shard in shards.items():
      write_file(partial / name, shard)
    for name, document in documents.items():
      text = json.dumps(document, indent=2, sort_keys=True) + "\n"
      (partial / name).write_text(text, "utf-8")
    for file in files:
      shutil.copyfile(file, partial / file.name)
    names = sorted(p.name for p in partial.iterdir() if p.name != "config.json")
    (path / "config.json").unlink(missing_ok=True)
    for stale in list(path.glob("model*.safetensors*")):
      if stale.name not in names:
        stale.unlink()
    for name in [*names, "config.json"]:
      os.replace(partial / name, path / name)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
