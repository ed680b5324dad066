"""Falcon-H1 checkpoints: every field of config.json, and the key map.

The stored layout is that of `transformers` model type `falcon_h1`. Its fused
projection and convolution (rows gate | x | B | C | dt, and x | B | C) are
separate parameters here.
"""

import math
from collections.abc import Mapping
from typing import Any

from multihead.checkpoints.config_reader import INFORMATIONAL, Reader
from multihead.checkpoints.key_map import Entry
from multihead.errors import nearest
from multihead.models import falcon_h1

MODEL_TYPE = "falcon_h1"
MODEL = falcon_h1.FalconH1
FORMAT = "transformers"
GENERATES = True
_ARCHITECTURE = "FalconH1ForCausalLM"

# Fields that the model has under the same name, with the default that a file
# without the field means: that of the published config class.
_INTEGERS = {
  "vocab_size": 128000,
  "hidden_size": 4096,
  "intermediate_size": 14336,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "mamba_n_heads": 128,
  "mamba_n_groups": 1,
  "mamba_d_state": 256,
  "mamba_d_conv": 4,
  "mamba_chunk_size": 256,
  "max_position_embeddings": 8192,
}
_BOOLEANS = {
  "mamba_conv_bias": True,
  "mamba_proj_bias": False,
  "mamba_rms_norm": False,
  "mamba_norm_before_gate": True,
  "projectors_bias": False,
  "attention_bias": False,
  "mlp_bias": False,
  "tie_word_embeddings": False,
}
_FLOATS = {"rms_norm_eps": 1e-5, "initializer_range": 0.02}
# Field of config.json -> field of Multipliers, default 1.
_MULTIPLIERS = {
  "embedding_multiplier": "embedding",
  "lm_head_multiplier": "lm_head",
  "key_multiplier": "key",
  "attention_in_multiplier": "attention_in",
  "attention_out_multiplier": "attention_out",
  "ssm_in_multiplier": "ssm_in",
  "ssm_out_multiplier": "ssm_out",
}
_MULTIPLIER_LISTS = {
  "mlp_multipliers": ("mlp_gate", "mlp_down"),
  "ssm_multipliers": ("z", "x", "B", "C", "dt"),
}
# Fields that need more than a copy; each has its lines in `model_fields`.
_DERIVED = (
  "model_type", "architectures", "num_key_value_heads", "head_dim",
  "mamba_d_ssm", "mamba_d_head", "mamba_expand", "time_step_limit",
  "rope_theta", "rope_scaling", "rope_parameters", "layer_types",
  "layers_block_type", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# Fields with one value that the model implements.
_FIXED = {
  "hidden_act": "silu",
  "attention_dropout": 0.0,
  "mamba_use_mlp": True,
  "attn_layer_indices": None,
  "sliding_window": None,
  "use_sliding_window": False,
  "partial_rotary_factor": 1.0,
  "per_layer_config": None,
  "quantization_config": None,
  "is_encoder_decoder": False,
}
KNOWN_FIELDS = frozenset(
  [*_INTEGERS, *_BOOLEANS, *_FLOATS, *_MULTIPLIERS, *_MULTIPLIER_LISTS,
   *_DERIVED, *_FIXED, *INFORMATIONAL]
)  # fmt: skip


def model_fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
  """Turns the content of config.json into the model's fields.

  Args:
    config: the parsed file.
    source: its path, for error texts.

  Raises:
    UserError: an unknown field (the nearest known one is named), a value of
      another type, a value the model does not implement, or two fields that
      contradict each other.
  """
  read = Reader(config, source)
  read.refuse_unknown(KNOWN_FIELDS)
  read.check_fixed(_FIXED)
  architectures = config.get("architectures") or [_ARCHITECTURE]
  if architectures != [_ARCHITECTURE]:
    raise read.error(
      f"architectures is {architectures!r}; only [{_ARCHITECTURE!r}] is loaded."
    )
  for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
    read.token_ids(name)

  fields: dict[str, Any] = {}
  fields |= {n: read.integer(n, default) for n, default in _INTEGERS.items()}
  fields |= {n: read.boolean(n, default) for n, default in _BOOLEANS.items()}
  fields |= {n: read.finite(n, default) for n, default in _FLOATS.items()}
  fields["multipliers"] = _multipliers(read)
  fields |= _attention_heads(read, fields)
  fields |= _ssm_heads(read, fields)
  fields["rope_theta"] = _rope_theta(read)
  fields["time_step_limit"] = _time_step_limit(read)
  for name in ("layer_types", "layers_block_type"):
    value = config.get(name)
    if value is not None and value != ["hybrid"] * fields["num_hidden_layers"]:
      raise read.error(f"{name} is {value!r}; every layer must be 'hybrid'.")
  return fields


def _multipliers(read: Reader) -> falcon_h1.Multipliers:
  values = {ours: read.finite(name, 1.0) for name, ours in _MULTIPLIERS.items()}
  mlp = read.numbers("mlp_multipliers", (1.0,) * 2)
  values |= dict(zip(_MULTIPLIER_LISTS["mlp_multipliers"], mlp, strict=True))
  ssm = read.numbers("ssm_multipliers", (1.0,) * 5)
  return falcon_h1.Multipliers(**values, ssm=ssm)


def _attention_heads(read: Reader, fields: Mapping[str, Any]) -> dict:
  heads = fields["num_attention_heads"]
  kv_heads, head_dim = heads, None
  if read.config.get("num_key_value_heads", 8) is not None:
    kv_heads = read.integer("num_key_value_heads", 8)
  if read.config.get("head_dim") is not None:
    head_dim = read.integer("head_dim", None)
  if heads % kv_heads:
    raise read.error(
      f"num_attention_heads {heads} is not a multiple of num_key_value_heads "
      f"{kv_heads}."
    )
  head_dim = head_dim or fields["hidden_size"] // heads
  if head_dim % 2:
    raise read.error(f"head_dim {head_dim} is odd; rotary halves need it even.")
  return {"num_key_value_heads": kv_heads, "head_dim": head_dim}


def _ssm_heads(read: Reader, fields: Mapping[str, Any]) -> dict:
  heads, groups = fields["mamba_n_heads"], fields["mamba_n_groups"]
  if read.config.get("mamba_d_ssm", 1024) is None:
    expand = read.integer("mamba_expand", 2)
    width = expand * fields["hidden_size"]
    stated = f"mamba_expand * hidden_size = {width}"
  else:
    # mamba_expand then says nothing, as published files show (2 * d != d_ssm).
    width = read.integer("mamba_d_ssm", 1024)
    stated = f"mamba_d_ssm {width}"
  if width % heads:
    raise read.error(f"{stated} is not a multiple of mamba_n_heads {heads}.")
  head_dim = width // heads
  if read.config.get("mamba_d_head", "auto") not in ("auto", None):
    head_dim = read.integer("mamba_d_head", None)
  if heads * head_dim != width:
    raise read.error(
      f"{stated} contradicts mamba_n_heads {heads} * mamba_d_head {head_dim} = "
      f"{heads * head_dim}."
    )
  if heads % groups:
    raise read.error(
      f"mamba_n_heads {heads} is not a multiple of mamba_n_groups {groups}."
    )
  return {"mamba_d_head": head_dim}


def _rope_theta(read: Reader) -> float:
  """The rotary base, from either spelling; there is no default for it."""
  config = read.config
  stated = {}
  if config.get("rope_theta") is not None:
    stated["rope_theta"] = read.finite("rope_theta", 0.0)
  for field in ("rope_scaling", "rope_parameters"):
    value = config.get(field)
    if value is None:
      continue
    if not isinstance(value, Mapping):
      raise read.error(f"{field} is {value!r}; it must be an object or null.")
    allowed = {
      "rope_type": ("default",),
      "type": ("default",),
      "partial_rotary_factor": (1.0, None),
    }
    for key, entry in value.items():
      if key == "rope_theta":
        stated[f"{field}.rope_theta"] = read.number(f"{field}.{key}", entry)
      elif key not in allowed:
        hint = nearest(key, [*allowed, "rope_theta"])
        raise read.error(
          f"{field} has {key!r}{hint}; the model implements the default "
          "rotary embedding with rope_theta only."
        )
      elif entry not in allowed[key]:
        raise read.error(
          f"{field}.{key} is {entry!r}; the model implements "
          f"{allowed[key][0]!r} only."
        )
  if not stated:
    raise read.error(
      "neither rope_theta nor rope_parameters.rope_theta is there. Releases of "
      "the format differ in the default, so it must be stated (the published "
      "models have 1e11)."
    )
  if len(set(stated.values())) > 1:
    listed = ", ".join(f"{name} {value:g}" for name, value in stated.items())
    raise read.error(f"the rotary base is stated twice, differently: {listed}.")
  (theta,) = set(stated.values())
  if not 0 < theta < math.inf:
    raise read.error(f"the rotary base is {theta}; it must be positive.")
  return theta


def _time_step_limit(read: Reader) -> tuple[float, float]:
  low, high = read.numbers("time_step_limit", (0.0, math.inf))
  if not 0 <= low < high:
    raise read.error(
      f"time_step_limit is {[low, high]}; it must be two rising numbers, the "
      "first not negative."
    )
  return low, high


def hub_config(model: falcon_h1.FalconH1) -> dict[str, Any]:
  """The config.json of a model, readable by old and new `transformers`."""
  config: dict[str, Any] = {
    "model_type": MODEL_TYPE,
    "architectures": [_ARCHITECTURE],
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "attn_layer_indices": None,
    "mamba_use_mlp": True,
    "use_cache": True,
  }
  same = [*_INTEGERS, *_BOOLEANS, *_FLOATS]
  same += ["num_key_value_heads", "head_dim", "mamba_d_head"]
  config |= {name: getattr(model, name) for name in same}
  config["mamba_d_ssm"] = model.mamba_n_heads * model.mamba_d_head
  config["mamba_expand"] = 2  # unread beside mamba_d_ssm; as published files
  # Both spellings: a reader that knows one would fall back to its own default.
  theta = float(model.rope_theta)
  config["rope_theta"] = theta
  config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
  multipliers = model.multipliers
  for name, ours in _MULTIPLIERS.items():
    config[name] = float(getattr(multipliers, ours))
  config["mlp_multipliers"] = [
    float(multipliers.mlp_gate), float(multipliers.mlp_down)
  ]  # fmt: skip
  config["ssm_multipliers"] = [float(value) for value in multipliers.ssm]
  limit = tuple(float(value) for value in model.time_step_limit)
  if limit != (0.0, math.inf):
    # The default is left out: old readers cannot parse a stored infinity.
    config["time_step_limit"] = [
      value if math.isfinite(value) else {"__float__": "Infinity"}
      for value in limit
    ]
  return config


def stored_name(model: falcon_h1.FalconH1, name: str) -> str:
  """The name in `key_map` of a stored tensor: as it is."""
  del model
  return name


def unsupported(model: falcon_h1.FalconH1) -> str | None:
  """Why the model cannot be written: it always can."""
  del model
  return None


def tied_copies(model: falcon_h1.FalconH1) -> dict[str, str]:
  """Stored tensors that may repeat another one."""
  if model.tie_word_embeddings:
    return {"lm_head.weight": "model.embed_tokens.weight"}
  return {}


def key_map(model: falcon_h1.FalconH1) -> list[Entry]:
  """Which of our parameters each stored tensor holds."""
  layer = "model.layers.{layer}."
  attention, mamba = "layers/attention/", "layers/mamba/"
  in_proj = [mamba + name for name in ("gate", "x", "bc", "dt")]
  conv = [mamba + name for name in ("conv_x", "conv_bc")]
  mlp = ("gate", "up", "down")

  def join(names: list[str], leaf: str) -> tuple[str, ...]:
    return tuple(f"{name}/{leaf}" for name in names)

  entries = [
    Entry("model.embed_tokens.weight", ("embed/embedding",), "matrix"),
    Entry("model.final_layernorm.weight", ("final_norm/scale",), "vector"),
    Entry(layer + "input_layernorm.weight", ("layers/input_norm/scale",),
          "vector"),
    Entry(layer + "pre_ff_layernorm.weight", ("layers/mlp_norm/scale",),
          "vector"),
    Entry(layer + "mamba.in_proj.weight", join(in_proj, "kernel"), "linear"),
    Entry(layer + "mamba.conv1d.weight", join(conv, "kernel"), "conv"),
    Entry(layer + "mamba.out_proj.weight", (mamba + "out/kernel",), "linear",
          inputs=2),
    Entry(layer + "self_attn.o_proj.weight", (attention + "out/kernel",),
          "linear", inputs=2),
  ]  # fmt: skip
  entries += [
    Entry(f"{layer}mamba.{name}", (mamba + name,), "vector")
    for name in ("A_log", "D", "dt_bias")
  ]
  entries += [
    Entry(f"{layer}self_attn.{name[0]}_proj.weight",
          (f"{attention}{name}/kernel",), "linear")
    for name in ("query", "key", "value")
  ]  # fmt: skip
  entries += [
    Entry(f"{layer}feed_forward.{name}_proj.weight",
          (f"layers/mlp/{name}/kernel",), "linear")
    for name in mlp
  ]  # fmt: skip
  if model.mamba_rms_norm:
    scale = (mamba + "norm/scale",)
    entries.append(Entry(layer + "mamba.norm.weight", scale, "vector"))
  if not model.tie_word_embeddings:
    entries.append(Entry("lm_head.weight", ("lm_head/kernel",), "linear"))

  if model.mamba_conv_bias:
    bias = join(conv, "bias")
    entries.append(Entry(layer + "mamba.conv1d.bias", bias, "vector"))
  if model.mamba_proj_bias:
    bias = join(in_proj, "bias")
    entries.append(Entry(layer + "mamba.in_proj.bias", bias, "vector"))
  if model.projectors_bias:
    bias = (mamba + "out/bias",)
    entries.append(Entry(layer + "mamba.out_proj.bias", bias, "vector"))
  if model.attention_bias:
    entries += [
      Entry(f"{layer}self_attn.{name[0]}_proj.bias",
            (f"{attention}{name}/bias",), "vector")
      for name in ("query", "key", "value", "out")
    ]  # fmt: skip
  if model.mlp_bias:
    entries += [
      Entry(f"{layer}feed_forward.{name}_proj.bias",
            (f"layers/mlp/{name}/bias",), "vector")
      for name in mlp
    ]  # fmt: skip
  return entries
