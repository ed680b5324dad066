"""The directory format of `peft` for LoRA, in and out.

adapter_config.json says ranks and factors; adapter_model.safetensors holds, for
each adapted module NAME, base_model.model.NAME.lora_A.weight [R, D] and
lora_B.weight [F, R], the transposes of our down and up kernels. peft itself is
not needed.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from multihead.adapters.hydra import Hydra
from multihead.adapters.linear_maps import (
  STACKS,
  LinearMap,
  flatten,
  maps_from_shapes,
)
from multihead.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Fields of adapter_config.json that change what is computed, and the values
# that leave a plain LoRA.
_PLAIN: dict[str, tuple] = {
  "peft_type": ("LORA",),
  "use_dora": (False, None),
  "use_qalora": (False, None),
  "use_bdlora": (None, False),
  "fan_in_fan_out": (False, None),
  "modules_to_save": (None, []),
  "layer_replication": (None, []),
  "alora_invocation_tokens": (None, []),
  "arrow_config": (None,),
  "kasa_config": (None,),
  "velora_config": (None,),
  "monteclora_config": (None,),
  "target_parameters": (None, []),
  "trainable_token_indices": (None,),
  "bias": ("none",),
}


@dataclasses.dataclass(frozen=True)
class _Module:
  """A module of peft's: ours at `path`, its layer `layer` where stacked."""

  name: str
  path: str
  layer: tuple[int, ...]


def default_names(path: str, target: LinearMap) -> str:
  """Our path as a dotted name; a stack's numbers follow its own name."""
  parts = path.split("/")
  if target.stack:
    depth = next((i for i, p in enumerate(parts) if p in STACKS), 0)
    parts.insert(depth + 1, "{layer}")
  return ".".join(parts)


def _modules(
  maps: Mapping[str, LinearMap], names: Mapping[str, str] | None
) -> dict[str, _Module]:
  """Every module that peft could name, by that name."""
  found = {}
  for path, target in maps.items():
    if names is not None and path not in names:
      continue
    name = default_names(path, target) if names is None else names[path]
    if target.stack and "{layer}" not in name:
      raise UserError(
        f"names: {path!r} is a stack of {target.copies} layers; its name "
        f"{name!r} must contain {{layer}}"
      )
    for layer in np.ndindex(target.stack):
      spelled = name.format(layer=".".join(map(str, layer)))
      found[spelled] = _Module(spelled, path, layer)
  return found


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    config = json.loads((path / CONFIG).read_text("utf-8"))
  except OSError as error:
    raise UserError(
      f"{path}: no {CONFIG} can be read ({error.strerror}); give a directory "
      "that peft's save_pretrained wrote"
    ) from None
  except ValueError as error:
    raise UserError(f"{path / CONFIG}: not JSON: {error}") from None
  for key, allowed in _PLAIN.items():
    value = config.get(key, allowed[0])
    if value not in allowed:
      raise UserError(
        f"{path / CONFIG}: {key}={value!r} is not supported; a plain LoRA has "
        f"{key}={allowed[0]!r}"
      )
  return config


def _pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
  """peft's own rule: a key is a regular expression for the end of a name."""
  for key, value in (patterns or {}).items():
    if re.match(rf"(.*\.)?({key})$", name):
      return value
  return default


def load_peft(
  path: str | os.PathLike,
  params: Any,
  *,
  names: Mapping[str, str] | None = None,
  maps: Mapping[str, LinearMap] | None = None,
) -> tuple[Hydra, Any]:
  """Reads a LoRA that peft saved, for a base of ours.

  Ranks and factors may differ from module to module (rank_pattern,
  alpha_pattern): in a stack of layers smaller ranks are filled up with zeros,
  and factors that differ are multiplied into the up projections.

  Args:
    path: the directory.
    params: the base's parameters; the adapter is bound to them.
    names: our path -> peft's name of the module, "{layer}" for the number of a
      stacked layer; `multihead.checkpoints.module_names` has those of a model
      with a published format. By default our path with dots.
    maps: from `linear_maps`, for kernels with axes for heads.

  Returns:
    (adapter, adapter_params), a parallel branch alone.

  Raises:
    UserError: no such directory, torn, not a plain LoRA, modules that the base
      lacks, or some layers of a stack without an adapter.
  """
  path = pathlib.Path(path)
  config = _read_config(path)
  tensors = _read_tensors(path / WEIGHTS)
  known = maps
  if known is None:
    shapes = maps_from_shapes(params)
    known = {p: m for p, m in shapes.items() if isinstance(m, LinearMap)}
  modules = _modules(known, names)
  parts: dict[str, dict[str, np.ndarray]] = {}
  for key, value in tensors.items():
    match = re.fullmatch(
      rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.(weight|bias)", key
    )
    if match is None or match[1] not in modules:
      raise UserError(
        f"{path / WEIGHTS}: {key!r} belongs to no linear map known here; pass "
        "names= (our path -> its name there), and maps= for kernels of several "
        f"heads. Names that are known: {', '.join(sorted(modules)[:4])}, ..."
      )
    parts.setdefault(match[1], {})[match[2] + match[3]] = value
  grouped: dict[str, dict[tuple, tuple]] = {}
  for name, found in parts.items():
    module = modules[name]
    if not {"Aweight", "Bweight"} <= found.keys():
      raise UserError(f"{path / WEIGHTS}: {name} lacks lora_A or lora_B")
    rank = found["Aweight"].shape[0]
    alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    grouped.setdefault(module.path, {})[module.layer] = (found, scale)
  ranks, made = {}, {}
  scales = {s for layers in grouped.values() for _, s in layers.values()}
  common = scales.pop() if len(scales) == 1 else 1.0
  biased = any("Bbias" in f for g in grouped.values() for f, _ in g.values())
  for target_path, layers in grouped.items():
    target = known[target_path]
    if len(layers) != target.copies:
      raise UserError(
        f"{path}: adapts {len(layers)} of the {target.copies} layers of "
        f"{target_path!r}, which are stacked here; give the parameters of the "
        "unrolled model (model.unroll) and names for it"
      )
    branch, ranks[target_path] = _stacked(path, target, layers, common, biased)
    made[f"{target_path}/par"] = branch
  adapter = Hydra(
    tuple(grouped),
    r_par=ranks,
    scale=common,
    bias="up" if biased else False,
    dropout=config.get("lora_dropout") or 0.0,
    maps=known,
  )
  adapter.bind(params)
  tree = flax.traverse_util.unflatten_dict(made, sep="/")
  return adapter, jax.tree.map(jnp.asarray, tree)


def _stacked(
  path: pathlib.Path,
  target: LinearMap,
  layers: Mapping[tuple, tuple],
  scale: float,
  biased: bool,
) -> tuple[dict[str, Any], int]:
  """The branch of one target from peft's tensors of its layers."""
  rank = max(found["Aweight"].shape[0] for found, _ in layers.values())
  down = np.zeros((*target.stack, target.d_in, rank), np.float32)
  up = np.zeros((*target.stack, rank, target.d_out), np.float32)
  bias = np.zeros((*target.stack, target.d_out), np.float32)
  for layer, (found, own) in layers.items():
    a, b = (np.asarray(found[k], np.float32) for k in ("Aweight", "Bweight"))
    r = a.shape[0]
    if a.shape != (r, target.d_in) or b.shape != (target.d_out, r):
      raise UserError(
        f"{path}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit "
        f"{target.path!r}, a map from {target.d_in} to {target.d_out}"
      )
    ratio = np.float32(own / scale)
    down[(*layer, slice(None), slice(r))] = a.T
    up[(*layer, slice(r))] = b.T * ratio
    if "Bbias" in found:
      bias[layer] = np.asarray(found["Bbias"], np.float32) * ratio
  branch = {"down": {"kernel": down}, "up": {"kernel": up}}
  if biased:
    branch["up"]["bias"] = bias
  return branch, rank


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    with safe_open(path, framework="np") as file:
      names = file.keys()
      return {name: file.get_tensor(name) for name in names}
  except OSError as error:
    raise UserError(
      f"{path}: cannot be read: {error}; pickled adapters (*.bin) are not "
      "loaded, since reading one can run any code"
    ) from None
  except SafetensorError as error:
    raise UserError(
      f"{path}: torn or not a safetensors file: {error}"
    ) from None


def save_peft(
  path: str | os.PathLike,
  adapter: Hydra,
  adapter_params: Any,
  *,
  names: Mapping[str, str] | None = None,
  base_model: str | None = None,
  task_type: str | None = None,
) -> None:
  """Writes a directory that peft's `PeftModel.from_pretrained` loads.

  Args:
    path: the directory; made if needed.
    adapter: with a parallel branch alone; `Hydra.to_lora` makes any adapter
      one.
    adapter_params: its parameters.
    names: see `load_peft`.
    base_model: base_model_name_or_path of the config.
    task_type: of the config, "CAUSAL_LM" for example.

  Raises:
    UserError: the adapter has other branches, a bias on the down projection or
      learned factors.
  """
  settings = adapter.settings
  leaves = flatten(adapter_params)
  other = [p for p in leaves if not re.search(r"/par/(down|up)/\w+$", p)]
  if other or any(p.endswith("/down/bias") for p in leaves):
    raise UserError(
      "peft's LoRA has a parallel branch alone, without a bias on its down "
      f"projection or a learned factor; this adapter has "
      f"{(other or ['par/down/bias'])[0]!r}. Convert it: "
      "adapter.to_lora(params, adapter_params)"
    )
  targets = _targets_of(leaves)
  modules = _modules(targets, names)
  tensors: dict[str, np.ndarray] = {}
  ranks, alphas = {}, {}
  for name, module in modules.items():
    down, up, bias = (
      leaves.get(f"{module.path}/par/{end}")
      for end in ("down/kernel", "up/kernel", "up/bias")
    )
    rank = down.shape[-1]
    scale = settings.scale_of("par", rank)
    ranks[name], alphas[name] = rank, scale * rank
    key = f"{_PREFIX}{name}"
    for end, leaf in (
      ("lora_A.weight", down), ("lora_B.weight", up), ("lora_B.bias", bias)
    ):  # fmt: skip
      if leaf is not None:
        value = np.asarray(jax.device_get(leaf[module.layer]), np.float32)
        tensors[f"{key}.{end}"] = np.ascontiguousarray(value.T)
  r = max(ranks.values())
  alpha = next(alphas[name] for name, rank in ranks.items() if rank == r)
  config = {
    "peft_type": "LORA",
    "task_type": task_type,
    "base_model_name_or_path": base_model,
    "inference_mode": True,
    "r": r,
    "lora_alpha": alpha,
    "lora_dropout": settings.dropout,
    "target_modules": sorted(modules),
    "rank_pattern": {re.escape(n): k for n, k in ranks.items() if k != r},
    "alpha_pattern": {re.escape(n): a for n, a in alphas.items() if a != alpha},
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": settings.bias == "up",
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
  }
  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
  text = json.dumps(config, indent=2) + "\n"
  (path / CONFIG).write_text(text, "utf-8")


def _targets_of(
  leaves: Mapping[str, Any],
) -> dict[str, LinearMap]:
  """The adapted maps, from the shapes of the adapter's own leaves."""
  targets = {}
  for leaf_path, leaf in leaves.items():
    if leaf_path.endswith("/par/down/kernel"):
      path = leaf_path.removesuffix("/par/down/kernel")
      up = leaves[f"{path}/par/up/kernel"]
      stack = tuple(leaf.shape[:-2])
      targets[path] = LinearMap(path, (leaf.shape[-2],), (up.shape[-1],), stack)
  return targets
