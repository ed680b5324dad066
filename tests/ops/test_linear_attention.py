"""ops.linear_attention against its sum over pairs of tokens, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from multihead import ops

B, N, H, HV = 2, 4, 5, 3
IMPLEMENTATIONS = ("xla", "reference")
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


def draw(T, kv_heads=2, *, decay=False, state=False, normalize=False, seed=0):
  """Float64 arrays of linear_attention by name."""
  rng = np.random.default_rng(seed)
  inputs = dict(
    q=rng.normal(size=(B, T, N, H)),
    k=rng.normal(size=(B, T, kv_heads, H)),
    v=rng.normal(size=(B, T, kv_heads, HV)),
  )
  if normalize:
    inputs["q"], inputs["k"] = np.exp(inputs["q"]), np.exp(inputs["k"])
  if decay:
    inputs["log_decay"] = -rng.exponential(size=(B, T, N))
  if state:
    inputs["initial_state"] = rng.random((B, N, H, HV + normalize))
  return inputs


def oracle(
  inputs, *, causal=True, normalize=False, segment_ids=None, scale=1.0
):
  """y and the final state, each a plain sum over pairs of tokens."""
  q, k, v = (inputs[name] for name in "qkv")
  batch, T, heads, _ = q.shape
  k, v = (np.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
  if normalize:
    v = np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)
  decay = inputs.get("log_decay", np.zeros((batch, T, heads)))
  start = inputs.get("initial_state", np.zeros((batch, heads, H, v.shape[-1])))
  if segment_ids is None:
    segment_ids = np.zeros((batch, T), int)
  y = np.zeros((batch, T, heads, v.shape[-1]))
  final = np.zeros_like(start, dtype=float)

  def state(b, t, n):
    unbroken = lambda s: (segment_ids[b, s : t + 1] == segment_ids[b, t]).all()
    total = np.zeros(start.shape[2:])
    for s in range(t + 1):
      if unbroken(s):
        weight = np.exp(decay[b, s + 1 : t + 1, n].sum())
        total += weight * np.outer(k[b, s, n], v[b, s, n])
    if unbroken(0):
      total += np.exp(decay[b, : t + 1, n].sum()) * start[b, n]
    return total

  for b, n in np.ndindex(batch, heads):
    final[b, n] = state(b, T - 1, n)
    for t in range(T):
      y[b, t, n] = q[b, t, n] @ (state(b, t, n) if causal else final[b, n])
  if normalize:
    y = y[..., :-1] / y[..., -1:]
  return scale * y, final


def evaluate(inputs, implementation, dtype, options, cotangents=None):
  """y, final state and (with cotangents) gradients by name."""
  segments = options.get("segment_ids")
  options = {k: x for k, x in options.items() if k != "segment_ids"}

  @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
  def both(inputs, segments, cotangents):
    def f(inputs):
      return ops.linear_attention(
        **inputs,
        segment_ids=segments,
        **options,
        return_final_state=True,
        implementation=implementation,
      )

    if cotangents is None:
      return f(inputs), None
    results, vjp = jax.vjp(f, inputs)
    return results, vjp(cotangents)[0]

  inputs = {name: jnp.asarray(x, dtype) for name, x in inputs.items()}
  if segments is not None:
    segments = jnp.asarray(segments)
  if cotangents is not None:
    y, state = cotangents
    state_dtype = jnp.promote_types(dtype, jnp.float32)
    cotangents = jnp.asarray(y, dtype), jnp.asarray(state, state_dtype)
  return both(inputs, segments, cotangents)


def segments(T):
  return np.stack([np.arange(T) // 5, np.arange(T) // 4 % 2])


CASES = {
  "plain": (21, dict(), dict()),
  "one token": (1, dict(decay=True, state=True), dict()),
  "shorter than a chunk": (5, dict(decay=True, state=True), dict(scale=0.3)),
  "whole chunks": (16, dict(decay=True), dict()),
  "state": (21, dict(state=True), dict()),
  "decay": (21, dict(decay=True, state=True), dict()),
  "normalized": (
    21,
    dict(decay=True, normalize=True),
    dict(normalize=True, scale=0.5),
  ),
  "normalized state": (
    13,
    dict(normalize=True, state=True),
    dict(normalize=True),
  ),
  "segments": (21, dict(state=True), dict(segment_ids=segments(21))),
  "one segment": (21, dict(state=True), dict(segment_ids=np.full((B, 21), 3))),
  "segments, everything": (
    22,
    dict(decay=True, state=True, normalize=True),
    dict(segment_ids=segments(22), normalize=True, scale=2.0),
  ),
  "not causal": (21, dict(), dict(causal=False)),
  "not causal, everything": (
    21,
    dict(state=True, normalize=True),
    dict(causal=False, normalize=True, scale=2.0),
  ),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(case, implementation):
  T, how, options = CASES[case]
  inputs = draw(T, **how)
  rng = np.random.default_rng(1)
  y, state = oracle(inputs, **options)
  cotangents = rng.normal(size=y.shape), rng.normal(size=state.shape)
  with jax.enable_x64(True):
    chunked = {**options, "chunk_size": 8}
    got, grads = evaluate(
      inputs, implementation, jnp.float64, chunked, cotangents
    )
  np.testing.assert_allclose(got[0], y, atol=1e-11)
  np.testing.assert_allclose(got[1], state, atol=1e-11)
  assert grads.keys() == inputs.keys()

  # The gradient of every input along one random direction.
  def moved(name, direction, step):
    y, state = oracle(
      {**inputs, name: inputs[name] + step * direction}, **options
    )
    return np.sum(y * cotangents[0]) + np.sum(state * cotangents[1])

  for name, grad in grads.items():
    direction = rng.normal(size=grad.shape)
    difference = moved(name, direction, 1e-5) - moved(name, direction, -1e-5)
    slope = np.sum(np.asarray(grad) * direction)
    np.testing.assert_allclose(
      slope, difference / 2e-5, rtol=1e-6, atol=1e-6, err_msg=name
    )


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_groups_of_heads(kv_heads):
  inputs = draw(11, kv_heads, decay=True)
  with jax.enable_x64(True):
    got, _ = evaluate(inputs, "xla", jnp.float64, dict(chunk_size=4))
  want = oracle(inputs)
  np.testing.assert_allclose(got[0], want[0], atol=1e-11)
  np.testing.assert_allclose(got[1], want[1], atol=1e-11)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  "dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.1)]
)
def test_narrow_dtypes(dtype, tolerance, implementation):
  inputs = draw(150, decay=True, state=True)
  rounded = {
    name: np.asarray(jnp.asarray(x, dtype), np.float64)
    for name, x in inputs.items()
  }
  (y, state), _ = evaluate(inputs, implementation, dtype, {})
  assert y.dtype == dtype
  assert state.dtype == jnp.float32
  want = oracle(rounded)
  np.testing.assert_allclose(y.astype(float), want[0], atol=tolerance)
  np.testing.assert_allclose(state, want[1], atol=tolerance)


@pytest.mark.parametrize("rate", [30.0, 1e4, np.inf])
def test_extreme_decays_stay_exact(rate):
  inputs = draw(260, decay=True)
  # Some tokens forget nearly nothing, among others that forget a lot.
  slow = np.arange(260)[:, None] % 7 > 2
  inputs["log_decay"] = np.where(slow, -0.01, -rate) * np.ones((B, 260, N))
  cotangents = np.ones((B, 260, N, HV)), np.ones((B, N, H, HV))
  got, grads = evaluate(inputs, "xla", jnp.float32, {}, cotangents)
  want, exact = evaluate(inputs, "reference", jnp.float32, {}, cotangents)
  size = np.abs(want[0]).max()
  np.testing.assert_allclose(got[0], want[0], atol=1e-6 * size)
  for name, grad in grads.items():
    assert np.isfinite(grad).all()
    size = max(1, np.abs(exact[name]).max())
    np.testing.assert_allclose(grad, exact[name], atol=5e-6 * size)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_state_continues_where_it_stopped(implementation):
  inputs = draw(20, decay=True, normalize=True)
  options = dict(normalize=True, chunk_size=8)
  whole, _ = evaluate(inputs, implementation, jnp.float32, options)
  part = lambda r: {name: x[:, r] for name, x in inputs.items()}
  first, _ = evaluate(part(np.r_[:13]), implementation, jnp.float32, options)
  rest = {**part(np.r_[13:20]), "initial_state": first[1]}
  second, _ = evaluate(rest, implementation, jnp.float32, options)
  y = np.concatenate([first[0], second[0]], axis=1)
  np.testing.assert_allclose(y, whole[0], atol=1e-5)
  np.testing.assert_allclose(second[1], whole[1], rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sum_of_weights_of_zero_gives_zero(implementation):
  inputs = draw(9, normalize=True)
  inputs["k"][:, :4] = 0
  cotangents = np.ones((B, 9, N, HV)), np.ones((B, N, H, HV + 1))
  options = dict(normalize=True, chunk_size=4)
  got, grads = evaluate(
    inputs, implementation, jnp.float32, options, cotangents
  )
  assert (got[0][:, :4] == 0).all()
  assert (got[0][:, 4:] != 0).all()
  assert all(np.isfinite(grad).all() for grad in grads.values())


def test_memory_holds_no_state_per_token():
  T, width = 8192, 64
  x = jax.ShapeDtypeStruct((1, T, 1, width), jnp.float32)

  def used(implementation):
    def loss(q, k, v):
      y = ops.linear_attention(q, k, v, implementation=implementation)
      return jnp.sum(y * y)

    step = jax.jit(jax.grad(loss, (0, 1, 2)))
    return step.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

  states = 4 * T * width * width
  assert used("xla") < states / 4
  assert used("reference") > states


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma, implementation):
  mesh = jax.make_mesh(
    (2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
  )
  P = PartitionSpec
  heads = P("data", None, "tensor")
  # One key head, on every shard; its gradient is a sum over them.
  inputs = draw(20, 1, decay=True)
  inputs = {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}
  specs = dict(q=heads, k=P("data"), v=P("data"), log_decay=heads)

  def attend(inputs):
    return ops.linear_attention(
      **inputs,
      chunk_size=8,
      return_final_state=True,
      implementation=implementation,
    )

  sharded = jax.shard_map(
    attend,
    mesh=mesh,
    in_specs=(specs,),
    out_specs=(heads, P("data", "tensor")),
    check_vma=check_vma,
  )
  loss = lambda f, x: sum(jnp.sum(jnp.sin(y)) for y in f(x))
  value = lambda f: jax.value_and_grad(functools.partial(loss, f))
  got = jax.jit(value(sharded), compiler_options=QUICK_COMPILE)(inputs)
  want = jax.jit(value(attend), compiler_options=QUICK_COMPILE)(inputs)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=3e-4)


def zeros(*shape, dtype=jnp.float32):
  return jnp.zeros(shape, dtype)


GOOD = dict(q=zeros(2, 5, 4, 8), k=zeros(2, 5, 2, 8), v=zeros(2, 5, 2, 3))


@pytest.mark.parametrize(
  "error, text, change",
  [
    (ValueError, "takes q .B, T, N, H.", dict(q=zeros(2, 5, 8))),
    (ValueError, "lengths differ: .*k .2, 6", dict(k=zeros(2, 6, 2, 8))),
    (ValueError, "heads K", dict(v=zeros(2, 5, 1, 3))),
    (ValueError, "head dim H", dict(k=zeros(2, 5, 2, 9))),
    (ValueError, "3 query heads.*2 key heads", dict(q=zeros(2, 5, 3, 8))),
    (TypeError, "one dtype", dict(v=zeros(2, 5, 2, 3, dtype=jnp.bfloat16))),
    (ValueError, "log_decay must.*B, T, N", dict(log_decay=zeros(2, 5))),
    (
      ValueError,
      "log_decay needs causal",
      dict(log_decay=zeros(2, 5, 4), causal=False),
    ),
    (
      ValueError,
      "segment_ids needs causal",
      dict(segment_ids=zeros(2, 5, dtype=jnp.int32), causal=False),
    ),
    (TypeError, "segment_ids must be integer", dict(segment_ids=zeros(2, 5))),
    (
      ValueError,
      r"initial_state must.*Hv \+ 1. = .2, 4, 8, 4.",
      dict(initial_state=zeros(2, 4, 8, 3), normalize=True),
    ),
    (ValueError, "chunk_size", dict(chunk_size=0)),
    (ValueError, "scale must be finite", dict(scale=float("nan"))),
    (ValueError, "unknown implementation", dict(implementation="cudnn")),
  ],
)
def test_border(error, text, change):
  with pytest.raises(error, match=text):
    ops.linear_attention(**{**GOOD, **change})
