"""The Hopper kernels of ops.selective_scan on a CPU: interpreted, and lowered.

The interpreter runs the kernels with their barriers and copies; sums across
lanes, which are written below Pallas, go through array arithmetic there, so
that those alone are shown by the GPU tests in test_selective_scan.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from multihead.ops import pallas_compat, selective_scan
from multihead.ops.dispatch import describe
from multihead.ops.selective_scan import mosaic_gpu, reference
from multihead.ops.selective_scan.mosaic_gpu import calls
from tests.ops.test_selective_scan import (
  assert_close,
  make_cotangents,
  make_inputs,
  oracle,
  segments,
)

interpreted = pytest.mark.skipif(
  pallas_compat.VERSION < (0, 11),
  reason="jax interprets these kernels since 0.11",
)
ABSENT = dict.fromkeys(("D", "z", "delta_bias", "initial_state"))
PLAIN = dict(segment_ids=None, delta_softplus=True, reverse=False)


def run(inputs, plan=None, **options):
  """The kernels' `run`, called as `selective_scan` calls it."""
  options = {**PLAIN, "return_final_state": True, **options}
  return mosaic_gpu.run(**{**ABSENT, **inputs}, plan=plan, **options)


def plan(**fields):
  return calls.Plan(interpret=pallas_compat.interpreter(), **fields)


def to_float32(tree):
  return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), tree)


# Channels that do not fill a tile, states that do not fill a lane, chunks that
# do not divide T, parts of T side by side, both ways of summing over states.
CASES = {
  "everything": (
    dict(length=21, groups=1, channels=6, state=4),
    dict(chunk=16, gradient_chunk=8, exchange=True),
    dict(segment_ids=True),
  ),
  "parts, reversed": (
    dict(length=30, groups=2, channels=64, state=16),
    dict(chunk=8, parts=3, gradient_chunk=16, gradient_parts=2, exchange=False),
    dict(segment_ids=True, reverse=True),
  ),
  "nothing optional": (
    dict(
      length=9,
      groups=1,
      channels=40,
      state=8,
      leave_out=("D", "z", "delta_bias", "initial_state"),
    ),
    dict(gradient_parts=2, gradient_chunk=8),
    dict(delta_softplus=False),
  ),
}


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_interpreted(case):
  shapes, fields, options = CASES[case]
  if options.get("segment_ids"):
    options = {**options, "segment_ids": segments(shapes["length"])}
  options = {**PLAIN, **options}
  inputs = make_inputs(**shapes)
  cotangents = make_cotangents(inputs)
  wanted, gradients = oracle(inputs, cotangents, **options)
  call = functools.partial(run, plan=plan(**fields), **options)
  (y, state), pull = jax.vjp(call, to_float32(inputs))
  actual = pull(tuple(to_float32(cotangents)))[0]
  assert_close(y, wanted[0], 2e-6, "y")
  assert_close(state, wanted[1], 2e-6, "final state")
  for name in gradients:
    assert_close(actual[name], gradients[name], 2e-6, name)
  without, _ = call(to_float32(inputs))
  assert_close(without, wanted[0], 2e-6, "y without a gradient")


@interpreted
def test_interpreted_vmap_and_second_order():
  inputs = to_float32(make_inputs(length=8, groups=1, channels=32, state=4))
  ids = jnp.asarray(segments(8))

  def norm(call, inputs):
    def loss(inputs):
      return jnp.sum(call(inputs, segment_ids=ids)[0] ** 2)

    return sum(jnp.sum(v**2) for v in jax.tree.leaves(jax.grad(loss)(inputs)))

  def exact(inputs, **options):
    return reference.run(
      **inputs, **{**PLAIN, **options}, return_final_state=True
    )

  kernels = functools.partial(run, plan=plan(chunk=8, gradient_chunk=8))
  twice = {**inputs, "u": jnp.stack([inputs["u"], -inputs["u"]])}
  axes = {**dict.fromkeys(inputs), "u": 0}
  actual, wanted = (
    (
      jax.grad(functools.partial(norm, call))(inputs),
      jax.vmap(functools.partial(norm, call), (axes,))(twice),
    )
    for call in (kernels, exact)
  )
  for name in inputs:
    assert_close(actual[0][name], np.asarray(wanted[0][name]), 2e-4, name)
  assert_close(actual[1], np.asarray(wanted[1]), 1e-5, "norms")


def shapes(batch=8, length=520, channels=64, size=16, dtype="bfloat16"):
  struct = jax.ShapeDtypeStruct
  tokens, maps = (batch, length, channels), (batch, length, 1, size)
  return dict(
    u=struct(tokens, dtype),
    delta=struct(tokens, dtype),
    A=struct((channels, size), "float32"),
    B=struct(maps, dtype),
    C=struct(maps, dtype),
    D=struct((channels,), "float32"),
    delta_bias=struct((channels,), "float32"),
  )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [3, 16, 32, 64])
@pytest.mark.parametrize("batch", [1, 300])
def test_lowers_for_a_gpu(dtype, size, batch):
  """Layouts, copies and shared memory fit, for few programs and for many."""

  def loss(inputs, ids):
    y, final = run(inputs, segment_ids=ids)
    return jnp.sum(y.astype(jnp.float32)) + jnp.sum(final)

  ids = jax.ShapeDtypeStruct((batch, 520), "int32")
  with pallas_compat.pretended_hopper():
    pallas_compat.lower(
      jax.grad(loss), shapes(batch, size=size, dtype=dtype), ids
    )


def test_inside_shard_map():
  """Traced with jax's checks of what varies over the mesh."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  sharded, whole = PartitionSpec("data"), PartitionSpec()
  specs = {
    k: sharded if len(v.shape) > 2 else whole for k, v in shapes().items()
  }
  local = jax.shard_map(
    lambda inputs: run(inputs)[0],
    mesh=mesh,
    in_specs=(specs,),
    out_specs=sharded,
  )

  def loss(inputs):
    return jnp.sum(local(inputs).astype(jnp.float32))

  out = jax.eval_shape(jax.grad(loss), shapes())
  assert {k: (v.shape, v.dtype) for k, v in out.items()} == {
    k: (v.shape, v.dtype) for k, v in shapes().items()
  }


def test_refuses_what_it_cannot_serve(monkeypatch):
  def reason(**fields):
    return describe(selective_scan, **shapes(**fields)).reasons["mosaic_gpu"]

  assert "'cpu'" in reason()
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(pallas_compat, "refusal", lambda: None)
  assert reason() is None
  assert "at most 64 states" in reason(size=65)
  with jax.enable_x64(True):
    assert "float64" in reason(dtype="float64")
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    assert "gather the operands" in reason()
