"""Options of the Hopper kernels that come as arrays, in the interpreter.

Segment ids, lengths, offsets, bias, mask and dropout; and which tiles they
leave to visit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead import ops
from multihead.ops import pallas_compat as pc
from multihead.ops.attention import mosaic_gpu
from multihead.ops.attention.mosaic_gpu import calls, limits, visibility
from tests.ops.attention_cases import Shape, check_case

interpreted = pytest.mark.skipif(
  pc.VERSION < (0, 11), reason="jax interprets these kernels since 0.11"
)


@pytest.fixture
def interpreter(monkeypatch):
  """ops.attention computes with the kernels, on a CPU."""
  run = functools.partial(calls.run, interpret=pc.interpreter())
  monkeypatch.setattr(mosaic_gpu, "supports", lambda args: None)
  monkeypatch.setattr(mosaic_gpu, "run", run)


# Two tiles of rows, three of columns, and what masks leave of them.
LONG = Shape(2, 130, 150, 2, 1, 32, 32)


@interpreted
@pytest.mark.parametrize(
  "option",
  [
    "offset per item",
    "segments",
    "segments in disorder",
    "lengths, some empty",
    "bias of heads",
    "bias of positions",
    "dropout, causal",
    "everything",
  ],
)
def test_interpreted_options(option, small_blocks, interpreter):
  check_case(LONG, option, "mosaic_gpu", "bfloat16", 1e-2)


@interpreted
def test_what_is_past_a_length_changes_nothing(small_blocks, interpreter):
  """Not even NaN, in a tile that is computed, and in no gradient."""
  lengths = jnp.array([30, 0])
  q, k, v = (
    jax.random.normal(jax.random.key(i), (2, 70, 1, 32)).astype("bfloat16")
    for i in range(3)
  )
  past = (jnp.arange(70) >= lengths[:, None])[..., None, None]

  def evaluate(fill):
    attend = lambda *x: ops.attention(
      *x, kv_lengths=lengths, implementation="mosaic_gpu"
    )
    arrays = q, *(jnp.where(past, fill, x) for x in (k, v))
    out, pull = jax.vjp(attend, *arrays)
    return out, *pull(jnp.cos(out))

  got = evaluate(jnp.nan)
  for a, b in zip(got, evaluate(0.0), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  for grad in got[2:]:
    assert not jnp.any(jnp.where(past, grad, 0))


# Which tiles are visited.


def tiles_of(see, given, rows, columns, batch):
  bounds = limits.bounds(see, given, batch, rows, columns)
  return np.asarray(bounds[..., :4])


def test_documents_cost_what_they_see():
  """A row of tiles visits those of its document up to the diagonal."""
  ids = jnp.arange(1024)[None] // 256
  see = visibility.Visibility(1024, 1024, None, 0, 0)
  given = limits.Limits(row_ids=ids, column_ids=ids)
  start, free_start, free_stop, stop = tiles_of(see, given, 128, 64, 1)[0].T
  row = np.arange(8)
  np.testing.assert_array_equal(start, row // 2 * 4)
  np.testing.assert_array_equal(stop, 2 * row + 2)
  # All but those on the diagonal need no mask.
  np.testing.assert_array_equal(free_stop - free_start, row % 2 * 2)
  given = given.transposed()
  bounds = limits.bounds(see.transposed(64), given, 1, 128, 64, transposed=True)
  start, _, _, stop = np.asarray(bounds)[0, :, :4].T
  np.testing.assert_array_equal(start, 2 * row)
  np.testing.assert_array_equal(stop, (row // 2 + 1) * 4)


def test_lengths_bound_what_is_visited():
  given = limits.Limits(lengths=jnp.array([640, 130, 128, 0]))
  see = visibility.Visibility(256, 640, None, None, 0)
  tiles = tiles_of(see, given, 128, 64, 4)
  np.testing.assert_array_equal(tiles[:, 0, 3], [10, 3, 2, 1])
  np.testing.assert_array_equal(tiles[:, 0, 2], [10, 2, 2, 0])
  bounds = limits.bounds(
    see.transposed(64), given.transposed(), 4, 128, 64, transposed=True
  )
  visited = np.asarray(bounds[..., 3] - bounds[..., 0])
  # Tiles of keys past a length visit no query.
  np.testing.assert_array_equal(
    visited > 0, np.arange(5) * 128 < np.array([[640], [130], [128], [0]])
  )


@pytest.mark.parametrize("seed", range(8))
def test_no_visible_pair_is_skipped_and_no_masked_one_is_free(seed):
  rng = np.random.default_rng(seed)
  B, T, S, rows, columns = 2, 70, 90, 16, 8
  left, right = (rng.choice([None, 0, 5, 30]) for _ in range(2))
  offsets = rng.integers(-40, 60, B)
  lengths = rng.integers(0, S + 1, B)
  q_ids, kv_ids = (np.sort(rng.integers(0, 4, (B, n))) for n in (T, S))
  if seed % 2:
    kv_ids = rng.permutation(kv_ids, axis=1)
  given = [jnp.asarray(x, jnp.int32) for x in (offsets, lengths, q_ids, kv_ids)]
  given = limits.Limits(*given)
  see = visibility.Visibility(T, S, left, right, 0)
  ahead = np.arange(S) - (np.arange(T)[:, None] + offsets[:, None, None])
  sees = q_ids[:, :, None] == kv_ids[:, None]
  sees &= np.arange(S) < lengths[:, None, None]
  if left is not None:
    sees &= ahead >= -left
  if right is not None:
    sees &= ahead <= right
  for transposed in (False, True):
    r, c = rows, columns
    if transposed:
      see, given = see.transposed(c), given.transposed()
      sees = sees.swapaxes(1, 2)
    bounds = np.asarray(limits.bounds(see, given, B, r, c, transposed))
    for b, i in np.ndindex(bounds.shape[:2]):
      start, free_start, free_stop, stop = bounds[b, i, :4] * c
      assert start <= free_start <= free_stop <= stop
      part = sees[b, i * r : (i + 1) * r]
      outside = np.ones(part.shape[1], bool)
      outside[start:stop] = False
      assert not part[:, outside].any()
      free = part[:, free_start:free_stop]
      if transposed:
        # Rows past the length are emptied in the end.
        free = free[: max(lengths[b] - i * r, 0)]
      assert free.all()


@interpreted
def test_mapped_bias_that_the_items_of_a_batch_share(interpreter):
  draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
  q, k, v = (draw(i, 3, 2, 20, 1, 32).astype("bfloat16") for i in range(3))
  bias = draw(3, 3, 1, 1, 20, 20)

  def evaluate(implementation, *arrays):
    attend = lambda q, k, v, bias: ops.attention(
      q, k, v, bias=bias, implementation=implementation
    )
    out, pull = jax.vjp(jax.vmap(attend), *arrays)
    return out, *pull(jnp.cos(out))

  got = evaluate("mosaic_gpu", q, k, v, bias)
  want = evaluate("reference", *(x.astype("float32") for x in (q, k, v)), bias)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=4e-2)
