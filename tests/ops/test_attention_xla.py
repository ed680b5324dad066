"""What ops.attention promises of the way `xla` works: time, memory, mapping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import AxisType, PartitionSpec

from multihead import ops
from multihead.ops.attention import positions, xla
from tests.ops.attention_cases import QUICK_COMPILE, draw, oracle

B, N, H, HV = 2, 4, 6, 5


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


def causal_window(i, j):
  return (j <= i) & (i - j <= 20)


def packed(i, j):
  return (i >= 25) == (j >= 25)


PACKED = jnp.arange(64)[None] >= 25
SKIPS = {
  # name: arrays of the call, its other options, what a row sees
  "static": ({}, dict(causal=True, window=(20, None)), causal_window),
  "traced offset": (
    dict(q_offset=jnp.zeros((1,), int)),
    dict(causal=True, window=(20, None)),
    causal_window,
  ),
  "lengths": (
    dict(kv_lengths=jnp.array([33])),
    dict(causal=True),
    lambda i, j: (j <= i) & (j < 33),
  ),
  "documents": (
    dict(q_segment_ids=PACKED * 7, kv_segment_ids=PACKED * 7),
    {},
    packed,
  ),
  "causal documents": (
    dict(q_segment_ids=PACKED * 7, kv_segment_ids=PACKED * 7),
    dict(causal=True),
    lambda i, j: packed(i, j) & (j <= i),
  ),
}


@pytest.mark.parametrize("name", SKIPS)
def test_loops_visit_only_visible_tiles(name, monkeypatch):
  arrays, options, sees = SKIPS[name]
  visited = {"forward": [], "backward": []}

  def count(function, direction, at):
    original = getattr(xla, function)

    def counted(*args):
      rows, columns = args[at : at + 2]
      jax.debug.callback(
        lambda i, j: visited[direction].append((int(i), int(j))),
        rows[0],
        columns[0],
      )
      return original(*args)

    monkeypatch.setattr(xla, function, counted)

  count("_hidden_logits", "forward", 3)
  count("_add_tile", "backward", 3)
  monkeypatch.setattr(xla, "_is_one_tile", lambda heads, T, S: False)
  monkeypatch.setattr(xla, "_loop_sizes", lambda heads, T, S: (16, 16))
  q = jnp.ones((1, 64, 4, 4))

  def loss(q, arrays):
    return jnp.sum(
      ops.attention(q, q, q, **arrays, **options, implementation="xla")
    )

  jax.jit(jax.grad(loss))(q, arrays)
  jax.effects_barrier()
  seen = sees(np.arange(64)[:, None], np.arange(64))
  tiles = seen.reshape(4, 16, 4, 16).any(axis=(1, 3))
  want = [(16 * int(i), 16 * int(j)) for i, j in np.argwhere(tiles)]
  for direction, got in visited.items():
    assert sorted(got) == want, direction


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


@pytest.mark.parametrize("way", ["xla", "loop"], indirect=True)
def test_vmap(way):
  rng = np.random.default_rng(3)
  draw32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  args = dict(
    q=draw32(3, B, 9, N, H),
    k=draw32(3, B, 14, 2, H),
    v=draw32(3, B, 14, 2, HV),
    bias=draw32(3, N, 1, 14),
    mask=jnp.asarray(rng.random((3, B, 1, 1, 14)) < 0.6),
    q_offset=jnp.array([[0, 3], [5, -4], [2, 30]]),
    q_segment_ids=jnp.asarray(rng.integers(0, 2, (3, B, 9))),
    kv_segment_ids=jnp.asarray(rng.integers(0, 2, (3, B, 14))),
    kv_lengths=jnp.array([[14, 3], [0, 9], [10, 14]]),
    sinks=draw32(3, N),
    dropout_key=jax.random.split(jax.random.key(0), 3),
  )

  def loss(args):
    out, lse = ops.attention(
      **args,
      causal=True,
      window=(6, None),
      dropout_rate=0.2,
      return_lse=True,
      implementation=way,
    )
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse > -1e9, lse, 0))

  differentiable = ("q", "k", "v", "bias", "sinks")
  split = {n: args.pop(n) for n in list(args) if n not in differentiable}
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
  "way, T, kv_heads, check_vma",
  [
    ("loop", 9, 4, True),
    ("loop", 9, 1, True),
    ("loop", 9, 1, False),
    ("xla", 40, 1, True),
    ("xla", 1, 4, True),  # Few rows.
    ("xla", 1, 1, False),
    ("reference", 9, 1, True),
  ],
  indirect=["way"],
)
def test_shard_map(T, kv_heads, check_vma, way):
  mesh = jax.make_mesh(
    (2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
  )
  P = PartitionSpec
  heads = P("data", None, "tensor")
  arrays, _, _ = draw(T, 14, batch=4, kv_heads=kv_heads)
  args = {n: jnp.asarray(x, jnp.float32) for n, x in arrays.items()}
  args["bias"] = jnp.asarray(
    np.random.default_rng(8).normal(size=(1, N, 1, 14)), jnp.float32
  )
  args["sinks"] = jnp.arange(4.0)
  specs = dict.fromkeys("qkv", heads)
  specs |= {"bias": P(None, "tensor"), "sinks": P("tensor")}
  if kv_heads == 1:
    specs["k"] = specs["v"] = P("data")
  ids = {
    "q_segment_ids": jnp.zeros((4, T), int),
    "kv_segment_ids": jnp.arange(56).reshape(4, 14) % 2,
    "q_offset": jnp.array([13, 9, 11, 12]),
    "kv_lengths": jnp.array([14, 5, 0, 9]),
  }
  id_specs = dict.fromkeys(ids, P("data"))

  def attend(args, ids):
    out, lse = ops.attention(
      **args, **ids, causal=True, return_lse=True, implementation=way
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
