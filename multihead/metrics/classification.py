"""Accuracy and its kin, from sums over batches.

sums = update(logits, labels, weights)   # of one batch; sums add up
print(compute(sums))
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from multihead.metrics.language_modelling import token_losses


class Sums(NamedTuple):
  """What batches add up to.

  Attributes:
    nll: sum of weight * negative log likelihood, in nats.
    top5: weight of the examples whose label is among the five likeliest.
    confusion: [C, C], weight of the examples of class i taken for class j.
  """

  nll: Float[Array, ""]
  top5: Float[Array, ""]
  confusion: Float[Array, "C C"]


def update(
  logits: Float[Array, "B C"],
  labels: Int[Array, "B"],
  weights: Float[Array, "B"],
) -> Sums:
  """The sums of one batch; nothing counts where the weight is 0.

  Of equal logits the first is the likeliest.
  """
  nll, _ = token_losses(logits, labels)
  weights = weights.astype(jnp.float32)
  classes = logits.shape[-1]
  taken = jnp.argmax(logits, axis=-1)
  true = jax.nn.one_hot(labels, classes) * weights[:, None]
  confusion = true.T @ jax.nn.one_hot(taken, classes)
  own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
  above = jnp.sum(logits > own, axis=-1)
  return Sums(
    nll=jnp.sum(jnp.where(weights > 0, weights * nll, 0.0)),
    top5=jnp.sum(jnp.where(above < 5, weights, 0.0)),
    confusion=confusion,
  )


def compute(sums: Sums) -> dict[str, float]:
  """Numbers of all batches together.

  Returns:
    loss (nats), accuracy, error = 1 - accuracy, mean_class_accuracy (over the
    classes that occur), matthews (the correlation of labels and predictions,
    0 where it is not defined), and with more than five classes top5_accuracy.
  """
  confusion = np.asarray(sums.confusion, np.float64)
  total = confusion.sum()
  if total == 0:
    raise ValueError("no example has been counted")
  size, taken = confusion.sum(axis=1), confusion.sum(axis=0)
  hits = np.trace(confusion)
  there = size > 0
  found = {
    "loss": float(sums.nll) / total,
    "accuracy": hits / total,
    "error": 1 - hits / total,
    "mean_class_accuracy": (np.diag(confusion)[there] / size[there]).mean(),
  }
  spread = (total**2 - size @ size) * (total**2 - taken @ taken)
  together = hits * total - size @ taken
  found["matthews"] = together / np.sqrt(spread) if spread > 0 else 0.0
  if len(size) > 5:
    found["top5_accuracy"] = float(sums.top5) / total
  return {name: float(value) for name, value in found.items()}
