"""ops.ssd against the recurrence and its adjoint, written out in float64."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from multihead.ops.dispatch import describe
from multihead.ops.ssd import chunk_math, ssd, ssd_step, xla

IMPLEMENTATIONS = ("xla", "reference")
BATCH, HEADS, WIDTH, STATE = 2, 6, 3, 5
ARRAYS = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


def make_inputs(length, groups, *, seed=0, bias=True, state=True):
  """Float64 arrays of ssd by name; dt already positive if there is no bias."""
  draw = np.random.default_rng(seed).normal
  inputs = dict(
    x=draw(size=(BATCH, length, HEADS, WIDTH)),
    dt=draw(size=(BATCH, length, HEADS)),
    A=-np.exp(draw(size=HEADS)),
    B=draw(size=(BATCH, length, groups, STATE)),
    C=draw(size=(BATCH, length, groups, STATE)),
    D=draw(size=HEADS),
  )
  if bias:
    inputs["dt_bias"] = draw(size=HEADS) - 1
  else:
    inputs["dt"] = np.exp(inputs["dt"] - 1.5)
  if state:
    inputs["initial_state"] = draw(size=(BATCH, HEADS, WIDTH, STATE))
  return inputs


def oracle(
  inputs, cotangents, *, segment_ids=None, dt_limit=(0, np.inf), softplus=False
):
  """Returns (y, final state) and the gradients by name, in float64."""
  inputs = {k: np.asarray(v, np.float64) for k, v in inputs.items()}
  x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
  batch, length, heads, width = x.shape
  groups, size = B.shape[2:]
  D = inputs.get("D", np.zeros(heads))
  raw = dt + inputs.get("dt_bias", 0)
  positive = np.logaddexp(raw, 0) if softplus else raw
  dt = np.clip(positive, *dt_limit)
  slope = (positive > dt_limit[0]) & (positive < dt_limit[1])
  slope = slope / (1 + np.exp(-raw)) if softplus else slope * 1.0
  B, C = (np.repeat(v, heads // groups, axis=2) for v in (B, C))
  decay = np.exp(dt * A)
  states = np.zeros((length + 1, batch, heads, width, size))
  states[0] = inputs.get("initial_state", 0)
  fresh = np.zeros((batch, length), bool)
  if segment_ids is not None:
    fresh[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
  y = np.zeros_like(x)
  for t in range(length):
    old = np.where(fresh[:, t, None, None, None], 0, states[t])
    new = np.einsum("bnh,bnm,bn->bnhm", x[:, t], B[:, t], dt[:, t])
    states[t + 1] = decay[:, t, :, None, None] * old + new
    y[:, t] = np.einsum("bnhm,bnm->bnh", states[t + 1], C[:, t])
    y[:, t] += D[:, None] * x[:, t]

  dy, d_state = (np.asarray(v, np.float64) for v in cotangents)
  d_x, d_dt = D[:, None] * dy, np.zeros_like(dt)
  d_B, d_C, d_A = np.zeros_like(B), np.zeros_like(C), np.zeros(heads)
  for t in reversed(range(length)):
    d_C[:, t] = np.einsum("bnhm,bnh->bnm", states[t + 1], dy[:, t])
    d_state = d_state + np.einsum("bnh,bnm->bnhm", dy[:, t], C[:, t])
    into_x = np.einsum("bnhm,bnm->bnh", d_state, B[:, t])
    d_x[:, t] += dt[:, t, :, None] * into_x
    d_B[:, t] = np.einsum("bnhm,bnh,bn->bnm", d_state, x[:, t], dt[:, t])
    old = np.where(fresh[:, t, None, None, None], 0, states[t])
    d_a = decay[:, t] * np.einsum("bnhm,bnhm->bn", d_state, old)
    d_A += (d_a * dt[:, t]).sum(0)
    d_dt[:, t] = d_a * A + np.einsum("bnh,bnh->bn", into_x, x[:, t])
    d_state = decay[:, t, :, None, None] * d_state
    d_state = np.where(fresh[:, t, None, None, None], 0, d_state)
  d_dt *= slope

  def to_groups(v):
    return v.reshape(batch, length, groups, heads // groups, size).sum(3)

  gradients = dict(
    x=d_x,
    dt=d_dt,
    A=d_A,
    B=to_groups(d_B),
    C=to_groups(d_C),
    D=np.einsum("btnh,btnh->n", dy, x),
    dt_bias=d_dt.sum((0, 1)),
    initial_state=d_state,
  )
  return (y, states[-1]), {k: v for k, v in gradients.items() if k in inputs}


def make_cotangents(inputs, seed=1):
  draw = np.random.default_rng(seed).normal
  batch, _, heads, width = inputs["x"].shape
  size = inputs["B"].shape[-1]
  return draw(size=inputs["x"].shape), draw(size=(batch, heads, width, size))


def value_and_gradients(inputs, cotangents, **options):
  """(y, final state) of the operation, and its gradients by name."""

  @jax.jit
  def run(inputs, cotangents):
    call = functools.partial(ssd, return_final_state=True, **options)
    out, pull = jax.vjp(lambda inputs: call(**inputs), inputs)
    return out, pull(
      jax.tree.map(lambda c, o: c.astype(o.dtype), cotangents, out)
    )[0]

  return run(inputs, cotangents)


def assert_close(actual, wanted, tolerance, name=""):
  """Every difference is small beside the largest value wanted."""
  actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted)
  assert actual.shape == wanted.shape, name
  assert np.isfinite(actual).all(), name
  scale = np.abs(wanted).max() + 1e-30
  worst = np.abs(actual - wanted).max() / scale
  assert worst <= tolerance, f"{name}: {worst:.2e} of {scale:.2e}"


def check(inputs, implementation, tolerance, *, segment_ids=None, **options):
  """Values and all gradients against the oracle."""
  cotangents = make_cotangents(inputs)
  wanted, gradients = oracle(
    inputs,
    cotangents,
    segment_ids=segment_ids,
    dt_limit=options.get("dt_limit", (0, np.inf)),
    softplus=options.get("dt_softplus", False),
  )
  cast = functools.partial(jax.tree.map, lambda v: jnp.asarray(v, jnp.float32))
  ids = None if segment_ids is None else jnp.asarray(segment_ids)
  (y, state), actual = value_and_gradients(
    cast(inputs),
    cast(cotangents),
    implementation=implementation,
    segment_ids=ids,
    **options,
  )
  assert_close(y, wanted[0], tolerance, "y")
  assert_close(state, wanted[1], tolerance, "final state")
  assert actual.keys() == gradients.keys()
  for name in gradients:
    assert_close(actual[name], gradients[name], tolerance, f"d{name}")


def segments(length, borders):
  """[BATCH, length] ids; the second row's borders are one token later.

  Ids come back after a while: only a change of id makes a border.
  """
  ids = np.zeros((BATCH, length), np.int32)
  for row in range(BATCH):
    for border in borders:
      ids[row, min(border + row, length) :] += 1
  return ids % 3


def test_the_oracles_gradients_are_finite_differences():
  inputs = make_inputs(7, 2)
  ids = segments(7, (2, 3))
  cotangents = make_cotangents(inputs)
  options = dict(segment_ids=ids, dt_limit=(0.1, 1.5), softplus=True)

  def loss(inputs):
    out, _ = oracle(inputs, cotangents, **options)
    return sum((c * o).sum() for c, o in zip(cotangents, out, strict=True))

  _, gradients = oracle(inputs, cotangents, **options)
  draw = np.random.default_rng(2).normal
  for name in inputs:
    way = draw(size=inputs[name].shape)
    ahead = loss({**inputs, name: inputs[name] + 1e-6 * way})
    behind = loss({**inputs, name: inputs[name] - 1e-6 * way})
    slope = (gradients[name] * way).sum()
    np.testing.assert_allclose((ahead - behind) / 2e-6, slope, rtol=1e-6)


CASES = {
  "one token": dict(length=1, groups=1),
  "one token, nothing optional": dict(length=1, groups=6, plain=True),
  "single-token segments": dict(length=5, groups=2, borders=(1, 2, 3)),
  "one less than a chunk, softplus": dict(
    length=127, groups=6, options=dict(dt_softplus=True)
  ),
  "segments end at chunk edges": dict(
    length=128, groups=1, borders=(32, 64, 65, 95), options=dict(chunk_size=32)
  ),
  "129 tokens, limits": dict(
    length=129,
    groups=2,
    options=dict(dt_softplus=True, dt_limit=(0.2, 0.8)),
  ),
  "long, segments": dict(
    length=300,
    groups=1,
    borders=(3, 128, 129, 256),
    options=dict(chunk_size=48),
  ),
  "several chunks, nothing optional": dict(length=300, groups=2, plain=True),
}


@pytest.mark.parametrize(
  "implementation, case",
  [("xla", case) for case in CASES]
  + [("reference", case) for case in CASES if "chunk" not in case],
)
def test_values_and_gradients(implementation, case):
  case = CASES[case]
  length, plain = case["length"], case.get("plain", False)
  inputs = make_inputs(length, case["groups"], bias=not plain, state=not plain)
  options = case.get("options", {})
  if plain:
    del inputs["D"]
  elif not options.get("dt_softplus"):
    # The bias then moves dt directly: keep most of it positive.
    inputs["dt"] = np.abs(inputs["dt"])
    inputs["dt_bias"] = np.abs(inputs["dt_bias"]) - 0.3
  ids = segments(length, case["borders"]) if "borders" in case else None
  check(inputs, implementation, 2e-5, segment_ids=ids, **options)


@pytest.mark.parametrize(
  "cpu, elements, chunks", ((True, 6000, 6), (False, 2200, 2), (False, 9000, 9))
)
def test_loop_over_steps(monkeypatch, cpu, elements, chunks):
  """Several steps of several chunks, in the forms of either kind of device."""
  monkeypatch.setattr(xla, "_on_cpu", lambda: cpu)
  monkeypatch.setattr(xla, "_STEP_ELEMENTS", elements)
  monkeypatch.setattr(xla, "_STEP_ELEMENTS_CPU", elements)
  inputs = make_inputs(203, 2)
  plan = xla._plan(inputs["x"], STATE, 8)
  assert plan.steps > 1 and plan.chunks == chunks
  ids = segments(203, (1, 16, 40, 112, 150))
  options = dict(dt_softplus=True, chunk_size=8)
  check(inputs, "xla", 2e-5, segment_ids=ids, **options)


def test_chunk_size_changes_nothing():
  inputs = make_inputs(150, 2, bias=False)
  ids = segments(150, (10, 64, 100))
  wanted = oracle(inputs, make_cotangents(inputs), segment_ids=ids)[0]
  inputs = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
  for chunk_size in (1, 7, 1000):
    out = jax.jit(
      functools.partial(
        ssd,
        chunk_size=chunk_size,
        segment_ids=jnp.asarray(ids),
        return_final_state=True,
      )
    )(**inputs)
    for actual, want in zip(out, wanted, strict=True):
      assert_close(actual, want, 5e-6, f"chunk {chunk_size}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64(implementation):
  inputs = make_inputs(40, 2)
  cotangents = make_cotangents(inputs)
  wanted, gradients = oracle(inputs, cotangents, softplus=True)
  with jax.enable_x64(True):
    out, actual = value_and_gradients(
      inputs,
      cotangents,
      dt_softplus=True,
      chunk_size=16,
      implementation=implementation,
    )
    assert all(v.dtype == jnp.float64 for v in (*out, *actual.values()))
    assert_close(out[0], wanted[0], 1e-13)
    assert_close(out[1], wanted[1], 1e-13)
    for name in gradients:
      assert_close(actual[name], gradients[name], 1e-12, name)


@pytest.mark.parametrize("log_decay", (-1e-6, -50, -1e4, "mixed"))
def test_extreme_decays(log_decay):
  """Neither a long memory nor a state that dies at once loses accuracy."""
  inputs = make_inputs(96, 2, bias=False)
  inputs["A"] = -np.ones(HEADS)
  if log_decay == "mixed":
    # A few tokens wipe the state, which then lasts: the sum of the logarithms
    # is near -1e5 where single ones of 1e-3 decide.
    inputs["dt"][:] = 1e-3
    inputs["dt"][:, 5:90:8] = 1e4
    inputs["B"][:, 5:90:8] *= 1e-4
  else:
    # Keep dt B of order 1, so that all gradients matter.
    inputs["dt"][:] = -log_decay
    inputs["B"] /= -log_decay
  check(inputs, "xla", 1e-5)


def test_decays_that_grow():
  inputs = make_inputs(64, 2, bias=False)
  inputs["A"] = np.linspace(-0.1, 0.1, HEADS)
  check(inputs, "xla", 2e-5, chunk_size=32)


def test_gradients_of_dead_states_are_exact():
  """With a = -1e4 nothing crosses a token: da is zero, not rounding noise."""
  inputs = make_inputs(64, 1, bias=False, state=False)
  inputs["A"] = np.full(HEADS, -1e4)
  inputs["dt"][:] = 1
  cast = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
  cotangents = jax.tree.map(jnp.float32, make_cotangents(inputs))
  _, gradients = value_and_gradients(cast, cotangents)
  np.testing.assert_array_equal(gradients["A"], 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_segments_do_not_leak_a_bit(implementation):
  """What came before a border changes no bit after it, however large."""
  length, border = 80, 37
  inputs = make_inputs(length, 2, bias=False)
  inputs = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
  ids = jnp.broadcast_to(jnp.arange(length) >= border, (BATCH, length))
  run = jax.jit(
    functools.partial(
      ssd,
      segment_ids=ids.astype(jnp.int32),
      chunk_size=16,
      return_final_state=True,
      implementation=implementation,
    )
  )
  y, state = run(**inputs)
  other = {**inputs, "initial_state": 1e20 * inputs["initial_state"]}
  for name in ("x", "B"):
    other[name] = other[name].at[:, :border].multiply(1e8)
  other_y, other_state = run(**other)
  np.testing.assert_array_equal(y[:, border:], other_y[:, border:])
  np.testing.assert_array_equal(state, other_state)
  assert (np.abs(other_y[:, :border]) > 1e6).any()
  alone, last = ssd(
    **{
      k: v[:, border:] if k in ("x", "dt", "B", "C") else v
      for k, v in inputs.items()
      if k != "initial_state"
    },
    return_final_state=True,
  )
  assert_close(y[:, border:], alone, 2e-6)
  assert_close(state, last, 2e-6)


def test_continues_from_a_state_and_steps():
  inputs = make_inputs(50, 2)
  inputs = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
  options = dict(dt_softplus=True, dt_limit=(0.1, 1.0))
  run = jax.jit(functools.partial(ssd, return_final_state=True, **options))
  y, final = run(**inputs)

  timed = ("x", "dt", "B", "C")
  first, state = run(
    **{k: v[:, :19] if k in timed else v for k, v in inputs.items()}
  )
  rest = {k: v[:, 19:] if k in timed else v for k, v in inputs.items()}
  second, state = run(**{**rest, "initial_state": state})
  assert_close(jnp.concatenate([first, second], 1), y, 3e-6)
  assert_close(state, final, 3e-6)

  state = inputs["initial_state"]
  step = jax.jit(functools.partial(ssd_step, **options))
  fixed = {k: inputs[k] for k in ("A", "D", "dt_bias")}
  for t in range(50):
    out, state = step(state, **{k: inputs[k][:, t] for k in timed}, **fixed)
    assert_close(out, y[:, t], 5e-6, f"token {t}")
  assert_close(state, final, 3e-6)


def test_step_keeps_the_dtypes_of_state_and_input():
  inputs = make_inputs(1, 2)
  x, dt, B, C = (
    jnp.asarray(inputs[k][:, 0], jnp.bfloat16) for k in ("x", "dt", "B", "C")
  )
  A = jnp.asarray(inputs["A"], jnp.float32)
  state = jnp.asarray(inputs["initial_state"], jnp.float32)
  y, new = ssd_step(state, x, dt, A, B, C, dt_softplus=True)
  assert (y.dtype, new.dtype) == (jnp.bfloat16, jnp.float32)
  _, new = ssd_step(state.astype(jnp.bfloat16), x, dt, A, B, C)
  assert new.dtype == jnp.bfloat16


@pytest.mark.parametrize("cpu", (True, False))
def test_bfloat16(monkeypatch, cpu):
  if not cpu:
    # The rounding of an accelerator, with products that a CPU can run.
    dot = chunk_math._dot

    def dot_in_float32(a, b, *args, **kwargs):
      return dot(a.astype(jnp.float32), b.astype(jnp.float32), *args, **kwargs)

    monkeypatch.setattr(xla, "_on_cpu", lambda: False)
    monkeypatch.setattr(chunk_math, "_dot", dot_in_float32)
  inputs = make_inputs(200, 2)
  low = {"x", "B", "C"}
  cast = {
    k: jnp.asarray(v, jnp.bfloat16 if k in low else jnp.float32)
    for k, v in inputs.items()
  }
  dy, d_state = make_cotangents(inputs)
  cotangents = jnp.asarray(dy, jnp.bfloat16), jnp.asarray(d_state, jnp.float32)
  (y, state), gradients = value_and_gradients(
    cast, cotangents, dt_softplus=True
  )
  assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
  assert all(g.dtype == cast[k].dtype for k, g in gradients.items())
  rounded = {k: np.asarray(v, np.float64) for k, v in cast.items()}
  wanted, wanted_gradients = oracle(rounded, cotangents, softplus=True)
  assert_close(y, wanted[0], 1e-2)
  assert_close(state, wanted[1], 1e-2)
  for name, gradient in gradients.items():
    assert_close(gradient, wanted_gradients[name], 1e-2, name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inside_shard_map(implementation):
  """Parameters that every shard holds get the gradient of all shards."""
  length = 70
  inputs = make_inputs(length, 1)
  inputs = {
    k: jnp.asarray(np.tile(v, (4,) + (1,) * (v.ndim - 1)), jnp.float32)
    if v.shape[0] == BATCH
    else jnp.asarray(v, jnp.float32)
    for k, v in inputs.items()
  }
  ids = jnp.asarray(np.tile(segments(length, (5, 32, 60)), (4, 1)))
  state = inputs.pop("initial_state")
  heads = PartitionSpec("tensor")
  specs = dict(
    x=PartitionSpec("data", None, "tensor"),
    dt=PartitionSpec("data", None, "tensor"),
    A=heads,
    B=PartitionSpec("data"),
    C=PartitionSpec("data"),
    D=heads,
    dt_bias=heads,
  )

  def gradients(call, extra):
    def loss(inputs):
      y, final = call(inputs, extra)
      return jnp.sum(y * weight) + jnp.sum(final**2)

    return jax.jit(jax.value_and_grad(loss))(inputs)

  def call(inputs, extra):
    ids, state = extra or (None, None)
    return ssd(
      **inputs,
      dt_softplus=True,
      chunk_size=16,
      segment_ids=ids,
      initial_state=state,
      return_final_state=True,
      implementation=implementation,
    )

  weight = jnp.cos(jnp.arange(inputs["x"].size, dtype=jnp.float32))
  weight = weight.reshape(inputs["x"].shape)
  mesh = jax.make_mesh(
    (4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
  )
  out_specs = (specs["x"], PartitionSpec("data", "tensor"))
  for extra in ((), (ids, state)):
    extra_specs = (PartitionSpec("data"), out_specs[1])[: len(extra)]
    wanted = gradients(call, extra)
    with jax.set_mesh(mesh):
      mapped = jax.shard_map(
        call, in_specs=(specs, extra_specs), out_specs=out_specs
      )
      actual = gradients(mapped, extra)
    np.testing.assert_allclose(actual[0], wanted[0], rtol=1e-5)
    for name in inputs:
      assert_close(actual[1][name], wanted[1][name], 1e-5, name)


def test_vmap_and_checkpoint():
  inputs = make_inputs(40, 2)
  inputs = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
  weight = jnp.asarray(make_cotangents(inputs)[0], jnp.float32)

  def loss(x, rest):
    y = ssd(x, **rest, dt_softplus=True, chunk_size=16)
    return jnp.sum(weight * y)

  rest = {k: v for k, v in inputs.items() if k != "x"}
  xs = jnp.stack([inputs["x"], -2 * inputs["x"]])
  plain = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  wanted = [plain(x, rest) for x in xs]
  mapped = jax.jit(jax.vmap(jax.checkpoint(plain), in_axes=(0, None)))(xs, rest)
  wanted = jax.tree.map(lambda *v: np.stack(v), *wanted)
  jax.tree.map(lambda a, w: assert_close(a, w, 1e-5), mapped, wanted)


def test_gradient_of_a_gradient():
  with jax.enable_x64(True):
    inputs = make_inputs(6, 1)
    x, rest = inputs["x"], {k: v for k, v in inputs.items() if k != "x"}

    def norm(dt, implementation):
      def loss(dt):
        options = dict(dt_softplus=True, implementation=implementation)
        return jnp.sum(ssd(x, **{**rest, "dt": dt}, **options) ** 2)

      return jnp.sum(jax.grad(loss)(dt) ** 2)

    actual, wanted = (
      jax.jit(jax.grad(functools.partial(norm, implementation=name)))(
        rest["dt"]
      )
      for name in IMPLEMENTATIONS
    )
    assert_close(actual, wanted, 1e-10)


@pytest.mark.parametrize("cpu", (True, False))
def test_memory_is_linear_and_small(monkeypatch, cpu):
  """T = 16384 forward and backward, far below a [B, T, N, H, M] array."""
  monkeypatch.setattr(xla, "_on_cpu", lambda: cpu)
  heads, width, size = 8, 64, 64

  def temporary(length):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    inputs = dict(
      x=shape((1, length, heads, width)),
      dt=shape((1, length, heads)),
      A=shape((heads,)),
      B=shape((1, length, 1, size)),
      C=shape((1, length, 1, size)),
      D=shape((heads,)),
    )
    grad = jax.grad(lambda inputs: jnp.sum(ssd(**inputs) ** 2))
    compiled = jax.jit(grad).lower(inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  used = temporary(16384)
  scan_inputs = 16384 * heads * width * 4
  assert used < (6 if cpu else 28) * scan_inputs
  assert used < scan_inputs * size / (10 if cpu else 2)
  if cpu:
    assert temporary(4096) < 0.3 * used


def test_describe():
  inputs = make_inputs(4, 1)
  text = str(describe(ssd, **inputs))
  assert "xla" in text and "reference" in text


BAD = {
  "x must be [B, T, N, H]": dict(x=(2, 4, 3)),
  "dt must be [B, T, N] = (2, 6, 6)": dict(dt=(2, 6, 3)),
  "A must be [N] = (6,)": dict(A=(3,)),
  "B must be [B, T, G, M]": dict(B=(2, 5, 2, 5), C=(2, 5, 2, 5)),
  "B and C must have one shape": dict(C=(2, 6, 1, 5)),
  "4 groups of B and C do not divide the 6 heads": dict(
    B=(2, 6, 4, 5), C=(2, 6, 4, 5)
  ),
  "D must be [N] = (6,)": dict(D=(1,)),
  "dt_bias must be [N] = (6,)": dict(dt_bias=(5,)),
  "initial_state must be [B, N, H, M] = (2, 6, 3, 5)": dict(
    initial_state=(2, 6, 5, 3)
  ),
  "segment_ids must be [B, T] = (2, 6)": dict(
    segment_ids=np.zeros((2, 7), np.int32)
  ),
  "segment_ids must be integers": dict(segment_ids=np.zeros((2, 6))),
  "chunk_size must be at least 1": dict(chunk_size=0),
  "dt_limit must be (smallest, largest)": dict(dt_limit=(1.0, 0.5)),
  "unknown implementation": dict(implementation="cuda"),
  "x must be a real floating point array": dict(x=np.zeros((2, 6, 6, 3), int)),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
  inputs = make_inputs(6, 2)
  options = {}
  for name, value in BAD[message].items():
    if name in ARRAYS and isinstance(value, tuple):
      value = np.zeros(value)
    (inputs if name in ARRAYS else options)[name] = value
  with pytest.raises((ValueError, TypeError)) as error:
    ssd(**inputs, **options)
  assert message in str(error.value)


@contextlib.contextmanager
def raises(message):
  with pytest.raises(ValueError) as error:
    yield
  assert message in str(error.value)


def test_step_errors_name_the_argument():
  inputs = make_inputs(6, 2)
  inputs = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
  state = inputs.pop("initial_state")
  now = {k: v[:, 0] if v.ndim > 2 else v for k, v in inputs.items()}
  ssd_step(state, **now)
  with raises("x must be [B, N, H]"):
    ssd_step(state, **inputs)
  with raises("state must be [B, N, H, M] = (2, 6, 3, 5)"):
    ssd_step(state[..., :2], **now)
  with raises("dt must be [B, N] = (2, 6)"):
    ssd_step(state, **{**now, "dt": now["dt"][:1]})
