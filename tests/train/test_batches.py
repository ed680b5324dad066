"""Which rows a process reads, and what does not divide."""

import numpy as np
import pytest
from absl.testing import parameterized

from multihead.errors import UserError
from multihead.parallel import make_mesh, sharding
from multihead.train import batches


class BatchesTest(parameterized.TestCase):
  @parameterized.parameters(
    (12, 8, 1, (4, 1), "batch_size=12 must be a multiple of"),
    (8, 4, 4, (4, 1), "= 4 * 4 = 16"),
    (8, 4, 2, (9, 2), "sequence_length=9 must be a multiple of"),
  )
  def test_mistakes(self, size, ways, micro, sequence, message):
    with pytest.raises(UserError) as raised:
      batches.check_batch(size, ways, micro, sequence)
    assert message in str(raised.value)

  def test_fitting(self):
    batches.check_batch(16, 4, 2, (8, 2))

  @parameterized.parameters(dict(), dict(fsdp=2, sequence=2, tensor=2))
  def test_one_process_reads_it_all(self, **axes):
    mesh = make_mesh(**axes)
    where = sharding.batch_sharding(mesh)
    assert batches.process_rows(where, 8, 6) == (0, 1)
    tokens = np.arange(48, dtype=np.int32).reshape(8, 6)
    placed = batches.to_global(
      {"tokens": tokens, "lengths": tokens[:, 0]}, where, 8
    )
    np.testing.assert_array_equal(placed["tokens"], tokens)
    np.testing.assert_array_equal(placed["lengths"], tokens[:, 0])
    assert placed["tokens"].sharding.is_equivalent_to(where, 2)

  def test_scattered_rows_are_refused(self):
    class Scattered:
      def addressable_devices_indices_map(self, shape):
        rows = [slice(0, 2), slice(4, 6)]
        return {i: (r, slice(None)) for i, r in enumerate(rows)}

    with pytest.raises(UserError, match="not one even part of it"):
      batches.process_rows(Scattered(), 8)

  @parameterized.parameters(
    ([slice(4, 6), slice(6, 8)], (1, 2)), ([slice(2, 4)] * 2, (1, 4))
  )
  def test_part_of_the_rows(self, rows, want):
    class Some:
      def addressable_devices_indices_map(self, shape):
        return {i: (r, slice(None)) for i, r in enumerate(rows)}

    assert batches.process_rows(Some(), 8) == want
