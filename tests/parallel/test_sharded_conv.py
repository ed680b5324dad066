"""The causal convolution on a mesh, beside the same call on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from multihead import ops
from multihead.parallel import sharded_conv

NAMES = ("ssm_heads", "head_dim")


def make(length, width, *, batch=4, channels=(2, 3), seed=0):
  draw = np.random.default_rng(seed).normal
  inputs = dict(
    x=draw(size=(batch, length, *channels)),
    kernel=draw(size=(width, *channels)),
    bias=draw(size=channels),
    initial_state=draw(size=(batch, width - 1, *channels)),
  )
  return {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}


def flat(inputs):
  lead = dict(x=2, kernel=1, bias=0, initial_state=2)
  return {k: v.reshape(*v.shape[: lead[k]], -1) for k, v in inputs.items()}


def outputs_and_gradients(call, inputs, ids):
  def loss(inputs):
    y, final = call(
      **inputs, activation="silu", segment_ids=ids, return_final_state=True
    )
    y, final = (v.reshape(*v.shape[:2], -1) for v in (y, final))
    weight = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
    return jnp.sum(y * weight) + jnp.sum(final**2), (y, final)

  gradients, out = jax.jit(jax.grad(loss, has_aux=True))(inputs)
  return out, flat(gradients)


def compare(mesh, inputs, ids, names=NAMES):
  wanted = outputs_and_gradients(ops.causal_conv1d, flat(inputs), ids)
  call = functools.partial(sharded_conv.causal_conv1d, axis_names=names)
  with jax.set_mesh(mesh):
    actual = outputs_and_gradients(call, inputs, ids)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    actual,
    wanted,
  )


def mesh_of(**axes):
  return jax.make_mesh(
    tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
  )


def segments(length, borders):
  """The borders lie one token later from row to row; ids come back."""
  ids = np.zeros((4, length), np.int32)
  for row in range(4):
    for border in borders:
      ids[row, min(border + row, length) :] += 1
  return jnp.asarray(ids % 2)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(
  "axes",
  [
    dict(data=2, tensor=2, sequence=2),
    dict(sequence=8),
    dict(data=4, tensor=2),
  ],
  ids=str,
)
def test_as_on_one_device(axes, segmented):
  # Borders before, at and behind the ends of shards of 4 and 16 tokens.
  ids = segments(32, (2, 3, 8, 13, 17, 25)) if segmented else None
  compare(mesh_of(**axes), make(32, 4), ids)


def test_shards_shorter_than_the_window():
  compare(mesh_of(sequence=8), make(8, 4), segments(8, (2,)))


def test_what_does_not_divide_stays_whole():
  mesh = mesh_of(data=2, tensor=2, sequence=2)
  compare(mesh, make(7, 3, batch=3, channels=(2, 3, 2)), None, (None,) * 3)
  inputs = make(8, 3, channels=(2, 3, 2))
  compare(mesh, inputs, segments(8, (3,)), (None, "groups", "state"))


def test_without_a_mesh():
  inputs = make(9, 4)
  y = sharded_conv.causal_conv1d(**inputs, axis_names=NAMES)
  wanted = ops.causal_conv1d(**flat(inputs))
  np.testing.assert_allclose(y.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("length", [64, 512])
def test_exchanges_no_more_for_more_tokens(length):
  """W - 1 inputs and one id a row, whatever the length."""
  inputs, ids = make(length, 4), segments(length, (5, 40))

  def run(inputs, ids):
    return sharded_conv.causal_conv1d(
      **inputs, axis_names=NAMES, segment_ids=ids, activation="silu"
    )

  mesh = mesh_of(sequence=8)
  rows = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(None, "sequence")
  )
  with jax.set_mesh(mesh):
    inputs["x"] = jax.device_put(inputs["x"], rows)
    ids = jax.device_put(ids, rows)
    text = jax.jit(run).lower(inputs, ids).compile().as_text()
  assert "all-gather" not in text and "all-to-all" not in text
  exchanges = [
    line.split(" collective-permute")[0].split("=")[1]
    for line in text.splitlines()
    if " collective-permute(" in line or " collective-permute-start(" in line
  ]
  assert exchanges
  assert all("[4,3,2,3]" in e or "[4,1]" in e for e in exchanges), exchanges
