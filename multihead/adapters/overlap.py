"""How much of a weight's update lies in the weight's own principal subspace."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def subspace_overlap(
  kernel: Float[Array, "... D F"],
  update: Float[Array, "... D F"],
  k: int,
  *,
  side: str = "output",
) -> Float[Array, "..."]:
  """Share of an update's energy in the top-k singular directions of a weight.

  || update P ||^2 / || update ||^2 with P the projection on the first k right
  singular vectors of W (its output side, F), or on the left ones for
  side="input". A direction at random gives k / F or k / D.

  Args:
    kernel: W; axes of a stack in front.
    update: W' - W, likewise.
    k: how many directions, at most min(D, F).
    side: "output" or "input".

  Returns:
    Numbers in [0, 1]; 0 for an update of zero.

  Raises:
    ValueError: k or side is out of range.
  """
  if side not in ("output", "input"):
    raise ValueError(f"side={side!r} must be 'output' or 'input'")
  if not 1 <= k <= min(kernel.shape[-2:]):
    raise ValueError(
      f"k={k} must be between 1 and {min(kernel.shape[-2:])}, the smaller side "
      "of the weight"
    )
  kernel, update = (jnp.asarray(x, jnp.float32) for x in (kernel, update))
  left, _, right = jnp.linalg.svd(kernel, full_matrices=False)
  if side == "output":
    kept = update @ jnp.swapaxes(right[..., :k, :], -1, -2)
  else:
    kept = jnp.swapaxes(left[..., :, :k], -1, -2) @ update
  total = jnp.sum(update**2, axis=(-2, -1))
  part = jnp.sum(kept**2, axis=(-2, -1))
  return jnp.where(total > 0, part / jnp.where(total > 0, total, 1.0), 0.0)
