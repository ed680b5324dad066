"""Fixtures that the tests of several operations share."""

import pytest

from multihead.ops.attention import xla


@pytest.fixture
def way(request, monkeypatch):
  """An implementation of attention, by `indirect` parameters.

  Returns the name to pass. Beside the names there are two more ways of xla,
  which else it takes by the size of a call: "tile", and "loop" over tiles so
  small that every case takes several.
  """
  if request.param not in ("tile", "loop"):
    return request.param
  tile = request.param == "tile"
  monkeypatch.setattr(xla, "_FEW_ROWS", 0)
  monkeypatch.setattr(xla, "_is_one_tile", lambda heads, T, S: tile)
  monkeypatch.setattr(
    xla, "_loop_sizes", lambda heads, T, S: (min(T, 6), min(S, 8))
  )
  return "xla"
