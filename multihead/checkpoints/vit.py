"""ViT and DeiT checkpoints of `transformers`: config.json and the key map.

The stored layouts are those of model types `vit` and, for distilled models,
`deit`. timm's own layout, which covers every variant, is in timm_vit.py.
"""

from collections.abc import Mapping
from typing import Any

from multihead.checkpoints.config_reader import (
  INFORMATIONAL,
  Reader,
  published_activation,
)
from multihead.checkpoints.key_map import Entry
from multihead.models import vit

MODEL_TYPE = "vit"
MODEL = vit.ViT
FORMAT = "transformers"
GENERATES = False

_CLASSIFIER = {
  "vit": "ViTForImageClassification",
  "deit": "DeiTForImageClassificationWithTeacher",
}
_ENCODER = {"vit": "ViTModel", "deit": "DeiTModel"}
# Published name -> ours, with the default that a file without it means.
_INTEGERS = {
  "hidden_size": ("embed_dim", 768),
  "num_hidden_layers": ("depth", 12),
  "num_attention_heads": ("num_heads", 12),
  "intermediate_size": ("mlp_dim", 3072),
  "patch_size": ("patch_size", 16),
  "num_channels": ("in_chans", 3),
}
_FIXED = {"quantization_config": None, "is_encoder_decoder": False}
_DERIVED = (
  "model_type", "architectures", "hidden_act", "layer_norm_eps", "image_size",
  "qkv_bias", "hidden_dropout_prob", "attention_probs_dropout_prob",
)  # fmt: skip
# Of masked image modelling, of the encoder's pooler, and of initialisation.
_UNREAD = ("encoder_stride", "pooler_act", "pooler_output_size",
           "initializer_range")  # fmt: skip
KNOWN_FIELDS = frozenset(
  [*_INTEGERS, *_FIXED, *_DERIVED, *_UNREAD, *INFORMATIONAL]
)


def model_fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
  """Turns the content of config.json into the model's fields.

  Raises:
    UserError: an unknown field, a value of another type, or one that the model
      does not implement.
  """
  read = Reader(config, source)
  read.refuse_unknown(KNOWN_FIELDS)
  read.check_fixed(_FIXED)
  kind = config["model_type"]
  allowed = (_CLASSIFIER[kind], _ENCODER[kind])
  architecture = read.architecture(allowed, allowed[0])
  fields: dict[str, Any] = {
    ours: read.integer(name, default)
    for name, (ours, default) in _INTEGERS.items()
  }
  fields["img_size"] = read.image_size("image_size", 224)
  fields["act"] = read.activation()
  fields["norm_eps"] = read.finite("layer_norm_eps", 1e-12)
  fields["qkv_bias"] = read.boolean("qkv_bias", True)
  dropout = read.fraction("hidden_dropout_prob", 0.0)
  fields |= {"pos_drop_rate": dropout, "proj_drop_rate": dropout}
  fields["attn_drop_rate"] = read.fraction("attention_probs_dropout_prob", 0.0)
  fields["distilled"] = kind == "deit"
  classifier = architecture == _CLASSIFIER[kind]
  fields["num_classes"] = read.num_labels() if classifier else 0
  return fields


def stored_name(model: vit.ViT, name: str) -> str | None:
  """The name in `key_map` of a stored tensor; None: it is not loaded.

  The prefix depends on the head that the checkpoint was saved with; the pooler
  of an encoder is no part of the model.
  """
  kind = _kind(model)
  if "classifier." in name:
    return name
  bare = name.removeprefix(f"{kind}.")
  return None if bare.startswith("pooler.") else _prefix(model) + bare


def _kind(model: vit.ViT) -> str:
  return "deit" if model.distilled else "vit"


def _prefix(model: vit.ViT) -> str:
  return f"{_kind(model)}." if model.num_classes else ""


def unsupported(model: vit.ViT) -> str | None:
  """Why the model cannot be written in this format; None: it can."""
  wrong = [
    f"{name}={getattr(model, name)!r}"
    for name, only in (
      ("global_pool", "token"),
      ("init_values", None),
      ("class_token", True),
      ("no_embed_class", False),
      ("reg_tokens", 0),
      ("pre_norm", False),
      ("final_norm", True),
    )
    if getattr(model, name) != only
  ]
  if wrong:
    return f"the format has no {', '.join(wrong)}"
  return None


def hub_config(model: vit.ViT) -> dict[str, Any]:
  """The config.json of a model."""
  kind = _kind(model)
  size = model.img_size
  config: dict[str, Any] = {
    "model_type": kind,
    "architectures": [
      _CLASSIFIER[kind] if model.num_classes else _ENCODER[kind]
    ],
    "hidden_act": published_activation(model.act),
    "image_size": size if isinstance(size, int) else list(size),
    "layer_norm_eps": model.norm_eps,
    "qkv_bias": model.qkv_bias,
    "hidden_dropout_prob": model.proj_drop_rate,
    "attention_probs_dropout_prob": model.attn_drop_rate,
    "encoder_stride": model.patch_size,
  }
  config |= {n: getattr(model, ours) for n, (ours, _) in _INTEGERS.items()}
  if model.num_classes:
    labels = [f"LABEL_{i}" for i in range(model.num_classes)]
    config["id2label"] = {str(i): label for i, label in enumerate(labels)}
    config["label2id"] = {label: i for i, label in enumerate(labels)}
  return config


def tied_copies(model: vit.ViT) -> dict[str, str]:
  """Stored tensors that may repeat another one: none."""
  del model
  return {}


def key_map(model: vit.ViT) -> list[Entry]:
  """Which of our parameters each stored tensor holds."""
  prefix = _prefix(model)
  embed, layer = f"{prefix}embeddings.", f"{prefix}encoder.layer.{{layer}}."
  projection = f"{embed}patch_embeddings.projection"
  entries = [
    Entry(f"{embed}cls_token", ("cls_token",), "matrix"),
    Entry(f"{embed}position_embeddings", ("pos_embed",), "matrix"),
    Entry(f"{projection}.weight", ("patch_embed/kernel",), "conv2d"),
    Entry(f"{projection}.bias", ("patch_embed/bias",), "vector"),
  ]
  if model.distilled:
    entries.append(
      Entry(f"{embed}distillation_token", ("dist_token",), "matrix")
    )
  norms = [
    (f"{layer}layernorm_before", "blocks/norm1"),
    (f"{layer}layernorm_after", "blocks/norm2"),
    (f"{prefix}layernorm", "norm"),
  ]
  linears = [
    (f"{layer}attention.output.dense", "blocks/attention/out", 2),
    (f"{layer}intermediate.dense", "blocks/mlp/up", 1),
    (f"{layer}output.dense", "blocks/mlp/down", 1),
  ]
  if model.num_classes:
    if model.distilled:
      linears += [
        ("cls_classifier", "head", 1),
        ("distillation_classifier", "head_dist", 1),
      ]
    else:
      linears.append(("classifier", "head", 1))
  for name in ("query", "key", "value"):
    stored, ours = f"{layer}attention.attention.{name}", "blocks/attention/"
    entries.append(
      Entry(f"{stored}.weight", (f"{ours}{name}/kernel",), "linear")
    )
    if model.qkv_bias:
      entries.append(Entry(f"{stored}.bias", (f"{ours}{name}/bias",), "vector"))
  for stored, ours in norms:
    entries += [
      Entry(f"{stored}.weight", (f"{ours}/scale",), "vector"),
      Entry(f"{stored}.bias", (f"{ours}/bias",), "vector"),
    ]
  for stored, ours, inputs in linears:
    entries += [
      Entry(f"{stored}.weight", (f"{ours}/kernel",), "linear", inputs=inputs),
      Entry(f"{stored}.bias", (f"{ours}/bias",), "vector"),
    ]
  return entries
