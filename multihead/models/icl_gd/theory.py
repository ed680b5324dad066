"""What gradient descent and its relatives reach on in-context least squares.

Closed forms, and explicit recursions to check weights against. Everywhere the
loss is 1/2 E |prediction - y_query|^2, summed over outputs, with the query from
the law of the context and without noise; W has independent entries of mean 0
and variance `weight_variance`. A `step` is what multiplies the sum over the
context: the learning rate over N, of the loss 1/(2N) sum |W x_j - y_j|^2.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def optimal_step_and_loss(
  input_size: int,
  context_size: int,
  variance: float,
  fourth_moment: float,
  *,
  output_size: int = 1,
  weight_variance: float = 1.0,
  noise_variance: float = 0.0,
  distractors: int = 0,
) -> tuple[float, float]:
  """The best single step from W = 0, and its loss.

  With S the sum of x x^T over the honest part of the context, the loss is
  a quadratic in the step whose coefficients are E tr S and E tr S^2.

  Args:
    input_size: d; coordinates are independent and of mean zero.
    context_size: N.
    variance: of a coordinate.
    fourth_moment: of a coordinate.
    output_size: o.
    weight_variance: of the entries of W.
    noise_variance: of label noise in the context.
    distractors: targets of the context replaced by N(0, 1).

  Returns:
    (step, loss); a step of 0 has the loss o/2 weight_variance variance d.
  """
  d, n = input_size, context_size - distractors
  trace = n * d * variance
  square = (
    n * (d * fourth_moment + d * (d - 1) * variance**2)
    + n * (n - 1) * d * variance**2
  )
  # Of targets that do not follow W: their noise times the inputs it comes with.
  foreign = noise_variance * trace + distractors * d * variance
  total = square + foreign / weight_variance
  step = trace / total
  loss = weight_variance * variance * (d - trace**2 / total) / 2
  return step, output_size * loss


def gram_eigenvalues(x: Float[Array, "B N d"]) -> Float[Array, "B d"]:
  """Eigenvalues of S = sum_j x_j x_j^T of each context."""
  return jnp.linalg.eigvalsh(jnp.einsum("bni,bnj->bij", x, x))


def k_step_loss(
  eigenvalues: Float[Array, "B d"],
  steps: Float[Array, "L"],
  variance: float,
  *,
  curvature: Float[Array, "L"] | None = None,
  output_size: int = 1,
  weight_variance: float = 1.0,
) -> Float[Array, "B"]:
  """Loss after L steps from W = 0, given each context's S: no tasks needed.

  Everything that happens is a polynomial in S. A layer multiplies the error
  1 - W/W* by 1 - c s a^2 and, with curvature correction (GD++), the inputs
  a by 1 - gamma s a^2, where s are the eigenvalues of S.

  Args:
    eigenvalues: of S, see `gram_eigenvalues`.
    steps: c of each layer.
    variance: of an input coordinate of the query (isotropic).
    curvature: gamma of each layer; None is plain gradient descent.
    output_size: o.
    weight_variance: of the entries of W.

  Returns:
    The loss for each context, expected over W and query. Its mean over
    contexts is the loss; its spread says how precise that mean is.
  """
  if curvature is None:
    curvature = jnp.zeros_like(steps)

  def layer(carry, rates):
    error, inputs = carry
    step, gamma = rates
    seen = eigenvalues * inputs**2
    return (error * (1 - step * seen), inputs * (1 - gamma * seen)), None

  ones = jnp.ones_like(eigenvalues)
  (error, _), _ = jax.lax.scan(layer, (ones, ones), (steps, curvature))
  scale = output_size * weight_variance * variance / 2
  return scale * jnp.sum(error**2, axis=-1)


def best_rates(
  loss: Callable[[Float[Array, ""], Float[Array, ""], Any], Float[Array, ""]],
  data: Any,
  step_bounds: tuple[float, float],
  curvature_bounds: tuple[float, float] = (0.0, 0.0),
  *,
  points: int = 17,
  rounds: int = 5,
) -> tuple[float, float, float]:
  """The step and curvature of the least loss, by a grid that zooms in.

  Args:
    loss: of a step, a curvature (scalars) and the data; traced.
    data: arrays that it reads.
    step_bounds: where to look for the step.
    curvature_bounds: and the curvature; equal bounds fix it.
    points: of the grid along each axis.
    rounds: each spans the neighbours of the best point of the one before.

  Returns:
    (step, curvature, loss).
  """
  bounds = [step_bounds, curvature_bounds]
  counts = [1 if low == high else points for low, high in bounds]
  evaluate = jax.jit(
    lambda grid, data: jax.lax.map(lambda p: loss(p[0], p[1], data), grid)
  )
  best = (np.nan, np.nan, np.inf)
  for _ in range(rounds):
    axes = [
      np.linspace(*ends, count)
      for ends, count in zip(bounds, counts, strict=True)
    ]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    losses = evaluate(jnp.asarray(grid, jnp.float32), data)
    losses = np.asarray(losses, np.float64)
    # A step beyond the stable ones may overflow: no candidate.
    losses = np.where(np.isfinite(losses), losses, np.inf)
    index = int(losses.argmin())
    if losses[index] < best[2]:
      best = (*grid[index].tolist(), float(losses[index]))
    bounds = [
      (low, high)
      if count == 1
      else (
        max(low, value - (high - low) / (count - 1)),
        min(high, value + (high - low) / (count - 1)),
      )
      for value, (low, high), count in zip(best, bounds, counts, strict=False)
    ]
  return best


def anisotropic_preconditioner(
  covariance: Float[np.ndarray, "d d"],
  context_size: int,
  *,
  noise_variance: float = 0.0,
) -> Float[np.ndarray, "d d"]:
  """The best P of y = x_q^T P (1/N) sum_j y_j x_j for x ~ N(0, covariance).

  P = ((1 + 1/N) covariance + (tr(covariance) + noise)/N I)^-1, W ~ N(0, I).

  Args:
    covariance: of the inputs.
    context_size: N.
    noise_variance: of label noise in the context, over that of W's entries.

  Returns:
    P, float64.
  """
  covariance = np.asarray(covariance, np.float64)
  spread = (np.trace(covariance) + noise_variance) / context_size
  eye = np.eye(len(covariance))
  return np.linalg.inv((1 + 1 / context_size) * covariance + spread * eye)


def anisotropic_loss(
  covariance: Float[np.ndarray, "d d"],
  context_size: int,
  *,
  noise_variance: float = 0.0,
) -> float:
  """The loss that `anisotropic_preconditioner` reaches: 1/2 tr(C - C P C).

  Args:
    covariance: C, of the inputs.
    context_size: N.
    noise_variance: see there; W has entries of variance 1.
  """
  covariance = np.asarray(covariance, np.float64)
  best = anisotropic_preconditioner(
    covariance, context_size, noise_variance=noise_variance
  )
  return float(np.trace(covariance - covariance @ best @ covariance) / 2)


def gd_predictions(
  x: Float[Array, "B N d"],
  y: Float[Array, "B N o"],
  x_query: Float[Array, "B d"],
  steps: Sequence[float] | Float[Array, "L"],
  *,
  curvature: Sequence[float] | Float[Array, "L"] | None = None,
  preconditioner: Float[Array, "d d"] | None = None,
  initial: Float[Array, "o d"] | None = None,
) -> Float[Array, "L B o"]:
  """Predictions after each step of (preconditioned) GD or GD++, explicitly.

  Args:
    x: inputs of the context.
    y: their targets.
    x_query: the query.
    steps: c of each step.
    curvature: gamma of each step: inputs and query become (I - gamma S) x.
    preconditioner: multiplies the gradient from the right.
    initial: W0; None is zero.
  """
  steps = jnp.asarray(steps, x.dtype)
  gammas = jnp.zeros_like(steps)
  if curvature is not None:
    gammas = jnp.asarray(curvature, x.dtype)
  prediction = jnp.zeros((len(x), y.shape[-1]), x.dtype)
  if initial is not None:
    prediction = jnp.einsum("bd,od->bo", x_query, initial)
    y = y - jnp.einsum("bnd,od->bno", x, initial)
  residual = y

  def layer(carry, rates):
    x, x_query, residual, prediction = carry
    step, gamma = rates
    change = step * jnp.einsum("bno,bnd->bod", residual, x)
    if preconditioner is not None:
      change = change @ preconditioner
    prediction = prediction + jnp.einsum("bod,bd->bo", change, x_query)
    residual = residual - jnp.einsum("bod,bnd->bno", change, x)
    gram = jnp.einsum("bni,bnj->bij", x, x)
    x_query = x_query - gamma * jnp.einsum("bij,bj->bi", gram, x_query)
    x = x - gamma * jnp.einsum("bni,bij->bnj", x, gram)
    return (x, x_query, residual, prediction), prediction

  carry = (x, x_query, residual, prediction)
  return jax.lax.scan(layer, carry, (steps, gammas))[1]


def ridge_predictions(
  x: Float[Array, "B N d"],
  y: Float[Array, "B N o"],
  x_query: Float[Array, "B d"],
  penalty: float | Array,
) -> Float[Array, "B o"]:
  """Ridge regression, the best there is at penalty = noise / weight variance.

  Solved through the N x N kernel, which a vanishing penalty leaves as the
  minimum-norm solution where d > N.

  Args:
    x: inputs of the context.
    y: their targets.
    x_query: the query.
    penalty: of |W|^2 beside sum_j |W x_j - y_j|^2; positive. May be traced.
  """
  if not isinstance(penalty, jax.core.Tracer) and not penalty > 0:
    raise ValueError(
      f"penalty is {penalty}; it must be positive, or use "
      "least_squares_predictions"
    )
  kernel = jnp.einsum("bni,bmi->bnm", x, x)
  kernel = kernel + penalty * jnp.eye(x.shape[1], dtype=x.dtype)
  dual = jnp.linalg.solve(kernel, y)
  return jnp.einsum("bi,bni,bno->bo", x_query, x, dual)


def least_squares_predictions(
  x: Float[Array, "B N d"],
  y: Float[Array, "B N o"],
  x_query: Float[Array, "B d"],
) -> Float[Array, "B o"]:
  """Least squares; of many solutions that of minimum norm."""
  weights = jnp.einsum("bdn,bno->bdo", jnp.linalg.pinv(x), y)
  return jnp.einsum("bd,bdo->bo", x_query, weights)
