"""What kernels for Mosaic GPU share."""

import pytest

from multihead.ops import pallas_compat as pc


@pytest.mark.parametrize("consumers", sorted(pc.REGISTERS))
def test_registers_fit_what_a_program_starts_with(consumers):
  # 65536 of 32 bits; a thread starts with a multiple of 8 of them. One
  # register too many, and the last warpgroup waits for it forever.
  start = 65536 // (128 * (consumers + 1)) // 8 * 8
  most, least = pc.REGISTERS[consumers]
  assert consumers * most + least <= (consumers + 1) * start
  assert least <= start <= most
  assert most % 8 == least % 8 == 0
