"""The bits of attention's dropout: even, independent, and everywhere the same.

That implementations keep the weights which these bits say, forward and
backward, is a case of test_attention.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead import ops
from multihead.ops.attention import dropout
from tests.ops.attention_cases import draw


def all_bits(key, B, N, T, S):
  """[B, N, T, S] uint32."""
  states = dropout.all_row_states(dropout.words(key), B, N, T)
  return np.asarray(
    dropout.bits(states[..., None], jnp.arange(S, dtype=jnp.uint32))
  )


def test_mix32_is_murmur3s():
  # Published values of its 32-bit finaliser.
  for x, want in ((0, 0), (1, 0x514E28B7), (0xFFFFFFFF, 0x81F16F39)):
    assert int(dropout.mix32(jnp.uint32(x))) == want


def chi_square(counts):
  """Distance from even counts, in standard deviations."""
  mean = counts.mean()
  free = counts.size - 1
  return (np.sum((counts - mean) ** 2) / mean - free) / np.sqrt(2 * free)


@pytest.mark.parametrize("seed", [0, 1])
def test_even_in_every_part_of_the_word(seed):
  bits = all_bits(jax.random.key(seed), 2, 3, 128, 128)
  for shift in (0, 8, 16, 24):
    counts = np.bincount((bits.ravel() >> shift) & 255, minlength=256)
    assert abs(chi_square(counts)) < 4, shift
  # And along each axis, for the first and last of its slices.
  for axis in range(4):
    for part in (0, -1):
      top = np.take(bits, part, axis=axis).ravel() >> 28
      assert abs(chi_square(np.bincount(top, minlength=16))) < 4


@pytest.mark.parametrize(
  "keys", ["random.key", "PRNGKey", "rbg", "folded in", "split"]
)
def test_independent_along_every_axis_and_between_keys(keys):
  """Correlations of what is kept are those of coins, 4 deviations at most."""
  base = jax.random.key(3)
  first, second = {
    "random.key": (jax.random.key(0), jax.random.key(1)),
    "PRNGKey": (jax.random.PRNGKey(0), jax.random.PRNGKey(1)),
    "rbg": (jax.random.key(0, impl="rbg"), jax.random.key(1, impl="rbg")),
    "folded in": (jax.random.fold_in(base, 0), jax.random.fold_in(base, 1)),
    "split": jax.random.split(base),
  }[keys]
  coin = lambda key: 2.0 * (all_bits(key, 4, 4, 64, 64) >= 2**31) - 1
  kept, other = coin(first), coin(second)
  bound = 4 / np.sqrt(kept.size)
  assert abs(kept.mean()) < bound
  assert abs((kept * other).mean()) < bound
  for axis in range(4):
    for step in (1, 2, 3, 16, 32):
      size = kept.shape[axis] - step
      if size > 0:
        low, high = (
          np.take(kept, np.arange(size) + start, axis) for start in (0, step)
        )
        assert abs((low * high).mean()) < 4 / np.sqrt(low.size), (axis, step)
        # Along the diagonals too: what a hash of i + j would repeat.
  diagonal = kept[:, :, 1:, :-1] * kept[:, :, :-1, 1:]
  assert abs(diagonal.mean()) < 4 / np.sqrt(diagonal.size)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_expectation_is_attention_without_dropout(rate):
  arrays, *_ = draw(5, 30, heads=2, kv_heads=1, batch=1)
  q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays.values())
  samples = 1500

  @jax.jit
  @jax.vmap
  def sample(key):
    return ops.attention(
      q,
      k,
      v,
      dropout_rate=rate,
      dropout_key=key,
      return_lse=True,
      implementation="reference",
    )

  outs, lse = sample(jax.random.split(jax.random.key(0), samples))
  want, want_lse = ops.attention(q, k, v, return_lse=True)
  deviation = np.std(outs, axis=0) / np.sqrt(samples)
  off = np.abs(np.mean(outs, axis=0) - want) / deviation
  assert off.max() < 4.5
  np.testing.assert_allclose(
    lse, np.broadcast_to(want_lse, lse.shape), atol=1e-5
  )


def test_share_that_is_kept_is_the_rates():
  columns = jnp.arange(1 << 16, dtype=jnp.uint32)
  for rate in (0.05, 0.25, 1 - 2**-10):
    states = dropout.row_states(
      jnp.uint32(1), jnp.uint32(2), jnp.arange(4, dtype=jnp.uint32)
    )
    factors = dropout.factors(rate, states[:, None], columns, "float32")
    kept = np.asarray(factors) > 0
    np.testing.assert_allclose(factors[kept], 1 / (1 - rate), rtol=1e-6)
    spread = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) < 4 * spread
  # A rate that rounds to one still keeps what it can.
  assert dropout.threshold(1 - 2**-53) == 2**32 - 1


def test_one_key_one_mask_in_every_call():
  arrays, *_ = draw(9, 12)
  q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays.values())
  attend = jax.jit(
    lambda seed: ops.attention(
      q, k, v, dropout_rate=0.5, dropout_key=jax.random.key(seed)
    )
  )
  np.testing.assert_array_equal(attend(1), attend(1))
  assert np.abs(attend(1) - attend(2)).max() > 0.1
