"""Fixtures that several files of tests share."""

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


@pytest.fixture
def small_blocks(monkeypatch):
  """Hopper's kernels in small blocks, and two programs for all tiles.

  So rings and barriers outlive a tile.
  """
  pallas_compat = pytest.importorskip(
    "multihead.ops.pallas_compat", reason="this jax has no Mosaic GPU"
  )
  from multihead.ops.attention.mosaic_gpu import blocks

  monkeypatch.setattr(pallas_compat, "cores", lambda: 2)
  small = dict(columns=64, persistent=True)
  monkeypatch.setattr(
    blocks, "forward", lambda *_: blocks.Forward(overlap=False, **small)
  )
  for direction in ("queries", "keys"):
    monkeypatch.setattr(
      blocks, direction, lambda *_: blocks.Backward(consumers=1, **small)
    )
