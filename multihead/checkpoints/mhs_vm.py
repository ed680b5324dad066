"""Weights of the authors' MHS-VM and VM-UNet, as one safetensors file.

They publish pickles, which are not opened here: a pickle can run any program.
Where torch is installed, this writes the file that `load` reads:

  import torch, safetensors.torch as st
  state = torch.load("best.pth", map_location="cpu", weights_only=True)
  st.save_file({k: v.clone() for k, v in state.items()}, "best.safetensors")

(of latest.pth, the values of state["model_state_dict"]; clone, since some
tensors stand there two times). Names and layouts are those of the modules in
the repositories PixDeep/MHS-VM and JCruan519/VM-UNet; no published file was at
hand to try them on. The threshold of the gate is no weight, and must be given.
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from safetensors.numpy import save_file

from multihead import models
from multihead.checkpoints.hub_format import check_names
from multihead.checkpoints.key_map import Entry
from multihead.checkpoints.safetensors_io import read_file
from multihead.errors import UserError
from multihead.models.mhs_vm import MHSVM
from multihead.parallel import sharding

# Ends of the names of files that are not opened.
PICKLES = (".pth", ".pt", ".bin", ".ckpt")

_PREFIX = "vmunet."
_HEADS = "CXSZ"
# What a head's four scans are stored as, and the parameters of ours, which are
# those of the scans of all heads one after another.
_ENGINE = {
  "x_proj_weight": "steering",
  "dt_projs_weight": "dt",
  "dt_projs_bias": "dt_bias",
  "A_logs": "A_log",
  "Ds": "D",
}
_TRANSPOSED = ("x_proj_weight", "dt_projs_weight")
_FLATTENED = ("A_logs", "Ds")
# Ends of the second names of tensors that have two, and of the first ones.
_SECOND_NAMES = {
  ".x_ssproj_W": ".x_ssproj.weight",
  **{f".scanning.seq2seq_engine.{n}": f".mambaeng.{n}" for n in _ENGINE},
}
# Counters that the authors' profiler may leave in a model.
_COUNTERS = ("total_ops", "total_params")


def load(
  path: str | os.PathLike, **overrides: Any
) -> tuple[nn.Module, dict[str, Any]]:
  """Reads a file of the authors' weights.

  Args:
    path: a .safetensors file, made as the head of this module says.
    **overrides: fields of the model that the weights do not tell, first of all
      `threshold`: published are 0.5 for ISIC 2018 and 0 for ISIC 2017.

  Returns:
    (model, params), for `model.apply({"params": params}, images)`. The result
    are logits; the authors' model of one class gives their sigmoid.

  Raises:
    UserError: no such file, a pickle, or tensors that are not those of an
      MHS-VM or VM-UNet.
  """
  path = pathlib.Path(path)
  if path.suffix in PICKLES:
    raise UserError(
      f"{path}: a pickle, which may run any program and is not opened; "
      "multihead.checkpoints.mhs_vm says how to make a safetensors file of it"
    )
  tensors = {
    name.removeprefix("module."): tensor.read(
      *[slice(None)] * len(tensor.shape)
    )
    for name, tensor in read_file(path).items()
    if not name.endswith(_COUNTERS)
  }
  fields = model_fields({n: x.shape for n, x in tensors.items()}, str(path))
  model = models.create("mhs_vm", **{**fields, **overrides})
  return model, from_tensors(model, tensors, str(path))


def save(path: str | os.PathLike, model: nn.Module, params: Any) -> None:
  """Writes a file whose tensors the authors' code loads.

  There: model.load_state_dict(safetensors.torch.load_file(path)).

  Raises:
    UserError: their code has no such model.
  """
  tensors = to_tensors(model, jax.device_get(nn.meta.unbox(params)))
  # The library writes memory as it lies and takes no note of strides.
  save_file({n: np.ascontiguousarray(x) for n, x in tensors.items()}, path)


def model_fields(
  shapes: Mapping[str, tuple[int, ...]], source: str
) -> dict[str, Any]:
  """Fields of the model that tensors of these names and shapes belong to.

  Raises:
    UserError: they are of no MHS-VM or VM-UNet.
  """

  def depths(stage: str) -> tuple[int, ...]:
    found = re.compile(rf"{re.escape(_PREFIX + stage)}\.(\d+)\.blocks\.(\d+)\.")
    pairs = {tuple(map(int, m.groups())) for m in map(found.match, shapes) if m}
    stages = 1 + max((i for i, _ in pairs), default=-1)
    return tuple(sum(i == stage for i, _ in pairs) for stage in range(stages))

  try:
    patches = shapes[f"{_PREFIX}patch_embed.proj.weight"]
    classes = shapes[f"{_PREFIX}final_conv.weight"][0]
    block = f"{_PREFIX}layers.0.blocks.0.self_attention."
    letters = [
      h for h in _HEADS if f"{block}mhs.scanhead_{h}.mambaeng.Ds" in shapes
    ]
    engine = f"{block}mhs.scanhead_C.mambaeng." if letters else block
    state_size = shapes[f"{engine}A_logs"][1]
  except (KeyError, IndexError) as error:
    raise UserError(
      f"{source}: no weights of MHS-VM or VM-UNet: there is no {error}"
    ) from None
  return dict(
    in_chans=patches[1],
    num_classes=classes,
    embed_dim=patches[0],
    depths=depths("layers"),
    depths_decoder=depths("layers_up"),
    patch_size=patches[2],
    heads=len(letters),
    projection=not letters or f"{block}mhs.y_proj.weight" in shapes,
    state_size=state_size,
  )


def _stages(model: MHSVM) -> list[tuple[str, str, tuple[int, ...]]]:
  return [
    ("layers", "encoder", model.depths),
    ("layers_up", "decoder", model.depths_decoder),
  ]


def _entries(model: MHSVM) -> list[Entry]:
  """Stored tensors that hold whole parameters of ours."""
  entries = []

  def add(stored: str, *ours: str, layout: str = "linear", **how: int) -> None:
    entries.append(Entry(_PREFIX + stored, ours, layout, **how))

  def norm(stored: str, ours: str) -> None:
    add(f"{stored}.weight", f"{ours}/scale", layout="vector")
    add(f"{stored}.bias", f"{ours}/bias", layout="vector")

  add("patch_embed.proj.weight", "patch_embed/kernel", layout="conv2d")
  add("patch_embed.proj.bias", "patch_embed/bias", layout="vector")
  norm("patch_embed.norm", "patch_norm")
  for theirs, kind, depths in _stages(model):
    for i, j in ((i, j) for i, n in enumerate(depths) for j in range(n)):
      stored, ours = f"{theirs}.{i}.blocks.{j}", f"{kind}_{i}_{j}"
      norm(f"{stored}.ln_1", f"{ours}/norm")
      stored = f"{stored}.self_attention"
      add(f"{stored}.in_proj.weight", f"{ours}/x/kernel", f"{ours}/z/kernel")
      norm(f"{stored}.out_norm", f"{ours}/scan_norm")
      add(f"{stored}.conv2d.bias", f"{ours}/conv/bias", layout="vector")
      if not model.heads:
        add(f"{stored}.out_proj.weight", f"{ours}/outward/kernel")
        continue
      add(f"{stored}.mhs.x_ssproj.weight", f"{ours}/scan/inward/kernel")
      if model.projection:
        norm(f"{stored}.mhs.cat_norm", f"{ours}/scan/norm")
        add(
          f"{stored}.mhs.y_proj.weight", f"{ours}/scan/outward/kernel", inputs=2
        )
  for i in range(len(model.depths) - 1):
    # Theirs ends a stage of the encoder, and begins one of the decoder.
    norm(f"layers.{i}.downsample.norm", f"merge_norms_{i}")
    add(f"layers.{i}.downsample.reduction.weight", f"merges_{i}/kernel")
    add(f"layers_up.{i + 1}.upsample.expand.weight", f"expands_{i}/kernel")
    norm(f"layers_up.{i + 1}.upsample.norm", f"expand_norms_{i}")
  add("final_up.expand.weight", "final_expand/kernel")
  norm("final_up.norm", "final_norm")
  add("final_conv.bias", "head/bias", layout="vector")
  return entries


def to_tensors(model: MHSVM, params: Any) -> dict[str, np.ndarray]:
  """The authors' state dict of parameters of ours.

  Raises:
    UserError: their code has no such model.
  """
  wrong = {
    "heads": model.heads not in (0, 3, 4),
    "routes": model.routes is not None,
    "scale_free": model.heads and model.scale_free,
    "threshold": model.heads and model.threshold is None,
    "in_chans": model.in_chans not in (1, 3),
  }
  if odd := [name for name, is_wrong in wrong.items() if is_wrong]:
    values = ", ".join(f"{name}={getattr(model, name)!r}" for name in odd)
    raise UserError(f"the authors' code has no model with {values}")
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  flat = {name: np.asarray(value) for name, value in flat.items()}
  tensors = {
    entry.name: np.concatenate([entry.to_stored(flat[p]) for p in entry.paths])
    for entry in _entries(model)
  }
  tensors[f"{_PREFIX}final_conv.weight"] = flat["head/kernel"].T[
    ..., None, None
  ]
  for theirs, ours in _blocks(model):
    kernel = np.moveaxis(flat[f"{ours}/conv/kernel"], -1, 0)
    tensors[f"{theirs}.conv2d.weight"] = kernel[:, None]
    for head, prefix in _engines(model, theirs):
      for name, path in _ENGINE.items():
        value = flat[f"{ours}/scan/routes/{path}"][4 * head : 4 * head + 4]
        if name in _TRANSPOSED:
          value = value.swapaxes(1, 2)
        if name in _FLATTENED:
          value = value.reshape(-1, *value.shape[2:])
        tensors[f"{prefix}.{name}"] = value
  for second, first in _SECOND_NAMES.items():
    for name in [n for n in tensors if n.endswith(first)]:
      tensors[name.removesuffix(first) + second] = tensors[name]
  return tensors


def from_tensors(
  model: MHSVM, tensors: Mapping[str, np.ndarray], source: str = "tensors"
) -> dict[str, Any]:
  """Parameters of ours from the authors' state dict.

  Args:
    model: the model, see `model_fields`.
    tensors: the state dict; what it has under two names must be equal.
    source: where it is from, for errors.

  Raises:
    UserError: tensors are missing, of another shape, or not the model's.
  """
  tensors = dict(tensors)
  for second, first in _SECOND_NAMES.items():
    for name in [n for n in tensors if n.endswith(second)]:
      copy, original = tensors.pop(name), name.removesuffix(second) + first
      if original in tensors and not np.array_equal(copy, tensors[original]):
        raise UserError(
          f"{source}: {name} and {original} differ; they are one tensor"
        )
  leaves = flax.traverse_util.flatten_dict(
    sharding.abstract_params(model), sep="/"
  )
  # Not touched, so these take no memory.
  empty = {name: np.empty(leaf.shape, np.int8) for name, leaf in leaves.items()}
  expected = {
    name: tensor.shape
    for name, tensor in to_tensors(
      model, flax.traverse_util.unflatten_dict(empty, sep="/")
    ).items()
    if not name.endswith(tuple(_SECOND_NAMES))
  }
  check_names(
    pathlib.Path(source), expected, {n: x.shape for n, x in tensors.items()}
  )
  flat = {}
  for entry in _entries(model):
    parts = np.split(tensors[entry.name], len(entry.paths))
    for path, part in zip(entry.paths, parts, strict=True):
      flat[path] = entry.from_stored(part, leaves[path].shape)
  flat["head/kernel"] = tensors[f"{_PREFIX}final_conv.weight"][..., 0, 0].T
  for theirs, ours in _blocks(model):
    kernel = tensors[f"{theirs}.conv2d.weight"][:, 0]
    flat[f"{ours}/conv/kernel"] = np.moveaxis(kernel, 0, -1)
    for name, path in _ENGINE.items():
      path = f"{ours}/scan/routes/{path}"
      found = [tensors[f"{p}.{name}"] for _, p in _engines(model, theirs)]
      if name in _TRANSPOSED:
        found = [value.swapaxes(1, 2) for value in found]
      flat[path] = np.concatenate(found).reshape(leaves[path].shape)
  # Device arrays of memory that is in order.
  flat = {
    n: jax.device_put(np.ascontiguousarray(x, leaves[n].dtype))
    for n, x in flat.items()
  }
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def _blocks(model: MHSVM) -> list[tuple[str, str]]:
  """Stored prefix and our path of what each block scans with."""
  return [
    (f"{_PREFIX}{theirs}.{i}.blocks.{j}.self_attention", f"{kind}_{i}_{j}")
    for theirs, kind, depths in _stages(model)
    for i, depth in enumerate(depths)
    for j in range(depth)
  ]


def _engines(model: MHSVM, block: str) -> list[tuple[int, str]]:
  if not model.heads:
    return [(0, block)]
  return [
    (head, f"{block}.mhs.scanhead_{letter}.mambaeng")
    for head, letter in enumerate(_HEADS[: model.heads])
  ]
