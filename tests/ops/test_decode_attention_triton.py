"""The Triton kernels of ops.decode_attention: interpreted, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from multihead import ops
from multihead.ops import triton_compat
from multihead.ops.decode_attention import triton
from multihead.ops.decode_attention.triton import calls
from tests.ops import triton_interpreter
from tests.ops.test_decode_attention import (
  CASES,
  LENGTHS,
  PAGE,
  agree,
  draw,
  oracle,
  paged,
  run,
)

on_gpu = pytest.mark.skipif(
  jax.default_backend() != "gpu", reason="needs a GPU: make test-gpu"
)


@pytest.fixture
def interpreted(monkeypatch):
  """Parts of one tile and more, of more items than one."""
  triton_interpreter.use(monkeypatch, triton)
  monkeypatch.setattr(triton, "supports", lambda args: None)
  use_blocks(monkeypatch, keys=16, cores=5)


def use_blocks(monkeypatch, *, cores, **sizes):
  monkeypatch.setattr(calls, "_blocks", lambda q, v: calls.Blocks(**sizes))
  monkeypatch.setattr(calls, "_cores", lambda: cores)


def poisoned(k, v, lengths):
  """k and v with NaN where no query may look."""
  k, v = k.copy(), v.copy()
  for b, length in enumerate(lengths):
    k[b, length:] = v[b, length:] = np.nan
  return k, v


def in_pages(k, v, lengths):
  """Pools and a table whose unused slots hold numbers of no page too."""
  (k, table), (v, _) = paged(k), paged(v)
  for b, length in enumerate(lengths):
    unused = table[b, -(-length // PAGE) :]
    unused[:] = np.resize([-1, len(k), 2**31 - 1, 0, -(2**31)], len(unused))
  return k, v, table


@pytest.mark.parametrize(
  "case, pages",
  [(case, False) for case in CASES]
  + [(case, True) for case in ("one query", "few queries", "everything")],
)
def test_interpreted(interpreted, case, pages):
  T, kv_heads, options = CASES[case]
  q, k, v = draw(T, kv_heads)
  want = oracle(q, k, v, LENGTHS, **options)
  (k, v), table = poisoned(k, v, LENGTHS), None
  if pages:
    k, v, table = in_pages(k, v, LENGTHS)
  got = run(q, k, v, "triton", table=table, **options)
  agree(got, want)
  assert (got[0][0] == 0).all()
  assert (got[1][0] == -np.inf).all()


@pytest.mark.parametrize("programs", [1, 2, 7])
@pytest.mark.parametrize("T, window", [(3, None), (3, (70, None)), (1, (9, 0))])
def test_interpreted_parts(interpreted, monkeypatch, programs, T, window):
  """Long and short items together, in few and many parts, two heads a time."""
  use_blocks(monkeypatch, keys=16, heads=2, programs=programs, cores=4)
  lengths = np.array([1, 208, 0, 97])  # One is a multiple of a tile.
  rng = np.random.default_rng(3)
  q = rng.normal(size=(4, T, 4, 16))
  k, v = rng.normal(size=(2, 4, 211, 2, 16))
  want = oracle(q, k, v, lengths, window=window)
  k, v = poisoned(k, v, lengths)
  got = run(q, k, v, "triton", kv_lengths=lengths, window=window)
  agree(got, want)


def test_interpreted_many_rows(interpreted):
  """More rows than a program holds."""
  rng = np.random.default_rng(4)
  q = rng.normal(size=(2, 9, 8, 16))
  k, v = rng.normal(size=(2, 2, 40, 1, 16))
  got = run(q, k, v, "triton", kv_lengths=np.array([40, 7]))
  agree(got, oracle(q, k, v, [40, 7]))


@pytest.mark.parametrize("name, bad", [("k", -np.inf), ("v", np.nan)])
@pytest.mark.parametrize("T, window", [(4, None), (4, (3, None)), (1, None)])
def test_interpreted_bad_number(interpreted, name, bad, T, window):
  q, k, v = draw(T=T)
  clean = oracle(q, k, v, LENGTHS, window=window)[0]
  {"k": k, "v": v}[name][2, 11, 1, 3] = bad
  out, _ = run(q, k, v, "triton", window=window)
  # Item 2, position 11, key head 1: its last two queries, of its heads.
  sees = np.zeros(out.shape, bool)
  sees[2, -2:, 2:] = True
  np.testing.assert_array_equal(np.isnan(out), sees)
  np.testing.assert_allclose(out[~sees], clean[~sees], atol=2e-5)


@pytest.mark.parametrize("bad", [-1, 99])
def test_interpreted_page_that_does_not_exist(interpreted, bad):
  q, k, v = draw(T=1)
  clean = oracle(q, k, v, LENGTHS)[0]
  k, v, table = in_pages(k, v, LENGTHS)
  table[2, 1] = bad
  out, _ = run(q, k, v, "triton", table=table)
  assert np.isnan(out[2]).all()
  others = [0, 1, 3]
  np.testing.assert_allclose(out[others], clean[others], atol=2e-5)


def test_interpreted_huge_logits(interpreted):
  q, k, v = draw(T=1)
  q *= 1e4
  got = run(q, k, v, "triton")
  want = oracle(q, k, v, LENGTHS)
  np.testing.assert_allclose(got[0], want[0], atol=2e-3)
  np.testing.assert_allclose(got[1], want[1], rtol=1e-6)


def test_interpreted_vmap_and_derivatives(interpreted):
  """Caches mapped over, a pool that is shared, forward and reverse mode."""
  drawn = [draw(T=2, batch=1, length=9, seed=seed) for seed in range(2)]
  q, k, v = (
    jnp.asarray(np.stack(x), jnp.float32) for x in zip(*drawn, strict=True)
  )
  lengths = jnp.array([[9], [3]])
  pools = [paged(np.asarray(x[0])) for x in (k, v)]
  (k_pool, table), (v_pool, _) = pools
  k_pool, v_pool = jnp.nan_to_num(k_pool), jnp.nan_to_num(v_pool)

  def both(implementation):
    decode = functools.partial(
      ops.decode_attention,
      window=(8, None),
      return_lse=True,
      implementation=implementation,
    )
    each = lambda q, k, v, lengths: decode(q, k, v, kv_lengths=lengths)
    shared = lambda q, lengths: decode(
      q, k_pool, v_pool, kv_lengths=lengths, page_table=jnp.asarray(table)
    )
    loss = lambda q, k: jnp.sum(jnp.sin(each(q, k, v[0], lengths[0])[0]))
    return lambda: (
      jax.vmap(each)(q, k, v, lengths),
      jax.vmap(shared)(q, lengths),
      jax.grad(loss, argnums=(0, 1))(q[0], k[0]),
      jax.jvp(loss, (q[0], k[0]), (q[1], k[1])),
    )

  got, want = jax.jit(both("triton"))(), jax.jit(both("reference"))()
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_interpreted_shard_map(interpreted):
  mesh = jax.make_mesh(
    (2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
  )
  P = PartitionSpec
  q, k, v = draw(T=2)
  decode = lambda q, k, v, lengths: ops.decode_attention(
    q, k, v, kv_lengths=lengths, return_lse=True, implementation="triton"
  )
  heads = P("data", None, "tensor")
  sharded = jax.shard_map(
    decode,
    mesh=mesh,
    in_specs=(heads, heads, heads, P("data")),
    out_specs=(heads, P("data", "tensor")),
  )
  args = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
  got = jax.jit(sharded)(*args, jnp.asarray(LENGTHS))
  agree(got, oracle(q, k, v, LENGTHS))


def test_refuses_what_it_cannot_serve(monkeypatch):
  monkeypatch.setattr(triton_compat, "refusal", lambda: None)

  def reason(dtype="bfloat16", T=1, H=64):
    struct = jax.ShapeDtypeStruct
    q = struct((2, T, 8, H), dtype)
    cache = struct((2, 32, 2, H), dtype)
    selection = ops.describe("decode_attention", q, cache, cache)
    assert selection.chosen == "xla"
    return selection.reasons["triton"]

  assert reason() is None
  assert "H=320" in reason(H=320)
  assert "T=65" in reason(T=65)
  with jax.enable_x64(True):
    assert "float64" in reason(dtype="float64")
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    assert "gather the operands" in reason()


@pytest.mark.parametrize(
  "widths, dtype, heads, keys",
  [
    ((128, 128), "bfloat16", 1, 64),
    ((256, 256), "bfloat16", 1, 32),
    ((256, 256), "float32", 1, 16),
    ((72, 80), "float32", 1, 32),
    ((128, 128), "bfloat16", 2, 32),
    ((96, 96), "bfloat16", 2, 64),  # Heads are joined in powers of two only.
  ],
)
def test_tiles_fit_into_shared_memory(widths, dtype, heads, keys):
  struct = jax.ShapeDtypeStruct
  q = struct((1, 1, 8, widths[0]), dtype)
  v = struct((1, 64, 4, widths[1]), dtype)
  fitted = calls._fit(calls.Blocks(keys=64, heads=heads, stages=4), q, v)
  assert fitted.keys == keys
  assert fitted.heads == (1 if 96 in widths else heads)


GPU_CASES = {
  "one query": (1, 8, 2, 128, 128, {}),
  "few queries, window": (4, 8, 2, 128, 128, dict(window=(100, None))),
  "own heads, softcap": (1, 4, 4, 64, 64, dict(softcap=5.0)),
  "odd head dims": (2, 6, 2, 80, 72, dict(scale=0.2)),
  "many rows": (8, 16, 1, 64, 64, {}),
  "256": (1, 4, 1, 256, 256, {}),
  "narrow": (1, 4, 2, 16, 8, dict(window=(33, None))),
}


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
  "case, pages, dtype",
  [
    ("one query", False, "bfloat16"),
    ("one query", True, "float16"),
    ("one query", False, "float32"),
    ("few queries, window", False, "bfloat16"),
    ("few queries, window", True, "bfloat16"),
    ("own heads, softcap", True, "float16"),
    ("odd head dims", False, "float32"),
    ("odd head dims", True, "bfloat16"),
    ("many rows", False, "bfloat16"),
    ("256", False, "bfloat16"),
    ("256", False, "float32"),
    ("narrow", True, "bfloat16"),
  ],
)
def test_gpu(case, pages, dtype):
  """Beside float64, and twice the same bits."""
  T, heads, kv_heads, width, v_width, options = GPU_CASES[case]
  lengths = np.array([0, 1, 1000, 333])
  rng = np.random.default_rng(0)
  rounded = lambda *shape: np.asarray(
    jnp.asarray(rng.normal(size=shape), dtype), np.float64
  )
  q = rounded(4, T, heads, width)
  k = rounded(4, 1000, kv_heads, width)
  v = rounded(4, 1000, kv_heads, v_width)
  want = oracle(q, k, v, lengths, **options)
  (k, v), table = poisoned(k, v, lengths), None
  if pages:
    k, v, table = in_pages(k, v, lengths)
  decode = functools.partial(
    run, q, k, v, "triton", dtype, table, kv_lengths=lengths, **options
  )
  got = decode()
  tolerance = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}[dtype]
  agree((got[0], got[0]), (want[0], want[0]), tolerance)
  np.testing.assert_allclose(got[1], want[1], atol=1e-4)
  for a, b in zip(got, decode(), strict=True):
    np.testing.assert_array_equal(a, b)
