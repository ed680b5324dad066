"""The Hopper kernels of ops.attention on a GPU, over a grid of shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead import ops
from tests.ops.test_attention_mosaic import structs

pytestmark = [
  pytest.mark.gpu,
  pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU: make test-gpu"
  ),
]

SHAPES = [
  # B, T, S, N, K, H, Hv
  (2, 512, 512, 8, 2, 64, 64),
  (1, 333, 517, 6, 2, 128, 128),
  (1, 517, 333, 6, 3, 64, 64),
  (1, 1, 777, 4, 1, 128, 128),
  (1, 300, 1, 4, 4, 64, 64),
  (1, 700, 700, 8, 1, 32, 32),
  (1, 700, 700, 2, 1, 72, 72),
  (1, 700, 700, 2, 1, 80, 80),
  (1, 700, 700, 2, 2, 96, 96),
  (1, 700, 700, 2, 2, 192, 128),
  (1, 700, 700, 2, 2, 256, 256),
]
FULL = dict(causal=False)
CAUSAL = dict(causal=True)
MORE = [
  dict(causal=True, window=(200, None)),
  dict(window=(100, 50)),
  dict(window=(None, 30), q_offset=20),
  dict(causal=True, softcap=10.0),
  dict(scale=1.0),
]


@pytest.mark.parametrize(
  "shape, options, dtype",
  [(shape, o, "bfloat16") for shape in SHAPES for o in (FULL, CAUSAL)]
  + [(shape, o, "bfloat16") for shape in SHAPES[:2] for o in MORE]
  + [(SHAPES[0], CAUSAL, "float16")],
)
def test_against_the_definition(shape, options, dtype):
  B, T, _, N, *_, Hv = shape
  keys = jax.random.split(jax.random.key(0), 5)
  q, k, v = (
    jax.random.normal(key, x.shape).astype(dtype)
    for key, x in zip(keys, structs(*shape), strict=False)
  )
  d_out = jax.random.normal(keys[3], (B, T, N, Hv)).astype(dtype)
  d_lse = jax.random.normal(keys[4], (B, N, T))

  @functools.partial(jax.jit, static_argnums=0)
  def evaluate(implementation, q, k, v):
    def attend(*arrays):
      return ops.attention(
        *arrays, return_lse=True, implementation=implementation, **options
      )

    (out, lse), pull = jax.vjp(attend, q, k, v)
    return out, lse, *pull((d_out.astype(q.dtype), d_lse))

  got = evaluate("mosaic_gpu", q, k, v)
  with jax.default_matmul_precision("highest"):
    want = evaluate("reference", *(x.astype("float32") for x in (q, k, v)))
  for name, a, b in zip(
    ("out", "lse", "dq", "dk", "dv"), got, want, strict=True
  ):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    size = np.abs(b[np.isfinite(b)]).max(initial=1e-3)
    np.testing.assert_allclose(a, b, atol=1.5e-2 * size, rtol=0, err_msg=name)
  again = evaluate("mosaic_gpu", q, k, v)
  for a, b in zip(got, again, strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_what_lies_past_the_arrays_changes_nothing():
  """Lengths that are not a multiple of a tile, beside memory full of NaN."""
  poison = jnp.full((1, 1024, 4, 64), jnp.nan, "bfloat16")
  arrays = [
    jax.random.normal(jax.random.key(i), (1, 1024, 4, 64)).astype("bfloat16")
    for i in range(3)
  ]
  attend = functools.partial(
    ops.attention, causal=True, implementation="mosaic_gpu"
  )
  want = attend(*(x[:, :333] for x in arrays))
  got = jax.jit(lambda *x: attend(*(a[:, :333] for a in x)))(
    *(
      jnp.where(jnp.arange(1024)[:, None, None] < 333, x, poison)
      for x in arrays
    )
  )
  np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_mapped_and_differentiated_twice_on_a_gpu():
  arrays = [
    jax.random.normal(jax.random.key(i), (3, 2, 200, 4, 64)).astype("bfloat16")
    for i in range(3)
  ]

  def penalty(implementation, *arrays):
    attend = functools.partial(
      ops.attention, causal=True, implementation=implementation
    )

    def loss(*arrays):
      return jnp.sum(jnp.sin(jax.vmap(attend)(*arrays).astype("float32")))

    grads = jax.grad(loss, argnums=(0, 1, 2))(*arrays)
    return sum(jnp.sum(jnp.square(g.astype("float32"))) for g in grads)

  seconds = jax.jit(jax.grad(penalty, argnums=(1, 2, 3)), static_argnums=0)
  got = seconds("mosaic_gpu", *arrays)
  with jax.default_matmul_precision("highest"):
    want = seconds("reference", *(x.astype("float32") for x in arrays))
  for a, b in zip(got, want, strict=True):
    size = np.abs(b).max()
    np.testing.assert_allclose(
      np.asarray(a, np.float32), b, atol=3e-2 * size, rtol=0
    )
