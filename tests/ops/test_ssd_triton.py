"""The Triton kernels of ops.ssd: interpreted, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from multihead.ops import triton_compat
from multihead.ops.dispatch import describe
from multihead.ops.ssd import ssd, triton
from multihead.ops.ssd.triton import calls
from tests.ops import triton_interpreter
from tests.ops.test_ssd import (
  assert_close,
  check,
  make_cotangents,
  make_inputs,
  oracle,
  segments,
  value_and_gradients,
)

on_gpu = pytest.mark.skipif(
  jax.default_backend() != "gpu", reason="needs a GPU: make test-gpu"
)


@pytest.fixture
def interpreted(monkeypatch):
  triton_interpreter.use(monkeypatch, triton)
  # The interpreter multiplies in float32 too, which shows smaller mistakes.
  monkeypatch.setattr(triton, "supports", lambda args: None)


def use_blocks(monkeypatch, *, whole, chunk=16):
  launch = calls.Launch(16, 4, 1)
  forward = launch if whole else None
  blocks = calls.Blocks(chunk, forward, launch, launch, launch)
  monkeypatch.setattr(calls, "_blocks", lambda *_: blocks)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "halves"])
@pytest.mark.parametrize(
  "length, groups, borders", [(37, 2, (3, 16, 17, 36)), (20, 1, None)]
)
def test_interpreted(interpreted, monkeypatch, whole, length, groups, borders):
  """Chunks that do not divide T, segments within and between chunks."""
  use_blocks(monkeypatch, whole=whole)
  ids = None if borders is None else segments(length, borders)
  inputs = make_inputs(length, groups)
  options = dict(dt_softplus=True, dt_limit=(0.01, 2.0))
  check(inputs, "triton", 2e-6, segment_ids=ids, **options)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "halves"])
def test_interpreted_without_excess(interpreted, monkeypatch, whole):
  """One token, no D, no bias, no initial state, a head in two parts."""
  use_blocks(monkeypatch, whole=whole)
  inputs = make_inputs(1, 3, bias=False, state=False)
  del inputs["D"]
  check(inputs, "triton", 2e-6)
  inputs = make_inputs(18, 1, bias=False, state=False)
  inputs["x"] = np.random.default_rng(5).normal(size=(2, 18, 6, 20))
  check(inputs, "triton", 2e-6)


def derivatives(implementation):
  cast = functools.partial(jax.tree.map, lambda v: jnp.asarray(v, jnp.float32))
  inputs = cast(make_inputs(5, 2))
  ids = jnp.asarray(segments(5, (2,)))

  def loss(inputs):
    y = ssd(**inputs, segment_ids=ids, implementation=implementation)
    return jnp.sum(y**2)

  def norm(inputs):
    return sum(jnp.sum(v**2) for v in jax.tree.leaves(jax.grad(loss)(inputs)))

  twice = jax.tree.map(lambda v: jnp.stack([v, v * 0.5]), inputs)
  some = {**inputs, "x": twice["x"], "D": twice["D"]}
  axes = {**dict.fromkeys(inputs), "x": 0, "D": 0}
  return (
    jax.jit(jax.grad(norm))(inputs),
    jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss)), (axes,)))(some),
  )


def test_interpreted_vmap_checkpoint_and_second_order(interpreted, monkeypatch):
  use_blocks(monkeypatch, whole=True)
  every = zip(derivatives("triton"), derivatives("reference"), strict=True)
  for actual, wanted in every:
    for name in wanted:
      assert_close(actual[name], wanted[name], 2e-4, name)


def test_refuses_what_it_cannot_serve(monkeypatch):
  monkeypatch.setattr(triton_compat, "refusal", lambda: None)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

  def reason(dtype="bfloat16", width=64, size=128, length=64):
    struct = jax.ShapeDtypeStruct
    x = struct((1, length, 8, width), dtype)
    maps = struct((1, length, 1, size), dtype)
    dt, A = struct((1, length, 8), "float32"), struct((8,), "float32")
    return describe(ssd, x, dt, A, maps, maps)

  assert reason().chosen == "triton"
  assert "float32" in reason(dtype="float32").reasons["triton"]
  assert "H = 256" in reason(width=256).reasons["triton"]
  assert "32 bits" in reason(length=2**22).reasons["triton"]
  assert reason(width=256).chosen == "xla"
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    assert "gather the operands" in reason().reasons["triton"]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
  "length, heads, width, groups, size",
  [
    (200, 4, 64, 2, 128),
    (130, 2, 128, 1, 256),
    (77, 3, 24, 1, 40),
    (1, 2, 64, 1, 64),
  ],
)
def test_gpu(length, heads, width, groups, size, dtype):
  """Errors are those of 16-bit products: twice what the XLA form has."""
  draw = np.random.default_rng(0).normal
  inputs = dict(
    x=draw(size=(2, length, heads, width)),
    dt=draw(size=(2, length, heads)),
    A=-np.exp(draw(size=heads)),
    B=draw(size=(2, length, groups, size)),
    C=draw(size=(2, length, groups, size)),
    D=draw(size=heads),
    initial_state=draw(size=(2, heads, width, size)),
  )
  low = {k: jnp.asarray(v, dtype) for k, v in inputs.items() if k in "xBC"}
  inputs = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()} | low
  ids = segments(length, (3, 64, 70, 128)) if length > 128 else None
  options = dict(segment_ids=ids, dt_softplus=True)
  cotangents = make_cotangents(inputs)
  wanted, gradients = oracle(inputs, cotangents, segment_ids=ids, softplus=True)
  out, actual = value_and_gradients(
    inputs, cotangents, implementation="triton", **options
  )
  tolerance = {"bfloat16": 1e-2, "float16": 2e-3}[dtype]
  assert_close(out[0], wanted[0], tolerance, "y")
  assert_close(out[1], wanted[1], tolerance, "final state")
  for name in gradients:
    assert_close(actual[name], gradients[name], tolerance, name)


@pytest.mark.gpu
@on_gpu
def test_gpu_vmap_and_second_order(monkeypatch):
  """In bfloat16 beside the XLA form, whose products are as rough."""
  inputs = {k: jnp.asarray(v) for k, v in make_inputs(70, 1).items()}
  inputs = jax.tree.map(lambda v: v.astype(jnp.bfloat16), inputs)

  def loss(inputs, implementation):
    y = ssd(**inputs, dt_softplus=True, implementation=implementation)
    return jnp.sum(y.astype(jnp.float32) ** 2)

  twice = jax.tree.map(lambda v: jnp.stack([v, v * 0.5]), inputs)
  actual, wanted = (
    jax.vmap(jax.grad(functools.partial(loss, implementation=name)))(twice)
    for name in ("triton", "xla")
  )
  for name in wanted:
    want = np.asarray(wanted[name], np.float64)
    assert_close(actual[name], want, 3e-2, name)
