"""Configs are read strictly: no key, type or value passes unnoticed."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
from absl.testing import parameterized
from ml_collections import ConfigDict

from configs import common
from multihead import tasks
from multihead.errors import UserError
from multihead.models import falcon_h1
from multihead.train import config as config_lib


def _model(**fields):
  return {"model": {"name": "falcon_h1", "vocab_size": 264, **fields}}


class ReadTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"total_step": 3}, "'total_step' (did you mean 'total_steps'?)"),
    (
      {"optimizer": {"learning": 1.0, "warmup": 3}},
      "'optimizer.learning'",
    ),
    (
      {"optimizer": {"warmup_step": 3}},
      "did you mean 'optimizer.warmup_steps'?",
    ),
    # The right name in the wrong section.
    ({"clip_norm": 1.0}, "did you mean 'optimizer.clip_norm'?"),
    ({"mesh": {"model": 2}}, "known here: mesh.data, mesh.fsdp"),
    ({"data": {"pth": "x"}}, "did you mean 'data.path'?"),
  )
  def test_unknown_key_names_the_nearest(self, values, message):
    with pytest.raises(UserError, match="unknown config key") as raised:
      config_lib.read_config(values)
    assert message in str(raised.value)

  @parameterized.parameters(
    ({"batch_size": "8"}, "config.batch_size is '8' (str); it must be int"),
    ({"batch_size": 8.0}, "it must be int"),
    ({"batch_size": True}, "it must be int"),
    ({"optimizer": {"lr": "x"}}, "config.optimizer.lr is 'x'"),
    ({"data": {"path": 3}}, "it must be str or None"),
    ({"optimizer": 3}, "it must be a section with the keys name, lr"),
    ({"eval": {"baselines": 1}}, "it must be bool"),
  )
  def test_wrong_type(self, values, message):
    with pytest.raises(UserError) as raised:
      config_lib.read_config(values)
    assert message in str(raised.value)

  @parameterized.parameters(
    ({"total_steps": 0}, "config.total_steps is 0; it must be at least 1"),
    ({"optimizer": {"lr": -1.0}}, "config.optimizer.lr"),
    ({"optimizer": {"b2": 1.0}}, "at least 0 and less than 1"),
    ({"dtype": "float16"}, "one of float32, bfloat16"),
    ({"remat": "ful"}, "(did you mean 'full'?)"),
    ({"task": "language_modeling"}, "(did you mean 'language_modelling'?)"),
    (_model(multipliers="shapes"), "(did you mean 'shape'?)"),
    ({"optimizer": {"lr": float("nan")}}, "config.optimizer.lr is nan"),
  )
  def test_wrong_value(self, values, message):
    with pytest.raises(UserError) as raised:
      config_lib.read_config(values)
    assert message in str(raised.value)

  def test_ints_serve_as_floats(self):
    config = config_lib.read_config({"optimizer": {"lr": 1}})
    assert type(config.optimizer.lr) is float

  def test_round_trip_through_json(self):
    values = common.training()
    values.model = ConfigDict(
      {"name": "falcon_h1", "time_step_limit": (0.0, 1.0), "head_dim": 8}
    )
    config = config_lib.read_config(values)
    assert config.model.overrides == {
      "time_step_limit": (0.0, 1.0),
      "head_dim": 8,
    }
    again = config_lib.read_config(json.loads(json.dumps(config.to_dict())))
    assert again == config

  def test_common_config_has_every_key_and_default(self):
    # A key that a config file lacks cannot be changed on the command line.
    values = common.training()
    assert config_lib.read_config(values) == config_lib.TrainConfig()
    for field in dataclasses.fields(config_lib.TrainConfig):
      assert field.name in values
      kind = (
        tasks.TASKS["language_modelling"].data_config
        if field.name == "data"
        else field.type
      )
      if dataclasses.is_dataclass(kind) and field.name != "model":
        names = {part.name for part in dataclasses.fields(kind)}
        assert set(values[field.name]) == names, field.name

  def test_missing_config_of_a_workdir(self):
    with pytest.raises(UserError, match="no config at /nowhere/config.json"):
      config_lib.read_json("/nowhere/config.json")


class BuildModelTest(parameterized.TestCase):
  def test_overrides_dtype_and_remat(self):
    config = config_lib.read_config(
      {"dtype": "bfloat16", "remat": "dots", **_model(hidden_size=64)}
    )
    model = config_lib.build_model(config)
    assert model.hidden_size == 64
    assert model.dtype == jnp.bfloat16
    assert model.param_dtype == jnp.float32
    assert model.remat == "dots"

  def test_key_without_value_keeps_the_variant(self):
    config = config_lib.read_config(
      {"model": {"name": "falcon_h1", "variant": "0.5b", "hidden_size": None}}
    )
    assert config_lib.build_model(config).hidden_size == 1024

  @parameterized.parameters(
    ("variant", "0.5", "(did you mean '0.5b'?)"),
    ("name", "falcon_h2", "(did you mean 'falcon_h1'?)"),
    ("hiden_size", 3, "(did you mean 'hidden_size'?)"),
  )
  def test_unknown_names(self, key, value, message):
    config = config_lib.read_config(_model(**{key: value}))
    with pytest.raises(UserError) as raised:
      config_lib.build_model(config)
    assert message in str(raised.value)

  def test_multipliers(self):
    build = lambda **fields: (
      config_lib.build_model(
        config_lib.read_config({"model": {"name": "falcon_h1", **fields}})
      ).multipliers
    )
    assert build(variant="0.5b", multipliers="none") == falcon_h1.Multipliers()
    published = build(variant="0.5b")
    assert build(variant="0.5b", multipliers="published") == published
    shape = build(variant="0.5b", multipliers="shape", hidden_size=2560)
    # lm_head = 40 / d, in the table of the released values.
    assert shape.lm_head == pytest.approx(40 / 2560)
    assert published.lm_head == pytest.approx(40 / 1024)

  def test_sequence_longer_than_the_model(self):
    values = _model(max_position_embeddings=128)
    config = config_lib.read_config({"sequence_length": 129, **values})
    with pytest.raises(UserError, match="129 is longer than the 128 positions"):
      config_lib.build_model(config)
