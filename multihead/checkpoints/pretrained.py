"""Hugging Face checkpoint directories, read and written for every family."""

import dataclasses
import functools
import importlib
import json
import logging
import os
import pathlib
import time
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from multihead import models
from multihead.checkpoints import hub_format, installed
from multihead.errors import UserError, nearest
from multihead.parallel import sharding

# model_type in config.json -> module of multihead.checkpoints.
_FAMILIES = {
  "bert": "bert",
  "deit": "vit",
  "falcon_h1": "falcon_h1",
  "roberta": "bert",
  "vit": "vit",
}
# Modules for timm's directories, whose config.json has an `architecture`.
_TIMM_FAMILIES = ("timm_vit",)
_Path = str | os.PathLike
_FLOATS = ("float32", "bfloat16", "float16")

# What save_pretrained copies from a tokenizer's directory.
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
  "tokenizer.model",
  "vocab.json",
  "merges.txt",
)


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """Ids with a meaning to generation; None or empty where there is none.

  Attributes:
    bos: begins a text.
    eos: each of these ends a text.
    pad: fills up a batch.
  """

  bos: int | None = None
  eos: tuple[int, ...] = ()
  pad: int | None = None

  def to_config(self) -> dict[str, Any]:
    """Fields of config.json and generation_config.json."""
    eos = list(self.eos)
    return {
      "bos_token_id": self.bos,
      "eos_token_id": eos if len(eos) > 1 else (eos[0] if eos else None),
      "pad_token_id": self.pad,
    }


def _module(name: str) -> ModuleType:
  return importlib.import_module(f"multihead.checkpoints.{name}")


def _family(config: dict[str, Any], source: str) -> ModuleType:
  """The module for a config.json."""
  model_type = config.get("model_type")
  if model_type is None and isinstance(config.get("architecture"), str):
    architecture = config["architecture"]
    for module in map(_module, _TIMM_FAMILIES):
      if module.handles(architecture):
        return module
    raise UserError(
      f"{source}: architecture is {architecture!r}; of timm's models, variants "
      "of vit, deit and flexivit are supported."
    )
  if model_type not in _FAMILIES:
    raise UserError(
      f"{source}: model_type is {model_type!r}"
      f"{nearest(str(model_type), _FAMILIES)}; supported: "
      f"{', '.join(_FAMILIES)}."
    )
  return _module(_FAMILIES[model_type])


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text("utf-8"))
  except (ValueError, OSError) as e:
    raise UserError(f"{path}: cannot be read as JSON: {e}.") from e
  if not isinstance(content, dict):
    raise UserError(f"{path}: must hold a JSON object.")
  return content


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_dir():
    raise UserError(
      f"{path}: no such directory. Give the directory of a downloaded "
      "checkpoint; nothing is downloaded here (`hf download NAME --local-dir "
      "DIRECTORY` does)."
    )
  if not (path / "config.json").is_file():
    raise UserError(
      f"{path}: no config.json, so not a complete checkpoint directory."
    )
  config = _read_json(path / "config.json")
  _family(config, str(path / "config.json"))
  return config


def _float_dtype(dtype: Any, name: str) -> np.dtype:
  try:
    resolved = jnp.dtype(dtype)
  except TypeError:
    resolved = None
  if resolved is None or resolved.name not in _FLOATS:
    raise UserError(
      f"{name}={dtype!r} is not a dtype for weights; allowed are "
      f"{', '.join(_FLOATS)}{'' if name == 'compute_dtype' else ' and None'}."
    )
  return resolved


def from_pretrained(
  path: _Path,
  dtype: Any = None,
  mesh: Mesh | None = None,
  *,
  compute_dtype: Any = None,
  **overrides: Any,
) -> tuple[nn.Module, Any]:
  """Loads a Hugging Face or timm directory: config.json and safetensors.

  The weights are memory-mapped and every device reads its own shard; the host
  never holds more than the shards of one parameter, and what of them is being
  read from the file.

  Args:
    path: the directory, with model.safetensors or with
      model.safetensors.index.json and the files it names; or one inside an
      installed package, written `package:NAME/FOLDER` (see `installed`).
    dtype: of the parameters; None keeps every tensor as it is stored.
    mesh: where the parameters go, by their logical axes; None puts them on the
      default device.
    compute_dtype: the model's `dtype`, that of activations and matrix
      products; by default `dtype`, or the dtype that the weights are stored in.
    **overrides: further fields of the model, e.g. `scan_layers=False`.

  Returns:
    (model, params), for `model.apply({"params": params}, tokens)` (or images).

  Raises:
    UserError: no such directory; an unknown, unsupported or contradictory
      field of config.json; missing, unexpected, mis-shaped or torn tensors;
      pickled weights only; an unknown override.
  """
  began = time.perf_counter()
  path = installed.locate(path)
  config = _read_config(path)
  family = _family(config, str(path / "config.json"))
  if dtype is not None:
    dtype = _float_dtype(dtype, "dtype")
  if compute_dtype is not None:
    compute_dtype = _float_dtype(compute_dtype, "compute_dtype")
  fields = family.model_fields(config, str(path / "config.json"))
  model = models.create(family.MODEL_TYPE, **{**fields, **overrides})
  params = hub_format.load_params(
    path,
    model,
    family.key_map(model),
    dtype=dtype,
    mesh=mesh,
    copies=family.tied_copies(model),
    rename=functools.partial(family.stored_name, model),
  )
  stored = jax.tree.leaves(params)[0].dtype
  types = {"param_dtype": stored, "dtype": compute_dtype or stored}
  model = model.clone(**{k: v for k, v in types.items() if k not in overrides})
  logging.info(
    "loaded %s: %s parameters in %.1f s",
    path,
    f"{sharding.param_count(params):,}",
    time.perf_counter() - began,
  )
  return model, params


def read_special_tokens(path: _Path) -> SpecialTokens:
  """Reads the begin, end and padding ids of a checkpoint directory.

  generation_config.json has the last word, config.json the first.

  Raises:
    UserError: no such directory, or ids that are not integers.
  """
  path = installed.locate(path)
  ids = _read_config(path)
  generation = path / "generation_config.json"
  if generation.is_file():
    ids = {**ids, **_read_json(generation)}

  def read(name: str) -> list[int]:
    value = ids.get(name)
    values = value if isinstance(value, list) else [value]
    values = [v for v in values if v is not None]
    if not all(type(v) is int for v in values):
      raise UserError(
        f"{path}: {name} is {value!r}; it must be an integer, a list of them "
        "or null."
      )
    return values

  def one(name: str) -> int | None:
    return (read(name) or [None])[0]

  return SpecialTokens(
    bos=one("bos_token_id"),
    eos=tuple(read("eos_token_id")),
    pad=one("pad_token_id"),
  )


def save_pretrained(
  path: _Path,
  model: nn.Module,
  params: Any,
  *,
  dtype: Any = None,
  max_shard_size: int = 5 * 10**9,
  special_tokens: SpecialTokens = SpecialTokens(),
  tokenizer_files: _Path | Iterable[_Path] | None = None,
  format: str | None = None,
) -> None:
  """Writes a directory that `transformers` or timm, and `from_pretrained` load.

  In a job of several processes, all of them call this with the same path on a
  file system they share; the first one writes.

  Args:
    path: the directory; made if needed, an earlier checkpoint in it is
      replaced. An interrupted save leaves no config.json, so that no reader
      takes the half for the whole.
    model: the model.
    params: its parameters, on the host or sharded in any way; gathered one
      weight file at a time.
    dtype: to store; None stores each parameter in its own dtype.
    max_shard_size: bytes per weight file; more are split, with an index. The
      host holds one file's values at a time: lower it to save memory. (Only a
      single tensor larger than this takes more.)
    special_tokens: ids to write into config.json; without them, none.
    tokenizer_files: a directory whose tokenizer files are copied, or a list of
      files.
    format: "transformers" or "timm"; None: the first of these that has the
      model.

  Raises:
    UserError: no such format for this model, parameters of another model or
      of a dtype that is not float, or tokenizer files that are not there.
  """
  family = writer(model, format)
  if max_shard_size <= 0:
    raise UserError(f"max_shard_size={max_shard_size} must be positive.")
  if dtype is not None:
    dtype = _float_dtype(dtype, "dtype")
  files = _tokenizer_files(tokenizer_files)
  params = nn.meta.unbox(params)
  tensors = hub_format.tensors_to_write(
    model, params, family.key_map(model), dtype
  )
  config = family.hub_config(model)
  documents = {"config.json": config}
  if family.FORMAT == "transformers":
    stored = tensors[0].dtype.name
    config |= {"dtype": stored, "torch_dtype": stored}
  if hasattr(model, "vocab_size"):
    ids = special_tokens.to_config()
    # Where none is given, the family's own: RoBERTa counts from its padding.
    ids = {n: config.get(n) if v is None else v for n, v in ids.items()}
    config |= ids
    if family.GENERATES:
      generation = {"_from_model_config": True, **ids}
      documents["generation_config.json"] = generation
  hub_format.write_directory(
    path,
    tensors,
    documents,
    max_shard_size=max_shard_size,
    files=files,
  )


def writer(model: nn.Module, format: str | None) -> ModuleType:
  """The module that writes a model."""
  names = [*dict.fromkeys(_FAMILIES.values()), *_TIMM_FAMILIES]
  modules = [_module(name) for name in names]
  mine = [m for m in modules if isinstance(model, m.MODEL)]
  if not mine:
    supported = dict.fromkeys(m.MODEL.__name__ for m in modules)
    raise UserError(
      f"a {type(model).__name__} has no Hugging Face format here; supported: "
      f"{', '.join(supported)}."
    )
  formats = {m.FORMAT: m for m in mine}
  if format is not None and format not in formats:
    raise UserError(
      f"format={format!r}; a {type(model).__name__} is written as "
      f"{' or '.join(formats)}."
    )
  reasons = []
  for name, module in formats.items():
    if format in (None, name):
      reason = module.unsupported(model)
      if reason is None:
        return module
      reasons.append(f"{name}: {reason}")
  raise UserError(f"this model cannot be written; {'; '.join(reasons)}.")


def _tokenizer_files(
  given: _Path | Iterable[_Path] | None,
) -> list[pathlib.Path]:
  if given is None:
    return []
  if not isinstance(given, (str, os.PathLike)):
    files = [pathlib.Path(file) for file in given]
  elif pathlib.Path(given).is_dir():
    files = [pathlib.Path(given) / name for name in TOKENIZER_FILES]
    files = [file for file in files if file.is_file()]
    if not files:
      raise UserError(
        f"{given}: no tokenizer files; looked for {', '.join(TOKENIZER_FILES)}."
      )
  else:
    files = [pathlib.Path(given)]
  missing = [str(file) for file in files if not file.is_file()]
  if missing:
    raise UserError(f"tokenizer files not found: {', '.join(missing)}.")
  return files
