"""ops.causal_conv1d against loops over tokens and taps in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from multihead.ops.causal_conv1d import causal_conv1d, xla
from multihead.ops.dispatch import describe

IMPLEMENTATIONS = ("xla", "reference")
BATCH, CHANNELS = 2, 5


def make_inputs(length, width, *, bias=True, state=True, seed=0):
  draw = np.random.default_rng(seed).normal
  inputs = dict(
    x=draw(size=(BATCH, length, CHANNELS)),
    kernel=draw(size=(width, CHANNELS)),
  )
  if bias:
    inputs["bias"] = draw(size=CHANNELS)
  if state:
    inputs["initial_state"] = draw(size=(BATCH, width - 1, CHANNELS))
  return inputs


def make_cotangents(length, width, seed=1):
  draw = np.random.default_rng(seed).normal
  shapes = ((BATCH, length, CHANNELS), (BATCH, width - 1, CHANNELS))
  return tuple(draw(size=shape) for shape in shapes)


def oracle(inputs, cotangents, *, segment_ids=None, activation=None):
  """Returns (y, final state), and the gradients by name."""
  inputs = {k: np.asarray(v, np.float64) for k, v in inputs.items()}
  x, kernel = inputs["x"], inputs["kernel"]
  batch, length, channels = x.shape
  width = len(kernel)
  past = width - 1
  state = inputs.get("initial_state", np.zeros((batch, past, channels)))
  stream = np.concatenate([state, x], axis=1)
  if segment_ids is None:
    segment_ids = np.zeros((batch, length), int)
  ids = np.concatenate(
    [np.repeat(segment_ids[:, :1], past, axis=1), segment_ids], axis=1
  )

  def visible(row, source, target):
    """Whether `target` sees `source`, both counted in `stream`."""
    return len(set(ids[row, source : target + 1])) == 1

  dy, d_final = (np.asarray(v, np.float64) for v in cotangents)
  y, final = np.zeros_like(x), np.zeros_like(state)
  d_stream, d_kernel = np.zeros_like(stream), np.zeros_like(kernel)
  d_bias = np.zeros(channels)
  for row in range(batch):
    for t in range(length):
      taps = [i for i in range(width) if visible(row, t + i, t + past)]
      total = inputs.get("bias", 0) + sum(
        kernel[i] * stream[row, t + i] for i in taps
      )
      slope = np.ones(channels)
      y[row, t] = total
      if activation == "silu":
        gate = 1 / (1 + np.exp(-total))
        y[row, t] = total * gate
        slope = gate + total * gate * (1 - gate)
      d_total = dy[row, t] * slope
      d_bias += d_total
      for i in taps:
        d_kernel[i] += d_total * stream[row, t + i]
        d_stream[row, t + i] += d_total * kernel[i]
    for i in range(past):
      if visible(row, length + i, length + past - 1):
        final[row, i] = stream[row, length + i]
        d_stream[row, length + i] += d_final[row, i]
  gradients = dict(
    x=d_stream[:, past:],
    kernel=d_kernel,
    bias=d_bias,
    initial_state=d_stream[:, :past],
  )
  return (y, final), {k: v for k, v in gradients.items() if k in inputs}


def value_and_gradients(inputs, cotangents, **options):
  @jax.jit
  def run(inputs, cotangents):
    call = functools.partial(causal_conv1d, return_final_state=True, **options)
    out, pull = jax.vjp(lambda inputs: call(**inputs), inputs)
    cotangents = jax.tree.map(lambda c, o: c.astype(o.dtype), cotangents, out)
    return out, pull(cotangents)[0]

  return run(inputs, cotangents)


def assert_close(actual, wanted, tolerance, name=""):
  actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted)
  assert actual.shape == wanted.shape, name
  scale = np.abs(wanted).max(initial=0) + 1e-30
  worst = np.abs(actual - wanted).max(initial=0) / scale
  assert worst <= tolerance, f"{name}: {worst:.2e} of {scale:.2e}"


def segments(length, borders):
  """Ids that come back; the second row's borders are one token later."""
  ids = np.zeros((BATCH, length), np.int32)
  for row in range(BATCH):
    for border in borders:
      ids[row, min(border + row, length) :] += 1
  return ids % 2


def test_the_oracles_gradients_are_finite_differences():
  inputs, cotangents = make_inputs(9, 4), make_cotangents(9, 4)
  options = dict(segment_ids=segments(9, (3, 4, 7)), activation="silu")

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
  "one token": dict(length=1, width=4),
  "shorter than the window": dict(length=2, width=4, borders=(1,)),
  "shorter than the window, one segment": dict(length=2, width=5),
  "one tap": dict(length=6, width=1, borders=(2,), activation="silu"),
  "nothing optional": dict(length=13, width=3, plain=True),
  "silu": dict(length=33, width=4, activation="silu"),
  "segments, some of one token": dict(
    length=33, width=4, borders=(1, 2, 5, 20, 31), activation="silu"
  ),
  "segments, no state": dict(length=33, width=4, borders=(3, 31), plain=True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients(implementation, case):
  case = CASES[case]
  length, width = case["length"], case["width"]
  plain = case.get("plain", False)
  inputs = make_inputs(length, width, bias=not plain, state=not plain)
  cotangents = make_cotangents(length, width)
  ids = segments(length, case["borders"]) if "borders" in case else None
  activation = case.get("activation")
  wanted, gradients = oracle(
    inputs, cotangents, segment_ids=ids, activation=activation
  )
  cast = functools.partial(jax.tree.map, lambda v: jnp.asarray(v, jnp.float32))
  out, actual = value_and_gradients(
    cast(inputs),
    cast(cotangents),
    activation=activation,
    segment_ids=None if ids is None else jnp.asarray(ids),
    implementation=implementation,
  )
  assert_close(out[0], wanted[0], 1e-6, "y")
  assert_close(out[1], wanted[1], 1e-7, "final state")
  assert actual.keys() == gradients.keys()
  for name in gradients:
    assert_close(actual[name], gradients[name], 2e-6, name)


@pytest.mark.parametrize("plain", (False, True))
@pytest.mark.parametrize("length", (100, 131))
def test_backward_in_blocks(monkeypatch, length, plain):
  """Several blocks of tokens, also where they do not divide the length."""
  monkeypatch.setattr(xla, "_BLOCK_ELEMENTS_CPU", 300)
  inputs = make_inputs(length, 4, bias=not plain, state=not plain)
  cotangents = make_cotangents(length, 4)
  blocks, size = xla._blocks(inputs["x"], 3)
  assert blocks > 2 and (blocks * size == length) == (length == 100)
  # Borders before, at and behind the ends of blocks, also in pairs.
  ids = None if plain else segments(length, (1, 24, 32, 33, 50, 66, 68, 98))
  options = dict(segment_ids=ids, activation="silu")
  wanted, gradients = oracle(inputs, cotangents, **options)
  cast = functools.partial(jax.tree.map, lambda v: jnp.asarray(v, jnp.float32))
  out, actual = value_and_gradients(cast(inputs), cast(cotangents), **options)
  assert_close(out[0], wanted[0], 1e-6, "y")
  for name in gradients:
    assert_close(actual[name], gradients[name], 2e-6, name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("segmented", (False, True))
def test_continues_from_its_final_state(implementation, segmented):
  """In pieces of 1, 2, 7 and 10 tokens, as in one."""
  length = 20
  inputs = make_inputs(length, 4)
  inputs = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
  ids = jnp.asarray(segments(length, (2, 9, 12))) if segmented else None
  run = jax.jit(
    functools.partial(
      causal_conv1d,
      activation="silu",
      return_final_state=True,
      implementation=implementation,
    )
  )
  y, final = run(**inputs, segment_ids=ids)
  state, start, parts = inputs.pop("initial_state"), 0, []
  x = inputs.pop("x")
  for size in (1, 2, 7, 10):
    now = slice(start, start + size)
    if segmented and start:
      # The state belongs to the first token's segment: drop it at a border.
      same = ids[:, start] == ids[:, start - 1]
      state = jnp.where(same[:, None, None], state, 0)
    part, state = run(
      x[:, now],
      **inputs,
      initial_state=state,
      segment_ids=None if ids is None else ids[:, now],
    )
    parts.append(part)
    start += size
  np.testing.assert_allclose(jnp.concatenate(parts, 1), y, atol=1e-6)
  np.testing.assert_array_equal(state, final)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_leaks_from_the_future_or_another_segment(implementation):
  """Not even a NaN, forward or backward."""
  inputs = make_inputs(12, 4, state=False)
  inputs = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
  ids = jnp.broadcast_to(jnp.arange(12) >= 4, (BATCH, 12)).astype(jnp.int32)

  @jax.jit
  @jax.value_and_grad
  def loss(x):
    y = causal_conv1d(
      x,
      inputs["kernel"],
      inputs["bias"],
      activation="silu",
      segment_ids=ids,
      implementation=implementation,
    )
    return jnp.sum(y[:, 4:9] ** 2)

  value, gradient = loss(inputs["x"])
  past = inputs["x"].at[:, :4].set(jnp.nan)
  np.testing.assert_allclose(loss(past)[0], value, rtol=1e-6)
  np.testing.assert_allclose(loss(past)[1][:, 4:], gradient[:, 4:], rtol=1e-5)
  np.testing.assert_array_equal(gradient[:, :4], 0)
  np.testing.assert_array_equal(gradient[:, 9:], 0)
  future = inputs["x"].at[:, 9:].set(jnp.nan)
  np.testing.assert_allclose(loss(future)[0], value, rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_sums_in_float32(implementation):
  inputs = make_inputs(40, 4)
  cast = {k: jnp.asarray(v, jnp.bfloat16) for k, v in inputs.items()}
  cotangents = tuple(
    jnp.asarray(c, jnp.bfloat16) for c in make_cotangents(40, 4)
  )
  out, gradients = value_and_gradients(
    cast, cotangents, activation="silu", implementation=implementation
  )
  assert {v.dtype for v in (*out, *gradients.values())} == {
    jnp.dtype(jnp.bfloat16)
  }
  rounded = {k: np.asarray(v, np.float64) for k, v in cast.items()}
  wanted, wanted_gradients = oracle(rounded, cotangents, activation="silu")
  # One rounding of the result: half a unit in the last of 8 bits.
  np.testing.assert_allclose(
    np.asarray(out[0], np.float64), wanted[0], rtol=2**-8, atol=1e-6
  )
  np.testing.assert_array_equal(np.asarray(out[1], np.float64), wanted[1])
  for name, gradient in gradients.items():
    assert_close(gradient, wanted_gradients[name], 2**-7, name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64(implementation):
  inputs, cotangents = make_inputs(9, 4), make_cotangents(9, 4)
  wanted, gradients = oracle(inputs, cotangents, activation="silu")
  with jax.enable_x64(True):
    out, actual = value_and_gradients(
      inputs, cotangents, activation="silu", implementation=implementation
    )
    assert out[0].dtype == jnp.float64
    assert_close(out[0], wanted[0], 1e-14)
    for name in gradients:
      assert_close(actual[name], gradients[name], 1e-14, name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inside_shard_map(implementation):
  """Kernel and bias, the same on all data shards, get the summed gradient."""
  draw = np.random.default_rng(0).normal
  inputs = dict(
    x=draw(size=(8, 11, 6)),
    kernel=draw(size=(4, 6)),
    bias=draw(size=6),
    initial_state=draw(size=(8, 3, 6)),
  )
  inputs = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
  ids = jnp.asarray(np.tile(segments(11, (2, 5)), (4, 1)))
  data = PartitionSpec("data", None, "tensor")
  specs = dict(
    x=data,
    kernel=PartitionSpec(None, "tensor"),
    bias=PartitionSpec("tensor"),
    initial_state=data,
  )
  weight = jnp.asarray(draw(size=(8, 11, 6)), jnp.float32)

  def call(inputs, ids):
    return causal_conv1d(
      **inputs,
      activation="silu",
      segment_ids=ids,
      return_final_state=True,
      implementation=implementation,
    )

  def gradients(call):
    def loss(inputs):
      y, final = call(inputs, ids)
      return jnp.sum(y * weight) + jnp.sum(final**2)

    return jax.jit(jax.grad(loss))(inputs)

  wanted = gradients(call)
  mesh = jax.make_mesh(
    (4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
  )
  with jax.set_mesh(mesh):
    actual = gradients(
      jax.shard_map(
        call,
        in_specs=(specs, PartitionSpec("data")),
        out_specs=(data, data),
      )
    )
  for name in inputs:
    assert_close(actual[name], wanted[name], 1e-6, name)


def test_vmap_checkpoint_and_second_order():
  inputs = make_inputs(12, 4)
  inputs = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}

  def loss(inputs, implementation):
    y = causal_conv1d(
      **inputs, activation="silu", implementation=implementation
    )
    return jnp.sum(y**2)

  def norm(inputs, implementation):
    gradient = jax.grad(loss)(inputs, implementation)
    return sum(jnp.sum(v**2) for v in jax.tree.leaves(gradient))

  def second(inputs, implementation):
    return jax.grad(norm)(inputs, implementation)

  actual, wanted = (
    jax.jit(second, static_argnums=1)(inputs, name) for name in IMPLEMENTATIONS
  )
  for name in wanted:
    assert_close(actual[name], wanted[name], 1e-5, name)

  first = jax.grad(functools.partial(loss, implementation="xla"))
  both = inputs, jax.tree.map(jnp.negative, inputs)
  twice = jax.tree.map(lambda *v: jnp.stack(v), *both)
  mapped = jax.jit(jax.vmap(jax.checkpoint(first)))(twice)
  for i, one in enumerate(both):
    wanted = jax.jit(first)(one)
    for name in wanted:
      assert_close(mapped[name][i], wanted[name], 1e-6, name)


def test_keeps_only_its_inputs_for_the_backward_pass():
  """Not W copies of x in float32, as autodiff of the sum would."""
  x = jax.ShapeDtypeStruct((1, 64, 32), jnp.bfloat16)
  kernel = jax.ShapeDtypeStruct((4, 32), jnp.float32)

  def pull(x, kernel):
    return jax.vjp(
      functools.partial(causal_conv1d, activation="silu"), x, kernel
    )[1]

  kept = jax.tree.leaves(jax.eval_shape(pull, x, kernel))
  assert sum(v.size for v in kept if v.ndim == 3) == x.size


def test_describe():
  inputs = make_inputs(4, 2)
  text = str(describe(causal_conv1d, **inputs))
  assert "xla" in text and "reference" in text


BAD = {
  "x must be [B, T, C] with T >= 1": dict(x=(2, 5)),
  "kernel must be [W, C = 5]": dict(kernel=(4, 6)),
  "bias must be [C] = (5,)": dict(bias=(4,)),
  "initial_state must be [B, W - 1, C] = (2, 3, 5)": dict(
    initial_state=(2, 4, 5)
  ),
  "segment_ids must be [B, T] = (2, 6)": dict(
    segment_ids=np.zeros((2, 5), np.int32)
  ),
  "segment_ids must be integers": dict(segment_ids=np.zeros((2, 6))),
  "activation must be None or 'silu'": dict(activation="gelu"),
  "unknown implementation": dict(implementation="cuda"),
  "kernel must be a real floating point array": dict(
    kernel=np.zeros((4, 5), int)
  ),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
  arguments = make_inputs(6, 4)
  for name, value in BAD[message].items():
    is_shape = isinstance(value, tuple)
    arguments[name] = np.zeros(value) if is_shape else value
  with pytest.raises((ValueError, TypeError)) as error:
    causal_conv1d(**arguments)
  assert message in str(error.value)
