"""Placement of parameters: by name, by divisibility, whatever the values."""

import chex
import jax
import numpy as np
from absl.testing import parameterized
from jax.sharding import PartitionSpec as P

from multihead import models
from multihead.parallel import make_mesh, sharding


def tiny(**overrides):
  fields = dict(hidden_size=32, num_hidden_layers=2, mamba_n_heads=4)
  return models.create("falcon_h1", None, **{**fields, **overrides})


class Sharding(parameterized.TestCase):
  @parameterized.parameters(
    ((8, 4, 16), ("embed", "heads", "head_dim"), P("fsdp", "tensor", None)),
    ((8, 3, 16), ("embed", "kv_heads", "head_dim"), P("fsdp", None, None)),
    ((7, 4), ("embed", "mlp"), P(None, "tensor")),
    ((4, 4), ("mlp", "heads"), P("tensor", None)),
    ((5, 8), ("layers", "embed"), P(None, "fsdp")),
    ((6,), (None,), P(None)),
  )
  def test_partition_spec(self, shape, names, spec):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    self.assertEqual(sharding.partition_spec(shape, names, mesh), spec)

  def test_bad_names_are_refused(self):
    mesh = make_mesh()
    with self.assertRaisesRegex(ValueError, "unknown logical axis 'wings'"):
      sharding.partition_spec((4,), ("wings",), mesh)
    with self.assertRaisesRegex(ValueError, "2 axis names"):
      sharding.partition_spec((4,), ("embed", "mlp"), mesh)

  @parameterized.parameters(True, False)
  def test_init_is_sharded_and_the_same_on_every_mesh(self, scan):
    model = tiny(scan_layers=scan)
    want = sharding.init_params(model, jax.random.key(0))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    got = sharding.init_params(model, jax.random.key(0), mesh)
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(want))
    layers = got["layers"] if scan else got["layers_1"]
    lead = (None,) if scan else ()
    up = layers["mlp"]["up"]["kernel"]
    self.assertEqual(up.sharding.spec, P(*lead, "fsdp", "tensor"))
    # Every device holds a quarter, not the whole.
    self.assertEqual(up.addressable_shards[0].data.size * 4, np.prod(up.shape))
    self.assertEqual(
      got["embed"]["embedding"].sharding.spec, P("tensor", "fsdp")
    )

  def test_abstract_params_hold_no_memory(self):
    tree = sharding.abstract_params(models.create("falcon_h1", "34b"))
    for leaf in jax.tree.leaves(tree):
      self.assertIsInstance(leaf, jax.ShapeDtypeStruct)

  def test_constrain_needs_no_mesh(self):
    x = np.ones((2, 3))
    self.assertIs(sharding.constrain(x, "data", None), x)

  def test_split_takes_what_divides(self):
    sizes = {"data": 2, "fsdp": 4}
    self.assertEqual(
      sharding.split(8, ("data", "fsdp"), sizes), ("data", "fsdp")
    )
    self.assertEqual(sharding.split(4, ("data", "fsdp"), sizes), ("data",))
    self.assertIsNone(sharding.split(3, ("data", "fsdp"), sizes))
    self.assertIsNone(sharding.split(8, "tensor", sizes))
