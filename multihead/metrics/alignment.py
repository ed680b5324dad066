"""How alike two predictors are, and which tokens a layer looks at.

A predictor of in-context regression is linear in its query, or nearly: its
gradient by the query, [B, o, d], is the weight that it found in the context.
Two of them align when these gradients do (section 3 of arXiv 2212.07677).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Added to norms, so that two zero gradients have the cosine 0 and not NaN.
_EPSILON = 1e-8

Predictor = Callable[[Float[Array, "B T D"]], Float[Array, "B o"]]


class Alignment(NamedTuple):
  """Means over tasks, outputs and inputs flattened together.

  Attributes:
    cosine: between the gradients; 1 is perfect.
    difference: norm of the difference of the gradients.
    prediction_difference: absolute difference of the predictions, averaged
      over outputs too.
  """

  cosine: Float[Array, ""]
  difference: Float[Array, ""]
  prediction_difference: Float[Array, ""]


def query_gradients(
  predict: Predictor, tokens: Float[Array, "B T D"], input_size: int
) -> tuple[Float[Array, "B o"], Float[Array, "B o d"]]:
  """Predictions, and their gradients by the query's first d channels.

  Args:
    predict: treats the rows of a batch apart from one another.
    tokens: the query stands last.
    input_size: d.
  """
  query = tokens[:, -1, :input_size]

  def outputs(query: Array) -> tuple[Array, Array]:
    out = predict(tokens.at[:, -1, :input_size].set(query))
    # Rows do not mix: the gradient of the sum holds that of each.
    return jnp.sum(out, axis=0), out

  gradients, predictions = jax.jacrev(outputs, has_aux=True)(query)
  return predictions, jnp.moveaxis(gradients, 0, 1)


def align(
  first: tuple[Float[Array, "B o"], Float[Array, "B o d"]],
  second: tuple[Float[Array, "B o"], Float[Array, "B o d"]],
) -> Alignment:
  """Compares predictions and gradients, as `query_gradients` gives them."""
  (p, g), (q, h) = first, second
  g, h = g.reshape(len(g), -1), h.reshape(len(h), -1)
  norms = [jnp.linalg.norm(a, axis=-1) + _EPSILON for a in (g, h)]
  return Alignment(
    cosine=jnp.mean(jnp.sum(g * h, axis=-1) / (norms[0] * norms[1])),
    difference=jnp.mean(jnp.linalg.norm(g - h, axis=-1)),
    prediction_difference=jnp.mean(jnp.abs(p - q)),
  )


class Sensitivity(NamedTuple):
  """Of a token after a layer to the tokens before it, averaged over tokens.

  Attributes:
    own: to the token of the same place.
    next: to the one after it.
    other: mean over the rest.
  """

  own: Float[Array, ""]
  next: Float[Array, ""]
  other: Float[Array, ""]


def copy_sensitivity(
  layer: Callable[[Float[Array, "B T D"]], Float[Array, "B T E"]],
  tokens: Float[Array, "B T D"],
) -> Sensitivity:
  """Which token a layer copies (section 5).

  For each token j but the last, the gradient of the sum of its channels after
  the layer by every token before it, averaged over the batch, then its norm.

  Args:
    layer: treats the rows of a batch apart from one another.
    tokens: T >= 3.

  Raises:
    ValueError: too short a sequence, which has no other tokens.
  """
  T = tokens.shape[1]
  if T < 3:
    raise ValueError(f"tokens {list(tokens.shape)}: T must be at least 3")
  sums = lambda tokens: jnp.sum(layer(tokens), axis=(0, 2))
  gradients = jax.jacrev(sums)(tokens)  # [T, B, T, D]
  norms = jnp.linalg.norm(jnp.mean(gradients, axis=1), axis=-1)[:-1]
  own = jnp.trace(norms)
  following = jnp.trace(norms[:, 1:])
  rest = (jnp.sum(norms) - own - following) / (T - 2)
  return Sensitivity(*(x / (T - 1) for x in (own, following, rest)))
