"""Flax linen modules, one concept a file."""

from multihead.layers.attention import SelfAttention
from multihead.layers.linear import Embedding, Linear
from multihead.layers.mamba import Mamba2
from multihead.layers.mlp import GatedMLP
from multihead.layers.norms import GatedRMSNorm, RMSNorm
from multihead.layers.rope import apply_rope

__all__ = [
  "Embedding",
  "GatedMLP",
  "GatedRMSNorm",
  "Linear",
  "Mamba2",
  "RMSNorm",
  "SelfAttention",
  "apply_rope",
]
