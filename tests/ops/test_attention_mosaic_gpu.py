"""The Hopper kernels of ops.attention on a GPU, over a grid of shapes.

One program a case is compiled, for outputs and all gradients; what it is
compared with is NumPy's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead import ops
from tests.ops.attention_cases import OPTIONS, Shape, check_case

pytestmark = [
  pytest.mark.gpu,
  pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU: make test-gpu"
  ),
]

SHAPES = [
  Shape(2, 256, 256, 4, 1, 64, 64),
  Shape(1, 167, 259, 3, 1, 128, 128),
  Shape(1, 259, 167, 4, 2, 64, 64),
  Shape(1, 1, 333, 4, 1, 128, 128),
  Shape(1, 200, 1, 4, 4, 64, 64),
  Shape(1, 300, 300, 4, 1, 32, 32),
  Shape(1, 300, 300, 2, 1, 72, 72),
  Shape(1, 300, 300, 2, 1, 80, 80),
  Shape(1, 300, 300, 2, 2, 96, 96),
  Shape(1, 300, 300, 2, 2, 192, 128),
  Shape(1, 300, 300, 2, 2, 256, 256),
]
# Several tiles each way, and what is left of one.
WIDE = {width: Shape(2, 300, 420, 2, 1, width, width) for width in (64, 128)}
TOLERANCE = {"bfloat16": 1.5e-2, "float16": 5e-3}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("option", ["plain", "causal"])
def test_shapes(shape, option):
  check_case(shape, option, "mosaic_gpu", "bfloat16", TOLERANCE["bfloat16"])


@pytest.mark.parametrize("width", WIDE)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, width):
  check_case(
    WIDE[width], option, "mosaic_gpu", "bfloat16", TOLERANCE["bfloat16"]
  )


@pytest.mark.parametrize("option", ["causal", "everything"])
def test_float16(option):
  check_case(WIDE[64], option, "mosaic_gpu", "float16", TOLERANCE["float16"])


@pytest.mark.parametrize(
  "option", ["causal", "segments", "lengths", "bias of positions", "dropout"]
)
def test_repeats_bit_for_bit(option):
  shape = WIDE[128]
  runs = [
    check_case(shape, option, "mosaic_gpu", "bfloat16", TOLERANCE["bfloat16"])
    for _ in range(2)
  ]
  for a, b in zip(*map(jax.tree.leaves, runs), strict=True):
    np.testing.assert_array_equal(a, b)


def test_what_lies_past_the_arrays_changes_nothing():
  """Lengths that are not a multiple of a tile, beside memory full of NaN."""
  arrays = [
    jax.random.normal(jax.random.key(i), (1, 1024, 4, 64)).astype("bfloat16")
    for i in range(3)
  ]
  used = jnp.arange(1024)[:, None, None] < 333

  @jax.jit
  def attend(fill):
    parts = (jnp.where(used, x, fill)[:, :333] for x in arrays)
    return ops.attention(*parts, causal=True, implementation="mosaic_gpu")

  got, want = attend(jnp.bfloat16(jnp.nan)), attend(jnp.bfloat16(0))
  np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_what_is_past_a_length_changes_nothing():
  """NaN in the keys of a tile that is computed: no output, no gradient."""
  lengths = jnp.array([300, 0, 128, 257])
  q, k, v = (
    jax.random.normal(jax.random.key(i), (4, 300, 2, 128)).astype("bfloat16")
    for i in range(3)
  )
  past = (jnp.arange(300) >= lengths[:, None])[..., None, None]

  @jax.jit
  def evaluate(fill):
    attend = functools.partial(
      ops.attention, kv_lengths=lengths, implementation="mosaic_gpu"
    )
    out, pull = jax.vjp(attend, q, *(jnp.where(past, fill, x) for x in (k, v)))
    return out, *pull(jnp.cos(out))

  got = evaluate(jnp.bfloat16(jnp.nan))
  for a, b in zip(got, evaluate(jnp.bfloat16(0)), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_mapped_and_differentiated_twice_on_a_gpu():
  arrays = [
    jax.random.normal(jax.random.key(i), (3, 1, 100, 2, 64)).astype("bfloat16")
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
  with jax.default_device(jax.devices("cpu")[0]):
    host = [jax.device_put(x, jax.devices("cpu")[0]) for x in arrays]
    want = seconds("reference", *(x.astype("float32") for x in host))
  for a, b in zip(got, want, strict=True):
    size = np.abs(b).max()
    np.testing.assert_allclose(
      np.asarray(a, np.float32), b, atol=3e-2 * size, rtol=0
    )
