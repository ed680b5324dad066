"""Moves parameters between our trees and a Hugging Face weight directory.

A family (one file per model family beside this one) states its key map: which
of our parameters each stored tensor holds, and in which layout. This file turns
a key map into reads that go straight to the shard that wants them, and into
writes that gather one tensor at a time.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.traverse_util
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from multihead.checkpoints import safetensors_io
from multihead.checkpoints.safetensors_io import StoredTensor, TensorToWrite
from multihead.errors import UserError
from multihead.parallel import sharding as sharding_lib

Layout = Literal["matrix", "vector", "linear", "conv"]

# Buffers that some exporters keep; the config determines them.
_DERIVED = (".rotary_emb.inv_freq", ".mamba.mup_vector")


@dataclasses.dataclass(frozen=True)
class Entry:
  """One stored tensor and the parameters of ours that it holds.

  Attributes:
    name: name of the stored tensor; `{layer}` stands for the layer's number.
    paths: our parameters, joined along the first axis of the stored tensor.
      A path under `layers/` is one layer's part of the stack.
    layout: how one parameter is stored. `matrix`: as it is. `vector`: all axes
      flattened. `linear`: [inputs, outputs] stored as [outputs, inputs].
      `conv`: [W, channels] stored as [channels, 1, W].
    inputs: number of leading axes of a `linear` kernel that are its input.
  """

  name: str
  paths: tuple[str, ...]
  layout: Layout
  inputs: int = 1

  def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stored shape of one of our parameters of this shape."""
    match self.layout:
      case "matrix":
        return shape
      case "vector":
        return (math.prod(shape),)
      case "linear":
        k = self.inputs
        return math.prod(shape[k:]), math.prod(shape[:k])
      case "conv":
        return math.prod(shape[1:]), 1, shape[0]

  def to_stored(self, value: np.ndarray) -> np.ndarray:
    """One of our parameters as it is stored."""
    match self.layout:
      case "linear":
        outputs, inputs = self.stored_shape(value.shape)
        return value.reshape(inputs, outputs).T
      case "conv":
        return value.reshape(value.shape[0], -1).T[:, None]
    return value.reshape(self.stored_shape(value.shape))

  def from_stored(
    self, stored: np.ndarray, shape: tuple[int, ...]
  ) -> np.ndarray:
    """A view of the stored rows in our layout; copies nothing."""
    match self.layout:
      case "linear":
        stored = stored.T
      case "conv":
        stored = stored[:, 0].T
    return stored.reshape(shape)


@dataclasses.dataclass(frozen=True)
class _Part:
  """A parameter, or one layer's slice of a stacked one."""

  path: str
  layer: int | None
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """A stored tensor, resolved for one model."""

  name: str
  entry: Entry
  parts: tuple[_Part, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    shapes = [self.entry.stored_shape(part.shape) for part in self.parts]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _resolve(
  entries: Sequence[Entry], shapes: Mapping[str, tuple[int, ...]], layers: int
) -> list[_Tensor]:
  """Spells out a key map for a parameter tree, stacked or not."""

  def part(path: str, layer: int | None) -> _Part:
    if layer is None:
      return _Part(path, None, shapes[path])
    if path in shapes:
      return _Part(path, layer, shapes[path][1:])
    path = path.replace("layers/", f"layers_{layer}/", 1)
    return _Part(path, None, shapes[path])

  def tensor(entry: Entry, layer: int | None) -> _Tensor:
    parts = tuple(part(path, layer) for path in entry.paths)
    return _Tensor(entry.name.format(layer=layer), entry, parts)

  per_layer = [e for e in entries if e.paths[0].startswith("layers/")]
  tensors = [tensor(e, None) for e in entries if e not in per_layer]
  tensors += [tensor(e, i) for i in range(layers) for e in per_layer]
  covered = {part.path for t in tensors for part in t.parts}
  if covered != shapes.keys():
    raise ValueError(
      f"the key map and the model differ in {sorted(covered ^ shapes.keys())}"
    )
  return tensors


def _flatten(tree: Any) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(tree, sep="/")


def check_names(
  path: pathlib.Path,
  expected: Mapping[str, tuple[int, ...]],
  found: Mapping[str, tuple[int, ...]],
  hint: str = "",
) -> None:
  """Raises one UserError with every missing, unexpected or mis-shaped name."""
  shorten = safetensors_io.shorten
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

  Returns:
    The parameters. In host memory there is never more than one parameter's
    shards for the devices of this process.

  Raises:
    UserError: files missing or torn; tensors missing, unexpected, of another
      shape or type; a copy that differs.
  """
  path = pathlib.Path(path)
  shapes = {
    name: leaf.shape
    for name, leaf in _flatten(sharding_lib.abstract_params(model)).items()
  }
  tensors = _resolve(entries, shapes, model.num_hidden_layers)
  stored = {
    name: tensor
    for name, tensor in safetensors_io.read_directory(path).items()
    if not name.endswith(_DERIVED)
  }
  for name, original in (copies or {}).items():
    if name in stored and original in stored:
      _check_copy(path, stored.pop(name), stored[original])
  hint = ""
  if "lm_head.weight" not in stored and not copies:
    hint = " A checkpoint without lm_head needs tie_word_embeddings true."
  check_names(
    path,
    {tensor.name: tensor.shape for tensor in tensors},
    {name: tensor.shape for name, tensor in stored.items()},
    hint,
  )
  views = _views(tensors, stored)
  shardings = (
    {} if mesh is None else _flatten(sharding_lib.param_shardings(model, mesh))
  )
  params = {
    name: _place(name, views[name], shapes[name], dtype, shardings.get(name))
    for name in shapes
  }
  return flax.traverse_util.unflatten_dict(params, sep="/")


def _check_copy(
  path: pathlib.Path, copy: StoredTensor, original: StoredTensor
) -> None:
  same = copy.shape == original.shape and copy.dtype == original.dtype
  # Bit for bit and a mebibyte at a time: both may be gigabytes.
  step = 2**20
  same = same and all(
    np.array_equal(copy.data[i : i + step], original.data[i : i + step])
    for i in range(0, copy.data.size, step)
  )
  if not same:
    raise UserError(
      f"{path}: tie_word_embeddings is true but {copy.name} differs from "
      f"{original.name}. Set it to false in config.json to load both."
    )


def _views(
  tensors: Sequence[_Tensor], stored: Mapping[str, StoredTensor]
) -> dict[str, list[np.ndarray]]:
  """Lazy views in our layout: one per layer for a stacked parameter."""
  views: dict[str, list[np.ndarray]] = collections.defaultdict(list)
  for tensor in tensors:
    whole = stored[tensor.name].view()
    row = 0
    for part in tensor.parts:
      rows = tensor.entry.stored_shape(part.shape)[0]
      view = tensor.entry.from_stored(whole[row : row + rows], part.shape)
      views[part.path].append(view)
      row += rows
  return views


def _place(
  name: str,
  views: Sequence[np.ndarray],
  shape: tuple[int, ...],
  dtype: np.dtype | None,
  sharding: NamedSharding | None,
) -> jax.Array:
  """Reads one parameter: each shard for itself if there is a sharding."""
  stacked = len(shape) == views[0].ndim + 1
  kinds = {view.dtype for view in views}
  if dtype is None and len(kinds) > 1:
    raise UserError(
      f"{name}: its layers are stored as {sorted(k.name for k in kinds)}; say "
      "which one to load with dtype=."
    )
  dtype = np.dtype(dtype or views[0].dtype)

  def read(index: tuple[slice, ...]) -> np.ndarray:
    # Always a copy: a device array must not alias the mapped file.
    if not stacked:
      return np.array(views[0][index], dtype, order="C")
    layers = views[index[0]]
    part = layers[0][index[1:]].shape
    out = np.empty((len(layers), *part), dtype)
    for i, view in enumerate(layers):
      out[i] = view[index[1:]]
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
    UserError: the tree is not this model's.
  """
  leaves = _flatten(params)
  expected = _flatten(sharding_lib.abstract_params(model))
  shapes = {name: leaf.shape for name, leaf in expected.items()}
  check_names(
    pathlib.Path("params"),
    shapes,
    {name: tuple(np.shape(leaf)) for name, leaf in leaves.items()},
  )

  def write(tensor: _Tensor) -> TensorToWrite:
    kinds = {np.dtype(leaves[part.path].dtype) for part in tensor.parts}
    if dtype is None and len(kinds) > 1:
      raise UserError(
        f"{tensor.name} joins parameters of {sorted(k.name for k in kinds)}; "
        "cast them to one dtype, or pass dtype=."
      )
    kind = np.dtype(dtype or kinds.pop())

    def make() -> np.ndarray:
      parts = [_fetch(leaves[part.path], part.layer) for part in tensor.parts]
      parts = [tensor.entry.to_stored(part) for part in parts]
      return np.concatenate(parts).astype(kind, copy=False)

    return TensorToWrite(tensor.name, kind, tensor.shape, make)

  tensors = _resolve(entries, shapes, model.num_hidden_layers)
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
    max_shard_size: bytes of values per weight file.
    files: further files to copy, under their own names.
  """
  path = pathlib.Path(path)
  writer = jax.process_index() == 0
  shards = safetensors_io.split_into_shards(tensors, max_shard_size)
  documents = dict(documents)
  if len(shards) > 1:
    documents[safetensors_io.INDEX_FILE] = safetensors_io.index_of(shards)
  if not writer:
    for shard in shards.values():
      safetensors_io.write_file(None, shard)
  else:
    _write_files(path, shards, documents, files)
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(f"saved {path}")


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
      safetensors_io.write_file(partial / name, shard)
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
