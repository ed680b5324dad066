"""The mesh: sizes, axis types, and what is said when they do not fit."""

import jax
from absl.testing import parameterized
from jax.sharding import AxisType

from multihead.errors import UserError
from multihead.parallel import AXES, initialize_distributed, make_mesh


class Mesh(parameterized.TestCase):
  @parameterized.parameters(
    (dict(), (8, 1, 1, 1)),
    (dict(data=2, fsdp=2, tensor=2), (2, 2, 1, 2)),
    (dict(data=1, fsdp=-1, sequence=4), (1, 2, 4, 1)),
    (dict(data=1, fsdp=1, tensor=8), (1, 1, 1, 8)),
  )
  def test_sizes(self, given, sizes):
    mesh = make_mesh(**given)
    self.assertEqual(mesh.axis_names, AXES)
    self.assertEqual(mesh.devices.shape, sizes)
    self.assertEqual(set(mesh.axis_types), {AxisType.Auto})

  def test_subset_of_devices(self):
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
    self.assertEqual(mesh.devices.shape, (1, 1, 1, 2))

  @parameterized.parameters(
    dict(data=3),
    dict(data=-1, tensor=3),
    dict(data=16),
    dict(data=0),
    dict(data=-1, fsdp=-1),
    dict(data=-1, tensor=16),
  )
  def test_what_does_not_fit_is_refused(self, **given):
    with self.assertRaisesRegex(UserError, "mesh"):
      make_mesh(**given)

  def test_distributed_needs_all_or_nothing(self):
    with self.assertRaisesRegex(UserError, "go together"):
      initialize_distributed("localhost:1234")

  def test_one_process_stays_alone(self):
    self.assertFalse(initialize_distributed())
