"""Which attention weights dropout keeps: a function of their position alone.

Nothing is stored between the passes, and how an implementation cuts the matrix
does not matter: the bits of weight (b, n, i, j) follow from two words of the
key by integer arithmetic modulo 2**32, the same in every implementation,

    row   = (b * N + n) * T + i
    state = mix32(mix32(word0 ^ row) + word1)
    bits  = mix32(state + j * 0x9E3779B9)

and the weight is kept where bits >= round(rate * 2**32). Every function here
takes arrays and scalars alike, so that kernels can use them in their bodies.
"""

import jax
import jax.numpy as jnp

# 2**32 over the golden ratio: multiples of it are spread over all words.
_STEP = 0x9E3779B9


def words(key: jax.Array) -> jax.Array:
  """Two uint32 words of a key of any kind."""
  try:
    return jax.random.bits(key, (2,), jnp.uint32)
  except (TypeError, ValueError) as e:
    raise TypeError(
      "dropout_key must be one key of jax.random, such as jax.random.key(0); "
      f"got {getattr(key, 'aval', type(key).__name__)}"
    ) from e


def threshold(rate: float) -> int:
  """Words below it are dropped: round(rate * 2**32)."""
  return min(round(rate * 2**32), 2**32 - 1)


def mix32(x: jax.Array) -> jax.Array:
  """A bijection of uint32 in which each bit depends on all: murmur3's end."""
  x = x ^ (x >> jnp.uint32(16))
  x = x * jnp.uint32(0x85EBCA6B)
  x = x ^ (x >> jnp.uint32(13))
  x = x * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> jnp.uint32(16))


def row_states(
  word0: jax.Array, word1: jax.Array, rows: jax.Array
) -> jax.Array:
  """The state of each row; `rows` are (b * N + n) * T + i, in uint32."""
  return mix32(mix32(word0 ^ rows) + word1)


def bits(states: jax.Array, columns: jax.Array) -> jax.Array:
  """The bits of weights; states and columns, uint32, broadcast together."""
  return mix32(states + columns * jnp.uint32(_STEP))


def factors(
  rate: float, states: jax.Array, columns: jax.Array, dtype: str
) -> jax.Array:
  """What the weights are multiplied by: 1 / (1 - rate) where kept, else 0.

  Args:
    rate: share to drop.
    states: uint32, from `row_states`.
    columns: uint32 key positions, broadcast against the states.
    dtype: of the result.
  """
  kept = bits(states, columns) >= jnp.uint32(threshold(rate))
  return jnp.where(kept, 1 / (1 - rate), 0).astype(dtype)


def all_row_states(words: jax.Array, B: int, N: int, T: int) -> jax.Array:
  """[B, N, T]: the states of all rows of a call."""
  # Counted in uint32: it wraps where an int32 would overflow.
  heads = jnp.arange(B * N, dtype=jnp.uint32).reshape(B, N, 1)
  rows = heads * jnp.uint32(T) + jnp.arange(T, dtype=jnp.uint32)
  return row_states(words[0], words[1], rows)
