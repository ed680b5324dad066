"""Choosing the next token from its logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

# Candidates are sorted in blocks of this many at least, so that top_k = 40
# and top_k = 50 share a program.
_LEAST_CANDIDATES = 64


@dataclasses.dataclass(frozen=True)
class Strategy:
  """What of sampling is compiled in; the numbers themselves are arguments.

  Attributes:
    greedy: take the largest logit.
    candidates: how many of the largest logits are sorted and may be drawn; 0
      draws from all, unsorted.
  """

  greedy: bool
  candidates: int = 0


@dataclasses.dataclass(frozen=True)
class Settings:
  """The numbers of sampling, a pytree of scalars.

  Attributes:
    temperature: divides the logits.
    top_k: how many of the most likely tokens stay.
    top_p: the most likely tokens stay until they hold this probability.
  """

  temperature: Float[Array, ""]
  top_k: Int[Array, ""]
  top_p: Float[Array, ""]


jax.tree_util.register_dataclass(Settings)


def plan(
  vocab_size: int,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
) -> tuple[Strategy, Settings]:
  """Splits the settings of sampling into what is compiled and what is passed.

  Args:
    vocab_size: V.
    temperature: 0 takes the most likely token; top_k and top_p then change
      nothing.
    top_k: keep the k most likely tokens; None keeps all.
    top_p: keep the smallest set of most likely tokens whose probability, after
      temperature and top_k, reaches p; None keeps all. One token always stays.

  Returns:
    The strategy and the settings for `sample`.

  Raises:
    ValueError: a number outside its range.
  """
  if not 0 <= temperature < float("inf"):
    raise ValueError(
      f"temperature={temperature} must be 0 (greedy) or a positive number"
    )
  if top_k is not None and top_k < 1:
    raise ValueError(f"top_k={top_k} must be at least 1, or None for no limit")
  if top_p is not None and not 0 < top_p <= 1:
    raise ValueError(f"top_p={top_p} must be in (0, 1], or None for no limit")
  by_rank = top_k is not None and top_k < vocab_size
  by_mass = top_p is not None and top_p < 1
  settings = Settings(
    temperature=np.float32(temperature or 1.0),
    top_k=np.int32(top_k if by_rank else vocab_size),
    # Beyond 1 no rounding of the cumulated sum can cut the tail off.
    top_p=np.float32(top_p if by_mass else np.inf),
  )
  candidates = 0
  if temperature > 0 and by_rank:
    block = max(_LEAST_CANDIDATES, 1 << (top_k - 1).bit_length())
    candidates = min(block, vocab_size)
  elif temperature > 0 and by_mass:
    candidates = vocab_size
  return Strategy(temperature == 0, candidates), settings


def sample(
  logits: Float[Array, "B V"],
  rng: Array | None,
  strategy: Strategy,
  settings: Settings,
) -> Int[Array, "B"]:
  """Draws one token for each row.

  Args:
    logits: float32; tokens with a logit of -inf are never drawn.
    rng: a key; not used by the greedy strategy.
    strategy: static, from `plan`.
    settings: from `plan`.

  Returns:
    Token ids, int32. Of equal logits the lower id counts as the more likely.
  """
  if strategy.greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / settings.temperature
  if not strategy.candidates:
    return jax.random.categorical(rng, logits).astype(jnp.int32)
  best, ids = lax.top_k(logits, strategy.candidates)
  rank = jnp.arange(strategy.candidates)
  best = jnp.where(rank < settings.top_k, best, -jnp.inf)
  # A token stays if those before it have not reached p yet.
  probability = jax.nn.softmax(best, axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  keep = (before < settings.top_p) | (rank == 0)
  choice = jax.random.categorical(rng, jnp.where(keep, best, -jnp.inf))
  ids = jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]
  return ids.astype(jnp.int32)
