"""Directories of weights: loading, sharding, saving, and what can go wrong."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as library

from multihead import checkpoints, models
from multihead.checkpoints import falcon_h1, hub_format, safetensors_io
from multihead.errors import UserError
from multihead.parallel import make_mesh, sharding

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "golden"))
import falcon_h1_cases as cases

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def hub(tmp_path):
  """Writes a case as a directory: hub(case, dtype) -> (path, tensors)."""

  def write(case="plain", dtype=np.float32):
    path = tmp_path / case
    return path, cases.write_directory(path, case, dtype)

  return write


def rewrite(path, stored):
  library.save_file(stored, path / "model.safetensors")


def change_config(path, **changes):
  config = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(json.dumps({**config, **changes}))


def assert_equal_trees(a, b):
  a, b = hub_format._flatten(a), hub_format._flatten(b)
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype, name
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_fused_tensors_are_split_at_the_right_rows(hub):
  path, stored = hub("norm_after_gate_g2")
  _, params = checkpoints.from_pretrained(path)
  # Rows gate | x | B | C | dt: 64 | 64 | 24 | 24 | 8, heads of 8, 2 groups.
  rows = stored["model.layers.1.mamba.in_proj.weight"]
  mamba = jax.tree.map(lambda x: np.asarray(x[1]), params["layers"]["mamba"])
  d = 40
  np.testing.assert_array_equal(
    mamba["gate"]["kernel"].reshape(d, -1), rows[:64].T
  )
  np.testing.assert_array_equal(mamba["x"]["kernel"][:, 3, 5], rows[64 + 29])
  bc = mamba["bc"]["kernel"]
  assert bc.shape == (d, 2, 2, 12)
  np.testing.assert_array_equal(bc[:, 0, 1, 7], rows[128 + 19])
  np.testing.assert_array_equal(bc[:, 1, 0, 2], rows[128 + 24 + 2])
  np.testing.assert_array_equal(mamba["dt"]["kernel"], rows[-8:].T)
  conv = stored["model.layers.1.mamba.conv1d.weight"]
  np.testing.assert_array_equal(mamba["conv_x"]["kernel"][:, 2, 1], conv[17, 0])
  np.testing.assert_array_equal(
    mamba["conv_bc"]["kernel"][:, 1, 1, 4], conv[64 + 24 + 16, 0]
  )
  out = stored["model.layers.1.self_attn.o_proj.weight"]
  kernel = params["layers"]["attention"]["out"]["kernel"][1]
  np.testing.assert_array_equal(kernel[4, 3], out[:, 4 * 8 + 3])


@pytest.mark.parametrize("case", cases.CASES)
def test_round_trip_is_bit_identical(hub, tmp_path, case):
  path, stored = hub(case)
  model, params = checkpoints.from_pretrained(path)
  checkpoints.save_pretrained(tmp_path / "again", model, params)
  written = library.load_file(tmp_path / "again" / "model.safetensors")
  assert written.keys() == stored.keys()
  for name, value in stored.items():
    assert written[name].dtype == value.dtype
    np.testing.assert_array_equal(written[name], value, err_msg=name)
  again, params_again = checkpoints.from_pretrained(tmp_path / "again")
  assert again == model
  assert_equal_trees(params_again, params)


def test_layers_one_after_another(hub, tmp_path):
  path, _ = hub("tied_expand_g2")
  stacked, params = checkpoints.from_pretrained(path)
  model, flat = checkpoints.from_pretrained(path, scan_layers=False)
  assert not model.scan_layers
  _, expected = stacked.unroll(params)
  assert_equal_trees(flat, expected)
  checkpoints.save_pretrained(tmp_path / "a", model, flat)
  checkpoints.save_pretrained(tmp_path / "b", stacked, params)
  a, b = (tmp_path / x / "model.safetensors" for x in "ab")
  assert a.read_bytes() == b.read_bytes()


def test_dtypes(hub):
  path, stored = hub(dtype=BFLOAT16)
  model, params = checkpoints.from_pretrained(path)
  assert model.dtype == model.param_dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(params)} == {BFLOAT16}
  head = params["lm_head"]["kernel"]
  np.testing.assert_array_equal(head, stored["lm_head.weight"].T)

  model, params = checkpoints.from_pretrained(
    path, "float32", compute_dtype="bfloat16"
  )
  assert model.dtype == jnp.bfloat16 and model.param_dtype == jnp.float32
  head = params["lm_head"]["kernel"]
  assert head.dtype == np.float32
  np.testing.assert_array_equal(head, stored["lm_head.weight"].T)

  with pytest.raises(UserError, match="dtype='int8' .* float32, bfloat16"):
    checkpoints.from_pretrained(path, "int8")
  with pytest.raises(UserError, match="compute_dtype='bf16'"):
    checkpoints.from_pretrained(path, compute_dtype="bf16")


def test_mixed_dtypes_are_kept(hub, tmp_path):
  path, stored = hub(dtype=BFLOAT16)
  for name in list(stored):
    if name.endswith("A_log"):
      stored[name] = stored[name].astype(np.float32) + np.float32(1e-4)
  rewrite(path, stored)
  model, params = checkpoints.from_pretrained(path)
  assert params["layers"]["mamba"]["A_log"].dtype == np.float32
  assert params["layers"]["mamba"]["D"].dtype == BFLOAT16
  checkpoints.save_pretrained(tmp_path / "again", model, params)
  written = library.load_file(tmp_path / "again" / "model.safetensors")
  name = "model.layers.0.mamba.A_log"
  np.testing.assert_array_equal(written[name], stored[name])

  stored[name] = stored[name].astype(BFLOAT16)
  rewrite(path, stored)
  with pytest.raises(UserError, match="A_log: its layers are stored as"):
    checkpoints.from_pretrained(path)


def test_saving_in_another_dtype(hub, tmp_path):
  path, stored = hub()
  model, params = checkpoints.from_pretrained(path)
  checkpoints.save_pretrained(
    tmp_path / "half", model, params, dtype="bfloat16"
  )
  written = library.load_file(tmp_path / "half" / "model.safetensors")
  for name, value in stored.items():
    np.testing.assert_array_equal(written[name], value.astype(BFLOAT16))
  config = json.loads((tmp_path / "half" / "config.json").read_text())
  assert config["dtype"] == config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("scan_layers", [True, False])
def test_weights_go_straight_to_their_shard(
  hub, tmp_path, monkeypatch, scan_layers
):
  path, stored = hub("norm_after_gate_g2")
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  _, whole = checkpoints.from_pretrained(path, scan_layers=scan_layers)

  largest = 0
  make = jax.make_array_from_callback

  def watch(shape, placement, callback):
    def read(index):
      nonlocal largest
      part = callback(index)
      assert part.shape == placement.shard_shape(shape)
      largest = max(largest, part.size)
      return part

    return make(shape, placement, read)

  elements = 0
  read_part = safetensors_io.StoredTensor.read

  def count(tensor, *index):
    nonlocal elements
    part = read_part(tensor, *index)
    elements += part.size
    return part

  monkeypatch.setattr(jax, "make_array_from_callback", watch)
  monkeypatch.setattr(safetensors_io.StoredTensor, "read", count)
  model, params = checkpoints.from_pretrained(
    path, mesh=mesh, scan_layers=scan_layers
  )
  assert_equal_trees(params, whole)
  placements = hub_format._flatten(sharding.param_shardings(model, mesh))
  for name, leaf in hub_format._flatten(params).items():
    assert leaf.sharding.is_equivalent_to(placements[name], leaf.ndim), name
  assert largest < max(x.size for x in jax.tree.leaves(whole))
  # Each value once, but for cuts that are not contiguous in the file.
  assert elements < 1.1 * sum(x.size for x in stored.values())

  checkpoints.save_pretrained(tmp_path / "again", model, params)
  written = library.load_file(tmp_path / "again" / "model.safetensors")
  for name, value in stored.items():
    np.testing.assert_array_equal(written[name], value, err_msg=name)


def test_sharded_files(hub, tmp_path):
  path, stored = hub()
  model, params = checkpoints.from_pretrained(path)
  again = tmp_path / "again"
  checkpoints.save_pretrained(again, model, params, max_shard_size=20_000)
  files = sorted(again.glob("*.safetensors"))
  assert len(files) > 3
  assert all(file.stat().st_size < 30_000 for file in files)
  index = json.loads((again / "model.safetensors.index.json").read_text())
  assert index["weight_map"].keys() == stored.keys()
  assert_equal_trees(checkpoints.from_pretrained(again)[1], params)
  # A smaller save into the same directory leaves no stale shard behind.
  checkpoints.save_pretrained(again, model, params)
  names = {file.name for file in again.iterdir()}
  assert names == {
    "config.json", "generation_config.json", "model.safetensors"
  }  # fmt: skip
  with pytest.raises(UserError, match="max_shard_size=0"):
    checkpoints.save_pretrained(again, model, params, max_shard_size=0)


def test_tied_weights(hub):
  path, stored = hub("tied_expand_g2")
  model, params = checkpoints.from_pretrained(path)
  assert "lm_head" not in params
  embedding = stored["model.embed_tokens.weight"]
  rewrite(path, {**stored, "lm_head.weight": embedding.copy()})
  assert_equal_trees(checkpoints.from_pretrained(path)[1], params)
  rewrite(path, {**stored, "lm_head.weight": embedding + 1})
  with pytest.raises(UserError, match="lm_head.weight differs"):
    checkpoints.from_pretrained(path)


def test_tensors_that_do_not_fit_are_all_named(hub):
  path, stored = hub()
  del stored["model.layers.0.mamba.D"], stored["lm_head.weight"]
  stored["model.layers.7.extra"] = np.zeros(3, np.float32)
  stored["model.layers.1.mamba.conv1d.weight"] = np.zeros((88, 4), np.float32)
  rewrite(path, stored)
  with pytest.raises(UserError) as error:
    checkpoints.from_pretrained(path)
  text = str(error.value)
  assert "2 missing: lm_head.weight, model.layers.0.mamba.D;" in text
  assert "1 unexpected: model.layers.7.extra;" in text
  assert "conv1d.weight is [88, 4], not [88, 1, 4]" in text
  assert "tie_word_embeddings" in text
  assert "\n" not in text


def test_derived_buffers_are_ignored(hub):
  path, stored = hub()
  _, params = checkpoints.from_pretrained(path)
  extra = {
    "model.rotary_emb.inv_freq": np.zeros(4, np.float32),
    "model.layers.0.mamba.mup_vector": np.zeros((1, 1, 4), np.float32),
  }
  rewrite(path, {**stored, **extra})
  assert_equal_trees(checkpoints.from_pretrained(path)[1], params)


def test_stored_integers_are_refused(hub):
  path, stored = hub()
  stored["lm_head.weight"] = stored["lm_head.weight"].astype(np.int8)
  rewrite(path, stored)
  with pytest.raises(UserError, match="'lm_head.weight' is stored as I8"):
    checkpoints.from_pretrained(path)


def test_directories_that_are_none(tmp_path, hub):
  with pytest.raises(UserError, match="org/name: no such directory"):
    checkpoints.from_pretrained("org/name")
  with pytest.raises(UserError, match="no config.json"):
    checkpoints.from_pretrained(tmp_path)
  path, _ = hub()
  change_config(path, model_type="falcon_h2")
  with pytest.raises(UserError, match="did you mean 'falcon_h1'"):
    checkpoints.from_pretrained(path)
  (path / "config.json").write_text("{")
  with pytest.raises(UserError, match="cannot be read as JSON"):
    checkpoints.from_pretrained(path)
  (path / "config.json").write_text("[]")
  with pytest.raises(UserError, match="must hold a JSON object"):
    checkpoints.from_pretrained(path)


def test_unknown_override(hub):
  path, _ = hub()
  with pytest.raises(UserError, match="did you mean 'scan_layers'"):
    checkpoints.from_pretrained(path, scan_layer=True)


def test_saving_what_is_not_the_model(hub, tmp_path):
  path, _ = hub()
  model, params = checkpoints.from_pretrained(path)
  bad = {**params, "extra": np.zeros(2)}
  del bad["lm_head"]
  with pytest.raises(UserError, match="1 missing: lm_head/kernel"):
    checkpoints.save_pretrained(tmp_path / "x", model, bad)
  whole = {**params, "final_norm": {"scale": np.ones(40, np.int32)}}
  with pytest.raises(UserError, match="dtype int32 cannot be saved; allowed"):
    checkpoints.save_pretrained(tmp_path / "x", model, whole)
  assert not (tmp_path / "x").exists()
  with pytest.raises(UserError, match="a str has no Hugging Face format"):
    checkpoints.save_pretrained(tmp_path / "x", "model", params)
  with pytest.raises(UserError, match="is a file"):
    file = tmp_path / "file"
    file.write_text("")
    checkpoints.save_pretrained(file, model, params)


def test_a_failed_save_is_not_readable(hub, tmp_path, monkeypatch):
  path, _ = hub()
  model, params = checkpoints.from_pretrained(path)
  before = {f.name: f.read_bytes() for f in path.iterdir()}

  def fail(*args, **kwargs):
    raise OSError("disk full")

  # While files are written, the old checkpoint stays whole.
  with monkeypatch.context() as m:
    m.setattr(hub_format.json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
      checkpoints.save_pretrained(path, model, params)
  assert {f.name: f.read_bytes() for f in path.iterdir()} == before
  # While they are moved, no reader takes the directory for a checkpoint.
  with monkeypatch.context() as m:
    m.setattr(hub_format.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
      checkpoints.save_pretrained(path, model, params)
  with pytest.raises(UserError, match="no config.json"):
    checkpoints.from_pretrained(path)
  checkpoints.save_pretrained(path, model, params)
  assert_equal_trees(checkpoints.from_pretrained(path)[1], params)


def test_special_tokens(hub, tmp_path):
  path, _ = hub()
  tokens = checkpoints.read_special_tokens(path)
  assert tokens == checkpoints.SpecialTokens(bos=1, eos=(2,), pad=0)
  (path / "generation_config.json").write_text('{"eos_token_id": [11, 228]}')
  tokens = checkpoints.read_special_tokens(path)
  assert tokens == checkpoints.SpecialTokens(bos=1, eos=(11, 228), pad=0)

  model, params = checkpoints.from_pretrained(path)
  saved = tmp_path / "saved"
  checkpoints.save_pretrained(saved, model, params, special_tokens=tokens)
  assert checkpoints.read_special_tokens(saved) == tokens
  checkpoints.save_pretrained(saved, model, params)
  assert checkpoints.read_special_tokens(saved) == checkpoints.SpecialTokens()
  (path / "generation_config.json").write_text('{"eos_token_id": "x"}')
  with pytest.raises(UserError, match="eos_token_id is 'x'"):
    checkpoints.read_special_tokens(path)


def test_tokenizer_files(hub, tmp_path):
  path, _ = hub()
  model, params = checkpoints.from_pretrained(path)
  source = tmp_path / "tokenizer"
  source.mkdir()
  with pytest.raises(UserError, match="no tokenizer files"):
    checkpoints.save_pretrained(path, model, params, tokenizer_files=source)
  (source / "tokenizer.json").write_text("{}")
  (source / "model.safetensors").write_text("not a tokenizer")
  for given in (source, source / "tokenizer.json", [source / "tokenizer.json"]):
    into = tmp_path / "into"
    checkpoints.save_pretrained(into, model, params, tokenizer_files=given)
    assert (into / "tokenizer.json").read_text() == "{}"
    (into / "tokenizer.json").unlink()
  with pytest.raises(UserError, match="tokenizer files not found"):
    checkpoints.save_pretrained(path, model, params, tokenizer_files=["/no/f"])


def test_boxed_parameters_can_be_saved(tmp_path):
  fields = falcon_h1.model_fields(cases.config("plain"), "c")
  model = models.create("falcon_h1", **fields)
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )
  boxed = jax.tree.map(lambda x: np.full(x.shape, 3, x.dtype), shapes)
  checkpoints.save_pretrained(tmp_path, model, boxed["params"])
  written = library.load_file(tmp_path / "model.safetensors")
  assert all((value == 3).all() for value in written.values())


_WORKER = """
import sys
import jax
from multihead import checkpoints
from multihead.parallel import initialize_distributed, make_mesh

address, process, source, target = sys.argv[1:]
initialize_distributed(address, 2, int(process))
assert jax.device_count() == 2
model, params = checkpoints.from_pretrained(source, mesh=make_mesh(fsdp=2))
leaf = params["layers"]["mlp"]["up"]["kernel"]
assert not leaf.is_fully_addressable and not leaf.is_fully_replicated
checkpoints.save_pretrained(target, model, params)
"""


def test_two_processes_load_and_save(hub, tmp_path):
  path, stored = hub()
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"localhost:{s.getsockname()[1]}"
  root = str(pathlib.Path(checkpoints.__file__).parents[2])
  environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": root}
  target = tmp_path / "target"
  workers = [
    subprocess.Popen(
      [sys.executable, "-c", _WORKER, address, str(i), str(path), str(target)],
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    for worker in workers:
      _, errors = worker.communicate(timeout=180)
      assert worker.returncode == 0, errors
  finally:
    for worker in workers:
      worker.kill()
  written = library.load_file(target / "model.safetensors")
  for name, value in stored.items():
    np.testing.assert_array_equal(written[name], value, err_msg=name)
