"""JAX's TPU kernels behind ops.attention: interpreted, and lowered for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from multihead import ops
from multihead.ops.attention import splash
from tests.ops.attention_cases import Shape, check_case

# Two blocks of rows and keys each, the second one not full.
SHAPE = Shape(1, 140, 170, 2, 1, 16, 8)
BATCH = SHAPE._replace(B=2, N=1)


@pytest.fixture
def blocks(monkeypatch):
  """Several blocks at small lengths, and the limits but not the device."""
  monkeypatch.setattr(splash, "_BLOCK", 128)
  monkeypatch.setattr(
    splash,
    "supports",
    lambda args: splash._version_limit() or splash._limit(args),
  )


@pytest.fixture
def interpreted(blocks, monkeypatch):
  monkeypatch.setattr(
    splash, "run", functools.partial(splash.run, interpret=True)
  )


@pytest.mark.parametrize(
  "option, shape, more",
  [
    ("plain", SHAPE, dict(scale=0.4)),
    ("window causal", SHAPE, dict(softcap=2.0)),
    ("sinks in empty rows", SHAPE, {}),
    ("segments", BATCH, {}),
    ("segments in disorder", SHAPE, dict(causal=True, window=(30, None))),
    ("lengths, some empty", BATCH, {}),
  ],
)
def test_interpreted(option, shape, more, interpreted):
  check_case(shape, option, "splash", "float32", 3e-5, **more)


def test_bfloat16(interpreted):
  check_case(SHAPE, "causal", "splash", "bfloat16", 4e-2)


def test_mapped(interpreted):
  x = jax.random.normal(jax.random.key(0), (2, 1, 40, 1, 8))

  def gradient(implementation):
    def loss(x, lengths):
      return jnp.sum(
        jnp.sin(
          ops.attention(
            x, x, x, kv_lengths=lengths, implementation=implementation
          )
        )
      )

    step = jax.jit(jax.vmap(jax.grad(loss)))
    return step(x, jnp.array([[40], [7]]))

  np.testing.assert_allclose(
    gradient("splash"), gradient("reference"), atol=1e-5
  )


def export(shape, dtype="bfloat16", mesh=None, **options):
  """The program of value and gradients for a TPU."""
  B, T, S, N, K, H, Hv = shape

  def loss(q, k, v):
    out, lse = ops.attention(
      q, k, v, return_lse=True, implementation="splash", **options
    )
    return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

  step = jax.grad(loss, argnums=(0, 1, 2))
  if mesh is not None:
    spec = PartitionSpec("data", None, "tensor")
    step = jax.shard_map(
      step, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec,) * 3
    )
  arrays = [
    jax.ShapeDtypeStruct(s, dtype)
    for s in ((B, T, N, H), (B, S, K, H), (B, S, K, Hv))
  ]
  exported = jax.export.export(jax.jit(step), platforms=["tpu"])(*arrays)
  return exported.mlir_module()


@pytest.mark.parametrize(
  "H, Hv, dtype",
  [
    (64, 64, "bfloat16"),
    (80, 40, "bfloat16"),
    (128, 128, "float32"),
    (256, 256, "bfloat16"),
  ],
)
def test_lowers_for_a_tpu(H, Hv, dtype, blocks):
  text = export(
    Shape(2, 300, 500, 4, 2, H, Hv),
    dtype,
    causal=True,
    window=(100, None),
    softcap=30.0,
    kv_lengths=np.array([70, 500]),
  )
  # Forward, keys and values, queries.
  assert text.count("tpu_custom_call") == 3


def test_lowers_on_shards_that_are_checked(blocks):
  mesh = jax.make_mesh(
    (2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
  )
  text = export(Shape(2, 256, 256, 4, 2, 64, 64), mesh=mesh, causal=True)
  assert text.count("tpu_custom_call") == 3
  assert "all_gather" not in text


@pytest.mark.parametrize("window", [(None, 0), (3, None), (2, 4), (0, 0)])
@pytest.mark.parametrize("offset", [-5, 0, 3])
def test_mask_of_a_block_is_that_of_its_positions(window, offset):
  mask = splash._mask_type()((16, 24), window, offset)
  left, right = window
  ahead = np.arange(24) - np.arange(16)[:, None] - offset
  want = np.ones((16, 24), bool)
  if left is not None:
    want &= ahead >= -left
  if right is not None:
    want &= ahead <= right
  for i, j in np.ndindex(4, 3):
    block = slice(4 * i, 4 * i + 4), slice(8 * j, 8 * j + 8)
    np.testing.assert_array_equal(mask[block], want[block])


@pytest.mark.parametrize(
  "text, change",
  [
    (None, dict(causal=True, q_offset=-3)),
    (None, dict(sinks=np.zeros(4, "float32"), softcap=3.0)),
    (None, dict(deterministic=True, kv_lengths=np.array([5, 9]))),
    ("float16", dict(dtype="float16")),
    ("up to 256, got Hv=264", dict(Hv=264)),
    ("no bias", dict(bias=np.zeros((1, 1), "float32"))),
    ("no mask", dict(mask=np.ones((1, 1), bool))),
    ("dropout", dict(dropout_rate=0.1, dropout_key=jax.random.key(0))),
    ("known while tracing", dict(causal=True, q_offset=np.array([1, 2]))),
    ("sees a key by its position", dict(causal=True, q_offset=-200)),
    ("sees a key by its position", dict(window=(3, 3), q_offset=400)),
  ],
)
def test_limits_and_what_a_tpu_runs(text, change, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  change = {"dtype": "bfloat16", "Hv": 64, **change}
  dtype, Hv = change.pop("dtype"), change.pop("Hv")
  q = jnp.zeros((2, 200, 4, 64), dtype)
  k, v = q[:, :, :2], jnp.zeros((2, 200, 2, Hv), dtype)
  said = ops.describe("attention", q, k, v, **change)
  if text is None:
    assert said.chosen == "splash"
  else:
    assert text in said.reasons["splash"]
    assert said.chosen == "xla"
  # Decoding has too few rows for a block.
  assert ops.describe("attention", q[:, :1], k, v).chosen == "xla"


def test_says_so_where_jax_has_changed(monkeypatch):
  monkeypatch.setattr(splash, "_kernels", lambda: object())
  assert jax.__version__ in splash._version_limit.__wrapped__()
