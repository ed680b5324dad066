"""The Triton kernels of ops.causal_conv1d: interpreted, and on a GPU.

Triton's interpreter runs the kernels on a CPU, a block of channels at a time,
inside the whole operation with its derivatives. It needs the packages triton
and torch, which only the extras `gpu` and `parity` bring.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead.ops import triton_compat
from multihead.ops.causal_conv1d import causal_conv1d, triton
from multihead.ops.causal_conv1d.triton import calls
from multihead.ops.dispatch import describe
from tests.ops import triton_interpreter
from tests.ops.test_causal_conv1d import (
  CASES as ALL,
)
from tests.ops.test_causal_conv1d import (
  assert_close,
  make_cotangents,
  make_inputs,
  oracle,
  segments,
  value_and_gradients,
)

AUTO = jax.sharding.AxisType.Auto
# One tap is left to XLA.
CASES = {name: case for name, case in ALL.items() if case["width"] > 1}

to_float32 = functools.partial(
  jax.tree.map, lambda v: jnp.asarray(v, jnp.float32)
)


def on_gpu(test):
  needed = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU: make test-gpu"
  )
  return pytest.mark.gpu(needed(test))


@pytest.fixture
def interpreted(monkeypatch):
  triton_interpreter.use(monkeypatch, triton)


def use_blocks(monkeypatch, **blocks):
  for name in ("FORWARD", "BACKWARD"):
    monkeypatch.setattr(calls, name, calls.Blocks(**blocks))


def check(length, width, *, ids=None, activation=None, plain=False):
  inputs = make_inputs(length, width, bias=not plain, state=not plain)
  cotangents = make_cotangents(length, width)
  options = dict(segment_ids=ids, activation=activation)
  wanted, gradients = oracle(inputs, cotangents, **options)
  out, actual = value_and_gradients(
    to_float32(inputs),
    to_float32(cotangents),
    implementation="triton",
    **options,
  )
  assert_close(out[0], wanted[0], 1e-6, "y")
  assert_close(out[1], wanted[1], 1e-7, "final state")
  assert actual.keys() == gradients.keys()
  for name in gradients:
    assert_close(actual[name], gradients[name], 2e-6, name)


def check_case(case):
  case = dict(CASES[case])
  length, borders = case.pop("length"), case.pop("borders", None)
  ids = None if borders is None else segments(length, borders)
  check(length, ids=ids, **case)


@pytest.mark.parametrize("case", CASES)
def test_interpreted(interpreted, monkeypatch, case):
  # Fewer channels than a block, and runs that do not divide the tokens.
  use_blocks(monkeypatch, span=12, ahead=6, columns=8)
  check_case(case)


@pytest.mark.parametrize(
  "blocks",
  [
    dict(rows=1, span=8, ahead=2, columns=4),
    dict(rows=2, span=8, ahead=8, columns=4),
    dict(rows=4, span=4, ahead=4, columns=2),
  ],
)
def test_interpreted_blocks(interpreted, monkeypatch, blocks):
  """Borders before, at and behind the ends of runs, blocks of channels."""
  use_blocks(monkeypatch, **blocks)
  ids = segments(37, (1, 7, 8, 9, 16, 24, 30, 31, 32))
  check(37, 4, ids=ids, activation="silu")


def test_interpreted_without_excess(interpreted, monkeypatch):
  use_blocks(monkeypatch, span=8, ahead=8, columns=8)
  check(16, 3, activation="silu", plain=True)


def test_interpreted_bfloat16(interpreted, monkeypatch):
  use_blocks(monkeypatch, span=8, ahead=4, columns=8)
  inputs, cotangents = make_inputs(20, 4), make_cotangents(20, 4)
  inputs, cotangents = (
    jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), tree)
    for tree in (inputs, cotangents)
  )
  options = dict(activation="silu", segment_ids=segments(20, (3, 9)))
  out, actual = value_and_gradients(
    inputs, cotangents, implementation="triton", **options
  )
  wanted, gradients = oracle(inputs, cotangents, **options)
  assert out[0].dtype == jnp.bfloat16
  assert_close(out[0], wanted[0], 2**-8, "y")
  for name in gradients:
    assert actual[name].dtype == jnp.bfloat16
    # Triton's interpreter cuts bits off where a GPU rounds.
    assert_close(actual[name], gradients[name], 2**-6, name)


def check_vmap_and_second_order():
  inputs = to_float32(make_inputs(9, 4))

  def loss(inputs, implementation):
    y = causal_conv1d(
      **inputs, activation="silu", implementation=implementation
    )
    return jnp.sum(y**2)

  def norm(inputs, implementation):
    gradient = jax.grad(loss)(inputs, implementation)
    return sum(jnp.sum(v**2) for v in jax.tree.leaves(gradient))

  both = inputs, jax.tree.map(jnp.negative, inputs)
  twice = jax.tree.map(lambda *v: jnp.stack(v), *both)
  some = {**inputs, "x": twice["x"], "initial_state": twice["initial_state"]}
  every = dict.fromkeys(inputs, 0)
  axes = {**dict.fromkeys(inputs), "x": 0, "initial_state": 0}
  runs = (
    lambda i: jax.grad(norm)(inputs, i),
    lambda i: jax.vmap(lambda a: jax.grad(loss)(a, i), (axes,))(some),
    lambda i: jax.vmap(lambda a: jax.grad(loss)(a, i), (every,))(twice),
  )
  for run in runs:
    actual, wanted = (
      jax.jit(run, static_argnums=0)(name) for name in ("triton", "reference")
    )
    for name in wanted:
      assert_close(actual[name], wanted[name], 1e-5, name)


def test_interpreted_vmap_and_second_order(interpreted, monkeypatch):
  use_blocks(monkeypatch, span=12, ahead=12, columns=8)
  check_vmap_and_second_order()


def test_refuses_what_it_cannot_serve(monkeypatch):
  monkeypatch.setattr(triton_compat, "refusal", lambda: None)

  def reason(dtype="float32", width=4, length=64):
    x = jax.ShapeDtypeStruct((2, length, 8), dtype)
    kernel = jax.ShapeDtypeStruct((width, 8), "float32")
    return describe(causal_conv1d, x, kernel)

  assert reason().chosen == "triton"
  # Decoding: a few tokens are fused into what stands around.
  assert reason(length=1).chosen == "xla"
  assert reason(length=1).reasons["triton"] is None
  assert "8 taps" in reason(width=9).reasons["triton"]
  with jax.enable_x64(True):
    assert "float64" in reason(dtype="float64").reasons["triton"]
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AUTO,) * 2)
  with jax.set_mesh(mesh):
    assert "gather the operands" in reason().reasons["triton"]
    assert reason().chosen == "xla"


def test_says_what_to_install(monkeypatch):
  monkeypatch.setattr(
    triton_compat, "refusal", lambda: "needs jax-triton: pip install it"
  )
  x, kernel = np.zeros((1, 32, 4), np.float32), np.zeros((4, 4), np.float32)
  described = describe(causal_conv1d, x, kernel)
  assert described.chosen == "xla" and "pip install it" in str(described)
  with pytest.raises(NotImplementedError, match="pip install it"):
    causal_conv1d(x, kernel, implementation="triton")


@on_gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu(case):
  check_case(case)


@on_gpu
@pytest.mark.parametrize("rows", [1, 4])
def test_gpu_blocks(monkeypatch, rows):
  use_blocks(monkeypatch, rows=rows, span=8, ahead=4, columns=32, warps=rows)
  check(100, 4, ids=segments(100, (1, 7, 8, 50, 64, 97)), activation="silu")


@on_gpu
def test_gpu_vmap_and_second_order():
  check_vmap_and_second_order()


@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(2, 1000, 1536), (3, 333, 130)])
def test_gpu_many_channels(shape, dtype):
  """The shapes of a model, beside the XLA form in float32."""
  batch, length, channels = shape
  draw = np.random.default_rng(0).normal
  inputs = dict(
    x=draw(size=shape),
    kernel=draw(size=(4, channels)),
    bias=draw(size=channels),
    initial_state=draw(size=(batch, 3, channels)),
  )
  cotangents = draw(size=shape), draw(size=(batch, 3, channels))
  inputs, cotangents = jax.tree.map(
    lambda v: jnp.asarray(v, dtype), (inputs, cotangents)
  )
  ids = np.cumsum(np.random.default_rng(1).random((batch, length)) < 0.02, 1)
  options = dict(activation="silu", segment_ids=jnp.asarray(ids, jnp.int32))
  out, actual = value_and_gradients(
    inputs, cotangents, implementation="triton", **options
  )
  wanted, gradients = value_and_gradients(
    to_float32(inputs), to_float32(cotangents), implementation="xla", **options
  )
  tolerance = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-10}[dtype]
  assert_close(out[0], np.asarray(wanted[0], np.float64), tolerance, "y")
  for name in gradients:
    assert actual[name].dtype == dtype
    want = np.asarray(gradients[name], np.float64)
    assert_close(actual[name], want, tolerance, name)
