"""An adapter in one file: its arrays, its settings, its base's fingerprint."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from multihead.adapters.hydra import Hydra
from multihead.adapters.linear_maps import LinearMap, flatten
from multihead.errors import UserError

FORMAT = "multihead.adapter"
_MAP_AXES = ("inputs", "features", "stack")


def save(
  path: str | os.PathLike,
  adapter: Hydra,
  adapter_params: Any,
  *,
  trained: Any = None,
) -> None:
  """Writes an adapter as one safetensors file; nothing of the base is in it.

  The file appears whole or not at all.

  Args:
    path: the file, usually named *.safetensors; folders are made.
    adapter: must know its base (from `init` or `bind` with values), which is
      the model's parameters without those in `trained`.
    adapter_params: its parameters.
    trained: parameters of the model that were trained in full, a new head for
      example, as a part of the model's tree.

  Raises:
    UserError: the adapter does not know its base.
  """
  if adapter.base is None:
    raise UserError(
      "this adapter does not know its base; call adapter.bind(params) first"
    )
  path = pathlib.Path(path)
  tensors = {f"adapter/{p}": x for p, x in flatten(adapter_params).items()}
  if trained:
    tensors |= {f"trained/{p}": x for p, x in flatten(trained).items()}
  tensors = {
    name: np.ascontiguousarray(jax.device_get(value))
    for name, value in tensors.items()
  }
  maps = None
  if adapter.maps is not None:
    maps = [dataclasses.asdict(m) for m in adapter.maps.values()]
  header = {
    "format": FORMAT,
    "version": "1",
    "base": adapter.base,
    "settings": json.dumps(dataclasses.asdict(adapter.settings)),
    "maps": json.dumps(maps),
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
  try:
    save_file(tensors, partial, metadata=header)
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def load(path: str | os.PathLike, params: Any) -> tuple[Hydra, Any, Any]:
  """Reads what `save` wrote, for the base that it belongs to.

  Args:
    path: the file.
    params: the model's parameters, with values; those that the file has in full
      may be any, and may be missing.

  Returns:
    (adapter, adapter_params, trained); `trained` is an empty dict where there
    is none. The adapter's base is `params` without what is in `trained`.

  Raises:
    UserError: no such file, torn, not an adapter, or of another base.
  """
  path = pathlib.Path(path)
  try:
    with safe_open(path, framework="np") as file:
      header = file.metadata() or {}
      names = file.keys()
      tensors = {name: file.get_tensor(name) for name in names}
  except OSError as error:
    raise UserError(f"{path}: cannot be read: {error}") from None
  except SafetensorError as error:
    raise UserError(
      f"{path}: torn or not a safetensors file: {error}; copy it again"
    ) from None
  if header.get("format") != FORMAT:
    raise UserError(
      f"{path}: not an adapter of this library; adapters of peft are read with "
      "load_peft"
    )
  settings = json.loads(header["settings"])
  maps = json.loads(header["maps"])
  if maps is not None:
    maps = {
      m["path"]: LinearMap(**{**m, **{k: tuple(m[k]) for k in _MAP_AXES}})
      for m in maps
    }
  adapter = Hydra(**settings, maps=maps)
  adapter.base = header["base"]
  own = {
    n.removeprefix("trained/") for n in tensors if n.startswith("trained/")
  }
  frozen = {p: leaf for p, leaf in flatten(params).items() if p not in own}
  frozen = flax.traverse_util.unflatten_dict(frozen, sep="/")
  try:
    adapter.bind(frozen)
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  trees: dict[str, dict] = {"adapter": {}, "trained": {}}
  for name, value in tensors.items():
    kind, _, leaf = name.partition("/")
    trees[kind][leaf] = jnp.asarray(value)
  made = {
    kind: flax.traverse_util.unflatten_dict(tree, sep="/")
    for kind, tree in trees.items()
  }
  adapter.check_params(made["adapter"], frozen)
  return adapter, made["adapter"], made["trained"]
