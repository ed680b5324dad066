"""The Hopper kernels of ops.attention on a CPU: interpreted and compiled.

The interpreter runs the kernels on a CPU, barriers and copies included, against
the definition in float64. What surrounds them (`vmap`, derivatives, shards) is
tested with array arithmetic in their place.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import AxisType, PartitionSpec

from multihead import ops
from multihead.ops import pallas_compat as pc
from multihead.ops.attention.mosaic_gpu import (
  backward,
  blocks,
  calls,
  forward,
  key_values,
  limits,
  visibility,
)
from tests.ops.attention_cases import draw, oracle

WIDTHS = (64, 128, 192, 256)
KERNELS = ("forward", "queries", "keys")
OPTIONS = dict(
  causal=False, q_offset=0, window=(None, None), softcap=None, return_lse=True
)


def structs(B, T, S, N, K, H, Hv, dtype="bfloat16"):
  return tuple(
    jax.ShapeDtypeStruct(shape, dtype)
    for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, Hv))
  )


# In the interpreter.

CASES = {
  # name: (T, S, N, K, H, Hv), options
  "grouped, causal, odd": (
    (131, 197, 2, 1, 64, 64),
    dict(causal=True, q_offset=66),
  ),
  "window, softcap, wide values": (
    (70, 150, 1, 1, 24, 40),
    dict(window=(30, 40), q_offset=40, softcap=2.0),
  ),
  "rows that see nothing": ((80, 9, 1, 1, 8, 8), dict(causal=True)),
}


interpreted = pytest.mark.skipif(
  pc.VERSION < (0, 11), reason="jax interprets these kernels since 0.11"
)


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, small_blocks):
  check_interpreted(*CASES[name])


@interpreted
def test_interpreted_as_the_table_has_it():
  """Three warpgroups, and a program a tile."""
  check_interpreted((200, 200, 1, 1, 64, 64), dict(causal=True))


def check_interpreted(shape, options):
  T, S, N, K, H, Hv = shape
  arrays, d_out, d_lse = draw(
    T, S, heads=N, kv_heads=K, width=H, v_width=Hv, batch=1
  )
  q, k, v = (jnp.asarray(x, "bfloat16") for x in arrays.values())
  rounded = lambda x: np.asarray(jnp.asarray(x, "bfloat16"), np.float64)
  options = {"q_offset": S - T, **options}
  (out, lse), pull = jax.vjp(
    lambda *x: calls.run(
      *x,
      **{**OPTIONS, **options},
      scale=H**-0.5,
      interpret=pc.interpreter(),
    ),
    q,
    k,
    v,
  )
  got = out, lse, *pull((jnp.asarray(d_out, "bfloat16"), jnp.float32(d_lse)))
  want = oracle(
    *map(rounded, arrays.values()), rounded(d_out), d_lse, **options
  )
  for name, a, b in zip(
    ("out", "lse", "dq", "dk", "dv"),
    got,
    (*want[:2], *want[2].values()),
    strict=True,
  ):
    size = np.abs(b[np.isfinite(b)]).max(initial=1)
    np.testing.assert_allclose(
      np.asarray(a, np.float64), b, atol=1e-2 * size, rtol=0, err_msg=name
    )


# What surrounds the kernels.


@pytest.fixture
def arithmetic(monkeypatch):
  """Array arithmetic in place of the kernels."""

  def logits(q, k, see, scale, softcap):
    assert softcap is None
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    x = scale * jnp.einsum("btnh,bsnh->bnts", q, k)
    past = jnp.arange(see.S) > jnp.arange(see.T)[:, None] + see.offset
    return jnp.where(past & (see.right == 0), -jnp.inf, x)

  def attend(
    q, k, v, limits, *, scale, softcap, see, config, dropout, interpret
  ):
    assert limits is None
    x = logits(q, k, see, scale, softcap)
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(x), v)
    return out.astype(q.dtype), jax.nn.logsumexp(x, axis=-1)

  def both(q, k, v, d_out, lse, delta, see, scale, softcap):
    x = logits(q, k, see, scale, softcap)
    p = jnp.exp2(x * backward._LOG2E - lse[..., None])
    group = q.shape[2] // k.shape[2]
    wide_k, wide_v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    d_p = jnp.einsum("btnh,bsnh->bnts", d_out, wide_v)
    d_x = scale * p * (d_p - delta[..., None])
    join = lambda x: x.reshape(*k.shape[:3], group, -1).sum(3)
    return (
      jnp.einsum("bnts,bsnh->btnh", d_x, wide_k),
      join(jnp.einsum("bnts,btnh->bsnh", d_x, q)),
      join(jnp.einsum("bnts,btnh->bsnh", p, d_out)),
    )

  def part(which):
    def run(*arrays, see, scale, softcap, config, dropout, interpret):
      *arrays, limits = arrays
      assert limits is None
      return both(*arrays, see, scale, softcap)[which]

    return run

  monkeypatch.setattr(forward, "attend", attend)
  monkeypatch.setattr(backward, "query_gradient", part(0))
  monkeypatch.setattr(key_values, "key_value_gradients", part(slice(1, 3)))


def ours(q, k, v, causal=True):
  options = {**OPTIONS, "causal": causal, "q_offset": k.shape[1] - q.shape[1]}
  return calls.run(q, k, v, scale=q.shape[3] ** -0.5, **options)


def definition(q, k, v, causal=True):
  return ops.attention(
    q, k, v, causal=causal, return_lse=True, implementation="reference"
  )


def random(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def assert_close(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_mapped_over_some_arrays(arithmetic):
  q, k, v = (
    random(0, 3, 2, 5, 4, 8),
    random(1, 2, 7, 2, 8),
    random(2, 2, 7, 2, 8),
  )
  v = jnp.stack([v, 2 * v, 3 * v], axis=1)

  def evaluate(attend, *arrays):
    mapped = jax.vmap(attend, in_axes=(0, None, 1))
    results, pull = jax.vjp(mapped, *arrays)
    return results, pull(jax.tree.map(jnp.cos, results))

  evaluate = jax.jit(evaluate, static_argnums=0)
  assert_close(evaluate(ours, q, k, v), evaluate(definition, q, k, v))


def test_second_derivatives(arithmetic):
  arrays = random(0, 2, 5, 4, 8), random(1, 2, 7, 2, 8), random(2, 2, 7, 2, 8)

  def penalty(attend, *arrays):
    def loss(*arrays):
      out, lse = attend(*arrays)
      return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    grads = jax.grad(loss, argnums=(0, 1, 2))(*arrays)
    return sum(jnp.sum(jnp.tanh(g)) for g in grads)

  seconds = jax.jit(jax.grad(penalty, argnums=(1, 2, 3)), static_argnums=0)
  assert_close(seconds(ours, *arrays), seconds(definition, *arrays))


@pytest.mark.parametrize(
  "policy, kernels",
  [
    (None, 4),
    (
      checkpoint_policies.save_only_these_names(
        "attention_out", "attention_lse"
      ),
      3,
    ),
  ],
)
def test_a_policy_keeps_the_forward_pass(policy, kernels):
  saved = jax.checkpoint(lambda *x: ours(*x)[0], policy=policy)

  def loss(*arrays):
    return jnp.sum(jnp.sin(saved(*arrays).astype(jnp.float32)))

  with pc.pretended_hopper():
    text = pc.lower(
      jax.value_and_grad(loss, argnums=(0, 1, 2)),
      *structs(1, 128, 128, 2, 2, 64, 64),
    ).as_text()
  assert len(re.findall(r"custom_call @mosaic_gpu", text)) == kernels


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [64, 192])
def test_traces_on_shards(causal, width):
  """With the type checks of shard_map, where keys are the same on all."""
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), (AxisType.Auto,) * 2)
  both, heads = (
    PartitionSpec("data", None, "tensor"),
    PartitionSpec(None, None, "tensor"),
  )
  mapped = jax.shard_map(
    functools.partial(ours, causal=causal),
    mesh=mesh,
    in_specs=(both, heads, both),
    out_specs=(both, PartitionSpec("data", "tensor")),
  )

  def loss(q, k, v):
    # Each shard of the batch reads the same keys.
    out, lse = mapped(q, k[:1], v)
    return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

  shapes = structs(4, 200, 200, 4, 2, width, width)
  traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes)
  assert [x.shape for x in jax.tree.leaves(traced.out_info)] == [
    x.shape for x in shapes
  ]


# Without a GPU.

# What is compiled: by name, whether rows see all keys, and `Limits`.
IDS = ("row_ids", "column_ids")
VARIANTS = {
  "full": (True, ()),
  "causal": (False, ()),
  "segments": (False, IDS),
  "lengths": (True, ("lengths",)),
  "offsets": (False, ("offsets",)),
  "bias": (False, ("bias",)),
  "dropout": (True, ("states",)),
  "all": (False, ("offsets", "lengths", *IDS, "bias", "states")),
}


def given_arrays(names, batch, heads, length):
  """`Limits` of shapes."""
  int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  every = dict(
    offsets=int32(batch),
    lengths=int32(batch),
    row_ids=int32(batch, length),
    column_ids=int32(batch, length),
    bias=jax.ShapeDtypeStruct((1, heads, length, length), jnp.float32),
    states=jax.ShapeDtypeStruct((batch, heads, length), jnp.uint32),
  )
  return limits.Limits(**{name: every[name] for name in names})


def kernel(direction, width, full, dtype="bfloat16", length=4096, given=()):
  """A kernel with its options, and the shapes of what it takes."""
  see = visibility.Visibility(length, length, None, None if full else 0, 0)
  table = {
    "forward": (forward.attend, blocks.forward),
    "queries": (backward.query_gradient, blocks.queries),
    "keys": (key_values.key_value_gradients, blocks.keys),
  }
  function, choose = table[direction]
  extra = given_arrays(given, 4, 16, length)
  config = choose(width, width, full and not extra.moving)
  function = functools.partial(
    function,
    scale=width**-0.5,
    softcap=None,
    see=see,
    config=blocks.biased(config) if "bias" in given else config,
    dropout=0.1 if "states" in given else 0.0,
  )
  arrays = structs(4, length, length, 16, 16, width, width, dtype)
  if direction != "forward":
    row = jax.ShapeDtypeStruct((4, 16, length), jnp.float32)
    arrays = *arrays, arrays[0], row, row
  return function, (*arrays, extra) if given else arrays


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("direction", KERNELS)
def test_every_configuration_lowers(direction, width, full):
  function, arrays = kernel(direction, width, full)
  with pc.pretended_hopper():
    assert "mosaic_gpu" in pc.lower(function, *arrays).as_text()


@pytest.mark.parametrize("variant", list(VARIANTS)[2:])
@pytest.mark.parametrize("direction", KERNELS)
def test_every_option_lowers(direction, variant):
  full, given = VARIANTS[variant]
  function, arrays = kernel(direction, 128, full, length=1000, given=given)
  with pc.pretended_hopper():
    assert "mosaic_gpu" in pc.lower(function, *arrays).as_text()


def test_every_device_has_a_size_for_every_call():
  for table in blocks.TABLES.values():
    for sizes in (table.forward, table.queries, table.keys):
      assert {full for _, full in sizes} == {False, True}
      assert all((256, full) in sizes for full in (False, True))


_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Bytes a thread may store for want of registers. Without options, that is
# outside of the loop without a mask.
SPILLS = {
  ("forward", 64, "causal"): 4,
  ("forward", 128, "dropout"): 4,
  ("keys", 64, "segments"): 28,
  ("keys", 64, "offsets"): 4,
  ("keys", 64, "dropout"): 28,
  ("keys", 128, "full"): 4,
  ("keys", 128, "segments"): 4,
  ("keys", 128, "offsets"): 4,
  ("keys", 128, "bias"): 16,
  ("keys", 128, "dropout"): 40,
  ("keys", 128, "all"): 40,
}


def compile_all():
  """Prints, kernel by kernel, what the assembler says; in its own process."""
  from jax.experimental import topologies
  from jax.sharding import SingleDeviceSharding

  device = topologies.get_topology_desc(
    platform="cuda",
    topology_name="1x1x1",
    topology="1x1x1",
    target_config=_H100,
  ).devices[0]
  place = SingleDeviceSharding(device)
  for direction in KERNELS:
    for width in (64, 128):
      for variant, (full, given) in VARIANTS.items():
        function, arrays = kernel(direction, width, full, given=given)
        arrays = jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
          arrays,
        )
        print("KERNEL", direction, width, variant, flush=True)
        jax.jit(function).trace(*arrays).lower().compile()


def cuda_folder():
  """The assembler's, beside a plugin that compiles for CUDA, or None."""
  for name in ("jax_plugins", "nvidia"):
    if importlib.util.find_spec(name) is None:
      return None
  if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
    return None
  for folder in importlib.util.find_spec("nvidia").submodule_search_locations:
    folder = os.path.join(folder, "cu13")
    if os.path.exists(os.path.join(folder, "bin", "ptxas")):
      return folder
  return None


def test_compiles_without_spills():
  cuda = cuda_folder()
  if cuda is None:
    pytest.skip(
      'compiling for CUDA needs its wheels: pip install "jax[cuda13]"'
    )
  done = subprocess.run(
    [
      sys.executable,
      "-c",
      "from tests.ops import test_attention_mosaic as t; t.compile_all()",
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
  assert len(reports) == 6 * len(VARIANTS)
  for report in reports:
    name = report.splitlines()[0]
    direction, width, variant = name.split()
    allowed = SPILLS.get((direction, int(width), variant), 0)
    spills = [int(x) for x in re.findall(r"(\d+) bytes spill stores", report)]
    assert spills, report
    assert max(spills) <= allowed, name
    # Products that wait for one another where they need not.
    assert not re.search("serializ", report, re.IGNORECASE), name


# The choice.


@pytest.fixture
def hopper(monkeypatch):
  class Client:
    platform_version = "cuda 13000"

  class Device:
    client = Client
    device_kind = "pretended"
    compute_capability = "9.0"

  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda *args: [Device])
  return Device


def test_needs_a_hopper_gpu():
  said = ops.describe("attention", *structs(1, 64, 64, 2, 2, 64, 64))
  assert "needs a Hopper GPU" in said.reasons["mosaic_gpu"]


@pytest.mark.parametrize(
  "shape, chosen",
  [
    ((2, 512, 512, 4, 2, 128, 128), "mosaic_gpu"),
    ((2, 513, 517, 4, 2, 64, 128), "mosaic_gpu"),
    ((2, 512, 512, 4, 2, 96, 96), "cudnn"),
    ((2, 513, 512, 4, 2, 96, 96), "mosaic_gpu"),
    ((2, 32, 512, 4, 2, 128, 128), "cudnn"),
    ((2, 1, 512, 4, 2, 128, 128), "xla"),
  ],
)
def test_preference(shape, chosen, hopper):
  assert ops.describe("attention", *structs(*shape)).chosen == chosen
  hopper.compute_capability = "10.0"
  said = ops.describe("attention", *structs(*shape))
  assert "9.0" in said.reasons["mosaic_gpu"]


@pytest.mark.parametrize(
  "text, options",
  [
    (None, dict(causal=True, softcap=3.0, window=(9, 2), return_lse=True)),
    ("positive scale", dict(scale=-1.0)),
  ],
)
def test_limits_of_options(text, options, hopper):
  said = ops.describe("attention", *structs(1, 64, 64, 2, 2, 64, 64), **options)
  reason = said.reasons["mosaic_gpu"]
  assert reason is None if text is None else text in reason


UNTRIED = {
  "bias": dict(bias=np.zeros((64, 64), np.float32)),
  "mask": dict(mask=np.ones((64, 64), bool)),
  "segments": dict.fromkeys(
    ("q_segment_ids", "kv_segment_ids"), np.zeros((1, 64), np.int32)
  ),
  "offsets": dict(causal=True, q_offset=np.zeros(1, np.int32)),
  "lengths": dict(kv_lengths=np.zeros(1, np.int32), deterministic=True),
  "dropout": dict(dropout_rate=0.1, dropout_key=np.zeros(2, np.uint32)),
}


@pytest.mark.parametrize("name", UNTRIED)
def test_what_no_gpu_has_confirmed_needs_the_name(name, hopper):
  arrays = structs(1, 64, 64, 2, 2, 64, 64)
  describe = functools.partial(
    ops.describe, "attention", *arrays, **UNTRIED[name]
  )
  assert describe().chosen not in ("mosaic_gpu", None)
  assert describe(implementation="mosaic_gpu").chosen == "mosaic_gpu"


@pytest.mark.parametrize(
  "text, H, options",
  [
    ("bias for head dims up to 128", 192, UNTRIED["bias"]),
    ("mask for head dims up to 128", 192, UNTRIED["mask"]),
    (None, 192, UNTRIED["segments"]),
  ],
)
def test_limits_of_wide_heads(text, H, options, hopper):
  said = ops.describe("attention", *structs(1, 64, 64, 2, 2, H, H), **options)
  reason = said.reasons["mosaic_gpu"]
  assert reason is None if text is None else text in reason


@pytest.mark.parametrize(
  "text, shape, dtype",
  [
    ("float32", (1, 64, 64, 2, 2, 64, 64), "float32"),
    ("H=20", (1, 64, 64, 2, 2, 20, 64), "bfloat16"),
    ("Hv=264", (1, 64, 64, 2, 2, 64, 264), "bfloat16"),
  ],
)
def test_limits_of_arrays(text, shape, dtype, hopper):
  said = ops.describe("attention", *structs(*shape, dtype))
  assert text in said.reasons["mosaic_gpu"]
