"""Writing weight files: what is in them, and how much is held meanwhile."""

import json
import resource
import stat
import weakref

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from multihead.checkpoints import hub_format
from multihead.errors import UserError

TENSORS = {
  "a": np.arange(12, dtype=np.float32).reshape(3, 4),
  "b.half": (np.arange(10) / 7).astype(np.float16).reshape(5, 2, 1),
  "c": (np.arange(35) / 3).astype(ml_dtypes.bfloat16).reshape(5, 7).T,
  "scalar": np.asarray(2.5, np.float32),
  "empty": np.zeros((0, 3), np.float32),
}


def to_write(tensors):
  return [
    hub_format.TensorToWrite(name, value.dtype, value.shape, lambda v=value: v)
    for name, value in tensors.items()
  ]


def test_a_written_file(tmp_path):
  path = tmp_path / "x.safetensors"
  hub_format.write_file(path, to_write(TENSORS))
  found = load_file(path)
  assert found.keys() == TENSORS.keys()
  for name, value in TENSORS.items():  # "c" is not contiguous
    assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  with safe_open(path, "np") as f:
    assert f.metadata() == {"format": "pt"}
  (tmp_path / "other").touch()
  mode = stat.S_IMODE((tmp_path / "other").stat().st_mode)
  assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_file_that_cannot_be_written(tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  big = to_write({"t": np.zeros(10**5, np.float32)})
  resource.setrlimit(resource.RLIMIT_FSIZE, (10**4, limits[1]))
  try:
    with pytest.raises(UserError, match=r"x: cannot be written: .*too large"):
      hub_format.write_file(tmp_path / "x", big)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_shards(tmp_path):
  made = {}

  def watched(tensor, file):
    def make():
      alive = {owner for ref, owner in made.values() if ref() is not None}
      assert alive <= {file}, "a finished file's tensors are still held"
      value = tensor.make().copy()
      made[tensor.name] = weakref.ref(value), file
      return value

    return hub_format.TensorToWrite(
      tensor.name, tensor.dtype, tensor.shape, make
    )

  # 48 + 20 | 70, more than a shard may have | 4 + 0
  owners = dict(zip(TENSORS, (1, 1, 2, 3, 3), strict=True))
  tensors = [watched(t, owners[t.name]) for t in to_write(TENSORS)]
  documents = {"config.json": {}}
  hub_format.write_directory(tmp_path, tensors, documents, max_shard_size=68)
  index = json.loads((tmp_path / hub_format.INDEX_FILE).read_text())
  assert index["metadata"] == {"total_size": 48 + 20 + 70 + 4}
  assert index["weight_map"] == {
    name: f"model-0000{i}-of-00003.safetensors" for name, i in owners.items()
  }
  for name, file in index["weight_map"].items():
    found = load_file(tmp_path / file)
    np.testing.assert_array_equal(found[name], TENSORS[name], err_msg=name)
  files = {p.name for p in tmp_path.iterdir()}
  expected = {"config.json", hub_format.INDEX_FILE}
  assert files == expected | set(index["weight_map"].values())
