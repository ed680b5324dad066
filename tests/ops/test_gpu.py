"""What only a GPU shows: cuDNN attention, SSD on tensor cores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead import ops

pytestmark = [
  pytest.mark.gpu,
  pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU: make test-gpu"
  ),
]


def normal(seed, *shape, dtype=jnp.bfloat16):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def relative(got, want):
  got, want = (np.asarray(x, np.float32) for x in (got, want))
  return np.abs(got - want).max() / np.abs(want).max()


def value_and_grads(fn, *arrays):
  def scalar(*arrays):
    out = fn(*arrays).astype(jnp.float32)
    return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

  (_, out), grads = jax.jit(
    jax.value_and_grad(scalar, argnums=tuple(range(len(arrays))), has_aux=True)
  )(*arrays)
  return out, *grads


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
  "causal, window", [(False, None), (True, None), (True, (100, 0))]
)
@pytest.mark.parametrize("N, K, H", [(8, 2, 64), (6, 2, 128), (4, 4, 256)])
def test_cudnn_attention(dtype, causal, window, N, K, H):
  """Forward and backward within cuDNN's rounding of a float32 reference."""
  q = normal(0, 2, 512, N, H, dtype=dtype)
  k, v = (normal(i, 2, 512, K, H, dtype=dtype) for i in (1, 2))
  options = dict(causal=causal, window=window)
  got = value_and_grads(
    lambda *a: ops.attention(*a, implementation="cudnn", **options), q, k, v
  )
  with jax.default_matmul_precision("highest"):
    want = value_and_grads(
      lambda *a: ops.attention(*a, implementation="reference", **options),
      *(x.astype(jnp.float32) for x in (q, k, v)),
    )
  for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
    assert relative(a, b) < 1e-2, name


def test_attention_that_cudnn_refuses_runs_elsewhere():
  q, k, v = (normal(i, 1, 64, 2, 64) for i in range(3))
  ids = jnp.repeat(jnp.arange(4), 16)[None]
  options = dict(causal=True, q_segment_ids=ids, kv_segment_ids=ids)
  with pytest.raises(NotImplementedError, match="segment"):
    ops.attention(q, k, v, implementation="cudnn", **options)
  described = ops.describe("attention", q, k, v, **options)
  assert described.chosen == "xla"


@pytest.mark.parametrize("implementation", ["xla"])
def test_chunked_attention(implementation):
  """The options that cuDNN lacks, on the GPU."""
  q, k, v = (
    normal(0, 2, 300, 8, 64),
    normal(1, 2, 300, 2, 64),
    normal(2, 2, 300, 2, 64),
  )
  ids = jnp.sort(jax.random.randint(jax.random.key(3), (2, 300), 0, 4), axis=1)
  options = dict(
    causal=True, softcap=20.0, q_segment_ids=ids, kv_segment_ids=ids
  )
  got = value_and_grads(
    lambda *a: ops.attention(*a, implementation=implementation, **options),
    q,
    k,
    v,
  )
  with jax.default_matmul_precision("highest"):
    want = value_and_grads(
      lambda *a: ops.attention(*a, implementation="reference", **options),
      *(x.astype(jnp.float32) for x in (q, k, v)),
    )
  for a, b in zip(got, want, strict=True):
    assert relative(a, b) < 1e-2


@pytest.mark.parametrize("T, G, M", [(1000, 1, 128), (512, 2, 256)])
def test_ssd(T, G, M):
  """bfloat16 products with float32 states, against the recurrence."""
  x = normal(0, 2, T, 8, 64)
  dt = jax.nn.softplus(normal(1, 2, T, 8, dtype="float32") - 3)
  A = -jnp.exp(normal(2, 8, dtype="float32"))
  B, C = normal(3, 2, T, G, M), normal(4, 2, T, G, M)
  D = normal(5, 8, dtype="float32")
  got = value_and_grads(lambda *a: ops.ssd(*a), x, dt, A, B, C, D)
  with jax.default_matmul_precision("highest"):
    want = value_and_grads(
      lambda *a: ops.ssd(*a, implementation="reference"),
      *(v.astype(jnp.float32) for v in (x, dt, A, B, C, D)),
    )
  names = ("y", "dx", "ddt", "dA", "dB", "dC", "dD")
  for name, a, b in zip(names, got, want, strict=True):
    assert relative(a, b) < 2e-2, name
