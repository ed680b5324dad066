"""The choice of implementations, its messages, and `describe`."""

import types

import jax
import jax.numpy as jnp
import pytest
from absl import logging

from multihead import ops
from multihead.ops import dispatch


def implementation(limit):
  """A module whose `supports` answers with `limit(args)`."""
  module = types.SimpleNamespace()
  module.supports = limit
  module.run = lambda **args: None
  return module


FAST = implementation(lambda args: "needs an even x" if args["x"] % 2 else None)
SMALL = implementation(
  lambda args: "needs x below 10" if args["x"] >= 10 else None
)
ALWAYS = implementation(lambda args: None)
TABLE = {"fast": FAST, "small": SMALL, "always": ALWAYS}


def select(x, implementation, preference=("fast", "small"), op="op"):
  return dispatch.select(op, TABLE, preference, implementation, {"x": x})


@pytest.mark.parametrize(
  "x, implementation, chosen",
  [
    (2, None, FAST),
    (3, None, SMALL),
    (2, "always", ALWAYS),
    (12, "fast", FAST),
    (3, ("fast", "always"), ALWAYS),
    (3, ["small", "fast"], SMALL),
    (12, ["small", "fast"], FAST),
  ],
)
def test_choice(x, implementation, chosen):
  assert select(x, implementation) is chosen


def test_none_does_not_leave_the_preference():
  with pytest.raises(NotImplementedError) as error:
    select(13, None)
  text = str(error.value)
  assert "fast: needs an even x" in text
  assert "small: needs x below 10" in text
  assert "implementation='always' supports these arguments" in text


def test_named_one_never_falls_back():
  with pytest.raises(NotImplementedError) as error:
    select(3, "fast")
  text = str(error.value)
  assert "'fast' refused: needs an even x" in text
  assert "implementation='small' supports" in text
  with pytest.raises(NotImplementedError, match="no implementation supports"):
    dispatch.select("op", {"fast": FAST}, ("fast",), "fast", {"x": 3})


def test_unknown_name_names_the_allowed_ones():
  with pytest.raises(ValueError, match="'smal'.*did you mean 'small'.*fast"):
    select(2, "smal")
  # Also where an earlier name would serve.
  with pytest.raises(ValueError, match="unknown implementation 'gpu'"):
    select(2, ("fast", "gpu"))
  with pytest.raises(ValueError, match="empty sequence"):
    select(2, ())


def test_logs_once_per_shape_and_choice(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, "info", lambda *args: lines.append(args))
  monkeypatch.setattr(dispatch, "_logged", set())
  table = {"always": ALWAYS}
  for shape in ((2, 3), (2, 3), (4, 3), (2, 3)):
    args = {"x": jnp.zeros(shape), "y": None}
    dispatch.select("op", table, ("always",), None, args)
  words = [line[0] % line[1:] for line in lines]
  assert words == [
    "ops.op: always runs x=float32[2,3]",
    "ops.op: always runs x=float32[4,3]",
  ]


def arrays(kind=jnp.zeros):
  shape = (1, 8, 2, 4)
  if kind is jax.ShapeDtypeStruct:
    return [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3
  return [kind(shape)] * 3


@pytest.mark.parametrize("kind", [jnp.zeros, jax.ShapeDtypeStruct])
@pytest.mark.parametrize("op", ["attention", ops.attention])
def test_describe(op, kind):
  said = ops.describe(op, *arrays(kind), causal=True)
  assert said.chosen == "xla"
  assert said.reasons["xla"] is None
  assert said.reasons["reference"] is None
  assert "GPU" in said.reasons["cudnn"]
  lines = str(said).splitlines()
  assert "q=float32[1,8,2,4]" in lines[0]
  assert "causal=True" in lines[0]
  assert any(line.startswith("-> xla") for line in lines)


def test_describe_follows_the_name_and_does_not_raise_the_refusal():
  said = ops.describe("attention", *arrays(), implementation="reference")
  assert said.chosen == "reference"
  said = ops.describe("attention", *arrays(), implementation="cudnn")
  assert said.chosen is None
  assert "implementation='xla' supports" in str(said)
  with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
    ops.attention(*arrays(), implementation="cudnn")
  # The description left nothing behind: the operation runs again.
  assert ops.attention(*arrays()).shape == (1, 8, 2, 4)


def test_describe_works_under_jit_and_for_every_operation():
  q, k, v = arrays()

  @jax.jit
  def f(q):
    assert ops.describe("linear_attention", q, k, v).chosen == "xla"
    return q

  f(q)
  x, dt, a, b = q, q[..., 0], q[0, 0, :, 0], q[:, :, :1]
  assert ops.describe("ssd", x, dt, a, b, b).chosen == "xla"
  x, kernel = jnp.zeros((1, 8, 4)), jnp.zeros((3, 4))
  assert ops.describe(ops.causal_conv1d, x, kernel).chosen == "xla"


def test_describe_refuses_what_it_cannot_describe():
  with pytest.raises(ValueError, match="'atention' .did you mean 'attention'"):
    ops.describe("atention", *arrays())
  with pytest.raises(ValueError, match="chooses no implementation"):
    ops.describe(lambda x: x, jnp.zeros(2))
  with pytest.raises(ValueError, match="q and k differ in head dim H"):
    ops.describe("attention", jnp.zeros((1, 8, 2, 5)), *arrays()[1:])
