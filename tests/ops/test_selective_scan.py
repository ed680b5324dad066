"""ops.selective_scan against the recurrence and its adjoint, in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from multihead.ops import selective_scan, selective_scan_step
from multihead.ops.dispatch import describe
from multihead.ops.selective_scan import api, xla

ARRAYS = "u delta A B C D z delta_bias initial_state".split()
TIMED = ("u", "delta", "B", "C", "z")
ANYWHERE = ("xla", "reference")
KERNELS = tuple(n for n in api._IMPLEMENTATIONS if n not in ANYWHERE)
BATCH, CHANNELS, STATE = 2, 6, 5


def on_gpu(test):
  skip = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU: make test-gpu"
  )
  return pytest.mark.gpu(skip(test))


def make_inputs(
  length, groups=2, *, channels=CHANNELS, state=STATE, seed=0, leave_out=()
):
  """Float64 arrays of selective_scan by name, without those left out."""
  draw = np.random.default_rng(seed).normal
  tokens = (BATCH, length)
  inputs = dict(
    u=draw(size=(*tokens, channels)),
    delta=np.abs(draw(size=(*tokens, channels))) / 2,
    A=-np.exp(draw(size=(channels, state))),
    B=draw(size=(*tokens, groups, state)),
    C=draw(size=(*tokens, groups, state)) / state**0.5,
    D=draw(size=channels),
    z=draw(size=(*tokens, channels)),
    delta_bias=np.abs(draw(size=channels)) / 4,
    initial_state=draw(size=(BATCH, channels, state)),
  )
  return {k: v for k, v in inputs.items() if k not in leave_out}


def make_cotangents(inputs, seed=1):
  draw = np.random.default_rng(seed).normal
  (batch, _, channels), state = inputs["u"].shape, inputs["A"].shape[1]
  return draw(size=inputs["u"].shape), draw(size=(batch, channels, state))


def segments(length):
  """[BATCH, length] ids; an id comes back: only a change makes a border."""
  ids = np.zeros((BATCH, length), np.int32)
  for row in range(BATCH):
    for border in (1, 2, 30, 63, 64, 65, 400, 900):
      ids[row, min(border + row, length) :] += 1
  return ids % 3


def oracle(
  inputs, cotangents, *, segment_ids=None, delta_softplus=False, reverse=False
):
  """Returns (y, final state) and the gradients by name, in float64."""
  inputs = {k: np.asarray(v, np.float64) for k, v in inputs.items()}
  dy, d_h = (np.asarray(v, np.float64) for v in cotangents)
  turn = lambda v: v[:, ::-1] if reverse else v
  inputs |= {k: turn(inputs[k]) for k in TIMED if k in inputs}
  dy = turn(dy)
  u, A, B, C = (inputs[k] for k in "u A B C".split())
  batch, length, channels = u.shape
  groups, state = B.shape[2:]
  D = inputs.get("D", np.zeros(channels))
  z = inputs.get("z")
  raw = inputs["delta"] + inputs.get("delta_bias", 0)
  delta = np.logaddexp(raw, 0) if delta_softplus else raw
  B, C = (np.repeat(v, channels // groups, axis=2) for v in (B, C))
  fresh = np.zeros((batch, length), bool)
  if segment_ids is not None:
    ids = turn(segment_ids)
    fresh[:, 1:] = ids[:, 1:] != ids[:, :-1]

  h = np.zeros((length + 1, batch, channels, state))
  h[0] = inputs.get("initial_state", 0)
  decay = lambda t: np.where(
    fresh[:, t, None, None], 0, np.exp(delta[:, t, :, None] * A)
  )
  scan = np.zeros_like(u)
  for t in range(length):
    h[t + 1] = decay(t) * h[t] + (delta * u)[:, t, :, None] * B[:, t]
    scan[:, t] = np.sum(h[t + 1] * C[:, t], axis=-1) + D * u[:, t]
  sigmoid = 0 if z is None else 1 / (1 + np.exp(-z))
  gate = 1 if z is None else z * sigmoid
  y = scan * gate

  g = dy * gate
  d_u, d_delta, d_A = D * g, np.zeros_like(u), np.zeros_like(A)
  d_B, d_C = np.zeros_like(B), np.zeros_like(C)
  for t in reversed(range(length)):
    d_h = d_h + C[:, t] * g[:, t, :, None]
    d_C[:, t] = h[t + 1] * g[:, t, :, None]
    d_B[:, t] = d_h * (delta * u)[:, t, :, None]
    into = np.sum(d_h * B[:, t], axis=-1)
    d_u[:, t] += delta[:, t] * into
    d_log = d_h * decay(t) * h[t]
    d_delta[:, t] = into * u[:, t] + np.sum(d_log * A, axis=-1)
    d_A += np.sum(d_log * delta[:, t, :, None], axis=0)
    d_h = decay(t) * d_h
  if delta_softplus:
    d_delta = d_delta / (1 + np.exp(-raw))

  def to_groups(v):
    return v.reshape(batch, length, groups, -1, state).sum(3)

  gradients = dict(
    u=turn(d_u),
    delta=turn(d_delta),
    A=d_A,
    B=turn(to_groups(d_B)),
    C=turn(to_groups(d_C)),
    D=np.sum(g * u, axis=(0, 1)),
    z=0 if z is None else turn(dy * scan * (sigmoid + gate * (1 - sigmoid))),
    delta_bias=np.sum(d_delta, axis=(0, 1)),
    initial_state=d_h,
  )
  return (turn(y), h[-1]), {k: gradients[k] for k in inputs}


def value_and_gradients(inputs, cotangents, **options):
  """(y, final state) of the operation, and its gradients by name."""

  @jax.jit
  def run(inputs, cotangents):
    call = functools.partial(selective_scan, return_final_state=True, **options)
    out, pull = jax.vjp(lambda inputs: call(**inputs), inputs)
    cotangents = [c.astype(o.dtype) for c, o in zip(cotangents, out)]
    return out, pull(tuple(cotangents))[0]

  return run(inputs, cotangents)


def assert_close(actual, wanted, tolerance, name=""):
  """Every difference is small beside the largest value wanted."""
  actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted)
  assert actual.shape == wanted.shape, name
  assert np.isfinite(actual).all(), name
  scale = np.abs(wanted).max() + 1e-30
  worst = np.abs(actual - wanted).max() / scale
  assert worst <= tolerance, f"{name}: {worst:.2e} of {scale:.2e}"


def check(
  inputs, implementation, tolerance=1e-5, *, dtype=jnp.float32, **options
):
  """Values and all gradients against the oracle of the rounded inputs."""
  low = ("u", "delta", "B", "C", "z")
  cast = {
    k: jnp.asarray(v, dtype if k in low else jnp.float32)
    for k, v in inputs.items()
  }
  dy, d_state = make_cotangents(inputs)
  cotangents = jnp.asarray(dy, dtype), jnp.asarray(d_state, jnp.float32)
  if implementation in KERNELS:
    reason = describe(selective_scan, **cast, **options).reasons[implementation]
    if reason is not None:
      pytest.skip(reason)
  (y, state), actual = value_and_gradients(
    cast, cotangents, implementation=implementation, **options
  )
  assert (y.dtype, state.dtype) == (dtype, jnp.float32)
  assert all(g.dtype == cast[k].dtype for k, g in actual.items())
  rounded = {k: np.asarray(v, np.float64) for k, v in cast.items()}
  wanted, gradients = oracle(rounded, cotangents, **options)
  assert_close(y, wanted[0], tolerance, "y")
  # The state is never rounded to the dtype of u.
  assert_close(state, wanted[1], min(tolerance, 1e-4), "final state")
  assert actual.keys() == gradients.keys()
  for name in gradients:
    assert_close(actual[name], gradients[name], tolerance, f"d{name}")


ALL = dict(delta_softplus=True, segment_ids=True)
OPTIONS = {
  "everything": (ALL, ()),
  "everything, reversed": ({**ALL, "reverse": True}, ()),
  "nothing": ({}, ("D", "z", "delta_bias", "initial_state")),
  "reversed": (dict(reverse=True), ("z", "delta_bias")),
  "softplus": (dict(delta_softplus=True), ("delta_bias", "D")),
  "bias and segments": (dict(segment_ids=True), ("z", "initial_state")),
}
LENGTHS, STATES = (1, 2, 63, 64, 65, 1000), (1, 4, 16, 64, 128)
# Every value of every axis, and pairs that make the plans differ.
THINNED = (
  (1, 16, 1, "everything"),
  (1, 1, 6, "nothing"),
  (2, 4, 2, "everything, reversed"),
  (63, 128, 6, "bias and segments"),
  (64, 64, 2, "softplus"),
  (65, 16, 1, "reversed"),
  (65, 1, 2, "everything"),
  (1000, 4, 6, "everything, reversed"),
  (1000, 16, 1, "nothing"),
)


def grid_case(length, state, groups, options, implementation, dtype, channels):
  tolerance = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 2e-2}[dtype]
  options, leave_out = OPTIONS[options]
  options = dict(options)
  if options.pop("segment_ids", False):
    options["segment_ids"] = segments(length)
  inputs = make_inputs(
    length, groups, channels=channels, state=state, leave_out=leave_out
  )
  check(
    inputs, implementation, tolerance, dtype=jnp.dtype(dtype).type, **options
  )


@pytest.mark.parametrize("implementation", ANYWHERE)
class TestValuesAndGradients:
  @pytest.mark.parametrize("case", THINNED, ids=str)
  def test_float32(self, implementation, case):
    grid_case(*case, implementation, "float32", CHANNELS)

  def test_bfloat16(self, implementation):
    case = (130, 16, 2, "everything")
    grid_case(*case, implementation, "bfloat16", CHANNELS)


# Kernels: the whole grid, with the options taking turns.
WHOLE = tuple(
  (*case, option)
  for case, option in zip(
    itertools.product(LENGTHS, STATES, (1, 2, 96)),
    itertools.cycle(OPTIONS),
    strict=False,
  )
)


@on_gpu
@pytest.mark.parametrize("implementation", KERNELS)
class TestKernels:
  @pytest.mark.parametrize("case", WHOLE, ids=str)
  def test_grid(self, implementation, case):
    grid_case(*case, implementation, "float32", 96)

  @pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
  @pytest.mark.parametrize("option", OPTIONS)
  def test_low_precision(self, implementation, option, dtype):
    grid_case(300, 16, 2, option, implementation, dtype, 64)

  @pytest.mark.parametrize("channels", (2, 40, 130, 256))
  def test_channels(self, implementation, channels):
    grid_case(130, 16, 1, "everything", implementation, "float32", channels)

  @pytest.mark.parametrize("log_decay", (-1e-6, -1.0, -50.0, "mixed"))
  def test_extreme_decays(self, implementation, log_decay):
    check_extreme_decays(log_decay, implementation, 64)


@on_gpu
@pytest.mark.parametrize("case", THINNED, ids=str)
def test_xla_on_a_gpu(case):
  grid_case(*case, "xla", "float32", CHANNELS)


def check_extreme_decays(log_decay, implementation, channels):
  leave_out = ("delta_bias", "z")
  inputs = make_inputs(
    192, channels=channels, state=16, seed=3, leave_out=leave_out
  )
  inputs["A"] = np.full((channels, 16), -1.0)
  if log_decay == "mixed":
    # A few tokens wipe a state that lasts otherwise, at other times in each
    # channel; the sum of the logarithms is near -1e4 where 1e-3 decides.
    inputs["delta"] = np.full_like(inputs["delta"], 1e-3)
    for channel in range(channels):
      inputs["delta"][:, channel % 7 :: 23, channel] = 50
    inputs["A"][:, ::2] = -1e-3
  else:
    # delta u of order 1, so that every gradient matters.
    inputs["delta"] = np.full_like(inputs["delta"], -log_decay)
    inputs["u"] /= -log_decay
  check(inputs, implementation, 1e-5)


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize("log_decay", (-1e-6, -50.0, "mixed"))
def test_extreme_decays(log_decay, implementation):
  """Neither a long memory nor a state that dies at once loses accuracy."""
  check_extreme_decays(log_decay, implementation, CHANNELS)


def test_the_oracles_gradients_are_finite_differences():
  inputs = make_inputs(7)
  options = dict(segment_ids=segments(7), delta_softplus=True, reverse=True)
  cotangents = make_cotangents(inputs)

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


@pytest.mark.parametrize(
  "cpu, lanes, chunks", ((True, 1, 1), (True, 300, 5), (False, 130, 2))
)
def test_every_way_to_cut_the_length(monkeypatch, cpu, lanes, chunks):
  """Several loops, of chunks alone or side by side, as on either device."""
  monkeypatch.setattr(xla, "_on_cpu", lambda: cpu)
  monkeypatch.setattr(xla, "_LANES", lanes)
  monkeypatch.setattr(xla, "_LANES_CPU", lanes)
  monkeypatch.setattr(xla, "_CHUNK", 8)
  length = 101
  plan = xla._plan(BATCH, length, CHANNELS, STATE)
  assert plan.loops > 1 and plan.chunks == chunks and plan.length > length
  ids = segments(length)
  options = dict(segment_ids=ids, delta_softplus=True, reverse=not cpu)
  check(make_inputs(length), "xla", **options)


def test_decays_that_grow():
  inputs = make_inputs(64)
  inputs["A"] = np.linspace(-0.1, 0.1, CHANNELS * STATE).reshape(-1, STATE)
  check(inputs, "xla")


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_float64(implementation):
  inputs = make_inputs(200)
  cotangents = make_cotangents(inputs)
  options = dict(delta_softplus=True, segment_ids=segments(200))
  wanted, gradients = oracle(inputs, cotangents, **options)
  with jax.enable_x64(True):
    out, actual = value_and_gradients(
      inputs, cotangents, implementation=implementation, **options
    )
    assert all(v.dtype == jnp.float64 for v in (*out, *actual.values()))
    assert_close(out[0], wanted[0], 1e-13)
    assert_close(out[1], wanted[1], 1e-13)
    for name in gradients:
      assert_close(actual[name], gradients[name], 1e-12, name)


def test_gradients_of_dead_states_are_exact():
  """With delta A = -1e4 nothing crosses a token: dA is zero, not noise."""
  inputs = make_inputs(64, leave_out=("initial_state", "delta_bias"))
  inputs["A"] = np.full((CHANNELS, STATE), -1e4)
  inputs["delta"][:] = 1
  cast = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
  cotangents = jax.tree.map(jnp.float32, make_cotangents(inputs))
  _, gradients = value_and_gradients(cast, cotangents)
  np.testing.assert_array_equal(gradients["A"], 0)


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("implementation", ANYWHERE)
def test_segments_do_not_leak_a_bit(implementation, reverse):
  """What came before a border changes no bit after it, however large."""
  length, border = 80, 37
  inputs = make_inputs(length)
  inputs = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
  ids = jnp.broadcast_to(jnp.arange(length) >= border, (BATCH, length))
  run = jax.jit(
    functools.partial(
      selective_scan,
      segment_ids=ids.astype(jnp.int32),
      reverse=reverse,
      return_final_state=True,
      implementation=implementation,
    )
  )
  before, after = slice(None, border), slice(border, None)
  if reverse:
    before, after = after, before
  y, state = run(**inputs)
  other = {**inputs, "initial_state": 1e20 * inputs["initial_state"]}
  for name in ("u", "B"):
    other[name] = other[name].at[:, before].multiply(1e8)
  other_y, other_state = run(**other)
  np.testing.assert_array_equal(y[:, after], other_y[:, after])
  np.testing.assert_array_equal(state, other_state)
  assert (np.abs(other_y[:, before]) > 1e6).any()


def test_continues_from_a_state_and_steps():
  inputs = make_inputs(50)
  inputs = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
  run = jax.jit(
    functools.partial(
      selective_scan, return_final_state=True, delta_softplus=True
    )
  )
  y, final = run(**inputs)
  part = lambda s: {k: v[:, s] if k in TIMED else v for k, v in inputs.items()}
  first, state = run(**part(slice(19)))
  rest = part(slice(19, None))
  second, state = run(**{**rest, "initial_state": state})
  assert_close(jnp.concatenate([first, second], 1), y, 3e-6)
  assert_close(state, final, 3e-6)

  step = jax.jit(functools.partial(selective_scan_step, delta_softplus=True))
  state = inputs["initial_state"]
  for t in range(50):
    now = part(t)
    del now["initial_state"]
    out, state = step(state, **now)
    assert_close(out, y[:, t], 5e-6, f"token {t}")
  assert_close(state, final, 3e-6)


def test_step_keeps_the_dtypes_of_state_and_input():
  inputs = make_inputs(1)
  u, delta, B, C = (
    jnp.asarray(inputs[k][:, 0], jnp.bfloat16) for k in ("u", "delta", "B", "C")
  )
  A = jnp.asarray(inputs["A"], jnp.float32)
  state = jnp.asarray(inputs["initial_state"], jnp.float32)
  y, new = selective_scan_step(state, u, delta, A, B, C)
  assert (y.dtype, new.dtype) == (jnp.bfloat16, jnp.float32)
  _, new = selective_scan_step(state.astype(jnp.bfloat16), u, delta, A, B, C)
  assert new.dtype == jnp.bfloat16


@pytest.mark.parametrize(
  "implementation, full", (("xla", False), ("xla", True), ("reference", True))
)
def test_inside_shard_map(implementation, full):
  """Parameters that every shard holds get the gradient of all shards."""
  length = 70
  inputs = {
    k: jnp.asarray(v, jnp.float32) for k, v in make_inputs(length, 1).items()
  }
  inputs |= {
    k: jnp.tile(inputs[k], (4,) + (1,) * (inputs[k].ndim - 1))
    for k in (*TIMED, "initial_state")
  }
  ids = jnp.tile(segments(length), (4, 1))
  state = inputs.pop("initial_state")
  rows, channels = PartitionSpec("data"), PartitionSpec("tensor")
  tokens = PartitionSpec("data", None, "tensor")
  specs = dict(u=tokens, delta=tokens, z=tokens, B=rows, C=rows)
  specs |= dict(A=channels, D=channels, delta_bias=channels)
  weight = jnp.cos(jnp.arange(inputs["u"].size, dtype=jnp.float32))
  weight = weight.reshape(inputs["u"].shape)

  def call(inputs, extra):
    ids, state = extra or (None, None)
    return selective_scan(
      **inputs,
      delta_softplus=True,
      segment_ids=ids,
      initial_state=state,
      return_final_state=True,
      implementation=implementation,
    )

  def gradients(call, extra):
    def loss(inputs):
      y, final = call(inputs, extra)
      return jnp.sum(y * weight) + jnp.sum(final**2)

    return jax.jit(jax.value_and_grad(loss))(inputs)

  mesh = jax.make_mesh(
    (4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
  )
  out_specs = (tokens, PartitionSpec("data", "tensor"))
  extra = (ids, state) if full else ()
  extra_specs = (rows, out_specs[1])[: len(extra)]
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
  inputs = make_inputs(150)
  inputs = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
  weight = jnp.asarray(make_cotangents(inputs)[0], jnp.float32)

  def loss(u, rest):
    return jnp.sum(weight * selective_scan(u, **rest, delta_softplus=True))

  rest = {k: v for k, v in inputs.items() if k != "u"}
  us = jnp.stack([inputs["u"], -2 * inputs["u"]])
  plain = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  wanted = [plain(u, rest) for u in us]
  mapped = jax.jit(jax.vmap(jax.checkpoint(plain), in_axes=(0, None)))(us, rest)
  wanted = jax.tree.map(lambda *v: np.stack(v), *wanted)
  jax.tree.map(lambda a, w: assert_close(a, w, 1e-5), mapped, wanted)


def test_gradient_of_a_gradient():
  with jax.enable_x64(True):
    inputs = make_inputs(6)

    def norm(delta, implementation):
      def loss(delta):
        y = selective_scan(
          **{**inputs, "delta": delta}, implementation=implementation
        )
        return jnp.sum(y**2)

      return jnp.sum(jax.grad(loss)(delta) ** 2)

    actual, wanted = (
      jax.jit(jax.grad(functools.partial(norm, implementation=name)))(
        inputs["delta"]
      )
      for name in ANYWHERE
    )
    assert_close(actual, wanted, 1e-10)


@pytest.mark.parametrize("cpu", (True, False))
def test_memory_is_linear_and_has_no_factor_of_the_state(monkeypatch, cpu):
  """T = 16384 forward and backward, far below a [B, T, E, M] array."""
  monkeypatch.setattr(xla, "_on_cpu", lambda: cpu)
  channels, size = 64, 64

  def temporary(length):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    inputs = dict(
      u=shape((1, length, channels)),
      delta=shape((1, length, channels)),
      A=shape((channels, size)),
      B=shape((1, length, 1, size)),
      C=shape((1, length, 1, size)),
    )
    grad = jax.grad(lambda inputs: jnp.sum(selective_scan(**inputs) ** 2))
    compiled = jax.jit(grad).lower(inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  if not cpu:
    # A loop of an accelerator holds its lanes; no more than that.
    monkeypatch.setattr(xla, "_LANES", 2**13)
  used = temporary(16384)
  array = 16384 * channels * 4
  assert used < 10 * array
  assert temporary(4096) < 0.4 * used


def test_describe():
  text = str(describe(selective_scan, **make_inputs(4)))
  assert "xla" in text and "reference" in text


BAD = {
  "u must be [B, T, E]": dict(u=(2, 6)),
  "u has no tokens": dict(u=(2, 0, 6)),
  "delta must be [B, T, E] = (2, 6, 6)": dict(delta=(2, 6, 3)),
  "A must be [E, M] = (6, 5)": dict(A=(6, 4)),
  "B must be [B, T, G, M]": dict(B=(2, 5, 2, 5), C=(2, 5, 2, 5)),
  "B and C must have one shape [B, T, G, M]": dict(C=(2, 6, 1, 5)),
  "4 groups of B and C do not divide the 6 channels": dict(
    B=(2, 6, 4, 5), C=(2, 6, 4, 5)
  ),
  "D must be [E] = (6,)": dict(D=(1,)),
  "z must be [B, T, E] = (2, 6, 6)": dict(z=(2, 6, 1)),
  "delta_bias must be [E] = (6,)": dict(delta_bias=(5,)),
  "initial_state must be [B, E, M] = (2, 6, 5)": dict(initial_state=(2, 5, 6)),
  "segment_ids must be [B, T] = (2, 6)": dict(
    segment_ids=np.zeros((2, 7), np.int32)
  ),
  "segment_ids must be integers": dict(segment_ids=np.zeros((2, 6))),
  "unknown implementation": dict(implementation="cuda"),
  "z must be a real floating point array": dict(z=np.zeros((2, 6, 6), int)),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
  inputs = make_inputs(6)
  options = {}
  for name, value in BAD[message].items():
    if name in ARRAYS and isinstance(value, tuple):
      value = np.zeros(value)
    (inputs if name in ARRAYS else options)[name] = value
  with pytest.raises((ValueError, TypeError)) as error:
    selective_scan(**inputs, **options)
  assert message in str(error.value)


def test_step_errors_name_the_argument():
  inputs = {k: jnp.asarray(v, jnp.float32) for k, v in make_inputs(6).items()}
  state = inputs.pop("initial_state")
  now = {k: v[:, 0] if k in TIMED else v for k, v in inputs.items()}
  selective_scan_step(state, **now)
  for message, bad in (
    ("u must be [B, E]", inputs),
    ("delta must be [B, E] = (2, 6)", {**now, "delta": now["delta"][:1]}),
    ("B and C must have one shape [B, G, M]", {**now, "B": now["B"][:, :1]}),
  ):
    with pytest.raises(ValueError) as error:
      selective_scan_step(state, **bad)
    assert message in str(error.value)
  with pytest.raises(ValueError, match="state must be"):
    selective_scan_step(state[..., :2], **now)
