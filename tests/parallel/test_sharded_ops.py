"""Operations on local shards: same numbers, and nothing gathered."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from multihead import ops
from multihead.parallel import make_mesh, sharded_ops
from multihead.parallel.sharding import batch_sharding

MESHES = (
  dict(data=2, fsdp=2, tensor=2),
  dict(data=1, fsdp=1, tensor=8),
  dict(data=1, fsdp=2, tensor=4),
  dict(data=2, sequence=4),
  dict(data=1, sequence=4, tensor=2),
)


# Heads that divide by the tensor axis, that do not, and a single one.
CASES = tuple(
  (mesh, few, packed)
  for mesh in MESHES
  for few, packed in ((1, False), (2, True), (8, True))
)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def gathered(compiled):
  """Sizes of the results of all all-gathers in a compiled function."""
  sizes = []
  for line in compiled.as_text().splitlines():
    if re.search(r"= .* all-gather(-start)?\(", line):
      shapes = re.findall(r"\w+\[([\d,]*)\]", line.split(" all-gather")[0])
      sizes += [
        int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes
      ]
  return sizes


def value_and_grads(fn, names):
  """Value and gradients by name, of a scalar that weighs all outputs."""

  def scalar(arrays):
    out = jax.tree.leaves(fn(**arrays))
    return sum(
      jnp.sum(jnp.sin(jnp.where(jnp.isfinite(x), x, 0.0) + i))
      for i, x in enumerate(out)
    ), out

  def run(arrays, rest):
    (_, out), grads = jax.value_and_grad(
      lambda a: scalar({**a, **rest}), has_aux=True
    )(arrays)
    return out, grads

  def split_call(arrays):
    return run(
      {n: arrays[n] for n in names},
      {n: v for n, v in arrays.items() if n not in names},
    )

  return jax.jit(split_call)


class Attention(parameterized.TestCase):
  @parameterized.parameters(*CASES)
  def test_same_numbers(self, mesh, keys, packed):
    arrays = dict(
      q=normal(0, 4, 16, 8, 8),
      k=normal(1, 4, 16, keys, 8),
      v=normal(2, 4, 16, keys, 8),
    )
    names = tuple(arrays)
    if packed:
      ids = jnp.sort(
        jax.random.randint(jax.random.key(3), (4, 16), 1, 4), axis=1
      )
      arrays.update(
        q_segment_ids=ids,
        kv_segment_ids=ids,
        kv_lengths=jnp.array([16, 3, 9, 0]),
        sinks=normal(6, 8),
      )
      names += ("sinks",)
    else:
      arrays.update(
        bias=normal(4, 1, 8, 16, 16),
        mask=jax.random.bernoulli(jax.random.key(5), 0.8, (4, 1, 1, 16)),
      )
      names += ("bias",)
    options = dict(causal=True, window=(6, None), return_lse=True)
    want = value_and_grads(lambda **a: ops.attention(**a, **options), names)(
      arrays
    )
    with jax.set_mesh(make_mesh(**mesh)):
      got = value_and_grads(
        lambda **a: sharded_ops.attention(**a, **options), names
      )(arrays)
    chex.assert_trees_all_close(
      jax.device_get(got), jax.device_get(want), rtol=1e-4, atol=1e-5
    )

  def test_dropout_draws_on_every_shard_anew(self):
    """With equal inputs, equal outputs would be equal draws."""
    q, k = jnp.zeros((4, 16, 8, 8)), jnp.zeros((4, 16, 8, 8))
    v = jnp.broadcast_to(normal(0, 1, 16, 1, 8), k.shape)
    with jax.set_mesh(make_mesh(data=2, sequence=2, tensor=2)):
      step = jax.jit(
        lambda key: sharded_ops.attention(
          q, k, v, dropout_rate=0.5, dropout_key=key, kv_lengths=12
        )
      )
      outs = [np.asarray(step(jax.random.key(seed))) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(outs[0], outs[1])
    rows = np.concatenate([outs[0].reshape(-1, 8), outs[2].reshape(-1, 8)])
    # Of 4096 masks 1024 draws meet some twice; two equal shards are 512.
    self.assertGreater(len(np.unique(rows, axis=0)), 800)
    # Mean of 1024 draws of 12 weights that are 0 or 2 / 12.
    want = ops.attention(q, k, v, kv_lengths=12)[0, 0, 0]
    np.testing.assert_allclose(rows.mean(axis=0), want, atol=0.05)

  def test_decode_against_a_longer_cache(self):
    q, k, v = (
      normal(0, 4, 1, 8, 8),
      normal(1, 4, 24, 2, 8),
      normal(2, 4, 24, 2, 8),
    )
    for offset in (jnp.int32(9), jnp.array([3, 9, 0, 23])):
      want = ops.attention(q, k, v, causal=True, q_offset=offset)
      with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        got = jax.jit(
          lambda o: sharded_ops.attention(q, k, v, causal=True, q_offset=o)
        )(offset)
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

  def test_nothing_is_gathered(self):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shape = (4, 64, 8, 16)
    with jax.set_mesh(mesh):
      place = jax.NamedSharding(
        mesh, jax.P(("data", "fsdp"), None, "tensor", None)
      )
      qkv = [jax.device_put(normal(i, *shape), place) for i in range(3)]
      step = jax.jit(
        jax.grad(lambda x: jnp.sum(sharded_ops.attention(*x, causal=True) ** 2))
      )
      self.assertEqual(gathered(step.lower(qkv).compile()), [])


class Ssd(parameterized.TestCase):
  @parameterized.parameters(*CASES)
  def test_same_numbers(self, mesh, groups, packed):
    arrays = dict(
      x=normal(0, 4, 16, 8, 4),
      dt=normal(1, 4, 16, 8),
      A=-jnp.exp(normal(2, 8)),
      B=normal(3, 4, 16, groups, 6),
      C=normal(4, 4, 16, groups, 6),
      D=normal(5, 8),
      dt_bias=normal(6, 8),
      initial_state=normal(7, 4, 8, 4, 6),
    )
    names = tuple(arrays)
    if packed:
      # The same id on both sides of another one: runs count, not values.
      arrays["segment_ids"] = jnp.repeat(
        jnp.array([[1, 2, 1, 1], [1, 1, 1, 1], [2, 1, 2, 1], [1, 2, 3, 4]]),
        jnp.array([3, 4, 5, 4]),
        axis=1,
      )
    options = dict(
      dt_softplus=True,
      dt_limit=(0.2, 2.0),
      chunk_size=4,
      return_final_state=True,
    )
    want = value_and_grads(lambda **a: ops.ssd(**a, **options), names)(arrays)
    with jax.set_mesh(make_mesh(**mesh)):
      got = value_and_grads(lambda **a: sharded_ops.ssd(**a, **options), names)(
        arrays
      )
    chex.assert_trees_all_close(
      jax.device_get(got), jax.device_get(want), rtol=2e-4, atol=2e-5
    )

  def test_only_states_cross_the_sequence(self):
    """The payload is that of the states, whatever the length."""
    mesh = make_mesh(data=2, sequence=4)
    sizes = []
    for length in (64, 256):
      with jax.set_mesh(mesh):
        place = batch_sharding(mesh)
        x = jax.device_put(normal(0, 2, length, 4, 8), place)
        dt = jax.device_put(jnp.abs(normal(1, 2, length, 4)), place)
        B = jax.device_put(normal(2, 2, length, 1, 8), place)
        C = jax.device_put(normal(3, 2, length, 1, 8), place)
        step = jax.jit(lambda *a: sharded_ops.ssd(*a[:2], -jnp.ones(4), *a[2:]))
        sizes.append(sorted(gathered(step.lower(x, dt, B, C).compile())))
    self.assertEqual(sizes[0], sizes[1])
    # Per shard: one state and one decay a head, gathered from 4 shards.
    self.assertLessEqual(sum(sizes[0]), 4 * (4 * 8 * 8 + 4) * 2)
    self.assertGreater(sum(sizes[0]), 0)


@pytest.mark.parametrize(
  "error, text, change",
  [
    (ValueError, "sinks must.*N. = .4.*got .6.", dict(sinks=jnp.zeros(6))),
    (TypeError, "kv_lengths must be an integer", dict(kv_lengths=1.5)),
    (
      ValueError,
      "kv_lengths must.*B. = .2.*got .3.",
      dict(kv_lengths=jnp.zeros(3, jnp.int32)),
    ),
    (ValueError, "kv_lengths must be in 0..S = 0..8", dict(kv_lengths=9)),
  ],
)
def test_mistakes_are_told_of_the_whole_arrays(error, text, change):
  q = jnp.zeros((2, 8, 4, 8))
  with (
    jax.set_mesh(make_mesh(data=2, tensor=4)),
    pytest.raises(error, match=text),
  ):
    sharded_ops.attention(q, q, q, **change)
