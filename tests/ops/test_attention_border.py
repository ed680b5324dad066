"""The border of ops.attention: what it refuses, what cuDNN refuses."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead import ops
from tests.ops.attention_cases import QUICK_COMPILE


@pytest.mark.parametrize("T, S", [(0, 5), (4, 0)])
def test_no_queries_or_no_keys(T, S):
  q, k = jnp.ones((2, T, 4, 8)), jnp.ones((2, S, 2, 8))
  out, lse = ops.attention(q, k, k, causal=True, return_lse=True)
  assert out.shape == (2, T, 4, 8)
  assert (out == 0).all()
  assert lse.shape == (2, 4, T)
  assert (lse == -jnp.inf).all()
  sinks = jnp.arange(4.0)
  out, lse = ops.attention(q, k, k, sinks=sinks, return_lse=True)
  assert (out == 0).all()
  assert (lse == sinks[:, None]).all()


def zeros(*shape, dtype=jnp.float32):
  return jnp.zeros(shape, dtype)


GOOD = dict(q=zeros(2, 5, 4, 8), k=zeros(2, 7, 2, 8), v=zeros(2, 7, 2, 3))
INT = jnp.int32


@pytest.mark.parametrize(
  "error, text, change",
  [
    (
      ValueError,
      "takes q .B, T, N, H.*got q .2, 5, 8.",
      dict(q=zeros(2, 5, 8)),
    ),
    (ValueError, "batch sizes differ.*k .3, 7", dict(k=zeros(3, 7, 2, 8))),
    (ValueError, "length S or heads K.*v .2, 6", dict(v=zeros(2, 6, 2, 3))),
    (ValueError, "head dim H", dict(k=zeros(2, 7, 2, 9))),
    (ValueError, "5 query heads.*2 key heads", dict(q=zeros(2, 5, 5, 8))),
    (
      TypeError,
      "one dtype.*k bfloat16",
      dict(k=zeros(2, 7, 2, 8).astype("bfloat16")),
    ),
    (TypeError, "one dtype", {n: GOOD[n].astype(int) for n in "qkv"}),
    (TypeError, "mask must be bool.*bias", dict(mask=zeros(5, 7))),
    (TypeError, "bias must be floating", dict(bias=zeros(5, 7, dtype=bool))),
    (
      ValueError,
      r"mask \[2, 7\] does not.*\[2, 4, 5, 7\]",
      dict(mask=zeros(2, 7, dtype=bool)),
    ),
    (ValueError, "bias .1, 2, 1, 1. does not", dict(bias=zeros(1, 2, 1, 1))),
    (ValueError, "bias .* does not", dict(bias=zeros(1, 1, 1, 1, 1))),
    (TypeError, "q_offset must be an integer", dict(q_offset=1.5)),
    (ValueError, "q_offset must.*B. = .2.", dict(q_offset=zeros(5, dtype=INT))),
    (ValueError, "window must be .left, right.", dict(window=4)),
    (ValueError, "window must be", dict(window=(-1, 0))),
    (ValueError, "window must be", dict(window=(1, 2, 3))),
    (ValueError, "softcap must be positive", dict(softcap=0.0)),
    (ValueError, "scale must be finite", dict(scale=math.inf)),
    (
      ValueError,
      "only q_segment_ids",
      dict(q_segment_ids=zeros(2, 5, dtype=INT)),
    ),
    (
      ValueError,
      "kv_segment_ids must have shape .B, S. = .2, 7.",
      {n: zeros(2, 5, dtype=INT) for n in ("q_segment_ids", "kv_segment_ids")},
    ),
    (
      TypeError,
      "q_segment_ids must be integers",
      dict(q_segment_ids=zeros(2, 5), kv_segment_ids=zeros(2, 7, dtype=INT)),
    ),
    (TypeError, "kv_lengths must be an integer", dict(kv_lengths=2.5)),
    (
      ValueError,
      "kv_lengths must be in 0..S.*-1",
      dict(kv_lengths=-1),
    ),
    (
      ValueError,
      "kv_lengths must be in .*7, got 8",
      dict(kv_lengths=8),
    ),
    (
      ValueError,
      "kv_lengths must.*B. = .2.",
      dict(kv_lengths=zeros(3, dtype=INT)),
    ),
    (ValueError, "sinks must.*N. = .4.*got .2.", dict(sinks=zeros(2))),
    (TypeError, "sinks must be floating", dict(sinks=zeros(4, dtype=INT))),
    (ValueError, "dropout_rate must lie in .0, 1.", dict(dropout_rate=1.0)),
    (
      TypeError,
      "dropout_rate must be a number.*x",
      dict(dropout_rate="x"),
    ),
    (TypeError, "scale must be a number", dict(scale=zeros(2))),
    (ValueError, "dropout_rate=0.5 without a key", dict(dropout_rate=0.5)),
    (
      TypeError,
      "dropout_key must be one key.*str",
      dict(dropout_rate=0.5, dropout_key="key"),
    ),
    (
      ValueError,
      "dropout_rate=0.0 with a key",
      dict(dropout_key=jax.random.key(0)),
    ),
    (
      TypeError,
      "dropout_key must be one key.*float32.2",
      dict(dropout_rate=0.5, dropout_key=zeros(2)),
    ),
    (
      TypeError,
      "dropout_key must be one key",
      dict(
        dropout_rate=0.5, dropout_key=jax.random.split(jax.random.key(0), 3)
      ),
    ),
    (ValueError, "unknown implementation 'xl'", dict(implementation="xl")),
    (TypeError, "sequence of names, got 3; allowed: ", dict(implementation=3)),
  ],
)
def test_border(error, text, change):
  with pytest.raises(error, match=text):
    ops.attention(**{**GOOD, **change})


def test_border_lets_the_good_pass():
  assert ops.attention(**GOOD).shape == (2, 5, 4, 3)


def test_traced_scale_is_refused():
  f = jax.jit(lambda scale: ops.attention(**GOOD, scale=scale))
  with pytest.raises(TypeError, match="multiply q by it"):
    f(2.0)


class TestCudnn:
  """Its limits, and what it asks of jax.nn, on a GPU that is pretended."""

  @pytest.fixture
  def gpu(self, monkeypatch):
    class Client:
      platform_version = "cuda 13000"

    class Device:
      client = Client
      device_kind = "pretended"
      compute_capability = "9.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *args: [Device])
    return Device

  def inputs(self, T=8, S=8, H=16, Hv=16, dtype="bfloat16"):
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return dict(q=make(2, T, 4, H), k=make(2, S, 2, H), v=make(2, S, 2, Hv))

  @pytest.mark.parametrize(
    "text, shape, options",
    [
      (None, {}, {}),
      (None, dict(T=4, S=6), {}),
      (None, {}, dict(causal=True)),
      (None, dict(T=6), dict(causal=True, q_offset=9)),
      (None, {}, dict(causal=True, window=(3, None))),
      (None, {}, dict(window=(3, 0))),
      (None, {}, dict(window=(7, 7))),
      (None, dict(T=6), dict(causal=True, q_offset=0)),
      (None, dict(T=6), dict(q_offset=3)),
      (None, {}, dict(bias=zeros(4, 8, 8, dtype="bfloat16"))),
      ("float32", dict(dtype="float32"), {}),
      ("multiple of 8 and at most 256", dict(H=20, Hv=20), {}),
      ("at most 256", dict(H=264, Hv=264), {}),
      ("H=16 and Hv=8", dict(Hv=8), {}),
      ("lse", {}, dict(return_lse=True)),
      ("sinks need", {}, dict(sinks=zeros(4))),
      ("same bits", {}, dict(deterministic=True)),
      (
        "way of its own",
        {},
        dict(dropout_rate=0.1, dropout_key=jax.random.key(0)),
      ),
      ("without keys", {}, dict(kv_lengths=zeros(2, dtype=INT))),
      (None, {}, dict(kv_lengths=6)),
      ("even lengths", {}, dict(kv_lengths=5)),
      ("softcap", {}, dict(softcap=3.0)),
      ("mask empties", {}, dict(mask=zeros(8, 8, dtype=bool))),
      (
        "segment",
        {},
        dict(
          q_segment_ids=zeros(2, 8, dtype=INT),
          kv_segment_ids=zeros(2, 8, dtype=INT),
        ),
      ),
      ("this one is float32", {}, dict(bias=zeros(8, 8))),
      ("full axes T and S", {}, dict(bias=zeros(1, 8, dtype="bfloat16"))),
      ("even lengths", dict(T=7), {}),
      ("even lengths", dict(S=9), {}),
      (
        "bias together with a window",
        {},
        dict(bias=zeros(8, 8, dtype="bfloat16"), causal=True, window=(2, None)),
      ),
      ("right side of 0", {}, dict(window=(3, None))),
      ("right side of 0", {}, dict(window=(3, 2))),
      ("q_offset 0 only", dict(T=6), dict(causal=True)),
      (
        "known while tracing",
        {},
        dict(causal=True, q_offset=zeros(2, dtype=INT)),
      ),
      ("T <= S", dict(T=10), dict(causal=True, window=(2, None), q_offset=0)),
    ],
  )
  def test_limits(self, text, shape, options, gpu):
    said = ops.describe("attention", **self.inputs(**shape), **options)
    reason = said.reasons["cudnn"]
    if text is None:
      assert reason is None
      assert said.chosen == "cudnn"
    else:
      assert text in reason
      assert said.chosen == "xla"

  def test_limits_of_devices(self, gpu):
    reason = lambda **shape: ops.describe(
      "attention", **self.inputs(**shape)
    ).reasons["cudnn"]
    gpu.compute_capability = "8.6"
    assert reason() is None
    assert "at most 128" in reason(H=136, Hv=136)
    gpu.compute_capability = "7.5"
    assert "compute capability 8.0" in reason()
    gpu.client.platform_version = "rocm 60000"
    assert "NVIDIA" in reason()

  @pytest.mark.parametrize(
    "shape, options",
    [
      ({}, {}),
      (dict(T=4, S=6), {}),
      ({}, dict(causal=True)),
      (dict(T=6), dict(causal=True, q_offset=9)),
      ({}, dict(causal=True, window=(3, None), scale=0.7)),
      ({}, dict(window=(3, 0))),
      (dict(T=6), dict(causal=True, q_offset=0)),
      (dict(T=10), dict(causal=True, q_offset=0)),
      (
        {},
        dict(causal=True, bias=np.random.default_rng(8).normal(size=(4, 8, 8))),
      ),
    ],
  )
  def test_asks_for_the_same_attention(self, shape, options, gpu, monkeypatch):
    asked = []
    original = jax.nn.dot_product_attention

    def answer(*args, implementation, **kwargs):
      asked.append(implementation)
      return original(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    inputs = self.inputs(**shape)
    if "bias" in options:
      options = {**options, "bias": jnp.asarray(options["bias"], "bfloat16")}

    def attend(implementation):
      attention = functools.partial(
        ops.attention, **options, implementation=implementation
      )
      return jax.jit(attention, compiler_options=QUICK_COMPILE)(**inputs)

    got = attend(None)
    assert asked == ["cudnn"]
    want = attend("reference")
    np.testing.assert_allclose(
      np.asarray(got, np.float32), np.asarray(want, np.float32), atol=3e-2
    )
