"""ops.attention against its definition in float64, on any device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from multihead import ops
from multihead.ops.attention import xla
from tests.ops.attention_cases import (
  OPTIONS,
  SHAPES,
  Shape,
  check,
  check_case,
  draw,
  evaluate,
  oracle,
)

# xla by its ways: as it comes (with so few rows, reading keys as they lie), one
# tile, and loops over tiles.
each_way = pytest.mark.parametrize(
  "way", ["xla", "tile", "loop", "reference"], indirect=True
)
# What the ways of xla do apart from one another: not every case for each.
FEW_OPTIONS = [
  "plain",
  "offset per item",
  "softcap",
  "bias of heads",
  "mask of keys",
  "lengths, some empty",
  "everything",
]
# What the loops do as in another option, or not at all.
SAME_IN_LOOPS = {
  "scale",
  "window left",
  "window right",
  "window zero",
  "bias of items",
  "bias of positions",
  "mask of rows",
  "mask of positions",
  "sinks",
  "dropout, causal",
  "deterministic",
}
# Packed so that a row block of the loops meets some of the documents.
PACKED = Shape(2, 30, 33, 2, 1, 6, 5)


@pytest.mark.parametrize(
  "option, way",
  [(option, "reference") for option in OPTIONS]
  + [(option, "loop") for option in OPTIONS if option not in SAME_IN_LOOPS]
  + [(option, way) for way in ("xla", "tile") for option in FEW_OPTIONS],
  indirect=["way"],
)
def test_options(option, way):
  with jax.enable_x64(True):
    check_case(SHAPES["odd"], option, way, "float64", 1e-12)


@pytest.mark.parametrize(
  "shape, way",
  [(shape, "loop") for shape in SHAPES if shape != "odd"]
  + [(shape, "reference") for shape in ("one query", "more queries")]
  + [(shape, "xla") for shape in ("one query", "one of each", "one key head")],
  indirect=["way"],
)
def test_shapes(shape, way):
  options = dict(causal=True, window=(6, None), softcap=2.0)
  with jax.enable_x64(True):
    check_case(SHAPES[shape], "sinks", way, "float64", 1e-12, **options)


@pytest.mark.parametrize("way", ["loop"], indirect=True)
@pytest.mark.parametrize("shape", ["more keys", "more queries", "packed"])
def test_packed_documents(shape, way):
  shape = PACKED if shape == "packed" else SHAPES[shape]
  with jax.enable_x64(True):
    for option in ("segments", "segments in disorder"):
      check_case(shape, option, way, "float64", 1e-12)


@each_way
def test_masks_per_head_of_grouped_heads(way):
  with jax.enable_x64(True):
    check_case(SHAPES["one key head"], "mask", way, "float64", 1e-12)


@each_way
@pytest.mark.parametrize(
  "dtype, tolerance", [("float32", 5e-6), ("bfloat16", 4e-2), ("float16", 5e-3)]
)
def test_narrow_dtypes(dtype, tolerance, way):
  shape = Shape(2, 31, 40, 4, 2, 16, 8)
  options = dict(causal=True, sinks=np.array([0.5, -2.0, 1.0, 0.0]))
  check_case(shape, "bias of positions", way, dtype, tolerance, **options)


@each_way
def test_huge_logits_neither_overflow_nor_vanish(way):
  bias = np.where(np.arange(9)[:, None] < 4, -3e4, 3e4) * np.ones((1, 12))
  options = dict(scale=60.0, bias=bias)
  with jax.enable_x64(True):
    check(*draw(9, 12), way, "float64", 1e-9, **options)
    # Sinks beyond all logits, and below all.
    sinks = np.array([-1e5, 1e5, 2.9e4, -np.inf])
    check(*draw(9, 12), way, "float64", 1e-9, **options, sinks=sinks)


@each_way
@pytest.mark.parametrize("sinks", [None, np.array([0.3, -np.inf, 1.0, -2.0])])
def test_bias_of_minus_infinity_empties_rows(sinks, way):
  bias = np.where(np.arange(9)[:, None] % 3 == 0, -np.inf, 0.0)
  bias = bias + np.zeros((1, 12))
  out, lse, grads = check(
    *draw(9, 12), way, "float32", 1e-5, bias=bias, sinks=sinks
  )
  assert (out[:, ::3] == 0).all()
  assert (grads["q"][:, ::3] == 0).all()
  assert all(np.isfinite(grad).all() for grad in grads.values())


@each_way
@pytest.mark.parametrize("T, value", [(1, np.nan), (9, np.nan), (9, np.inf)])
def test_bad_number_in_masked_key_does_not_leak(T, value, way):
  arrays, d_out, d_lse = draw(T, 14)
  hidden = np.zeros((2, 14), bool)
  hidden[0, 3:7] = hidden[1, 10:] = True
  arrays["k"][hidden] = value
  arrays["v"][hidden] = value
  # And a query that sees nothing.
  mask = np.tile(~hidden[:, None, None], (1, 1, T, 1))
  if T > 1:
    mask[:, :, 2] = False
    arrays["q"][:, 2] = d_out[:, 2] = value
  with jax.enable_x64(True):
    _, _, grads = check(arrays, d_out, d_lse, way, "float64", 1e-12, mask=mask)
  assert (grads["k"][hidden] == 0).all()
  assert (grads["v"][hidden] == 0).all()


@each_way
@pytest.mark.parametrize("T", [1, 13])
def test_what_lies_past_a_length_changes_nothing(T, way):
  arrays, d_out, d_lse = draw(T, 19, batch=3)
  lengths = np.array([0, 11, 19], np.int32)
  past = np.arange(19) >= lengths[:, None]
  poisoned = {**arrays}
  for name in "kv":
    poisoned[name] = np.where(past[..., None, None], np.nan, arrays[name])
  options = dict(kv_lengths=lengths, dropout_rate=0.1)
  run = lambda arrays: evaluate(arrays, d_out, d_lse, way, "float32", **options)
  want, got = run(arrays), run(poisoned)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a, b)
  # An int cuts what all items of the batch share.
  poisoned = {n: x.copy() for n, x in arrays.items()}
  poisoned["k"][:, 11:] = poisoned["v"][:, 11:] = np.nan
  check(poisoned, d_out, d_lse, way, "float32", 1e-5, kv_lengths=11)


@each_way
@pytest.mark.parametrize("name", ["k", "v"])
def test_bad_number_reaches_exactly_the_rows_that_see_it(name, way):
  arrays, d_out, d_lse = draw(16, 16)
  # In item 0 causal hides it from rows 0..8, segments from rows 10..15.
  arrays[name][0, 9, 0, 2] = np.nan
  options = dict(causal=True, q_segment_ids=ids(16), kv_segment_ids=ids(16))
  out, lse, grads = evaluate(arrays, d_out, d_lse, way, "float32", **options)
  bad = np.isnan(out)
  assert bad[0, 9, :2].all()
  bad[0, 9, :2] = False
  assert not bad.any()
  clean = {**arrays, name: np.nan_to_num(arrays[name])}
  want = oracle(**clean, d_out=d_out, d_lse=d_lse, **options)
  far = np.r_[0:5, 10:16]  # The other segments of item 0.
  for field in "qkv":
    for where in ((0, far), (1,)):
      np.testing.assert_allclose(
        grads[field][where], want[2][field][where], atol=1e-5
      )


def ids(length):
  """[B, length] segments: runs of different lengths in the two items."""
  return np.stack([np.arange(length) // 5, np.arange(length) // 4 % 3])


@pytest.mark.parametrize("way", ["xla", "tile", "loop"], indirect=True)
def test_bad_cotangent_shows_and_stays_in_its_segment(way):
  arrays, d_out, d_lse = draw(16, 16)
  options = dict(causal=True, q_segment_ids=ids(16), kv_segment_ids=ids(16))
  _, _, want = oracle(**arrays, d_out=d_out, d_lse=d_lse, **options)
  d_out[0, 7, 1, 2] = np.nan
  *_, grads = evaluate(arrays, d_out, d_lse, way, "float32", **options)
  assert np.isnan(grads["q"][0, 7, 1]).all()
  assert np.isnan(grads["v"][0, 5:8, 0]).any(axis=-1).all()
  far = np.r_[0:5, 10:16]
  for name, grad in grads.items():
    np.testing.assert_allclose(grad[0, far], want[name][0, far], atol=1e-5)


# For a sink's own derivative, apart from the oracle's.
def test_a_sink_is_a_key_whose_value_is_zero():
  arrays, *_ = draw(7, 9, heads=2, kv_heads=2, batch=1)
  q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays.values())
  pad = lambda x: jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))

  def with_sinks(sinks):
    return ops.attention(q, k, v, sinks=sinks, return_lse=True)

  def with_key(sinks):
    bias = jnp.zeros((2, 7, 10)).at[..., -1].set(sinks[:, None])
    return ops.attention(q, pad(k), pad(v), bias=bias, return_lse=True)

  @functools.partial(jax.jit, static_argnums=0)
  def both(f, sinks):
    total = lambda sinks: sum(jnp.sum(jnp.sin(x)) for x in f(sinks))
    return *f(sinks), jax.grad(total)(sinks)

  sinks = jnp.array([0.7, -1.3])
  for a, b in zip(both(with_sinks, sinks), both(with_key, sinks), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
  T=strategies.integers(1, 40),
  S=strategies.integers(1, 40),
  offset=strategies.none() | strategies.integers(-50, 50),
  causal=strategies.booleans(),
  left=strategies.none() | strategies.integers(0, 45),
  right=strategies.none() | strategies.integers(0, 45),
  seed=strategies.integers(0, 99),
)
def test_loops_at_any_position(T, S, offset, causal, left, right, seed):
  inputs = draw(T, S, batch=1, heads=1, kv_heads=1, seed=seed)
  with pytest.MonkeyPatch.context() as patch:
    small_loops(patch)
    check(
      *inputs,
      "xla",
      "float32",
      2e-5,
      causal=causal,
      window=(left, right),
      q_offset=offset,
    )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=strategies.data())
def test_loops_with_any_segments_and_lengths(data):
  """Of one shape, so that one program serves all examples."""
  T, S = 29, 37
  some = lambda n: strategies.lists(
    strategies.integers(-2, 3), min_size=n, max_size=n
  )
  given_ids = lambda n: np.array([data.draw(some(n)) for _ in range(2)])
  q_ids, kv_ids = given_ids(T), given_ids(S)
  if data.draw(strategies.booleans()):
    q_ids, kv_ids = np.sort(q_ids), np.sort(kv_ids)
  lengths = np.array(
    data.draw(strategies.tuples(*[strategies.integers(0, S)] * 2))
  )
  arrays, d_out, d_lse = draw(T, S, heads=1, kv_heads=1)
  options = dict(q_segment_ids=q_ids, kv_segment_ids=kv_ids, kv_lengths=lengths)
  with pytest.MonkeyPatch.context() as patch:
    small_loops(patch)
    got = _packed_step(
      *(jnp.asarray(x, jnp.float32) for x in (*arrays.values(), d_out, d_lse)),
      {n: jnp.asarray(x) for n, x in options.items()},
    )
  out, lse, grads = oracle(**arrays, d_out=d_out, d_lse=d_lse, **options)
  want = out, lse, *(grads[name] for name in "qkv")
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@jax.jit
def _packed_step(q, k, v, d_out, d_lse, options):
  attend = functools.partial(
    ops.attention, return_lse=True, implementation="xla", **options
  )
  results, pull = jax.vjp(attend, q, k, v)
  return *results, *pull((d_out, d_lse))


def small_loops(patch):
  patch.setattr(xla, "_FEW_ROWS", 0)
  patch.setattr(xla, "_is_one_tile", lambda heads, T, S: False)
  patch.setattr(xla, "_loop_sizes", lambda heads, T, S: (8, 16))
