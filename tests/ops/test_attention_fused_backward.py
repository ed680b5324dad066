"""The Hopper kernel of ops.attention for all gradients at once.

On a CPU it runs in the interpreter, against the definition in float64, with
small tiles of work: two programs would add to the same sums at once, which the
interpreter does not order, so there is one.
"""

import dataclasses
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from multihead import ops
from multihead.ops import pallas_compat as pc
from multihead.ops.attention import positions
from multihead.ops.attention.mosaic_gpu import (
  backward,
  blocks,
  calls,
  forward,
  fused_backward,
  key_values,
  visibility,
)
from multihead.ops.attention.row_terms import row_terms
from tests.ops import test_attention_mosaic as mosaic
from tests.ops.attention_cases import draw, oracle

OPTIONS = dict(causal=False, window=(None, None), softcap=None)
NAMES = ("q", "k", "v")

needs_release = pytest.mark.skipif(
  pc.VERSION < (0, 11), reason="jax lets kernels add to inputs since 0.11"
)


def inputs(T, S, N, K, H, Hv, options, dtype="bfloat16", batch=1):
  """What the kernel takes, its static options, and the gradients in float64."""
  arrays, d_out, d_lse = draw(
    T, S, heads=N, kv_heads=K, width=H, v_width=Hv, batch=batch
  )
  low = [jnp.asarray(x, dtype) for x in (*arrays.values(), d_out)]
  *high, high_out = (np.asarray(x, np.float64) for x in low)
  options = {**OPTIONS, "q_offset": S - T, **options}
  out, lse, grads = oracle(*high, high_out, d_lse, **options)
  rows = row_terms(*map(jnp.float32, (out, lse, high_out, d_lse)))
  bounds = positions.bounds(
    options["causal"], options["window"], options["q_offset"], T, S
  )
  see = visibility.Visibility(T, S, *bounds, options["q_offset"])
  static = dict(scale=H**-0.5, softcap=options["softcap"], see=see)
  return (*low, *rows), static, [grads[name] for name in NAMES]


def assert_near(got, want):
  for name, a, b in zip(NAMES, got, want, strict=True):
    size = np.abs(b).max(initial=1e-3)
    np.testing.assert_allclose(
      np.asarray(a, np.float64), b, atol=1e-2 * size, rtol=0, err_msg=name
    )


@needs_release
@pytest.mark.parametrize(
  "shape, options, dtype",
  [
    # Both turns of both buffers, over several tiles of keys and heads.
    ((330, 300, 2, 1, 64, 64), dict(causal=True), "bfloat16"),
    ((130, 140, 1, 1, 128, 64), dict(), "float16"),
    (
      (70, 333, 1, 1, 64, 64),
      dict(window=(40, 20), q_offset=50, softcap=2.0),
      "bfloat16",
    ),
    # Rows that see nothing, a length of one.
    ((80, 9, 1, 1, 64, 64), dict(causal=True), "bfloat16"),
    ((1, 70, 1, 1, 64, 64), dict(), "bfloat16"),
  ],
)
def test_interpreted(shape, options, dtype, monkeypatch):
  monkeypatch.setattr(pc, "cores", lambda: 1)
  arrays, static, want = inputs(*shape, options, dtype)
  got = fused_backward.gradients(
    *arrays, config=blocks.Fused(), interpret=pc.interpreter(), **static
  )
  assert_near(got, want)


@needs_release
def test_logits_far_below_zero(monkeypatch):
  """Weights of keys past the end would be infinite, and 0 times them NaN."""
  monkeypatch.setattr(pc, "cores", lambda: 1)
  (q, k, v, d_out, lse, delta), static, _ = inputs(64, 70, 1, 1, 64, 64, {})
  # All products of the first number of a head: logits of about -4000.
  q, k = (jnp.zeros_like(x).at[..., 0].set(s) for x, s in ((q, 200), (k, -160)))
  got = fused_backward.gradients(
    q,
    k,
    v,
    d_out,
    jnp.full_like(lse, backward._LOG2E * (-4000 + np.log(70))),
    delta,
    config=blocks.Fused(),
    interpret=pc.interpreter(),
    **static,
  )
  want = np.asarray(d_out, np.float64).sum(1, keepdims=True) / 70
  want = np.broadcast_to(want, got[2].shape)
  np.testing.assert_allclose(np.float64(got[2]), want, atol=2e-2, rtol=2e-2)
  for x in got:
    assert np.isfinite(np.asarray(x, np.float32)).all()


@pytest.mark.parametrize("width", [64, 128])
def test_blocks_as_threads_hold_them(width):
  """Against where the hardware puts the numbers of a matrix product."""
  block = np.arange(64 * width).reshape(64, width)
  held = np.asarray(fused_backward._fold(jnp.asarray(block)))
  for thread in (0, 5, 37, 127):
    row = thread // 32 * 16 + thread % 32 // 4
    column = 2 * (thread % 4)
    mine = held.reshape(-1, 128, 4)[:, thread].reshape(-1, 2, 4)
    for i in range(width // 16):
      for r in range(2):
        columns = 16 * i + column + np.array([0, 1, 8, 9])
        assert (mine[i, r] == block[row + 8 * r, columns]).all()
  assert (np.asarray(fused_backward._unfold(jnp.asarray(held))) == block).all()


def test_every_tile_once(monkeypatch):
  """Also where two heads go together because one would fill the card."""
  monkeypatch.setattr(pc, "cores", lambda: 6)
  for row_tiles, pairs in ((2, 1), (4, 2)):
    plan = forward.order(2, 2, 1, row_tiles, 1, True, 3)
    assert plan.pairs == pairs
    tiles = [
      tuple(int(x) for x in plan.tile(jnp.int32(program), jnp.int32(turn)))
      for program in range(plan.programs)
      for turn in range(int(plan.count(jnp.int32(program))))
    ]
    assert sorted(tiles) == [
      (item, head, row)
      for item in range(2)
      for head in range(2)
      for row in range(row_tiles)
    ]


# The choice.

B, T, N, H = 1, 2048, 2, 128


def kernels(shape=(B, T, N, H), kv_shape=None, dtype="bfloat16", **options):
  """Names of the kernels that the gradients of a call take."""
  called = []

  def stand_in(name, count):
    def run(*arrays, **unused):
      called.append(name)
      results = arrays[:3] if count == 3 else arrays[1:3]
      return arrays[0] if count == 1 else tuple(results)

    return run

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      forward,
      "attend",
      lambda q, k, v, *_, **unused: (
        jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype),
        jnp.zeros((q.shape[0], q.shape[2], q.shape[1])),
      ),
    )
    patch.setattr(fused_backward, "gradients", stand_in("fused", 3))
    patch.setattr(backward, "query_gradient", stand_in("queries", 1))
    patch.setattr(key_values, "key_value_gradients", stand_in("keys", 2))
    q, k = (jax.ShapeDtypeStruct(x, dtype) for x in (shape, kv_shape or shape))
    options = {**OPTIONS, "q_offset": 0, "return_lse": False, **options}
    attend = functools.partial(calls.run, scale=1.0, **options)
    jax.eval_shape(lambda *x: jax.vjp(attend, *x[:3])[1](x[3]), q, k, k, q)
  return called


TWO = ["queries", "keys"]


@needs_release
@pytest.mark.parametrize(
  "wanted, options",
  [
    (["fused"], dict()),
    (["fused"], dict(causal=True)),
    (TWO, dict(deterministic=True)),
    (TWO, dict(causal=True, deterministic=True)),
    (TWO, dict(causal=True, window=(9, None))),
    (TWO, dict(softcap=3.0)),
    (TWO, dict(dtype="float16")),
    (TWO, dict(shape=(B, 1024, N, H))),
    (TWO, dict(shape=(B, T + 64, N, H))),
    (TWO, dict(shape=(B, T, N, 64))),
    (TWO, dict(kv_shape=(B, T, 1, H))),
    (TWO, dict(kv_shape=(B, 2 * T, N, H))),
  ],
)
def test_choice(wanted, options):
  assert kernels(**options) == wanted


def test_older_releases_take_two_kernels(monkeypatch):
  monkeypatch.setattr(pc, "VERSION", (0, 10))
  assert kernels() == TWO


# Without a GPU.


def loss(attend, *arrays):
  return jnp.sum(attend(*arrays).astype(jnp.float32))


def attend(q, k, v, causal=False):
  options = {**OPTIONS, "q_offset": 0, "return_lse": False, "causal": causal}
  return calls.run(q, k, v, scale=q.shape[3] ** -0.5, **options)


@needs_release
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("around", [lambda f: f, jax.checkpoint, jax.vmap])
def test_lowers(around, causal):
  f = around(functools.partial(attend, causal=causal))
  shape = (3, B, T, N, H) if around is jax.vmap else (B, T, N, H)
  arrays = [jax.ShapeDtypeStruct(shape, "bfloat16")] * 3
  with pc.pretended_hopper():
    text = pc.lower(
      jax.value_and_grad(functools.partial(loss, f), argnums=(0, 1, 2)),
      *arrays,
    ).as_text()
  found = len(re.findall(r"custom_call @mosaic_gpu", text))
  # The forward kernel, once more if it is not kept, this one, and its end.
  assert found == 3 + (around is jax.checkpoint)


@needs_release
def test_traces_on_shards():
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), (AxisType.Auto,) * 2)
  both = PartitionSpec("data", None, "tensor")
  mapped = jax.shard_map(attend, mesh=mesh, in_specs=both, out_specs=both)
  shape = jax.ShapeDtypeStruct((4, T, 4, H), "bfloat16")
  traced = jax.jit(
    jax.grad(functools.partial(loss, mapped), argnums=(0, 1, 2))
  ).trace(*[shape] * 3)
  assert [x.shape for x in traced.out_info] == [shape.shape] * 3


def compile_all():
  """Compiles every configuration, printing its name before it."""
  from jax.experimental import topologies

  place = topologies.get_topology_desc(
    platform="cuda",
    topology_name="1x1x1",
    topology="1x1x1",
    target_config=mosaic._H100,
  ).devices[0]
  for causal in (False, True):
    array, row = (
      jax.ShapeDtypeStruct(
        shape, dtype, sharding=jax.sharding.SingleDeviceSharding(place)
      )
      for shape, dtype in (
        ((4, 4096, 16, H), "bfloat16"),
        ((4, 16, 4096), "float32"),
      )
    )
    see = visibility.Visibility(4096, 4096, None, 0 if causal else None, 0)
    function = functools.partial(
      fused_backward.gradients,
      scale=H**-0.5,
      softcap=None,
      see=see,
      config=blocks.fused(H, H, see.full),
    )
    print("KERNEL", causal, flush=True)
    jax.jit(function).trace(*[array] * 4, row, row).lower().compile()


@needs_release
def test_compiles_without_spills():
  cuda = mosaic.cuda_folder()
  if cuda is None:
    pytest.skip(
      'compiling for CUDA needs its wheels: pip install "jax[cuda13]"'
    )
  done = subprocess.run(
    [
      sys.executable,
      "-c",
      f"from {__name__} import compile_all; compile_all()",
    ],
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
      "MOSAIC_GPU_DUMP_PTXAS": "1",
      "PATH": os.path.join(cuda, "bin") + os.pathsep + os.environ["PATH"],
      "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={cuda}",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout[-2000:]
  reports = done.stdout.split("KERNEL ")[1:]
  assert len(reports) == 2
  for report in reports:
    spills = [int(x) for x in re.findall(r"(\d+) bytes spill stores", report)]
    assert spills and max(spills) == 0, report
    assert not re.search("serializ", report, re.IGNORECASE), report


# On a GPU.


@pytest.mark.gpu
@pytest.mark.skipif(
  jax.default_backend() != "gpu", reason="needs a GPU: make test-gpu"
)
@pytest.mark.parametrize(
  "shape, options, dtype",
  [
    ((512, 512, 4, 4, 128, 128), dict(), "bfloat16"),
    ((512, 512, 4, 4, 128, 128), dict(causal=True), "bfloat16"),
    ((333, 517, 4, 2, 128, 128), dict(causal=True), "bfloat16"),
    ((517, 333, 4, 1, 64, 64), dict(causal=True), "bfloat16"),
    ((1, 300, 2, 1, 128, 128), dict(), "bfloat16"),
    ((300, 1, 2, 2, 64, 64), dict(), "bfloat16"),
    ((400, 400, 2, 2, 128, 64), dict(window=(100, 50)), "bfloat16"),
    ((300, 300, 2, 2, 64, 64), dict(causal=True, softcap=5.0), "bfloat16"),
    ((256, 256, 2, 2, 128, 128), dict(causal=True), "float16"),
  ],
)
def test_on_a_gpu(shape, options, dtype):
  arrays, static, want = inputs(*shape, options, dtype, batch=2)
  config = dataclasses.replace(blocks.Fused(), persistent=static["see"].full)
  run = jax.jit(
    functools.partial(fused_backward.gradients, config=config, **static)
  )
  got, again = run(*arrays), run(*arrays)
  assert_near(got, want)
  # Those of keys and values have one order.
  for a, b in zip(got[1:], again[1:], strict=True):
    np.testing.assert_array_equal(np.float32(a), np.float32(b))


@pytest.mark.gpu
@pytest.mark.skipif(
  jax.default_backend() != "gpu", reason="needs a GPU: make test-gpu"
)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("way", ("plain", "shards", "checkpoint"))
def test_default_gradients_on_a_gpu(causal, way):
  """Where it is the default, beside the two kernels."""
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, d_out = (
    jax.random.normal(key, (1, 2048, 2, 128), jnp.bfloat16) for key in keys
  )

  def gradients(deterministic):
    def attend(q, k, v):
      return ops.attention(
        q, k, v, causal=causal, deterministic=deterministic
      )  # fmt: skip

    if way == "checkpoint":
      attend = jax.checkpoint(attend)
    if way == "shards":
      mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
      spec = PartitionSpec("data")
      attend = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
    return jax.jit(lambda *a: jax.vjp(attend, *a)[1](d_out))(q, k, v)

  for got, want in zip(gradients(False), gradients(True), strict=True):
    got, want = np.float32(got), np.float32(want)
    np.testing.assert_allclose(got, want, atol=1e-2 * np.abs(want).max())
