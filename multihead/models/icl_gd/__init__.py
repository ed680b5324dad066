"""Transformers learn in context by gradient descent, arXiv 2212.07677.

`network` is the model, `weights` the constructions that make it gradient
descent, `theory` what gradient descent and its relatives reach.
"""

from typing import Any

from multihead.models.icl_gd.network import ICLGD, InContextAttention
from multihead.models.icl_gd.theory import (
  anisotropic_loss,
  anisotropic_preconditioner,
  best_rates,
  gd_predictions,
  gram_eigenvalues,
  k_step_loss,
  least_squares_predictions,
  optimal_step_and_loss,
  ridge_predictions,
)
from multihead.models.icl_gd.weights import (
  copy_weights,
  gd_weights,
  gdpp_weights,
  interpolate,
  invariants,
  learned_preconditioner,
  multi_head_gd_weights,
  online_gd,
)

# The networks of the paper's experiments, in the order it tells them.
VARIANTS: dict[str, dict[str, Any]] = {
  # Section 3: one layer, the same layer twice, layers of their own, and two
  # softmax heads in place of a linear one.
  "one_layer": dict(),
  "two_layer": dict(num_layers=2),
  "deep": dict(num_layers=5, recurrent=False, clip=10.0),
  "softmax": dict(attention="softmax", num_heads=2),
  # Section 4: an MLP in front of one layer.
  "sine": dict(embedding_size=40, embedding_mlp=4),
  # Section 5: x and y in tokens of their own, copied together by softmax.
  "copy": dict(
    num_layers=2, recurrent=False, first_layer_softmax=True,
    positions="concat", position_size=10, init_scale=0.02,
  ),
}  # fmt: skip

__all__ = [
  "ICLGD",
  "VARIANTS",
  "InContextAttention",
  "anisotropic_loss",
  "anisotropic_preconditioner",
  "best_rates",
  "copy_weights",
  "gd_predictions",
  "gd_weights",
  "gdpp_weights",
  "gram_eigenvalues",
  "interpolate",
  "invariants",
  "k_step_loss",
  "learned_preconditioner",
  "least_squares_predictions",
  "multi_head_gd_weights",
  "online_gd",
  "optimal_step_and_loss",
  "ridge_predictions",
]
