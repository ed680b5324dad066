"""Scans over a split length: the numbers of one device, a fixed payload."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from multihead import ops
from multihead.parallel import context_scan, make_mesh, sharded_ops
from multihead.parallel.sharding import batch_sharding

MESHES = (
  dict(data=2, fsdp=2, tensor=2),
  dict(data=1, sequence=8),
  dict(data=1, sequence=4, tensor=2),
)
# Groups of channels that all shards share, that split, and of one channel.
CASES = (
  (MESHES[0], 1, True, True),
  (MESHES[0], 8, False, False),
  (MESHES[1], 2, False, True),
  (MESHES[1], 1, True, False),
  (MESHES[2], 1, False, False),
  (MESHES[2], 2, True, True),
)
# 16 tokens: borders inside shards, and an id that comes back; none; one at an
# edge of shards; one a token.
SEGMENTS = jnp.array(
  [
    [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1],
    [1] * 16,
    [1] * 8 + [2] * 8,
    list(range(16)),
  ]
)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def make_arrays(groups, length=16):
  return dict(
    u=normal(0, 4, length, 8),
    delta=normal(1, 4, length, 8),
    A=-jnp.exp(normal(2, 8, 6)),
    B=normal(3, 4, length, groups, 6),
    C=normal(4, 4, length, groups, 6),
    D=normal(5, 8),
    z=normal(6, 4, length, 8),
    delta_bias=normal(7, 8) - 1,
    initial_state=normal(8, 4, 8, 6),
  )


def value_and_grads(fn, arrays):
  """Outputs, and the gradients of a scalar that weighs all of them."""

  @jax.jit
  def run(arrays):
    def scalar(arrays):
      out = fn(**arrays)
      return sum(jnp.sum(jnp.sin(x + i)) for i, x in enumerate(out)), out

    return jax.grad(scalar, has_aux=True)(arrays)

  return jax.device_get(run(arrays))


class SelectiveScan(parameterized.TestCase):
  @parameterized.parameters(*CASES)
  def test_same_numbers(self, mesh, groups, reverse, packed):
    arrays = make_arrays(groups)
    options = dict(
      segment_ids=SEGMENTS if packed else None,
      delta_softplus=True,
      reverse=reverse,
      return_final_state=True,
    )
    want = value_and_grads(
      functools.partial(ops.selective_scan, **options), arrays
    )
    with jax.set_mesh(make_mesh(**mesh)):
      got = value_and_grads(
        functools.partial(sharded_ops.selective_scan, **options), arrays
      )
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)

  def test_states_that_last_cross_every_shard(self):
    """The first token alone is not zero, and the last one feels it."""
    arrays = make_arrays(1)
    arrays = {k: arrays[k] for k in ("u", "delta", "A", "B", "C")}
    arrays["u"] = arrays["u"].at[:, 1:].set(0)
    arrays["delta"] = jnp.full_like(arrays["delta"], 0.01)
    want = ops.selective_scan(**arrays)
    with jax.set_mesh(make_mesh(data=1, sequence=8)):
      got = jax.jit(sharded_ops.selective_scan)(**arrays)
    self.assertGreater(np.abs(want[:, -1]).min(), 1e-5)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-7)

  def test_bfloat16_is_rounded_once(self):
    arrays = make_arrays(1)
    low = {k: arrays[k].astype(jnp.bfloat16) for k in ("u", "delta", "z")}
    arrays = {**arrays, **low}
    want = ops.selective_scan(**arrays, delta_softplus=True)
    with jax.set_mesh(make_mesh(data=1, sequence=8)):
      got = jax.jit(
        functools.partial(sharded_ops.selective_scan, delta_softplus=True)
      )(**arrays)
    self.assertEqual(got.dtype, jnp.bfloat16)
    differ = np.mean(np.asarray(got != want))
    # A last bit may flip where float32 sums differ; two roundings flip many.
    self.assertLess(differ, 0.02)

  def test_only_states_cross_the_sequence(self):
    """What is exchanged is in the compiled program: states, and no more."""
    mesh = make_mesh(data=2, sequence=4)
    payloads = []
    for length in (64, 256):
      arrays = make_arrays(1, length)
      arrays = {k: arrays[k][:2] for k in ("u", "delta", "B", "C")}
      with jax.set_mesh(mesh):
        arrays = jax.device_put(arrays, batch_sharding(mesh))

        def loss(arrays):
          y = sharded_ops.selective_scan(A=-jnp.ones((8, 6)), **arrays)
          return jnp.sum(y**2)

        for step in (loss, jax.grad(loss)):
          payloads.append(exchanged(jax.jit(step).lower(arrays).compile()))
    forward, backward = payloads[:2]
    self.assertEqual(forward, payloads[2])
    self.assertEqual(backward, payloads[3])
    # Four shards' states and decays of one row, 8 channels of 6; the gradient
    # also sends the states' own back. Scalars are sums of the loss.
    states = 4 * 8 * 6
    self.assertEqual(sum(n for n in forward if n > 1), 2 * states)
    self.assertLessEqual(sum(n for n in backward if n > 1), 6 * states)


def exchanged(compiled):
  """Sizes of what all collectives of a compiled function give, sorted."""
  sizes = []
  kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
  for line in compiled.as_text().splitlines():
    match = re.search(rf"= (.*?) (?:{kinds})(?:-start)?\(", line)
    for shape in re.findall(r"\w+\[([\d,]*)\]", match[1] if match else ""):
      sizes.append(int(np.prod([int(n) for n in shape.split(",") if n])))
  return sorted(sizes)


class Summaries(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_joined(self, reverse):
    """True up to the first border in each shard, counted from its start."""
    mesh = make_mesh(data=1, sequence=8)
    spec = jax.P(None, "sequence")
    with jax.set_mesh(mesh):
      got = jax.jit(
        jax.shard_map(
          lambda ids: context_scan.joined(ids, ids.shape, reverse=reverse),
          in_specs=spec,
          out_specs=spec,
        )
      )(SEGMENTS)
    want = np.zeros((4, 16), bool)
    ids = np.asarray(SEGMENTS)
    for row in range(4):
      for start in range(0, 16, 2):
        tokens = (start + 1, start) if reverse else (start, start + 1)
        back = 1 if reverse else -1
        for token in tokens:
          before = token + back
          if not 0 <= before < 16 or ids[row, before] != ids[row, token]:
            break
          want[row, token] = True
    np.testing.assert_array_equal(got, want)
