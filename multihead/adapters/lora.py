"""Other names for a Hydra with one branch."""

from typing import Any

from multihead.adapters.hydra import Hydra
from multihead.adapters.targets import Targets


def lora(
  targets: Targets,
  r: int = 8,
  *,
  alpha: float | None = None,
  rank_stabilised: bool = False,
  **settings: Any,
) -> Hydra:
  """LoRA (arXiv 2106.09685): y = f0 + alpha / r (x A) B.

  Args:
    targets: see `Hydra`.
    r: the rank.
    alpha: by default r, so that the factor is 1.
    rank_stabilised: alpha / sqrt(r) instead (arXiv 2312.03732).
    **settings: of `Hydra`.
  """
  return Hydra(
    targets,
    r_par=r,
    scale=float(r if alpha is None else alpha),
    scaling="rank_stabilised" if rank_stabilised else "rank",
    **settings,
  )


def seq_lora(targets: Targets, r: int = 8, **settings: Any) -> Hydra:
  """SeqLoRA: y = f0 + s (f0 C) D, a recombination of the frozen output."""
  return Hydra(targets, r_seq=r, **settings)


def input_lora(targets: Targets, r: int = 8, **settings: Any) -> Hydra:
  """The branch on the input side: y = f0 + s ((x E) F) W."""
  return Hydra(targets, r_pre=r, **settings)
