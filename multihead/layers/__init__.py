"""Flax linen modules, one concept a file."""

from multihead.layers.attention import MultiHeadAttention, SelfAttention
from multihead.layers.encoder import EncoderBlock, drop_path
from multihead.layers.linear import Embedding, Linear
from multihead.layers.mamba import Mamba2
from multihead.layers.mamba1 import Mamba
from multihead.layers.mlp import MLP, GatedMLP
from multihead.layers.norms import GatedRMSNorm, LayerNorm, RMSNorm
from multihead.layers.rope import apply_rope

__all__ = [
  "MLP",
  "Embedding",
  "EncoderBlock",
  "GatedMLP",
  "GatedRMSNorm",
  "LayerNorm",
  "Linear",
  "Mamba",
  "Mamba2",
  "MultiHeadAttention",
  "RMSNorm",
  "SelfAttention",
  "apply_rope",
  "drop_path",
]
