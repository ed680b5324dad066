"""Loss, accuracy and bits per byte of a language model.

    sums = empty()
    for batch in batches:
      sums = update(sums, logits, batch["targets"], batch["weights"])
    print(compute(sums, bytes_per_token=dataset.bytes_per_token))

The state holds sums, so merging batches of unequal weight is exact. Each sum is
a pair of float32, a value and what rounding took from it: one float32 stops
counting tokens at 16.7 million. All but compute can be jitted.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Sum = tuple[Float[Array, ""], Float[Array, ""]]


class Sums(NamedTuple):
  """State of the metrics; every field is a pair (value, remainder).

  Attributes:
    nll: sum of weight * negative log likelihood, in nats.
    correct: sum of the weights of targets that have the largest logit.
    weight: sum of the weights; the number of scored tokens.
  """

  nll: Sum
  correct: Sum
  weight: Sum


def empty() -> Sums:
  """The state before any batch."""
  zero = jnp.zeros((), jnp.float32)
  return Sums((zero, zero), (zero, zero), (zero, zero))


def token_losses(
  logits: Float[Array, "*B T V"], targets: Int[Array, "*B T"]
) -> tuple[Float[Array, "*B T"], Bool[Array, "*B T"]]:
  """Negative log likelihood in nats, float32, and whether the target is top.

  Of equal largest logits the first is top, so a model that knows nothing is not
  right about everything.
  """
  logits = logits.astype(jnp.float32)
  # A comparison, unlike a gather, is fused into the sum and stays where the
  # logits are if the vocabulary is sharded.
  here = jnp.arange(logits.shape[-1]) == targets[..., None]
  chosen = jnp.sum(jnp.where(here, logits, 0.0), axis=-1)
  nll = jax.nn.logsumexp(logits, axis=-1) - chosen
  return nll, jnp.argmax(logits, axis=-1) == targets


def update(
  sums: Sums,
  logits: Float[Array, "*B T V"],
  targets: Int[Array, "*B T"],
  weights: Float[Array, "*B T"],
) -> Sums:
  """Adds a batch. Where the weight is 0, nothing of logits counts, not NaN."""
  nll, correct = token_losses(logits, targets)
  return update_from_losses(sums, nll, correct, weights)


def update_from_losses(
  sums: Sums,
  nll: Float[Array, "*B T"],
  correct: Bool[Array, "*B T"],
  weights: Float[Array, "*B T"],
) -> Sums:
  """Adds a batch whose losses (nats) are computed already."""
  weights = weights.astype(jnp.float32)
  scored = weights > 0
  nll = jnp.where(scored, weights * nll.astype(jnp.float32), 0.0)
  zero = jnp.zeros((), jnp.float32)
  batch = Sums(
    nll=(jnp.sum(nll), zero),
    correct=(jnp.sum(jnp.where(correct, weights, 0.0)), zero),
    weight=(jnp.sum(weights), zero),
  )
  return merge(sums, batch)


def merge(first: Sums, second: Sums) -> Sums:
  """The state of both together."""
  return Sums(*(_add(a, b) for a, b in zip(first, second, strict=True)))


def compute(sums: Sums, *, bytes_per_token: float = 1.0) -> dict[str, float]:
  """The metrics, as Python floats.

  Args:
    sums: the state.
    bytes_per_token: UTF-8 bytes of text that a scored token stands for. 1 for
      the byte tokenizer; else the dataset's bytes_per_token, with which bits
      per byte are exact over its whole validation split.

  Returns:
    loss (nats per token), perplexity, accuracy, bits_per_byte, tokens (the sum
    of the weights). All but tokens are NaN if nothing was scored.
  """
  if bytes_per_token <= 0:
    raise ValueError(
      f"bytes_per_token is {bytes_per_token}; it must be above 0"
    )
  nll, correct, weight = (float(v) + float(r) for v, r in sums)
  loss = nll / weight if weight else math.nan
  return {
    "loss": loss,
    # Above this exp overflows; a diverged run still gets its report.
    "perplexity": math.exp(loss) if not loss > 700 else math.inf,
    "accuracy": correct / weight if weight else math.nan,
    "bits_per_byte": loss / math.log(2) / bytes_per_token,
    "tokens": weight,
  }


def _add(a: Sum, b: Sum) -> Sum:
  """The sum of two pairs, about twice as precise as float32 (two-sum)."""
  value = a[0] + b[0]
  shadow = value - a[0]
  error = (a[0] - (value - shadow)) + (b[0] - shadow)
  remainder = error + a[1] + b[1]
  # Keeps the remainder small against the value.
  total = value + remainder
  return total, remainder - (total - value)
