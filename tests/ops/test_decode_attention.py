"""ops.decode_attention against its definition, row by row in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from multihead import ops
from multihead.ops.decode_attention import xla

B, S, N, H, HV = 4, 22, 4, 6, 5
# Shorter than T, shorter and longer than a part, everything.
LENGTHS = np.array([0, 3, 13, S])
PAGE = 4
# xla with one part, and with parts so small that every case takes several.
IMPLEMENTATIONS = ("xla", "parts", "reference")


def oracle(q, k, v, lengths, *, scale=None, window=None, softcap=None):
  """out and lse; touches only what is visible."""
  batch, T, heads, width = q.shape
  group = heads // k.shape[2]
  left, _ = window or (None, None)
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  lse = np.full((batch, heads, T), -np.inf)
  for b, t, n in np.ndindex(batch, T, heads):
    last = lengths[b] - T + t
    first = 0 if left is None else max(last - left, 0)
    if last < first:
      continue
    keys = k[b, first : last + 1, n // group]
    values = v[b, first : last + 1, n // group]
    x = (scale or width**-0.5) * keys @ q[b, t, n]
    if softcap:
      x = softcap * np.tanh(x / softcap)
    top = np.max(x)
    lse[b, n, t] = top + np.log(np.sum(np.exp(x - top)))
    out[b, t, n] = np.exp(x - lse[b, n, t]) @ values
  return out, lse


def draw(T=4, kv_heads=2, batch=B, length=S, seed=0):
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=(batch, T, N, H)),
    rng.normal(size=(batch, length, kv_heads, H)),
    rng.normal(size=(batch, length, kv_heads, HV)),
  )


def paged(x, fill=np.nan):
  """A pool with the pages of x [B, S, K, H] shuffled, and its table.

  The tail of the last page and two pages that nobody owns hold `fill`.
  """
  count = -(-x.shape[1] // PAGE)
  whole = np.full((x.shape[0], count * PAGE, *x.shape[2:]), fill)
  whole[:, : x.shape[1]] = x
  table = np.random.default_rng(5).permutation(x.shape[0] * count + 2)
  pool = np.full((len(table), PAGE, *x.shape[2:]), fill)
  table = table[: x.shape[0] * count]
  pool[table] = whole.reshape(-1, PAGE, *x.shape[2:])
  return pool, table.reshape(x.shape[0], count).astype(np.int32)


@pytest.fixture
def implementation(request, monkeypatch):
  """The name to pass; for "parts" xla is told to go that way."""
  if request.param != "parts":
    return request.param
  # 5 keys, or 4 of 6 pages: the last part overlaps the one before.
  length = lambda q, k, v: 4 * PAGE if k.shape[1] == PAGE else 5
  monkeypatch.setattr(xla, "_part_length", length)
  return "xla"


each_implementation = pytest.mark.parametrize(
  "implementation", IMPLEMENTATIONS, indirect=True
)


def run(q, k, v, implementation, dtype=jnp.float32, table=None, **options):
  """out and lse of ops.decode_attention in `dtype`, as float64 numpy."""
  arrays = {"kv_lengths": options.pop("kv_lengths", LENGTHS)}
  if table is not None:
    arrays["page_table"] = table

  @jax.jit
  def decode(q, k, v, arrays):
    return ops.decode_attention(
      q,
      k,
      v,
      **arrays,
      **options,
      return_lse=True,
      implementation=implementation,
    )

  out, lse = decode(*(jnp.asarray(x, dtype) for x in (q, k, v)), arrays)
  assert out.dtype == dtype
  assert lse.dtype == jnp.promote_types(dtype, jnp.float32)
  return np.asarray(out, np.float64), np.asarray(lse, np.float64)


def agree(got, want, tolerance=2e-5):
  for name, a, b in zip(("out", "lse"), got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=0, err_msg=name)


CASES = {
  "one query": (1, 2, {}),
  "few queries": (4, 2, {}),
  "one key head": (1, 1, dict(window=(5, None))),
  "one key head, few queries": (4, 1, dict(scale=0.7)),
  "own key heads": (1, N, dict(softcap=0.8)),
  "own key heads, few queries": (4, N, dict(window=(2, 0))),
  "window of itself": (4, 2, dict(window=(0, None))),
  "window, right never binds": (4, 2, dict(window=(7, 1))),
  "everything": (4, 2, dict(window=(9, None), softcap=1.5, scale=1.0)),
}


@pytest.mark.parametrize(
  "case, pages, implementation",
  [(case, pages, "parts") for case in CASES for pages in (False, True)]
  + [
    (case, True, implementation)
    for case in ("one query", "everything")
    for implementation in ("xla", "reference")
  ],
  indirect=["implementation"],
)
def test_value(case, pages, implementation):
  T, kv_heads, options = CASES[case]
  q, k, v = draw(T, kv_heads)
  want = oracle(q, k, v, LENGTHS, **options)
  table = None
  # What lies past the length is poison: none of it may leak.
  for b, length in enumerate(LENGTHS):
    k[b, length:] = v[b, length:] = np.nan
  if pages:
    (k, table), (v, _) = paged(k), paged(v)
    # Unused slots hold numbers of other pages, and of none.
    for b, length in enumerate(LENGTHS):
      unused = table[b, -(-length // PAGE) :]
      unused[:] = np.resize([-1, len(k), 2**31 - 1, 0, -(2**31)], len(unused))
  got = run(q, k, v, implementation, table=table, **options)
  agree(got, want)
  assert (got[0][0] == 0).all()  # The empty item: zeros, and -inf below.
  assert (got[1][0] == -np.inf).all()


@pytest.mark.parametrize(
  "dtype, tolerance, pages, implementation",
  [
    ("bfloat16", 2e-2, False, "xla"),
    ("bfloat16", 2e-2, False, "parts"),
    ("bfloat16", 2e-2, True, "parts"),
    ("float16", 3e-3, True, "parts"),
    ("bfloat16", 2e-2, True, "reference"),
  ],
  indirect=["implementation"],
)
def test_narrow_dtypes(dtype, tolerance, pages, implementation):
  rounded = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in draw(T=2)]
  want = oracle(*rounded, LENGTHS)
  q, k, v = rounded
  table = None
  if pages:
    (k, table), (v, _) = paged(k), paged(v)
  got = run(q, k, v, implementation, dtype, table=table)
  agree(got, want, tolerance)


@pytest.mark.parametrize("implementation", ["xla", "parts"], indirect=True)
def test_many_rows_go_another_way(implementation, monkeypatch):
  monkeypatch.setattr(xla, "_FEW_ROWS", 0)
  q, k, v = draw(T=4)
  got = run(q, k, v, implementation)
  agree(got, oracle(q, k, v, LENGTHS))


@pytest.mark.parametrize("implementation", ["parts"], indirect=True)
def test_equals_attention_to_the_prefix(implementation):
  q, k, v = (jnp.asarray(x, jnp.float32) for x in draw(T=3))
  options = dict(window=(6, None), softcap=2.0, return_lse=True)
  decode = functools.partial(
    ops.decode_attention, implementation=implementation, **options
  )
  attend = functools.partial(
    ops.attention, causal=True, implementation="reference", **options
  )
  got = jax.jit(functools.partial(decode, kv_lengths=13))(q, k, v)
  agree(got, jax.jit(attend)(q, k[:, :13], v[:, :13]))
  # Without lengths, all keys are in use.
  agree(jax.jit(decode)(q, k, v), jax.jit(attend)(q, k, v))


@pytest.mark.parametrize("implementation", ["parts"], indirect=True)
def test_halves_merged_by_lse_are_the_whole(implementation):
  q, k, v = draw(T=1)
  halves = []
  for start, stop in ((0, 9), (9, S)):
    lengths = np.clip(LENGTHS - start, 0, stop - start)
    halves.append(
      run(
        q,
        k[:, start:stop],
        v[:, start:stop],
        implementation,
        kv_lengths=lengths,
      )
    )
  (out_a, lse_a), (out_b, lse_b) = halves
  with np.errstate(invalid="ignore"):  # -inf - -inf of the empty item
    lse = np.logaddexp(lse_a, lse_b)
    share = np.nan_to_num(np.exp(lse_a - lse)).transpose(0, 2, 1)[..., None]
  want = oracle(q, k, v, LENGTHS)
  agree((share * out_a + (1 - share) * out_b, lse), want)


@each_implementation
@pytest.mark.parametrize("name, bad", [("k", -np.inf), ("v", np.nan)])
def test_bad_number_reaches_exactly_the_rows_that_see_it(
  name, bad, implementation
):
  q, k, v = draw(T=4)
  clean = oracle(q, k, v, LENGTHS)[0]
  # Item 2, position 11, key head 1: seen by the last two queries of its heads.
  {"k": k, "v": v}[name][2, 11, 1, 3] = bad
  out, _ = run(q, k, v, implementation)
  sees = np.zeros(out.shape, bool)
  sees[2, 2:, 2:] = True
  np.testing.assert_array_equal(np.isnan(out), sees)
  np.testing.assert_allclose(out[~sees], clean[~sees], atol=2e-5)


@pytest.mark.parametrize("implementation", ["parts"], indirect=True)
@pytest.mark.parametrize("bad", [-1, 99])
def test_page_in_use_that_does_not_exist_shows(bad, implementation):
  q, k, v = draw(T=1)
  clean = oracle(q, k, v, LENGTHS)[0]
  (k, table), (v, _) = paged(k), paged(v)
  table[2, 1] = bad
  out, _ = run(q, k, v, implementation, table=table)
  assert np.isnan(out[2]).all()
  others = [0, 1, 3]
  np.testing.assert_allclose(out[others], clean[others], atol=2e-5)


@pytest.mark.parametrize("implementation", ["parts"], indirect=True)
def test_huge_logits_neither_overflow_nor_vanish(implementation):
  q, k, v = draw(T=1)
  q *= 1e4
  got = run(q, k, v, implementation)
  want = oracle(q, k, v, LENGTHS)
  np.testing.assert_allclose(got[0], want[0], atol=2e-3)
  np.testing.assert_allclose(got[1], want[1], rtol=1e-6)


@pytest.mark.parametrize("pages", [False, True], ids=["whole", "pages"])
def test_parts_that_nobody_sees_are_not_read(pages, monkeypatch):
  monkeypatch.setattr(xla, "_part_length", lambda q, k, v: 4)
  starts = []
  take = xla.pages.take

  def counted(x, page_table, of):
    jax.debug.callback(lambda i: starts.append(int(i)), of[0])
    return take(x, page_table, of)

  monkeypatch.setattr(xla.pages, "take", counted)
  q, k, v = draw(T=2)
  table = None
  if pages:
    (k, table), (v, _) = paged(k), paged(v)
  lengths = np.array([10, 13, 11, 12])
  options = dict(window=(3, None), kv_lengths=lengths)
  run(q, k, v, "xla", table=table, **options)
  jax.effects_barrier()
  # Positions 8 to 12 see back to 5: the parts 4..7, 8..11 and 12..15.
  step = 1 if pages else 4
  assert sorted(starts) == sorted(2 * [step, 2 * step, 3 * step])


def test_memory_is_that_of_a_part():
  """No copy of the cache and no logits of all keys, in a narrow dtype too."""
  long = 2**15
  for dtype in (jnp.float32, jnp.bfloat16):
    cache = jax.ShapeDtypeStruct((1, long, 2, 64), dtype)
    args = (
      jax.ShapeDtypeStruct((1, 1, 64, 64), dtype),
      cache,
      cache,
      jax.ShapeDtypeStruct((1,), jnp.int32),
    )

    @jax.jit
    def decode(q, k, v, lengths):
      return ops.decode_attention(q, k, v, kv_lengths=lengths)

    memory = decode.lower(*args).compile().memory_analysis()
    # float32: keys, or logits, of all positions would be 16 or 8 MiB.
    assert memory.temp_size_in_bytes < 12 * 2**20, dtype


@pytest.mark.parametrize("implementation", ["parts"], indirect=True)
def test_gradients(implementation):
  q, k, v = (jnp.asarray(x, jnp.float32) for x in draw(T=2))
  lengths = jnp.asarray(LENGTHS)
  poisoned = k.at[2, 13:].set(jnp.nan), v.at[2, 13:].set(jnp.nan)

  def loss(f, args):
    out, lse = f(*args)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse > -1e9, lse, 0))

  decode = lambda q, k, v: ops.decode_attention(
    q,
    k,
    v,
    kv_lengths=lengths,
    window=(6, None),
    return_lse=True,
    implementation=implementation,
  )
  definition = lambda q, k, v: ops.attention(
    q,
    k,
    v,
    causal=True,
    q_offset=lengths - 2,
    window=(6, None),
    return_lse=True,
    implementation="xla",
  )
  gradient = lambda f: jax.jit(jax.grad(functools.partial(loss, f)))
  got = gradient(decode)((q, *poisoned))
  want = gradient(definition)((q, k, v))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("implementation", ["parts"], indirect=True)
def test_vmap(implementation):
  drawn = [draw(T=2, seed=seed) for seed in range(2)]
  q, k, v = (np.stack(x) for x in zip(*drawn, strict=True))
  lengths = np.stack([LENGTHS, LENGTHS[::-1]])
  decode = lambda q, k, v, lengths: ops.decode_attention(
    q,
    k,
    v,
    kv_lengths=lengths,
    window=(8, None),
    return_lse=True,
    implementation=implementation,
  )
  args = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
  got = jax.jit(jax.vmap(decode))(*args, lengths)
  for i in range(2):
    want = oracle(q[i], k[i], v[i], lengths[i], window=(8, None))
    agree([x[i] for x in got], want)


@pytest.mark.parametrize("implementation", ["parts"], indirect=True)
def test_vmap_shares_a_pool(implementation):
  q, k, v = draw(T=2)
  want = oracle(q, k, v, LENGTHS)
  (k, table), (v, _) = paged(k), paged(v)
  k, v = (jnp.asarray(x, jnp.float32) for x in (k, v))
  decode = lambda q, lengths, table: ops.decode_attention(
    q[None],
    k,
    v,
    kv_lengths=lengths[None],
    page_table=table[None],
    return_lse=True,
    implementation=implementation,
  )
  out, lse = jax.jit(jax.vmap(decode))(
    jnp.asarray(q, jnp.float32), LENGTHS, table
  )
  agree((out[:, 0], lse[:, 0]), want)


@pytest.mark.parametrize(
  "implementation, kv_heads, pages, check_vma",
  [
    ("xla", 4, False, True),
    ("parts", 4, False, True),
    ("parts", 1, False, False),
    ("parts", 1, True, True),
    ("reference", 4, False, True),
  ],
  indirect=["implementation"],
)
def test_shard_map(kv_heads, pages, check_vma, implementation):
  mesh = jax.make_mesh(
    (2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
  )
  P = PartitionSpec
  q, k, v = draw(T=2, kv_heads=kv_heads)
  want = oracle(q, k, v, LENGTHS, window=(8, None))
  arrays = {"kv_lengths": jnp.asarray(LENGTHS)}
  tensor = "tensor" if kv_heads > 1 else None
  cache = P("data", None, tensor)
  if pages:
    (k, arrays["page_table"]), (v, _) = paged(k), paged(v)
    cache = P(None, None, tensor)  # Every shard holds the whole pool.
  heads = P("data", None, "tensor")

  def decode(q, k, v, arrays):
    return ops.decode_attention(
      q,
      k,
      v,
      **arrays,
      window=(8, None),
      return_lse=True,
      implementation=implementation,
    )

  sharded = jax.shard_map(
    decode,
    mesh=mesh,
    in_specs=(heads, cache, cache, dict.fromkeys(arrays, P("data"))),
    out_specs=(heads, P("data", "tensor")),
    check_vma=check_vma,
  )
  args = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
  agree(jax.jit(sharded)(*args, arrays), want)


@pytest.mark.parametrize("T, length", [(0, 5), (4, 0)])
def test_no_queries_or_no_keys(T, length):
  q, k = jnp.ones((2, T, 4, 8)), jnp.ones((2, length, 2, 8))
  out, lse = ops.decode_attention(q, k, k, return_lse=True)
  assert out.shape == (2, T, 4, 8)
  assert (out == 0).all()
  assert lse.shape == (2, 4, T)
  assert (lse == -jnp.inf).all()


def test_lengths_beyond_the_cache_count_as_all_of_it():
  q, k, v = (jnp.asarray(x, jnp.float32) for x in draw(T=2))
  decode = jax.jit(
    lambda lengths: ops.decode_attention(q, k, v, kv_lengths=lengths)
  )
  far = decode(jnp.array([-3, S + 9, S, 5]))
  near = decode(jnp.array([0, S, S, 5]))
  np.testing.assert_array_equal(far, near)


def zeros(*shape, dtype=jnp.float32):
  return jnp.zeros(shape, dtype)


GOOD = dict(q=zeros(2, 1, 4, 8), k=zeros(2, 7, 2, 8), v=zeros(2, 7, 2, 3))
INT = jnp.int32
TABLE = zeros(2, 3, dtype=INT)


@pytest.mark.parametrize(
  "error, text, change",
  [
    (
      ValueError,
      "decode_attention takes q .B, T, N, H.*got q .2, 4, 8.",
      dict(q=zeros(2, 4, 8)),
    ),
    (ValueError, "batch sizes differ.*k .3, 7", dict(k=zeros(3, 7, 2, 8))),
    (TypeError, "one dtype", dict(k=zeros(2, 7, 2, 8).astype("bfloat16"))),
    (ValueError, "5 query heads.*2 key heads", dict(q=zeros(2, 1, 5, 8))),
    (ValueError, "kv_lengths must be in 0..S = 0..7", dict(kv_lengths=8)),
    (TypeError, "kv_lengths must be an integer", dict(kv_lengths=1.5)),
    (
      ValueError,
      "kv_lengths must.*B. = .2.",
      dict(kv_lengths=zeros(5, dtype=INT)),
    ),
    (ValueError, "window must be .left, right.", dict(window=4)),
    (ValueError, "softcap must be positive", dict(softcap=0.0)),
    (TypeError, "page_table must be integers", dict(page_table=zeros(2, 3))),
    (
      ValueError,
      "page_table must have shape .B, pages. = .2, pages., got .3, 3.",
      dict(page_table=zeros(3, 3, dtype=INT)),
    ),
    (
      ValueError,
      "number or size of pages.*k .P, page, K, H.",
      dict(page_table=TABLE, k=zeros(5, 7, 2, 8)),
    ),
    (
      ValueError,
      "hold no page",
      dict(page_table=TABLE, k=zeros(0, 7, 2, 8), v=zeros(0, 7, 2, 3)),
    ),
    (ValueError, "unknown implementation", dict(implementation="cudnn")),
  ],
)
def test_border(error, text, change):
  with pytest.raises(error, match=text):
    ops.decode_attention(**{**GOOD, **change})


def test_describe_lists_what_there_is():
  selection = ops.describe("decode_attention", **GOOD, page_table=TABLE)
  assert selection.chosen == "xla"
  assert "needs an NVIDIA GPU" in selection.reasons.pop("triton")
  assert selection.reasons == {"xla": None, "reference": None}
  assert "page_table=int32[2,3]" in str(selection)
