"""Layouts of stored tensors: which part of a file holds which part of ours."""

import itertools
import math

import numpy as np
import pytest

from multihead.checkpoints.key_map import Entry

# Layout, leading input axes, shape of ours, and the stored tensor, spelt out.
CASES = [
  ("matrix", 1, (5, 3), lambda x: x),
  ("vector", 1, (4, 3), lambda x: x.ravel()),
  ("linear", 1, (3, 4, 2), lambda x: x.reshape(3, 8).T),
  ("linear", 1, (3, 2, 2, 3), lambda x: x.reshape(3, 12).T),
  ("linear", 2, (4, 2, 3), lambda x: x.reshape(8, 3).T),
  ("conv", 1, (4, 2, 3), lambda x: x.reshape(4, 6).T[:, None]),
]


@pytest.mark.parametrize("layout, inputs, shape, store", CASES)
def test_parts_are_found_in_the_stored_tensor(layout, inputs, shape, store):
  entry = Entry("t", (), layout, inputs)
  ours = np.arange(math.prod(shape)).reshape(shape)
  stored = np.ascontiguousarray(store(ours))
  np.testing.assert_array_equal(entry.to_stored(ours), stored)
  assert entry.stored_shape(shape) == stored.shape

  cuts = slice(None), slice(1, 2), slice(0, 2), slice(1, 1)
  # The axes of ours that lead an axis of the stored tensor.
  leading = {"matrix": (0, 1), "vector": (0,), "conv": (0, 1)}.get(
    layout, (0, inputs)
  )
  for index in itertools.product(cuts, repeat=len(shape)):
    window, inner, whole = entry.window(index, shape)
    read = stored[tuple(window)]
    part = entry.from_stored(read, whole)[inner]
    np.testing.assert_array_equal(part, ours[index], err_msg=str(index))
    if all(i in leading or s == slice(None) for i, s in enumerate(index)):
      assert read.size == part.size, index


@pytest.mark.parametrize("layout, inputs, shape, store", CASES)
def test_mapping_copies_nothing(layout, inputs, shape, store):
  entry = Entry("t", (), layout, inputs)
  ours = np.arange(math.prod(shape)).reshape(shape)
  stored = np.ascontiguousarray(store(ours))
  assert np.shares_memory(entry.from_stored(stored, shape), stored)
  assert np.shares_memory(entry.to_stored(ours), ours)
