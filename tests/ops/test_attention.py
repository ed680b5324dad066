"""ops.attention against its definition, row by row in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import AxisType, PartitionSpec

from multihead import ops
from multihead.ops.attention import positions, xla

B, N, H, HV = 2, 4, 6, 5
# xla by its ways: as it comes (with so few rows, reading keys as they lie), one
# tile, and loops over tiles so small that every case takes several.
IMPLEMENTATIONS = ("xla", "tile", "loop", "reference")
# Many small programs that run once: what counts is the time to compile.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


def oracle(q, k, v, d_out, d_lse, **options):
  """out, lse and the gradients by name; touches only what is visible."""
  bias, mask = options.get("bias"), options.get("mask")
  batch, T, heads, width = q.shape
  S, group = k.shape[1], heads // k.shape[2]
  full = (batch, heads, T, S)
  scale = options.get("scale") or width**-0.5
  offset = options.get("q_offset")
  offset = np.broadcast_to(S - T if offset is None else offset, (batch,))
  left, right = options.get("window") or (None, None)
  cap = options.get("softcap")
  q_ids, kv_ids = options.get("q_segment_ids"), options.get("kv_segment_ids")
  out, lse = np.zeros((*q.shape[:3], v.shape[-1])), np.zeros(full[:3])
  grads = {"q": np.zeros(q.shape), "k": np.zeros(k.shape)}
  grads["v"], d_bias = np.zeros(v.shape), np.zeros(full)
  whole_bias = np.zeros(full) if bias is None else np.broadcast_to(bias, full)
  whole_mask = np.broadcast_to(True if mask is None else mask, full)

  def sees(b, n, i, j):
    place = i + offset[b]
    return (
      (not options.get("causal") or j <= place)
      and (left is None or place - j <= left)
      and (right is None or j - place <= right)
      and whole_mask[b, n, i, j]
      and (q_ids is None or q_ids[b, i] == kv_ids[b, j])
    )

  for b, n, i in np.ndindex(*full[:3]):
    seen = [j for j in range(S) if sees(b, n, i, j)]
    if not seen:
      lse[b, n, i] = -np.inf
      continue
    row, keys, values = (
      q[b, i, n],
      k[b, seen, n // group],
      v[b, seen, n // group],
    )
    x = scale * keys @ row
    bent = np.tanh(x / cap) if cap else None
    z = (cap * bent if cap else x) + whole_bias[b, n, i, seen]
    lse[b, n, i] = np.max(z) + np.log(np.sum(np.exp(z - np.max(z))))
    p = np.exp(z - lse[b, n, i])
    out[b, i, n] = p @ values
    d_p = values @ d_out[b, i, n]
    d_z = p * (d_p - p @ d_p + d_lse[b, n, i])
    d_bias[b, n, i, seen] = d_z
    d_x = scale * d_z * (1 - bent**2 if cap else 1)
    grads["q"][b, i, n] = keys.T @ d_x
    grads["k"][b, seen, n // group] += np.outer(d_x, row)
    grads["v"][b, seen, n // group] += np.outer(p, d_out[b, i, n])
  if bias is not None:
    shape = (1,) * (4 - bias.ndim) + bias.shape
    axes = tuple(a for a in range(4) if shape[a] == 1)
    d_bias = d_bias.sum(axis=axes, keepdims=True)
    grads["bias"] = np.reshape(d_bias, bias.shape)
  return out, lse, grads


def draw(T, S, *, heads=N, kv_heads=2, width=H, v_width=HV, seed=0, batch=B):
  rng = np.random.default_rng(seed)
  arrays = {
    "q": rng.normal(size=(batch, T, heads, width)),
    "k": rng.normal(size=(batch, S, kv_heads, width)),
    "v": rng.normal(size=(batch, S, kv_heads, v_width)),
  }
  d_out = rng.normal(size=(batch, T, heads, v_width))
  return arrays, d_out, rng.normal(size=(batch, heads, T))


def evaluate(arrays, d_out, d_lse, implementation, dtype, **options):
  """out, lse and gradients of ops.attention in `dtype`, as float64 numpy."""
  fields = dict(arrays)
  if options.get("bias") is not None:
    fields["bias"] = options.pop("bias")
  fields = {name: jnp.asarray(x, dtype) for name, x in fields.items()}
  traced = {
    name: jnp.asarray(options.pop(name))
    for name in list(options)
    if isinstance(options[name], np.ndarray)
  }

  @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
  def both(fields, traced, d_out, d_lse):
    def f(fields):
      return ops.attention(
        **fields,
        **traced,
        **options,
        return_lse=True,
        implementation=implementation,
      )

    results, vjp = jax.vjp(f, fields)
    return results, vjp((d_out, d_lse))[0]

  lse_dtype = jnp.promote_types(dtype, jnp.float32)
  (out, lse), grads = both(
    fields, traced, jnp.asarray(d_out, dtype), jnp.asarray(d_lse, lse_dtype)
  )
  assert out.dtype == dtype
  assert lse.dtype == lse_dtype
  for name, grad in grads.items():
    assert grad.dtype == dtype
    assert grad.shape == fields[name].shape
  as64 = lambda x: np.asarray(x, np.float64)
  return as64(out), as64(lse), {name: as64(x) for name, x in grads.items()}


def check(arrays, d_out, d_lse, implementation, dtype, tolerance, **options):
  got = evaluate(arrays, d_out, d_lse, implementation, dtype, **options)
  want = oracle(**arrays, d_out=d_out, d_lse=d_lse, **options)
  for name, a, b in (("out", got[0], want[0]), ("lse", got[1], want[1])):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=0, err_msg=name)
  assert got[2].keys() == want[2].keys()
  for name, b in want[2].items():
    size = max(1, np.abs(b).max())
    np.testing.assert_allclose(
      got[2][name], b, atol=tolerance * size, rtol=0, err_msg=f"d_{name}"
    )
  return got


@pytest.fixture
def implementation(request, monkeypatch):
  """The name to pass; for "tile" and "loop" xla is told to go that way."""
  if request.param not in ("tile", "loop"):
    return request.param
  tile = request.param == "tile"
  monkeypatch.setattr(xla, "_FEW_ROWS", 0)
  monkeypatch.setattr(xla, "_is_one_tile", lambda heads, T, S: tile)
  monkeypatch.setattr(
    xla, "_loop_sizes", lambda heads, T, S: (min(T, 6), min(S, 8))
  )
  return "xla"


each_implementation = pytest.mark.parametrize(
  "implementation", IMPLEMENTATIONS, indirect=True
)


def random_mask(*shape):
  return np.random.default_rng(7).random(shape) < 0.6


def random_bias(*shape):
  return np.random.default_rng(8).normal(size=shape)


def ids(length):
  """[B, length] segments: runs of different lengths in the two items."""
  return np.stack([np.arange(length) // 5, np.arange(length) // 4 % 3])


CASES = {
  "plain": (13, 19, {}),
  "scale": (7, 9, dict(scale=1.7)),
  "causal": (17, 17, dict(causal=True)),
  "causal, fewer queries": (5, 21, dict(causal=True)),
  "causal, empty rows": (23, 9, dict(causal=True)),
  "one query": (1, 19, dict(causal=True, window=(6, None))),
  "one key": (11, 1, dict(causal=True)),
  "one of each": (1, 1, dict(causal=True, softcap=2.0)),
  "offset": (9, 14, dict(causal=True, q_offset=2)),
  "negative offset": (9, 14, dict(causal=True, q_offset=-4)),
  "far offset": (9, 14, dict(window=(3, 3), q_offset=40)),
  "offset per item": (
    9,
    22,
    dict(causal=True, window=(7, None), q_offset=np.array([3, 15])),
  ),
  "offset per item, empty": (
    9,
    6,
    dict(causal=True, q_offset=np.array([-5, 1])),
  ),
  "window": (15, 18, dict(window=(3, 2))),
  "window left": (15, 18, dict(window=(4, None))),
  "window right": (15, 18, dict(window=(None, 1))),
  "window zero": (12, 12, dict(window=(0, 0))),
  "window causal": (18, 18, dict(window=(4, 9), causal=True)),
  "softcap": (9, 12, dict(softcap=0.8, scale=1.0)),
  "bias": (9, 12, dict(bias=random_bias(B, N, 9, 12))),
  "bias of heads": (9, 12, dict(bias=random_bias(N, 1, 12), causal=True)),
  "bias of rows": (9, 12, dict(bias=random_bias(B, 1, 9, 1), softcap=1.5)),
  "bias of items": (9, 12, dict(bias=random_bias(B, 1, 1, 1))),
  "bias of positions": (9, 12, dict(bias=random_bias(9, 12))),
  "mask": (9, 12, dict(mask=random_mask(B, N, 9, 12))),
  "mask of keys": (9, 12, dict(mask=random_mask(B, 1, 1, 12))),
  "mask of rows": (9, 12, dict(mask=random_mask(1, N, 9, 1))),
  "mask of positions": (9, 12, dict(mask=random_mask(9, 12))),
  "mask of nothing": (3, 12, dict(mask=np.zeros((1, 1), bool))),
  "segments": (
    16,
    16,
    dict(causal=True, q_segment_ids=ids(16), kv_segment_ids=ids(16)),
  ),
  "segments crossed": (
    9,
    17,
    dict(q_segment_ids=ids(9)[::-1], kv_segment_ids=ids(17)),
  ),
  "everything": (
    14,
    17,
    dict(
      causal=True,
      window=(9, 3),
      softcap=1.2,
      scale=0.6,
      q_offset=np.array([4, 1]),
      bias=random_bias(B, N, 1, 17),
      mask=random_mask(1, 1, 14, 17),
      q_segment_ids=ids(14) // 2,
      kv_segment_ids=ids(17) // 2,
    ),
  ),
}


# What the three ways of xla do apart from one another: not every case for each.
SHORT_CASES = [
  "plain",
  "causal, empty rows",
  "one query",
  "one key",
  "offset per item",
  "softcap",
  "bias of heads",
  "mask of keys",
  "segments",
  "everything",
]


@pytest.mark.parametrize(
  "case, implementation",
  [(case, name) for name in ("loop", "reference") for case in CASES]
  + [(case, name) for name in ("xla", "tile") for case in SHORT_CASES],
  indirect=["implementation"],
)
def test_value_and_gradients(case, implementation):
  T, S, options = CASES[case]
  with jax.enable_x64(True):
    check(*draw(T, S), implementation, jnp.float64, 1e-12, **options)


@each_implementation
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (8, 1)])
def test_groups_of_heads(heads, kv_heads, implementation):
  inputs = draw(9, 12, heads=heads, kv_heads=kv_heads, v_width=9)
  mask = random_mask(B, heads, 9, 12)
  with jax.enable_x64(True):
    check(*inputs, implementation, jnp.float64, 1e-12, mask=mask)


@each_implementation
@pytest.mark.parametrize(
  "dtype, tolerance", [("float32", 5e-6), ("bfloat16", 4e-2), ("float16", 5e-3)]
)
def test_narrow_dtypes(dtype, tolerance, implementation):
  arrays, d_out, d_lse = draw(31, 40, width=16, v_width=8)
  # The oracle starts from the same rounded numbers.
  round_off = lambda x: np.asarray(jnp.asarray(x, dtype), np.float64)
  arrays = {name: round_off(x) for name, x in arrays.items()}
  check(
    arrays,
    round_off(d_out),
    d_lse,
    implementation,
    jnp.dtype(dtype),
    tolerance,
    causal=True,
    bias=round_off(random_bias(N, 31, 40)),
  )


@each_implementation
def test_huge_logits_neither_overflow_nor_vanish(implementation):
  arrays, d_out, d_lse = draw(9, 12)
  bias = np.where(np.arange(9)[:, None] < 4, -3e4, 3e4)
  with jax.enable_x64(True):
    check(
      arrays,
      d_out,
      d_lse,
      implementation,
      jnp.float64,
      1e-9,
      scale=60.0,
      bias=bias * np.ones((1, 12)),
    )


@each_implementation
def test_bias_of_minus_infinity_empties_rows(implementation):
  arrays, d_out, d_lse = draw(9, 12)
  bias = np.where(np.arange(9)[:, None] % 3 == 0, -np.inf, 0.0)
  bias = bias + np.zeros((1, 12))
  out, lse, grads = evaluate(
    arrays, d_out, d_lse, implementation, jnp.float32, bias=bias
  )
  assert (out[:, ::3] == 0).all()
  assert (lse[:, :, ::3] == -np.inf).all()
  assert (grads["q"][:, ::3] == 0).all()
  assert all(np.isfinite(grad).all() for grad in grads.values())
  assert np.isfinite(lse[:, :, 1::3]).all()


@each_implementation
@pytest.mark.parametrize("T, value", [(1, np.nan), (9, np.nan), (9, np.inf)])
def test_bad_number_in_masked_key_does_not_leak(T, value, implementation):
  arrays, d_out, d_lse = draw(T, 14)
  hidden = np.zeros((B, 14), bool)
  hidden[0, 3:7] = hidden[1, 10:] = True
  arrays["k"][hidden] = value
  arrays["v"][hidden] = value
  # And a query that sees nothing.
  mask = np.tile(~hidden[:, None, None], (1, 1, T, 1))
  if T > 1:
    mask[:, :, 2] = False
    arrays["q"][:, 2] = d_out[:, 2] = value
  with jax.enable_x64(True):
    _, _, grads = check(
      arrays, d_out, d_lse, implementation, jnp.float64, 1e-12, mask=mask
    )
  assert (grads["k"][hidden] == 0).all()
  assert (grads["v"][hidden] == 0).all()


@each_implementation
@pytest.mark.parametrize("name", ["k", "v"])
def test_bad_number_reaches_exactly_the_rows_that_see_it(name, implementation):
  arrays, d_out, d_lse = draw(16, 16)
  # In item 0 causal hides it from rows 0..8, segments from rows 10..15.
  arrays[name][0, 9, 0, 2] = np.nan
  options = dict(causal=True, q_segment_ids=ids(16), kv_segment_ids=ids(16))
  out, lse, grads = evaluate(
    arrays, d_out, d_lse, implementation, jnp.float32, **options
  )
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


@pytest.mark.parametrize(
  "implementation", ["xla", "tile", "loop"], indirect=True
)
def test_bad_cotangent_shows_and_stays_in_its_segment(implementation):
  arrays, d_out, d_lse = draw(16, 16)
  options = dict(causal=True, q_segment_ids=ids(16), kv_segment_ids=ids(16))
  _, _, want = oracle(**arrays, d_out=d_out, d_lse=d_lse, **options)
  d_out[0, 7, 1, 2] = np.nan
  *_, grads = evaluate(
    arrays, d_out, d_lse, implementation, jnp.float32, **options
  )
  assert np.isnan(grads["q"][0, 7, 1]).all()
  assert np.isnan(grads["v"][0, 5:8, 0]).any(axis=-1).all()
  far = np.r_[0:5, 10:16]
  for name, grad in grads.items():
    np.testing.assert_allclose(grad[0, far], want[name][0, far], atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_one_query_reads_a_long_cache_without_a_loop(kv_heads):
  arrays, _, _ = draw(1, 300, kv_heads=kv_heads, width=16, v_width=16)
  length = np.array([170, 33])
  mask = (np.arange(300) < length[:, None])[:, None, None]

  def step(q, k, v, mask):
    return ops.attention(q, k, v, mask=mask, implementation="xla")

  args = [jnp.asarray(arrays[n], jnp.float32) for n in "qkv"] + [mask]
  text = str(jax.make_jaxpr(step)(*args))
  assert "while" not in text
  assert "scan" not in text
  want = oracle(
    **arrays,
    d_out=np.zeros((B, 1, N, 16)),
    d_lse=np.zeros((B, N, 1)),
    mask=mask,
  )
  np.testing.assert_allclose(jax.jit(step)(*args), want[0], atol=1e-5)


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
def test_loops_agree_with_one_tile(T, S, offset, causal, left, right, seed):
  arrays, d_out, d_lse = draw(T, S, batch=1, heads=1, kv_heads=1, seed=seed)
  options = dict(
    causal=causal,
    window=(left, right),
    q_offset=offset,
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(xla, "_FEW_ROWS", 0)
    patch.setattr(xla, "_is_one_tile", lambda heads, T, S: False)
    patch.setattr(xla, "_loop_sizes", lambda heads, T, S: (8, 16))
    check(arrays, d_out, d_lse, "xla", jnp.float32, 2e-5, **options)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
  first=strategies.integers(0, 60),
  rows=strategies.integers(1, 20),
  S=strategies.integers(1, 60),
  offsets=strategies.lists(
    strategies.integers(-70, 70), min_size=1, max_size=3
  ),
  left=strategies.none() | strategies.integers(0, 70),
  right=strategies.none() | strategies.integers(0, 70),
)
def test_loops_skip_all_that_no_row_sees(first, rows, S, offsets, left, right):
  seen = {
    j
    for i in range(first, first + rows)
    for offset in offsets
    for j in range(S)
    if (left is None or j >= i + offset - left)
    and (right is None or j <= i + offset + right)
  }
  with jax.disable_jit():
    start, stop = positions.column_range(
      left, right, first, first + rows - 1, (min(offsets), max(offsets)), S
    )
  assert seen <= set(range(int(start), int(stop)))
  if len(offsets) == 1:
    assert len(seen) == int(stop) - int(start)


def test_a_bound_is_dropped_only_where_no_pair_meets_it():
  for T, S, offset in np.ndindex(4, 4, 9):
    T, S, offset = T + 1, S + 1, offset - 4
    ahead = np.arange(S) - np.arange(T)[:, None] - offset
    for size in range(8):
      left, _ = positions.bounds(False, (size, None), offset, T, S)
      assert (left is None) == (ahead >= -size).all()
      _, right = positions.bounds(False, (None, size), offset, T, S)
      assert (right is None) == (ahead <= size).all()
    _, right = positions.bounds(True, (None, 5), offset, T, S)
    assert (right is None) == (ahead <= 0).all()
  assert positions.bounds(True, (9, 9), np.zeros(2), 1, 1) == (9, 0)


@pytest.mark.parametrize("offset", [None, "traced"])
def test_loops_visit_only_visible_tiles(offset, monkeypatch):
  visited = []
  original = xla._hidden_logits

  def counted(spec, operands, poison, rows, columns):
    note = lambda i, j: visited.append((int(i), int(j)))
    jax.debug.callback(note, rows[0], columns[0])
    return original(spec, operands, poison, rows, columns)

  monkeypatch.setattr(xla, "_hidden_logits", counted)
  monkeypatch.setattr(xla, "_is_one_tile", lambda heads, T, S: False)
  monkeypatch.setattr(xla, "_loop_sizes", lambda heads, T, S: (16, 16))
  q = jnp.ones((1, 64, 4, 4))
  f = functools.partial(
    ops.attention, causal=True, window=(20, None), implementation="xla"
  )
  if offset:
    jax.jit(lambda offset: f(q, q, q, q_offset=offset))(jnp.zeros((1,), int))
  else:
    f(q, q, q)
  jax.effects_barrier()
  want = {(i, j) for i in range(0, 64, 16) for j in range(0, 64, 16)}
  want = {(i, j) for i, j in want if j <= i + 15 and j + 15 >= i - 20}
  assert set(visited) == want
  assert len(visited) == len(want)


def big(T, implementation, dtype=jnp.float32):
  """Bytes of temporary memory of value and gradients."""
  x = jax.ShapeDtypeStruct((1, T, 2, 64), dtype)

  def loss(q, k, v):
    out = ops.attention(q, k, v, causal=True, implementation=implementation)
    return jnp.sum(out * out)

  step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
  return step.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear():
  T = 16384
  matrix = 4 * T * T
  used = big(T, "xla")
  assert used < matrix / 8
  assert big(T, "reference") > matrix
  assert used < 2.5 * big(T // 2, "xla")


def test_bias_gradient_is_computed_only_if_wanted():
  q = jnp.ones((1, 600, 2, 64))
  bias = jnp.zeros((1, 2, 600, 600))

  def loss(q, bias):
    return jnp.sum(ops.attention(q, q, q, bias=bias, implementation="xla"))

  def used(argnums):
    step = jax.jit(jax.grad(loss, argnums))
    analysis = step.lower(q, bias).compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

  assert used((0, 1)) - used((0,)) >= bias.nbytes


def test_remat_policy_keeps_output_and_lse():
  q = jnp.ones((1, 512, 4, 16))
  names = ("attention_out", "attention_lse")

  def exponentials(policy):
    @functools.partial(jax.checkpoint, policy=policy)
    def block(q):
      return jnp.sin(ops.attention(q, q, q, causal=True, implementation="xla"))

    loss = lambda q: jnp.sum(block(q))
    program = jax.jit(jax.value_and_grad(loss)).lower(q)
    return program.as_text().count("stablehlo.exponential ")

  # Two in the forward loop, one in the backward loop.
  kept = exponentials(checkpoint_policies.save_only_these_names(*names))
  assert kept == 3
  assert exponentials(checkpoint_policies.nothing_saveable) == 5


@pytest.mark.parametrize("implementation", ["xla", "loop"], indirect=True)
def test_vmap(implementation):
  rng = np.random.default_rng(3)
  draw32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  args = dict(
    q=draw32(3, B, 9, N, H),
    k=draw32(3, B, 14, 2, H),
    v=draw32(3, B, 14, 2, HV),
    bias=draw32(3, N, 1, 14),
    mask=jnp.asarray(random_mask(3, B, 1, 1, 14)),
    q_offset=jnp.array([[0, 3], [5, -4], [2, 30]]),
  )

  def loss(args):
    out, lse = ops.attention(
      **args,
      causal=True,
      window=(6, None),
      return_lse=True,
      implementation=implementation,
    )
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse > -1e9, lse, 0))

  split = {name: args.pop(name) for name in ("mask", "q_offset")}
  both = lambda a, s: jax.value_and_grad(lambda a: loss({**a, **s}))(a)
  quick_jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
  got = quick_jit(jax.vmap(both))(args, split)
  both = quick_jit(both)
  for item in range(3):
    at = lambda tree, item=item: jax.tree.map(lambda x: x[item], tree)
    for a, b in zip(
      jax.tree.leaves(at(got)),
      jax.tree.leaves(both(at(args), at(split))),
      strict=True,
    ):
      np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
  "implementation, T, kv_heads, check_vma",
  [
    ("loop", 9, 4, True),
    ("loop", 9, 1, True),
    ("loop", 9, 1, False),
    ("xla", 40, 1, True),
    ("xla", 1, 4, True),  # Few rows.
    ("xla", 1, 1, False),
    ("reference", 9, 1, True),
  ],
  indirect=["implementation"],
)
def test_shard_map(T, kv_heads, check_vma, implementation):
  mesh = jax.make_mesh(
    (2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
  )
  P = PartitionSpec
  heads = P("data", None, "tensor")
  arrays, _, _ = draw(T, 14, batch=4, kv_heads=kv_heads)
  args = {n: jnp.asarray(x, jnp.float32) for n, x in arrays.items()}
  args["bias"] = jnp.asarray(random_bias(1, N, 1, 14), jnp.float32)
  specs = dict.fromkeys("qkv", heads) | {"bias": P(None, "tensor")}
  if kv_heads == 1:
    specs["k"] = specs["v"] = P("data")
  ids = {
    "q_segment_ids": jnp.zeros((4, T), int),
    "kv_segment_ids": jnp.arange(56).reshape(4, 14) % 2,
    "q_offset": jnp.array([13, 9, 11, 12]),
  }
  id_specs = dict.fromkeys(ids, P("data"))

  def attend(args, ids):
    out, lse = ops.attention(
      **args, **ids, causal=True, return_lse=True, implementation=implementation
    )
    return jnp.sin(out), lse

  sharded = jax.shard_map(
    attend,
    mesh=mesh,
    in_specs=(specs, id_specs),
    out_specs=(heads, P("data", "tensor")),
    check_vma=check_vma,
  )

  def loss(f, args):
    out, lse = f(args, ids)
    return jnp.sum(out * out) + jnp.sum(jnp.where(lse > -1e9, lse, 0))

  quick_jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
  got = quick_jit(jax.value_and_grad(functools.partial(loss, sharded)))(args)
  want = quick_jit(jax.value_and_grad(functools.partial(loss, attend)))(args)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-6)


@pytest.mark.parametrize("T, S", [(0, 5), (4, 0)])
def test_no_queries_or_no_keys(T, S):
  q, k = jnp.ones((2, T, 4, 8)), jnp.ones((2, S, 2, 8))
  out, lse = ops.attention(q, k, k, causal=True, return_lse=True)
  assert out.shape == (2, T, 4, 8)
  assert (out == 0).all()
  assert lse.shape == (2, 4, T)
  assert (lse == -jnp.inf).all()


def zeros(*shape, dtype=jnp.float32):
  return jnp.zeros(shape, dtype)


GOOD = dict(q=zeros(2, 5, 4, 8), k=zeros(2, 7, 2, 8), v=zeros(2, 7, 2, 3))
INT = jnp.int32


@pytest.mark.parametrize(
  "error, text, change",
  [
    (
      ValueError,
      "takes q .B, T, N, H.*got q .2, 5, 8.",
      dict(q=zeros(2, 5, 8)),
    ),
    (ValueError, "batch sizes differ.*k .3, 7", dict(k=zeros(3, 7, 2, 8))),
    (ValueError, "length S or heads K.*v .2, 6", dict(v=zeros(2, 6, 2, 3))),
    (ValueError, "head dim H", dict(k=zeros(2, 7, 2, 9))),
    (ValueError, "5 query heads.*2 key heads", dict(q=zeros(2, 5, 5, 8))),
    (
      TypeError,
      "one dtype.*k bfloat16",
      dict(k=zeros(2, 7, 2, 8).astype("bfloat16")),
    ),
    (TypeError, "one dtype", {n: GOOD[n].astype(int) for n in "qkv"}),
    (TypeError, "mask must be bool.*bias", dict(mask=zeros(5, 7))),
    (TypeError, "bias must be floating", dict(bias=zeros(5, 7, dtype=bool))),
    (
      ValueError,
      r"mask \[2, 7\] does not.*\[2, 4, 5, 7\]",
      dict(mask=zeros(2, 7, dtype=bool)),
    ),
    (ValueError, "bias .1, 2, 1, 1. does not", dict(bias=zeros(1, 2, 1, 1))),
    (ValueError, "bias .* does not", dict(bias=zeros(1, 1, 1, 1, 1))),
    (TypeError, "q_offset must be an integer", dict(q_offset=1.5)),
    (ValueError, "q_offset must.*B. = .2.", dict(q_offset=zeros(5, dtype=INT))),
    (ValueError, "window must be .left, right.", dict(window=4)),
    (ValueError, "window must be", dict(window=(-1, 0))),
    (ValueError, "window must be", dict(window=(1, 2, 3))),
    (ValueError, "softcap must be positive", dict(softcap=0.0)),
    (ValueError, "scale must be finite", dict(scale=math.inf)),
    (
      ValueError,
      "only q_segment_ids",
      dict(q_segment_ids=zeros(2, 5, dtype=INT)),
    ),
    (
      ValueError,
      "kv_segment_ids must have shape .B, S. = .2, 7.",
      {n: zeros(2, 5, dtype=INT) for n in ("q_segment_ids", "kv_segment_ids")},
    ),
    (
      TypeError,
      "q_segment_ids must be integers",
      dict(q_segment_ids=zeros(2, 5), kv_segment_ids=zeros(2, 7, dtype=INT)),
    ),
    (ValueError, "unknown implementation 'xl'", dict(implementation="xl")),
  ],
)
def test_border(error, text, change):
  with pytest.raises(error, match=text):
    ops.attention(**{**GOOD, **change})


def test_border_lets_the_good_pass():
  assert ops.attention(**GOOD).shape == (2, 5, 4, 3)


def test_traced_scale_is_refused():
  f = jax.jit(lambda scale: ops.attention(**GOOD, scale=scale))
  with pytest.raises(TypeError, match="multiply q by it"):
    f(2.0)


class TestCudnn:
  """Its limits, and what it asks of jax.nn, on a GPU that is pretended."""

  @pytest.fixture
  def gpu(self, monkeypatch):
    class Client:
      platform_version = "cuda 13000"

    class Device:
      client = Client
      device_kind = "pretended"
      compute_capability = "9.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *args: [Device])
    return Device

  def inputs(self, T=8, S=8, H=16, Hv=16, dtype="bfloat16"):
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return dict(q=make(2, T, 4, H), k=make(2, S, 2, H), v=make(2, S, 2, Hv))

  @pytest.mark.parametrize(
    "text, shape, options",
    [
      (None, {}, {}),
      (None, dict(T=4, S=6), {}),
      (None, {}, dict(causal=True)),
      (None, dict(T=6), dict(causal=True, q_offset=9)),
      (None, {}, dict(causal=True, window=(3, None))),
      (None, {}, dict(window=(3, 0))),
      (None, {}, dict(window=(7, 7))),
      (None, dict(T=6), dict(causal=True, q_offset=0)),
      (None, dict(T=6), dict(q_offset=3)),
      (None, {}, dict(bias=zeros(4, 8, 8, dtype="bfloat16"))),
      ("float32", dict(dtype="float32"), {}),
      ("multiple of 8 and at most 256", dict(H=20, Hv=20), {}),
      ("at most 256", dict(H=264, Hv=264), {}),
      ("H=16 and Hv=8", dict(Hv=8), {}),
      ("lse", {}, dict(return_lse=True)),
      ("softcap", {}, dict(softcap=3.0)),
      ("mask empties", {}, dict(mask=zeros(8, 8, dtype=bool))),
      (
        "segment",
        {},
        dict(
          q_segment_ids=zeros(2, 8, dtype=INT),
          kv_segment_ids=zeros(2, 8, dtype=INT),
        ),
      ),
      ("this one is float32", {}, dict(bias=zeros(8, 8))),
      ("full axes T and S", {}, dict(bias=zeros(1, 8, dtype="bfloat16"))),
      ("even lengths", dict(T=7), {}),
      ("even lengths", dict(S=9), {}),
      (
        "bias together with a window",
        {},
        dict(bias=zeros(8, 8, dtype="bfloat16"), causal=True, window=(2, None)),
      ),
      ("right side of 0", {}, dict(window=(3, None))),
      ("right side of 0", {}, dict(window=(3, 2))),
      ("q_offset 0 only", dict(T=6), dict(causal=True)),
      (
        "known while tracing",
        {},
        dict(causal=True, q_offset=zeros(2, dtype=INT)),
      ),
      ("T <= S", dict(T=10), dict(causal=True, window=(2, None), q_offset=0)),
    ],
  )
  def test_limits(self, text, shape, options, gpu):
    said = ops.describe("attention", **self.inputs(**shape), **options)
    reason = said.reasons["cudnn"]
    if text is None:
      assert reason is None
      assert said.chosen == "cudnn"
    else:
      assert text in reason
      assert said.chosen == "xla"

  def test_limits_of_devices(self, gpu):
    reason = lambda **shape: ops.describe(
      "attention", **self.inputs(**shape)
    ).reasons["cudnn"]
    gpu.compute_capability = "8.6"
    assert reason() is None
    assert "at most 128" in reason(H=136, Hv=136)
    gpu.compute_capability = "7.5"
    assert "compute capability 8.0" in reason()
    gpu.client.platform_version = "rocm 60000"
    assert "NVIDIA" in reason()

  @pytest.mark.parametrize(
    "shape, options",
    [
      ({}, {}),
      (dict(T=4, S=6), {}),
      ({}, dict(causal=True)),
      (dict(T=6), dict(causal=True, q_offset=9)),
      ({}, dict(causal=True, window=(3, None), scale=0.7)),
      ({}, dict(window=(3, 0))),
      (dict(T=6), dict(causal=True, q_offset=0)),
      (dict(T=10), dict(causal=True, q_offset=0)),
      ({}, dict(causal=True, bias=random_bias(4, 8, 8))),
    ],
  )
  def test_asks_for_the_same_attention(self, shape, options, gpu, monkeypatch):
    asked = []
    original = jax.nn.dot_product_attention

    def answer(*args, implementation, **kwargs):
      asked.append(implementation)
      return original(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    inputs = self.inputs(**shape)
    if "bias" in options:
      options = {**options, "bias": jnp.asarray(options["bias"], "bfloat16")}

    def attend(implementation):
      attention = functools.partial(
        ops.attention, **options, implementation=implementation
      )
      return jax.jit(attention, compiler_options=QUICK_COMPILE)(**inputs)

    got = attend(None)
    assert asked == ["cudnn"]
    want = attend("reference")
    np.testing.assert_allclose(
      np.asarray(got, np.float32), np.asarray(want, np.float32), atol=3e-2
    )
