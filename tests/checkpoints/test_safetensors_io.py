"""Lazy reads of weight files, and files that cannot be read."""

import itertools
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from multihead.checkpoints import safetensors_io as io
from multihead.errors import UserError

TENSORS = {
  "a": np.arange(24, dtype=np.float32).reshape(3, 4, 2),
  "b.half": (np.arange(10) / 7).astype(np.float16).reshape(5, 2, 1),
  "c": (np.arange(35) / 3).astype(ml_dtypes.bfloat16).reshape(5, 7),
  "scalar": np.asarray(2.5, ml_dtypes.bfloat16),
  "empty": np.zeros((0, 3), np.float32),
}


@pytest.fixture
def path(tmp_path):
  path = tmp_path / "x.safetensors"
  save_file(TENSORS, path)
  return path


@pytest.mark.parametrize("name", TENSORS)
def test_every_part_of_a_tensor(path, name):
  tensor, value = io.read_file(path)[name], TENSORS[name]
  assert (tensor.shape, tensor.dtype) == (value.shape, value.dtype)

  def cuts(n):
    edges = [None, *range(-1, n + 2)] if n < 5 else [None, 0, 2, n, n + 9]
    return [slice(*edge) for edge in itertools.product(edges, edges)]

  for index in itertools.product(*map(cuts, value.shape)):
    part = tensor.read(*index)
    assert part.dtype == value.dtype and part.shape == value[index].shape
    np.testing.assert_array_equal(part, value[index], err_msg=str(index))


def test_no_more_is_read_than_asked_for(tmp_path):
  values = np.arange(2**21, dtype=np.float32).reshape(2**11, 2**10)
  save_file({"big": values, "other": values}, tmp_path / "x.safetensors")
  tracemalloc.start()
  try:
    big = io.read_file(tmp_path / "x.safetensors")["big"]
    rows = big.read(slice(7, 9), slice(None))
    columns = big.read(slice(None), slice(5, 8))
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  np.testing.assert_array_equal(rows, values[7:9])
  np.testing.assert_array_equal(columns, values[:, 5:8])
  assert peak < 10**5 < values.nbytes / 50


@pytest.mark.parametrize(
  "dtype, code", [(np.int64, "I64"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")]
)
def test_another_dtype_is_refused_when_asked_for(tmp_path, dtype, code):
  save_file({"ids": np.zeros(3, dtype)}, tmp_path / "x.safetensors")
  tensor = io.read_file(tmp_path / "x.safetensors")["ids"]
  with pytest.raises(UserError, match=f"'ids' is stored as {code}"):
    tensor.read(slice(None))


def refuse(path, text):
  with pytest.raises(UserError) as error:
    io.read_file(path)
  assert str(error.value).startswith(f"{path}: ")
  assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 60, 300, -1])
def test_torn_file(path, keep):
  path.write_bytes(path.read_bytes()[:keep])
  refuse(path, "torn or not a safetensors file: ")


def test_other_bytes_are_refused(path):
  path.write_bytes(path.read_bytes() + b"x")
  refuse(path, "not fully covered")
  path.write_bytes(b"\x80\x04" + b"\xff" * 100)
  refuse(path, "torn or not a safetensors file: ")
  header = b'{"t": {"dtype": "F32", "shape": [1]}}'
  path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
  refuse(path, "missing field `data_offsets`")
  path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
  refuse(path, "git lfs pull")
  path.unlink()
  refuse(path, "cannot be read: No such file")


def write_shards(path):
  """TENSORS in four files, the empty one with the scalar."""
  names = [["a"], ["b.half"], ["c"], ["scalar", "empty"]]
  files = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
  weight_map = {}
  for file, group in zip(files, names, strict=True):
    save_file({name: TENSORS[name] for name in group}, path / file)
    weight_map |= dict.fromkeys(group, file)
  (path / io.INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
  return files


def test_each_shard_is_opened_once(tmp_path, monkeypatch):
  files = write_shards(tmp_path)
  opened = []
  library = io.safe_open

  def count(path, framework):
    opened.append(path.name)
    return library(path, framework)

  monkeypatch.setattr(io, "safe_open", count)
  found = io.read_directory(tmp_path)
  assert found.keys() == TENSORS.keys()
  for name, value in TENSORS.items():
    part = found[name].read(*[slice(None)] * value.ndim)
    np.testing.assert_array_equal(part, value)
  assert opened == files


def test_one_file_needs_no_index(tmp_path):
  save_file(TENSORS, tmp_path / io.SINGLE_FILE)
  assert io.read_directory(tmp_path).keys() == TENSORS.keys()


def test_shards_that_are_missing_or_wrong(tmp_path):
  files = write_shards(tmp_path)
  second = (tmp_path / files[1]).read_bytes()
  (tmp_path / files[1]).unlink()
  with pytest.raises(UserError, match=f"1 of 4 .* missing: {files[1]}"):
    io.read_directory(tmp_path)
  (tmp_path / files[1]).write_bytes((tmp_path / files[0]).read_bytes())
  with pytest.raises(UserError, match=r"other tensors .*: a, b\.half"):
    io.read_directory(tmp_path)
  (tmp_path / files[1]).write_bytes(second[:-1])
  with pytest.raises(UserError, match=f"{files[1]}: torn"):
    io.read_directory(tmp_path)
  (tmp_path / io.INDEX_FILE).write_text("{}")
  with pytest.raises(UserError, match="not an index"):
    io.read_directory(tmp_path)
  (tmp_path / io.INDEX_FILE).write_text('{"weight_map": {"a": 1}}')
  with pytest.raises(UserError, match="not an index"):
    io.read_directory(tmp_path)
  outside = {"weight_map": {"a": "../../elsewhere"}}
  (tmp_path / io.INDEX_FILE).write_text(json.dumps(outside))
  with pytest.raises(UserError, match="names a file elsewhere"):
    io.read_directory(tmp_path)


def test_pickles_are_not_loaded(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  with pytest.raises(UserError, match=r"no model\.safetensors") as error:
    io.read_directory(tmp_path)
  assert "its 1 files: pytorch_model.bin. Pickled" in str(error.value)
  assert "save_pretrained" in str(error.value)


def test_long_lists_are_shortened():
  text = io.shorten([f"t{i}" for i in range(50)])
  assert text.startswith("t0, t1") and text.endswith("t19 and 30 more")
