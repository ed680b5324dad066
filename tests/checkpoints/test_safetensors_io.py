"""Safetensors reading and writing, against the `safetensors` library."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as library

from multihead.checkpoints import safetensors_io as io
from multihead.errors import UserError

TENSORS = {
  "a": np.arange(12, dtype=np.float32).reshape(3, 4),
  "b.half": (np.arange(10) / 7).astype(np.float16).reshape(5, 2, 1),
  "c": (np.arange(35) / 3).astype(ml_dtypes.bfloat16).reshape(5, 7),
  "scalar": np.asarray(2.5, np.float32),
  "empty": np.zeros((0, 3), np.float32),
}


def to_write(tensors):
  return [
    io.TensorToWrite(name, value.dtype, value.shape, lambda v=value: v)
    for name, value in tensors.items()
  ]


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert found[name].dtype == value.dtype
    assert found[name].shape == value.shape
    np.testing.assert_array_equal(
      np.asarray(found[name]).view(np.uint8).ravel()
      if value.ndim
      else found[name],
      value.view(np.uint8).ravel() if value.ndim else value,
    )


def test_reads_what_the_library_writes(tmp_path):
  library.save_file(TENSORS, tmp_path / "x.safetensors")
  header = io.read_header(tmp_path / "x.safetensors")
  assert_same({name: t.view() for name, t in header.items()}, TENSORS)


def test_the_library_reads_what_is_written(tmp_path):
  io.write_file(tmp_path / "x.safetensors", to_write(TENSORS))
  assert_same(library.load_file(tmp_path / "x.safetensors"), TENSORS)
  with library.safe_open(tmp_path / "x.safetensors", "np") as f:
    assert f.metadata() == {"format": "pt"}


def test_written_views_need_not_be_contiguous(tmp_path):
  value = TENSORS["c"].T
  io.write_file(tmp_path / "x.safetensors", to_write({"c": value}))
  found = library.load_file(tmp_path / "x.safetensors")["c"]
  np.testing.assert_array_equal(found, value)


def test_a_view_reads_nothing_before_it_is_sliced(tmp_path):
  library.save_file(TENSORS, tmp_path / "x.safetensors")
  view = io.read_header(tmp_path / "x.safetensors")["c"].view()
  base = view
  while base.base is not None and not isinstance(base, np.memmap):
    base = base.base
  assert isinstance(base, np.memmap)
  assert not view.flags.writeable


def test_another_dtype_is_refused_when_asked_for(tmp_path):
  library.save_file({"ids": np.arange(3)}, tmp_path / "x.safetensors")
  tensor = io.read_header(tmp_path / "x.safetensors")["ids"]
  with pytest.raises(UserError, match="'ids' is stored as I64"):
    tensor.view()
  with pytest.raises(UserError, match="ids: dtype int64 cannot be saved"):
    io.write_file(tmp_path / "y", to_write({"ids": np.arange(3)}))


@pytest.mark.parametrize("keep", [0, 5, 60, 300, -1])
def test_torn_file(tmp_path, keep):
  path = tmp_path / "x.safetensors"
  library.save_file(TENSORS, path)
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(UserError, match=r"x\.safetensors: torn") as error:
    io.read_header(path)
  assert "\n" not in str(error.value)


def test_other_bytes_are_refused(tmp_path):
  path = tmp_path / "x.safetensors"
  path.write_bytes(b"\x80\x04" + b"\xff" * 100)
  with pytest.raises(UserError, match="torn or not a safetensors file"):
    io.read_header(path)
  path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
  with pytest.raises(UserError, match="git lfs pull"):
    io.read_header(path)
  with pytest.raises(UserError, match="none: cannot be read"):
    io.read_header(tmp_path / "none")


@pytest.mark.parametrize(
  "spec, reason",
  [
    ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "has 4 bytes"),
    (
      {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
      "starts at byte 4",
    ),
    ({"dtype": "F32", "shape": [1]}, "header is not valid"),
    ([], "header is not valid"),
  ],
)
def test_wrong_headers(tmp_path, spec, reason):
  raw = json.dumps({"t": spec}).encode()
  path = tmp_path / "x.safetensors"
  path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
  with pytest.raises(UserError, match=reason):
    io.read_header(path)


def write_directory(path, tensors, max_shard_size):
  shards = io.split_into_shards(to_write(tensors), max_shard_size)
  for name, shard in shards.items():
    io.write_file(path / name, shard)
  if len(shards) > 1:
    (path / io.INDEX_FILE).write_text(json.dumps(io.index_of(shards)))
  return list(shards)


def test_shards(tmp_path):
  files = write_directory(tmp_path, TENSORS, 60)
  # 48 | 20 | 70, more than a shard may have | 4 + 0
  assert files == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
  found = io.read_directory(tmp_path)
  assert_same({name: t.view() for name, t in found.items()}, TENSORS)
  index = json.loads((tmp_path / io.INDEX_FILE).read_text())
  assert index["metadata"]["total_size"] == 48 + 20 + 70 + 4
  assert index["weight_map"]["c"] == files[2]


def test_one_file_needs_no_index(tmp_path):
  assert write_directory(tmp_path, TENSORS, 10**6) == ["model.safetensors"]
  assert io.read_directory(tmp_path).keys() == TENSORS.keys()


def test_shards_that_are_missing_or_wrong(tmp_path):
  files = write_directory(tmp_path, TENSORS, 60)
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
  outside = {"weight_map": {"a": "../../elsewhere"}}
  (tmp_path / io.INDEX_FILE).write_text(json.dumps(outside))
  with pytest.raises(UserError, match="names a file elsewhere"):
    io.read_directory(tmp_path)


def test_pickles_are_not_loaded(tmp_path):
  with pytest.raises(UserError, match="no model.safetensors"):
    io.read_directory(tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  with pytest.raises(UserError, match="only pickled weights") as error:
    io.read_directory(tmp_path)
  assert "save_pretrained" in str(error.value)


def test_long_lists_are_shortened():
  text = io.shorten([f"t{i}" for i in range(50)])
  assert text.startswith("t0, t1") and text.endswith("t19 and 30 more")
