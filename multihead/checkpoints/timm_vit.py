"""ViT checkpoints of timm: config.json with `architecture`, and the key map.

The layout is that of the directories that timm pushes to a hub, and that
`timm.create_model("local-dir:PATH", pretrained=True)` reads.
"""

from collections.abc import Mapping
from typing import Any

from multihead.checkpoints.config_reader import Reader
from multihead.checkpoints.key_map import Entry
from multihead.errors import nearest
from multihead.models import vit

MODEL_TYPE = "vit"
MODEL = vit.ViT
FORMAT = "timm"

_KNOWN = frozenset(
  "architecture num_classes num_features global_pool model_args pretrained_cfg "
  "label_names label_descriptions labels".split()
)
# Arguments of timm's VisionTransformer that our model has under the same name.
_ARGUMENTS = (
  "img_size", "patch_size", "in_chans", "num_classes", "global_pool",
  "embed_dim", "depth", "num_heads", "qkv_bias", "init_values", "class_token",
  "no_embed_class", "reg_tokens", "pre_norm", "final_norm", "fc_norm",
  "dynamic_img_size", "drop_rate", "pos_drop_rate", "proj_drop_rate",
  "attn_drop_rate", "drop_path_rate",
)  # fmt: skip
# Of these the architecture alone decides: config.json has no way to say them.
_BY_NAME = ("norm_eps", "distilled")
_ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_tanh": "gelu_tanh",
  "quick_gelu": "quick_gelu",
  "quickgelu": "quick_gelu",
  "relu": "relu",
  "silu": "silu",
  "swish": "silu",
}


def handles(architecture: str) -> bool:
  """Whether this file is for an architecture, known or not."""
  return architecture.startswith(("vit_", "deit", "flexivit_"))


def model_fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
  """Turns the content of config.json into the model's fields.

  Raises:
    UserError: an architecture that is not in the table of variants, an unknown
      field or model argument, or a value that the model does not implement.
  """
  if "pretrained_cfg" not in config:  # the oldest files have one level
    config = {
      "architecture": config["architecture"],
      "num_classes": config.get("num_classes"),
      "pretrained_cfg": config,
    }
  read = Reader(config, source)
  read.refuse_unknown(_KNOWN)
  name = config["architecture"].partition(".")[0]
  if name not in vit.VARIANTS:
    raise read.error(
      f"architecture {name!r} is not implemented{nearest(name, vit.VARIANTS)}; "
      "multihead.models.variants('vit') lists those that are."
    )
  fields = dict(vit.VARIANTS[name])
  published = config["pretrained_cfg"] or {}
  for level in (published, config):
    if isinstance(level.get("num_classes"), int):
      fields["num_classes"] = max(level["num_classes"], 0)
    if level.get("global_pool"):
      fields["global_pool"] = level["global_pool"]
  size = published.get("input_size")
  if size and published.get("fixed_input_size"):
    fields["in_chans"] = size[0]
    fields["img_size"] = Reader({"input_size": size[1:]}, source).image_size(
      "input_size", 0
    )
  arguments = _arguments(read, fields)
  for key in ("num_classes", "global_pool"):
    stated = {config.get(key), arguments.get(key)} - {None}
    if len(stated) > 1:
      raise read.error(
        f"{key} is {config[key]!r} and model_args.{key} {arguments[key]!r}; "
        "the two must agree."
      )
  fields |= arguments
  if fields.get("fc_norm") == (fields.get("global_pool", "token") == "avg"):
    del fields["fc_norm"]  # it says what is the case without it
  return fields


def _arguments(read: Reader, variant: Mapping[str, Any]) -> dict[str, Any]:
  """The fields that `model_args` sets on top of the variant's."""
  arguments = read.config.get("model_args") or {}
  fields = {}
  width = arguments.get("embed_dim", variant["embed_dim"])
  if width != variant["embed_dim"]:  # at the variant's mlp_ratio
    fields["mlp_dim"] = width * variant["mlp_dim"] // variant["embed_dim"]
  for key, value in arguments.items():
    if key in _ARGUMENTS:
      fields[key] = tuple(value) if isinstance(value, list) else value
    elif key == "mlp_ratio":
      fields["mlp_dim"] = int(width * value)
    elif key == "act_layer" and value in _ACTIVATIONS:
      fields["act"] = _ACTIVATIONS[value]
    elif value is not None:
      known = [*_ARGUMENTS, "mlp_ratio", "act_layer"]
      raise read.error(
        f"model_args.{key} is {value!r}{nearest(key, known)}, which the model "
        f"does not implement; it reads {', '.join(known)}."
      )
  return fields


def stored_name(model: vit.ViT, name: str) -> str | None:
  """The name in `key_map` of a stored tensor: as it is."""
  del model
  return name


def _architecture(model: vit.ViT) -> tuple[str, dict[str, Any]] | None:
  """The variant that says the most about a model, and what it leaves to say.

  None if there is none: an argument that a variant sets cannot be unset.
  """
  best = None
  for name, fields in vit.VARIANTS.items():
    variant = vit.ViT(**fields)
    if any(getattr(variant, n) != getattr(model, n) for n in _BY_NAME):
      continue
    differ = {
      n: getattr(model, n)
      for n in (*_ARGUMENTS, "mlp_dim", "act")
      if getattr(variant, n) != getattr(model, n)
    }
    differ.pop("fc_norm", None)
    usual = model.global_pool == "avg"  # where timm is told nothing
    told = usual if variant.fc_norm is None else variant.fc_norm
    if told != model.uses_fc_norm:
      differ["fc_norm"] = model.uses_fc_norm
    if any(value is None for value in differ.values()):
      continue
    if best is None or len(differ) < len(best[1]):
      best = name, differ
  return best


def unsupported(model: vit.ViT) -> str | None:
  """Why the model cannot be written in this format; None: it can."""
  if _architecture(model) is None:
    return (
      f"no architecture of timm has norm_eps={model.norm_eps:g} and "
      f"distilled={model.distilled}"
    )
  return None


def hub_config(model: vit.ViT) -> dict[str, Any]:
  """The config.json of a model."""
  name, differ = _architecture(model)
  if "mlp_dim" in differ or "embed_dim" in differ:
    differ.pop("mlp_dim", None)
    # timm truncates the product; half a unit more survives that.
    differ["mlp_ratio"] = (model.mlp_dim + 0.5) / model.embed_dim
    if model.mlp_dim % model.embed_dim == 0:
      differ["mlp_ratio"] = model.mlp_dim // model.embed_dim
  if "act" in differ:
    differ["act_layer"] = differ.pop("act")
  height, width = model.image_shape
  return {
    "architecture": name,
    "num_classes": model.num_classes,
    "num_features": model.embed_dim,
    "global_pool": model.global_pool,
    "model_args": {
      key: list(value) if isinstance(value, tuple) else value
      for key, value in differ.items()
    },
    "pretrained_cfg": {
      "input_size": [model.in_chans, height, width],
      "fixed_input_size": not model.dynamic_img_size,
      "num_classes": model.num_classes,
      "pool_size": None,
      "first_conv": "patch_embed.proj",
      "classifier": ["head", "head_dist"] if model.distilled else "head",
    },
  }


def tied_copies(model: vit.ViT) -> dict[str, str]:
  """Stored tensors that may repeat another one: none."""
  del model
  return {}


def key_map(model: vit.ViT) -> list[Entry]:
  """Which of our parameters each stored tensor holds."""
  entries = [
    Entry(name, (name,), "matrix")
    for name, present in (
      ("cls_token", model.class_token),
      ("dist_token", model.distilled),
      ("reg_token", model.reg_tokens),
      ("pos_embed", True),
    )
    if present
  ]
  entries.append(
    Entry("patch_embed.proj.weight", ("patch_embed/kernel",), "conv2d")
  )
  if not model.pre_norm:
    entries.append(
      Entry("patch_embed.proj.bias", ("patch_embed/bias",), "vector")
    )
  layer, ours = "blocks.{layer}.", "blocks/attention/"
  heads = tuple(f"{ours}{name}/" for name in ("query", "key", "value"))
  entries.append(
    Entry(
      f"{layer}attn.qkv.weight", tuple(h + "kernel" for h in heads), "linear"
    )
  )
  if model.qkv_bias:
    entries.append(
      Entry(f"{layer}attn.qkv.bias", tuple(h + "bias" for h in heads), "vector")
    )
  if model.init_values is not None:
    entries += [
      Entry(f"{layer}ls1.gamma", ("blocks/attention_scale",), "vector"),
      Entry(f"{layer}ls2.gamma", ("blocks/mlp_scale",), "vector"),
    ]
  norms = [(f"{layer}{name}", f"blocks/{name}") for name in ("norm1", "norm2")]
  if model.pre_norm:
    norms.append(("norm_pre", "norm_pre"))
  if model.final_norm:
    norms.append(("fc_norm" if model.uses_fc_norm else "norm", "norm"))
  linears = [
    (f"{layer}attn.proj", "blocks/attention/out", 2),
    (f"{layer}mlp.fc1", "blocks/mlp/up", 1),
    (f"{layer}mlp.fc2", "blocks/mlp/down", 1),
  ]
  if model.num_classes:
    linears.append(("head", "head", 1))
    if model.distilled:
      linears.append(("head_dist", "head_dist", 1))
  for stored, path in norms:
    entries += [
      Entry(f"{stored}.weight", (f"{path}/scale",), "vector"),
      Entry(f"{stored}.bias", (f"{path}/bias",), "vector"),
    ]
  for stored, path, inputs in linears:
    entries += [
      Entry(f"{stored}.weight", (f"{path}/kernel",), "linear", inputs=inputs),
      Entry(f"{stored}.bias", (f"{path}/bias",), "vector"),
    ]
  return entries
