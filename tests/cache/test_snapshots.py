"""Caches resized, saved and read, of a model that is only shapes."""

import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from multihead.cache import snapshots, static
from multihead.errors import UserError
from multihead.models import falcon_h1


def init_cache(batch_size, max_length):
  """Stacked layers, axes in unusual places, one array without slots."""
  layers = {
    "keys": jnp.zeros((3, 2, batch_size, 5, max_length), jnp.bfloat16),
    "state": jnp.zeros((batch_size, 7, 3)),
    "shared": jnp.zeros((4,)),
  }
  return static.empty(batch_size, max_length, layers)


def filled(batch_size, max_length, used):
  """A cache with a different number in every place that is used."""
  cache = init_cache(batch_size, max_length)
  count = lambda x: jnp.arange(1, x.size + 1).reshape(x.shape).astype(x.dtype)
  cache["layers"] = jax.tree.map(count, cache["layers"])
  slot = jnp.arange(max_length) < used
  cache["layers"]["keys"] = cache["layers"]["keys"] * slot
  cache["valid"] = jnp.broadcast_to(slot, cache["valid"].shape)
  cache["index"] = jnp.int32(used)
  return cache


class ResizeTest(absltest.TestCase):
  def test_more_slots_and_fewer(self):
    cache = filled(2, 6, used=4)
    longer = snapshots.resize(init_cache, cache, 2, 11)
    self.assertEqual(snapshots.size(longer), (2, 11))
    keys = np.asarray(longer["layers"]["keys"], np.float32)
    np.testing.assert_array_equal(keys[..., :6], cache["layers"]["keys"])
    np.testing.assert_array_equal(keys[..., 6:], 0)
    self.assertFalse(longer["valid"][:, 4:].any())
    np.testing.assert_array_equal(
      longer["layers"]["state"], cache["layers"]["state"]
    )
    back = snapshots.resize(init_cache, longer, 2, 4)
    self.assertEqual(snapshots.size(back), (2, 4))
    again = snapshots.resize(init_cache, back, 2, 6)
    jax.tree.map(np.testing.assert_array_equal, again, cache)

  def test_one_row_becomes_many(self):
    cache = filled(1, 6, used=4)
    wide = snapshots.resize(init_cache, cache, 3, 6)
    self.assertEqual(wide["layers"]["keys"].shape, (3, 2, 3, 5, 6))
    self.assertEqual(wide["layers"]["shared"].shape, (4,))
    for row in range(3):
      np.testing.assert_array_equal(
        wide["layers"]["keys"][:, :, row], cache["layers"]["keys"][:, :, 0]
      )
      np.testing.assert_array_equal(
        wide["layers"]["state"][row], cache["layers"]["state"][0]
      )
    self.assertEqual(wide["index"], 4)

  def test_many_rows_stay_as_many(self):
    with self.assertRaisesRegex(ValueError, "2 rows cannot serve a batch of 4"):
      snapshots.resize(init_cache, filled(2, 6, 4), 4, 6)


class FileTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.path = pathlib.Path(folder.name) / "snapshot"
    self.cache, self.logits = filled(2, 6, used=6), jnp.ones((2, 9))
    self.identity = {"model": "Shapes", "width": "12"}

  def load(self, identity=None, init=init_cache, vocab_size=9):
    return snapshots.load(
      self.path, init, vocab_size, identity or self.identity
    )

  def test_round_trip_is_bit_identical(self):
    snapshots.save(self.path, self.cache, self.logits, self.identity)
    cache, logits = self.load()
    np.testing.assert_array_equal(logits, self.logits)
    for found, wanted in zip(
      jax.tree.leaves(cache), jax.tree.leaves(self.cache), strict=True
    ):
      self.assertEqual(found.dtype, wanted.dtype)
      np.testing.assert_array_equal(found, wanted)

  def test_another_identity_is_refused(self):
    snapshots.save(self.path, self.cache, self.logits, self.identity)
    with self.assertRaisesRegex(UserError, "width is 12 there and 3"):
      self.load({"model": "Shapes", "width": "3"})
    with self.assertRaisesRegex(UserError, "colour is None there and red"):
      self.load({**self.identity, "colour": "red"})

  def test_arrays_of_other_shapes_are_refused(self):
    snapshots.save(self.path, self.cache, self.logits, self.identity)
    text = r"logits is float32\[2, 9\] there"
    with self.assertRaisesRegex(UserError, text):
      self.load(vocab_size=10)

  def test_nothing_is_pickled(self):
    snapshots.save(self.path, self.cache, self.logits, self.identity)
    metadata = json.loads((self.path / "metadata" / "metadata").read_text())
    self.assertEqual(metadata["identity"]["model"], "Shapes")
    for file in self.path.rglob("*"):
      if file.is_file():
        self.assertNotEqual(file.read_bytes()[:2], b"\x80\x04", file)


class ArchitectureTest(absltest.TestCase):
  def test_execution_does_not_count(self):
    model = falcon_h1.FalconH1()
    same = model.clone(
      scan_layers=False, remat="full", ssd_implementation="xla"
    )
    other = model.clone(rope_theta=1e4)
    one = snapshots.architecture(model)
    self.assertEqual(one, snapshots.architecture(same))
    differ = {
      key for key in one if one[key] != snapshots.architecture(other)[key]
    }
    self.assertEqual(differ, {"rope_theta"})
