"""config.json of Falcon-H1: every field is read, or refused by name."""

import json
import math
import pathlib
import sys

import jax.numpy as jnp
import pytest

from multihead import models
from multihead.checkpoints import falcon_h1
from multihead.errors import UserError

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "golden"))
import falcon_h1_cases as cases

# The 0.5B file as published, in the old spelling of rope and dtype.
PUBLISHED = {
  "architectures": ["FalconH1ForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "attention_in_multiplier": 1.0,
  "attention_out_multiplier": 0.9375,
  "attn_layer_indices": None,
  "bos_token_id": 1,
  "embedding_multiplier": 5.656854249492381,
  "eos_token_id": [11, 228],
  "head_dim": 64,
  "hidden_act": "silu",
  "hidden_size": 1024,
  "initializer_range": 0.02,
  "intermediate_size": 2048,
  "key_multiplier": 0.390625,
  "lm_head_multiplier": 0.0390625,
  "mamba_chunk_size": 128,
  "mamba_conv_bias": True,
  "mamba_d_conv": 4,
  "mamba_d_head": 64,
  "mamba_d_ssm": 1536,
  "mamba_d_state": 128,
  "mamba_expand": 2,
  "mamba_n_groups": 1,
  "mamba_n_heads": 24,
  "mamba_norm_before_gate": False,
  "mamba_proj_bias": False,
  "mamba_rms_norm": False,
  "mamba_use_mlp": True,
  "max_position_embeddings": 16384,
  "mlp_bias": False,
  "mlp_expansion_factor": 8,
  "mlp_multipliers": [0.8838834764831844, 0.5859375],
  "model_type": "falcon_h1",
  "num_attention_heads": 8,
  "num_hidden_layers": 36,
  "num_key_value_heads": 2,
  "num_logits_to_keep": 1,
  "pad_token_id": 0,
  "projectors_bias": False,
  "rms_norm_eps": 1e-05,
  "rope_scaling": None,
  "rope_theta": 1e11,
  "ssm_in_multiplier": 1.25,
  "ssm_multipliers": [
    0.3535533905932738, 0.25, 0.1767766952966369, 0.5, 0.3535533905932738
  ],
  "ssm_out_multiplier": 0.23570226039551587,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.52.0",
  "use_cache": True,
  "vocab_size": 32784,
}  # fmt: skip


def read(**changes):
  """Fields of PUBLISHED with these changes; a field set to ... is left out."""
  config = {k: v for k, v in {**PUBLISHED, **changes}.items() if v is not ...}
  return falcon_h1.model_fields(config, "dir/config.json")


def test_published_file_is_the_published_variant():
  model = models.create("falcon_h1", **read())
  variant = models.create("falcon_h1", "0.5b")
  for name in variant.__dataclass_fields__:
    if name not in ("multipliers", "parent", "name"):
      assert getattr(model, name) == getattr(variant, name), name
  for name in falcon_h1._MULTIPLIERS.values():
    assert getattr(model.multipliers, name) == pytest.approx(
      getattr(variant.multipliers, name)
    )


def test_every_multiplier_lands_at_its_place():
  m = falcon_h1.model_fields(cases.config("plain"), "c")["multipliers"]
  assert m == falcon_h1.falcon_h1.Multipliers(
    embedding=1.7, lm_head=0.6, key=0.75, attention_in=1.3, attention_out=0.85,
    ssm_in=1.25, ssm_out=0.55, mlp_gate=0.9, mlp_down=1.15,
    ssm=(1.4, 0.8, 1.1, 0.7, 0.65),
  )  # fmt: skip


def test_defaults_are_those_of_the_published_class():
  fields = falcon_h1.model_fields(
    {"model_type": "falcon_h1", "rope_theta": 1e11, "mamba_n_heads": 64}, "c"
  )
  assert fields["mamba_norm_before_gate"] is True
  assert fields["mamba_rms_norm"] is False
  assert fields["mamba_conv_bias"] is True
  assert fields["num_key_value_heads"] == 8
  assert fields["head_dim"] == 4096 // 32
  assert fields["mamba_d_head"] == 1024 // 64
  assert fields["vocab_size"] == 128000
  assert fields["multipliers"] == falcon_h1.falcon_h1.Multipliers()


def test_null_and_auto():
  fields = read(mamba_d_ssm=None, mamba_d_head="auto", mamba_n_heads=16)
  assert fields["mamba_d_head"] == 2 * 1024 // 16
  fields = read(num_key_value_heads=None, head_dim=None)
  assert fields["num_key_value_heads"] == 8
  assert fields["head_dim"] == 1024 // 8
  # mamba_expand says nothing when mamba_d_ssm is there.
  assert read(mamba_expand=7) == read()


@pytest.mark.parametrize(
  "value, expected",
  [
    (..., (0.0, math.inf)),
    (None, (0.0, math.inf)),
    ([0.0, {"__float__": "Infinity"}], (0.0, math.inf)),
    ([0, math.inf], (0.0, math.inf)),
    ([0.0, "Infinity"], (0.0, math.inf)),
    ([0.001, 0.1], (0.001, 0.1)),
  ],
)
def test_time_step_limit(value, expected):
  assert read(time_step_limit=value)["time_step_limit"] == expected


def test_infinity_as_the_json_module_writes_it():
  config = json.loads(
    json.dumps({**PUBLISHED, "time_step_limit": [0, math.inf]})
  )
  fields = falcon_h1.model_fields(config, "c")
  assert fields["time_step_limit"] == (0.0, math.inf)


@pytest.mark.parametrize(
  "changes",
  [
    {"rope_theta": 5e5},
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
    {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    {
      "rope_theta": ...,
      "rope_scaling": ...,
      "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    },
    {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 500000}},
  ],
)
def test_rope_spellings(changes):
  assert read(**changes)["rope_theta"] == 5e5


@pytest.mark.parametrize(
  "changes, text",
  [
    ({"rope_thea": 1e4}, "'rope_thea' (did you mean 'rope_theta'?)"),
    ({"mamba_headdim": 64}, "unknown field 'mamba_headdim'"),
    ({"hidden_size": "1024"}, "hidden_size is '1024'; it must be a positive"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"mlp_bias": 0}, "mlp_bias is 0; it must be true or false"),
    ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf; it must be finite"),
    ({"key_multiplier": "x"}, "key_multiplier is 'x'; it must be a number"),
    ({"key_multiplier": math.nan}, "key_multiplier is nan"),
    ({"mlp_multipliers": [1.0]}, "mlp_multipliers is [1.0]; it must be a list"),
    ({"ssm_multipliers": 2.0}, "a list of 5 numbers"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ({"mamba_use_mlp": False}, "mamba_use_mlp is False"),
    ({"attn_layer_indices": [0]}, "attn_layer_indices is [0]"),
    ({"sliding_window": 4096}, "sliding_window is 4096"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    ({"architectures": ["FalconH1Model"]}, "architectures is"),
    ({"layer_types": ["mamba"] * 36}, "every layer must be 'hybrid'"),
    ({"num_key_value_heads": 3}, "a multiple of num_key_value_heads 3"),
    ({"mamba_n_groups": 5}, "24 is not a multiple of mamba_n_groups 5"),
    ({"mamba_d_ssm": 2048}, "2048 is not a multiple of mamba_n_heads 24"),
    ({"mamba_d_head": 32}, "mamba_n_heads 24 * mamba_d_head 32 = 768"),
    ({"mamba_d_ssm": None}, "mamba_expand * hidden_size = 2048"),
    ({"head_dim": 63}, "head_dim 63 is odd"),
    ({"rope_theta": ...}, "neither rope_theta nor"),
    ({"rope_theta": -1.0}, "must be positive"),
    ({"rope_parameters": {"rope_theta": 1e4}}, "stated twice, differently"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_scaling has 'factor'"),
    ({"rope_scaling": 2.0}, "must be an object or null"),
    ({"time_step_limit": [0.5, 0.1]}, "two rising numbers"),
    ({"time_step_limit": [0.1]}, "a list of 2 numbers"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
  ],
)  # fmt: skip
def test_refused(changes, text):
  with pytest.raises(UserError) as error:
    read(**changes)
  assert text in str(error.value)
  assert str(error.value).startswith("dir/config.json: ")
  assert "\n" not in str(error.value)


def test_all_unknown_fields_are_named():
  with pytest.raises(UserError, match=r"'alpha'.*, 'beta'"):
    read(beta=1, alpha=2)


@pytest.mark.parametrize("case", cases.CASES)
@pytest.mark.parametrize(
  "limit", [(0.0, math.inf), (0.1, math.inf), (0.1, 2.0)]
)
def test_config_survives_writing_and_reading(case, limit):
  fields = falcon_h1.model_fields(cases.config(case), "c")
  model = models.create("falcon_h1", **{**fields, "time_step_limit": limit})
  written = json.loads(json.dumps(falcon_h1.hub_config(model), allow_nan=False))
  again = models.create("falcon_h1", **falcon_h1.model_fields(written, "c"))
  assert again == model


def test_every_model_field_is_in_the_config():
  """A new field of the model must be written and read, or listed here."""
  ours_alone = {
    "initializer", "dtype", "param_dtype", "scan_layers", "remat",
    "attention_implementation", "ssd_implementation", "parent", "name",
  }  # fmt: skip
  fields = read().keys()
  model = models.create("falcon_h1", dtype=jnp.float32)
  assert fields == model.__dataclass_fields__.keys() - ours_alone
