"""The Triton kernels of ops.attention: interpreted, and on a GPU."""

import functools
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies
from jax.sharding import AxisType

from multihead import ops
from multihead.ops import triton_compat
from multihead.ops.attention import triton
from multihead.ops.attention.triton import blocks, launches, visits
from tests.ops import triton_interpreter
from tests.ops.attention_cases import (
  DROPOUT_KEY,
  OPTIONS,
  SHAPES,
  Shape,
  check,
  check_case,
  draw,
  draw_shape,
  oracle,
  small,
)
from tests.ops.attention_cases import evaluate as run

on_gpu = pytest.mark.skipif(
  jax.default_backend() != "gpu", reason="needs a GPU: make test-gpu"
)


@pytest.fixture
def interpreted(monkeypatch):
  """Runs the kernels in the interpreter, in tiles of 16."""
  triton_interpreter.use(monkeypatch, triton)
  launch = blocks.Launch(16, 16, 4, 1)
  small = blocks.Blocks(launch, launch, launch, launch)
  monkeypatch.setattr(blocks, "choose", lambda *_, **__: small)


# What the kernels do apart from one another; positions of all kinds have a test
# of their own below.
CASES = [(name, "causal") for name in SHAPES] + [
  ("odd", name)
  for name in (
    "plain",
    "offset per item",
    "window",
    "softcap",
    "bias",
    "bias of heads",
    "bias of rows",
    "mask",
    "mask of rows",
    "mask of nothing",
    "segments in disorder",
    "lengths, some empty",
    "sinks in empty rows",
    "everything",
  )
]


@pytest.mark.parametrize("shape, option", CASES)
def test_interpreted(shape, option, interpreted):
  check_case(SHAPES[shape], option, "triton", jnp.float32, 1e-5)


@pytest.mark.parametrize(
  "option",
  ["causal", "window", "bias of heads", "segments", "dropout, causal"],
)
def test_interpreted_over_many_tiles(option, interpreted, monkeypatch):
  """Some are free of masks, some are left out; a bias's are summed in parts."""
  monkeypatch.setattr(launches, "_MANY_PROGRAMS", 40)
  shape = Shape(2, 45, 64, 4, 2, 20, 9)
  check_case(shape, option, "triton", jnp.float32, 2e-5)


def test_interpreted_float16(interpreted):
  """The interpreter has no products of bfloat16."""
  shape = small(31, 40)._replace(H=16, Hv=8)
  check_case(shape, "bias", "triton", jnp.float16, 5e-3)


def test_interpreted_huge_logits(interpreted):
  """Beyond what an exponential holds: weights of 0 and 1."""
  inputs = draw(7, 20, scale=1e4)
  check(*inputs, "triton", jnp.float32, 2e-2, causal=True)


def test_interpreted_bias_of_minus_infinity_empties_rows(interpreted):
  arrays, d_out, d_lse = draw(9, 12)
  bias = np.where(np.arange(9)[:, None] % 3 == 0, -np.inf, 0.0)
  bias = bias + np.where(np.arange(12) % 5, 0, -np.inf)
  got = run(arrays, d_out, d_lse, "triton", jnp.float32, bias=bias)
  wanted = run(
    arrays, d_out, d_lse, "triton", jnp.float32, mask=np.isfinite(bias)
  )
  assert (got[1][:, :, ::3] == -np.inf).all()
  del got[2]["bias"]
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def evaluate(implementation, fields, cotangents, **options):
  """out, lse and gradients of ops.attention."""

  def attend(fields):
    return ops.attention(
      **fields, return_lse=True, implementation=implementation, **options
    )

  results, pull = jax.vjp(attend, fields)
  return *results, pull(cotangents)[0]


def close(got, want, tolerance):
  """Asserts that trees agree, relative to the largest finite number."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    size = np.abs(b[np.isfinite(b)]).max(initial=1e-3)
    np.testing.assert_allclose(a, b, atol=tolerance * size, rtol=0)


def as_float32(arrays, d_out, d_lse):
  cast = lambda x: jnp.asarray(x, jnp.float32)
  return jax.tree.map(cast, arrays), (cast(d_out), cast(d_lse))


def check_lengths_and_dropout(options, dtype, tolerance):
  """Beside the definition; NaN past the lengths changes not a bit."""
  fields, cotangents = as_float32(*draw(21, 40, width=16, v_width=16))
  fields = {k: x.astype(dtype).astype("float32") for k, x in fields.items()}
  cotangents = cotangents[0].astype(dtype).astype("float32"), cotangents[1]
  lengths = jnp.array([17, 0])
  options = dict(options, kv_lengths=lengths)
  with jax.default_matmul_precision("highest"):
    want = evaluate("reference", fields, cotangents, **options)
  low = {k: x.astype(dtype) for k, x in fields.items()}
  given = cotangents[0].astype(dtype), cotangents[1]
  got = evaluate("triton", low, given, **options)
  close(got, want, tolerance)
  unused = jnp.arange(40)[:, None, None] >= lengths[:, None, None, None]
  bad = {k: jnp.where(unused, jnp.nan, low[k]) for k in ("k", "v")}
  again = evaluate("triton", {**low, **bad}, given, **options)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)


LENGTHS = [
  dict(),
  dict(causal=True, dropout_rate=0.3, dropout_key=jax.random.key(5)),
]


@pytest.mark.parametrize("options", LENGTHS)
def test_interpreted_lengths(options, interpreted):
  check_lengths_and_dropout(options, "float32", 1e-5)


def check_dropped_weights():
  """Values that are a unit matrix show each weight that is kept."""
  S = 32
  shapes = [(2, 19, 4, 16), (2, S, 2, 16)]
  q, k = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))
  v = jnp.broadcast_to(jnp.eye(S)[:, None], (2, S, 2, S))
  got, want = (
    ops.attention(
      *(q, k, v),
      dropout_rate=0.4,
      dropout_key=jax.random.key(3),
      implementation=name,
    )
    for name in ("triton", "xla")
  )
  np.testing.assert_array_equal(got == 0, want == 0)
  assert 0.3 < np.mean(got == 0) < 0.5


def test_interpreted_dropout_is_that_of_xla(interpreted):
  check_dropped_weights()


def penalty(implementation, axes, fields, **options):
  """A loss of gradients, over one more axis of some arrays."""

  def loss(fields):
    out = ops.attention(**fields, implementation=implementation, **options)
    return jnp.sum(jnp.sin(out.astype(jnp.float32)))

  def inner(fields):
    grads = jax.grad(jax.checkpoint(loss))(fields)
    return sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))

  return jax.vmap(jax.value_and_grad(inner), in_axes=(axes,))(fields)


def check_maps(batch, mapped, tolerance, **options):
  fields, _ = as_float32(*draw(7, 18, batch=batch))
  fields["bias"] = jax.random.normal(jax.random.key(1), (1, 4, 1, 18))
  fields["k"] = jnp.stack([fields["k"], 2 * fields["k"]])
  fields["bias"] = jnp.stack([fields["bias"], -fields["bias"]])
  for name in ("k", "bias"):
    if name not in mapped:
      fields[name] = fields[name][0]
  axes = {name: 0 if name in mapped else None for name in fields}
  got, want = (
    jax.jit(functools.partial(penalty, name, axes, **options))(fields)
    for name in ("triton", "reference")
  )
  close(got, want, tolerance)


# The mapped axis joins the batch; it would repeat a bias for that.
MAPS = [(1, ("k", "bias")), (2, ("k", "bias"))]


@pytest.mark.parametrize("batch, mapped", MAPS)
def test_interpreted_vmap_checkpoint_and_second_order(
  batch, mapped, interpreted
):
  """The mapped axis joins the batch, or the kernels run for each place."""
  check_maps(batch, mapped, 1e-4, causal=True, kv_lengths=jnp.full(batch, 15))


def test_interpreted_vmap_of_dropout(interpreted):
  """Each mapped item drops what it would drop alone."""
  fields, _ = as_float32(*draw(7, 18))
  attend = functools.partial(
    ops.attention, dropout_rate=0.5, implementation="triton"
  )
  keys = jax.random.split(jax.random.key(0), 2)
  once = attend(**fields, dropout_key=keys[0])
  shared = jax.vmap(lambda q: attend(**{**fields, "q": q}, dropout_key=keys[0]))
  for out in shared(jnp.stack([fields["q"]] * 2)):
    close(out, once, 1e-6)
  own = jax.vmap(lambda key: attend(**fields, dropout_key=key))(keys)
  close(own[0], once, 1e-6)
  assert np.abs(own[1] - once).max() > 0.1


@settings(max_examples=60, deadline=None)
@given(strategies.data())
def test_visits_leave_out_nothing_visible(data):
  """And what is free of masks is visible whole; positions are exact."""
  number = lambda a, b: data.draw(strategies.integers(a, b))
  pick = lambda *x: data.draw(strategies.sampled_from(x))
  T, S = number(1, 40), number(1, 40)
  rows, columns = (2 ** number(0, 4) for _ in "ij")
  side = lambda: data.draw(strategies.none() | strategies.integers(0, 50))
  left, right, offset = side(), side(), number(-45, 45)
  rng = np.random.default_rng(number(0, 2**20))
  lengths, q_ids, kv_ids, mask = [None] * 4
  i, j = np.arange(T)[:, None] + offset, np.arange(S)
  seen = np.ones((2, 3, T, S), bool)
  if left is not None:
    seen &= j >= i - left
  if right is not None:
    seen &= j <= i + right
  positional = seen.copy()
  if data.draw(strategies.booleans()):
    lengths = rng.integers(0, S + 1, 2)
    seen &= j < lengths[:, None, None, None]
  if data.draw(strategies.booleans()):
    q_ids, kv_ids = (np.sort(rng.integers(0, 4, (2, n)), 1) for n in (T, S))
    seen &= (q_ids[:, :, None] == kv_ids[:, None, :])[:, None]
  if data.draw(strategies.booleans()):
    mask = rng.random((1, 3, *pick((T, 1), (T, S), (1, S)))) < 0.9
    seen &= mask
  sight = visits.Sight(T, S, left, right, offset, lengths, q_ids, kv_ids, mask)
  plain = lengths is None and q_ids is None and mask is None
  bounds = visits.row_bounds(sight, rows, columns)
  check_bounds(bounds, seen, positional if plain else None, rows, columns)
  seen, positional = (np.swapaxes(x, 2, 3) for x in (seen, positional))
  bounds = visits.column_bounds(sight, rows, columns)
  check_bounds(bounds, seen, positional if plain else None, columns, rows)


def check_bounds(bounds, seen, exact, rows, columns):
  tiles = -(-seen.shape[2] // rows)
  bounds = np.broadcast_to(bounds, (2, 3, tiles, 4))
  for b, n, tile in np.ndindex(2, 3, tiles):
    first, free, free_stop, stop = bounds[b, n, tile]
    assert 0 <= first <= free <= free_stop <= stop
    part = seen[b, n, tile * rows : (tile + 1) * rows]
    used = np.flatnonzero(part.any(axis=0)) // columns
    assert np.all((used >= first) & (used < stop))
    for j in range(free, free_stop):
      whole = part[:, j * columns : (j + 1) * columns]
      assert whole.shape == (rows, columns) and whole.all()
    if exact is not None:
      assert list(range(first, stop)) == sorted(set(used))


def test_visits_go_without_masks_up_to_a_hole():
  mask = jnp.asarray(np.arange(40) // 8 != 2)[None, None, None]
  sight = visits.Sight(16, 40, None, None, 0, None, None, None, mask)
  bounds = visits.row_bounds(sight, 16, 8)
  np.testing.assert_array_equal(bounds, [[[[0, 0, 2, 5]]]])


def test_visits_take_time_in_proportion():
  """Packed documents and lengths: tiles, as share of all below the diagonal."""
  T, tile = 4096, 128
  ids = jnp.asarray(np.arange(T)[None] // (T // 8))
  sight = visits.Sight(T, T, None, 0, 0, None, None, None, None)

  def count(sight):
    first, free, free_stop, stop = np.moveaxis(
      np.asarray(visits.row_bounds(sight, tile, tile)), -1, 0
    )
    return (stop - first).sum(), (free_stop - free).sum()

  n = T // tile
  assert count(sight) == (n * (n + 1) // 2, n * (n - 1) // 2)
  m = n // 8
  packed = sight._replace(q_ids=ids, kv_ids=ids)
  assert count(packed) == (n * (m + 1) // 2, n * (m - 1) // 2)
  assert isinstance(visits.row_bounds(packed, tile, tile), jax.Array)
  half = sight._replace(right=None, lengths=jnp.array([T // 2]))
  assert count(half) == (n * n // 2, n * n // 2)


@pytest.mark.parametrize("capability, shared", [("9.0", 227), ("8.6", 99)])
def test_blocks_fit_into_shared_memory(capability, shared, monkeypatch):
  class Device:
    device_kind = "any"
    compute_capability = capability

  monkeypatch.setattr(jax, "devices", lambda: [Device])
  for width, itemsize, more in itertools.product(
    (1, 16, 33, 64, 72, 128, 200, 256), (2, 4), (0, 5)
  ):
    found = blocks.choose(4096, 4096, (width, 16), itemsize, more)
    held = max(16, 2 ** math.ceil(math.log2(width)))
    for launch, name, more_held in (
      (found.forward, "rows", 0),
      (found.queries, "rows", 16),
      (found.keys, "columns", 16),
      (found.bias, "rows", 16),
    ):
      assert min(launch.rows, launch.columns) >= 16
      sizes = held + more_held, held + 16, itemsize, more
      assert blocks.shared_bytes(launch, name, *sizes) <= 1024 * shared
  few = blocks.choose(1, 17, (64, 64), 2)
  assert (few.forward.rows, few.keys.columns) == (16, 32)


def test_tuned_kernels_compile_without_a_gpu():
  """To what fits; none has products in turn, and few numbers are spilled."""
  pytest.importorskip("triton", reason="needs triton: pip install triton")
  script = pathlib.Path(__file__).with_name("attention_triton_sass.py")
  environment = {**os.environ, "TRITON_INTERPRET": "0", "JAX_PLATFORMS": "cpu"}
  said = subprocess.run(
    [sys.executable, script],
    env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  ).stdout
  lines = [json.loads(line) for line in said.splitlines()]
  assert len(lines) == 3 * len(blocks.TABLES["NVIDIA H100 80GB HBM3"])
  for line in lines:
    assert line["shared"] <= 227 * 1024, line
    assert line["serialised"] == 0, line
    # Faster nonetheless than the next smaller tile.
    large = line["kernel"] == "key_value_gradients" and line["width"] == 128
    wide = line["dtype"] == "float32" and line["width"] > 64
    assert line["spilled"] <= (400 if large or wide else 0), line


@pytest.fixture
def gpu(monkeypatch):
  monkeypatch.setattr(triton_compat, "refusal", lambda: None)


def reasons(dtype="bfloat16", width=64, **options):
  q, k, v = (
    jax.ShapeDtypeStruct((1, 128, heads, width), dtype) for heads in (4, 2, 2)
  )
  return ops.describe("attention", q, k, v, **options)


def test_refuses_what_it_cannot_serve(gpu):
  assert reasons().reasons["triton"] is None
  assert reasons("float32").reasons["triton"] is None
  assert "H=264" in reasons(width=264).reasons["triton"]
  with jax.enable_x64(True):
    assert "float64" in reasons("float64").reasons["triton"]
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    assert "gather the operands" in reasons().reasons["triton"]


def test_runs_by_name_only(gpu):
  ids = jax.ShapeDtypeStruct((1, 128), "int32")
  segments = dict(q_segment_ids=ids, kv_segment_ids=ids)
  assert reasons(softcap=3.0, **segments).chosen == "xla"
  options = dict(deterministic=True, implementation="triton", **segments)
  assert reasons(**options).chosen == "triton"


WIDE = Shape(2, 150, 200, 4, 2, 128, 128)
NARROW = Shape(2, 150, 200, 4, 2, 64, 48)
GPU_CASES = [
  (WIDE, "plain", "bfloat16"),
  (WIDE, "segments", "bfloat16"),
  (WIDE, "everything", "bfloat16"),
  (WIDE, "causal", "float32"),
  (NARROW, "causal", "bfloat16"),
  (NARROW, "causal", "float16"),
  (NARROW, "window", "bfloat16"),
  (NARROW, "softcap", "bfloat16"),
  (NARROW, "offset per item", "bfloat16"),
  (NARROW, "bias", "bfloat16"),
  (NARROW, "bias of heads", "bfloat16"),
  (NARROW, "bias of rows", "bfloat16"),
  (NARROW, "mask of keys", "bfloat16"),
  (NARROW, "mask of positions", "bfloat16"),
  (NARROW, "lengths, some empty", "bfloat16"),
  (NARROW, "dropout, causal", "bfloat16"),
  (NARROW, "everything", "float32"),
  (Shape(1, 1, 177, 4, 1, 128, 128), "causal", "bfloat16"),
  (Shape(1, 100, 1, 4, 4, 64, 64), "causal", "bfloat16"),
  (Shape(1, 200, 130, 8, 1, 32, 32), "causal", "bfloat16"),
  (Shape(1, 90, 90, 2, 1, 72, 80), "causal", "bfloat16"),
  (Shape(1, 90, 90, 2, 2, 192, 128), "causal", "bfloat16"),
  (Shape(1, 90, 90, 2, 2, 256, 256), "causal", "bfloat16"),
  (Shape(1, 90, 90, 2, 2, 256, 256), "causal", "float32"),
]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("shape, option, dtype", GPU_CASES)
def test_gpu(shape, option, dtype):
  """Close to the oracle, and three runs are the same bits."""
  arrays, d_out, d_lse = draw_shape(shape)
  options = OPTIONS[option](shape)
  rounded = lambda x: jnp.asarray(x, dtype)
  fields = jax.tree.map(rounded, arrays)
  if "bias" in options:
    fields["bias"] = rounded(options.pop("bias"))
  if "sinks" in options:
    fields["sinks"] = jnp.asarray(options.pop("sinks"), jnp.float32)
  wide = {name: np.asarray(x, np.float64) for name, x in fields.items()}
  d_out = rounded(d_out)
  want = oracle(
    **wide, d_out=np.asarray(d_out, np.float64), d_lse=d_lse, **options
  )
  if "dropout_rate" in options:
    options["dropout_key"] = jax.random.key(DROPOUT_KEY)
  attend = jax.jit(functools.partial(evaluate, "triton", **options))
  cotangents = d_out, jnp.asarray(d_lse, jnp.float32)
  first, *others = (attend(fields, cotangents) for _ in range(3))
  tolerance = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 1.5e-2}[dtype]
  close(first, want, tolerance)
  for other in others:
    for a, b in zip(
      jax.tree.leaves(first), jax.tree.leaves(other), strict=True
    ):
      np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("options", LENGTHS)
def test_gpu_lengths(options):
  check_lengths_and_dropout(options, "bfloat16", 1.5e-2)


@pytest.mark.gpu
@on_gpu
def test_gpu_dropout_is_that_of_xla():
  check_dropped_weights()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("batch, mapped", MAPS)
def test_gpu_vmap_and_second_order(batch, mapped):
  with jax.default_matmul_precision("highest"):
    check_maps(batch, mapped, 1e-4, causal=True)
