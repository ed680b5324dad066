"""BERT and RoBERTa checkpoints: every field of config.json, and the key map.

The stored layouts are those of `transformers` model types `bert` and `roberta`:
the encoder alone, or with the classifier of a sequence classification model.
Of a checkpoint with another head (masked language model, pre-training) the
encoder is loaded.
"""

from collections.abc import Mapping
from typing import Any

from multihead.checkpoints.config_reader import (
  INFORMATIONAL,
  Reader,
  published_activation,
)
from multihead.checkpoints.key_map import Entry
from multihead.models import bert

MODEL_TYPE = "bert"
MODEL = bert.Bert
FORMAT = "transformers"
GENERATES = False

_CLASS = {"bert": "Bert", "roberta": "Roberta"}
# Defaults of the published config classes, which a file may leave out.
_INTEGERS = {
  "bert": {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
  },
}
_INTEGERS["roberta"] = {**_INTEGERS["bert"], "vocab_size": 50265}
_FRACTIONS = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_FIXED = {
  "position_embedding_type": "absolute",
  "quantization_config": None,
  "is_encoder_decoder": False,
  "is_decoder": False,
  "add_cross_attention": False,
}
_DERIVED = (
  "model_type", "architectures", "hidden_act", "initializer_range",
  "layer_norm_eps", "classifier_dropout", "bos_token_id", "eos_token_id",
  "pad_token_id",
)  # fmt: skip
# Of training (how it saves memory) and of heads that are not loaded.
_UNREAD = ("gradient_checkpointing", "tie_word_embeddings", "output_past",
           "pooler_fc_size", "pooler_num_attention_heads",
           "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
           "directionality")  # fmt: skip
KNOWN_FIELDS = frozenset(
  [*_INTEGERS["bert"], *_FRACTIONS, *_FIXED, *_DERIVED, *_UNREAD,
   *INFORMATIONAL]
)  # fmt: skip


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
  heads = ("Model", "ForSequenceClassification", "ForMaskedLM")
  heads += ("ForPreTraining",) if kind == "bert" else ()
  allowed = [_CLASS[kind] + head for head in heads]
  architecture = read.architecture(allowed, allowed[0])
  for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
    read.token_ids(name)
  fields: dict[str, Any] = {}
  fields |= {n: read.integer(n, d) for n, d in _INTEGERS[kind].items()}
  fields |= {n: read.fraction(n, d) for n, d in _FRACTIONS.items()}
  fields["hidden_act"] = read.activation()
  fields["initializer_range"] = read.finite("initializer_range", 0.02)
  fields["layer_norm_eps"] = read.finite("layer_norm_eps", 1e-12)
  if config.get("classifier_dropout") is not None:
    fields["classifier_dropout"] = read.fraction("classifier_dropout", 0.0)
  if architecture.endswith("ForSequenceClassification"):
    fields["num_labels"] = read.num_labels()
  fields["add_pooling_layer"] = not architecture.endswith("ForMaskedLM")
  if kind == "roberta":
    padding = config.get("pad_token_id", 1)
    if padding != 1:
      raise read.error(
        f"pad_token_id is {padding!r}; positions that begin after padding id 1 "
        "are implemented only."
      )
    fields["position_offset"] = padding + 1
  return fields


def stored_name(model: bert.Bert, name: str) -> str | None:
  """The name in `key_map` of a stored tensor; None: it is not loaded.

  The prefix depends on the head that the checkpoint was saved with, and the
  oldest files call the parameters of a norm gamma and beta.
  """
  if name.startswith(("cls.", "lm_head.")):
    return None
  kind = _kind(model)
  bare = name.removeprefix(f"{kind}.")
  if bare.startswith("pooler.") and _pooler(model) != "pooler.dense":
    return None  # beside a RoBERTa classifier, or a masked language model
  bare = bare.replace("LayerNorm.gamma", "LayerNorm.weight")
  bare = bare.replace("LayerNorm.beta", "LayerNorm.bias")
  if bare.startswith("classifier."):
    return bare
  return _prefix(model) + bare


def _kind(model: bert.Bert) -> str:
  return "roberta" if model.position_offset else "bert"


def _prefix(model: bert.Bert) -> str:
  """Of the encoder's tensors: a file of the encoder alone has none."""
  alone = not model.num_labels and model.add_pooling_layer
  return "" if alone else f"{_kind(model)}."


def _pooler(model: bert.Bert) -> str | None:
  if not model.add_pooling_layer:
    return None
  if model.num_labels and model.position_offset:
    return "classifier.dense"
  return "pooler.dense"


def unsupported(model: bert.Bert) -> str | None:
  """Why the model cannot be written; None: it can."""
  if model.position_offset not in (0, 2):
    return f"position_offset={model.position_offset} is neither 0 nor 2"
  if not model.add_pooling_layer:
    return "the format has no encoder without a pooler"
  return None


def hub_config(model: bert.Bert) -> dict[str, Any]:
  """The config.json of a model."""
  kind = _kind(model)
  head = "ForSequenceClassification" if model.num_labels else "Model"
  config: dict[str, Any] = {
    "model_type": kind,
    "architectures": [_CLASS[kind] + head],
    "hidden_act": published_activation(model.hidden_act),
    "initializer_range": model.initializer_range,
    "layer_norm_eps": model.layer_norm_eps,
    "classifier_dropout": model.classifier_dropout,
  }
  if kind == "roberta":
    config["pad_token_id"] = model.position_offset - 1
  names = [*_INTEGERS[kind], *_FRACTIONS]
  config |= {name: getattr(model, name) for name in names}
  if model.num_labels:
    labels = [f"LABEL_{i}" for i in range(model.num_labels)]
    config["id2label"] = {str(i): label for i, label in enumerate(labels)}
    config["label2id"] = {label: i for i, label in enumerate(labels)}
  return config


def tied_copies(model: bert.Bert) -> dict[str, str]:
  """Stored tensors that may repeat another one: none that is loaded."""
  del model
  return {}


def key_map(model: bert.Bert) -> list[Entry]:
  """Which of our parameters each stored tensor holds."""
  prefix = _prefix(model)
  layer = f"{prefix}encoder.layer.{{layer}}."
  entries = [
    Entry(f"{prefix}embeddings.{name}.weight", (f"{name}/embedding",), "matrix")
    for name in (
      "word_embeddings", "position_embeddings", "token_type_embeddings"
    )
  ]  # fmt: skip
  norms = [
    (f"{prefix}embeddings.LayerNorm", "embed_norm"),
    (f"{layer}attention.output.LayerNorm", "blocks/norm1"),
    (f"{layer}output.LayerNorm", "blocks/norm2"),
  ]
  linears = [
    (f"{layer}attention.self.{name}", f"blocks/attention/{name}", 1)
    for name in ("query", "key", "value")
  ] + [
    (f"{layer}attention.output.dense", "blocks/attention/out", 2),
    (f"{layer}intermediate.dense", "blocks/mlp/up", 1),
    (f"{layer}output.dense", "blocks/mlp/down", 1),
  ]
  if pooler := _pooler(model):
    pooler = pooler if pooler.startswith("classifier") else prefix + pooler
    linears.append((pooler, "pooler", 1))
  if model.num_labels:
    head = "classifier.out_proj" if model.position_offset else "classifier"
    linears.append((head, "head", 1))
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
