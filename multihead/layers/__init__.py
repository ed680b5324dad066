"""Flax linen modules, one concept a file."""

from multihead.layers.attention import MultiHeadAttention, SelfAttention
from multihead.layers.encoder import EncoderBlock, drop_path
from multihead.layers.linear import Embedding, Linear
from multihead.layers.mamba import Mamba2
from multihead.layers.mamba1 import Mamba
from multihead.layers.mlp import MLP, GatedMLP
from multihead.layers.multi_head_scan import (
  SS2D,
  MultiHeadScan,
  VSSBlock,
  scan_route_attention,
)
from multihead.layers.norms import GatedRMSNorm, LayerNorm, RMSNorm
from multihead.layers.rope import apply_rope
from multihead.layers.scan_routes import scan_route

__all__ = [
  "MLP",
  "SS2D",
  "Embedding",
  "EncoderBlock",
  "GatedMLP",
  "GatedRMSNorm",
  "LayerNorm",
  "Linear",
  "Mamba",
  "Mamba2",
  "MultiHeadAttention",
  "MultiHeadScan",
  "RMSNorm",
  "SelfAttention",
  "VSSBlock",
  "apply_rope",
  "drop_path",
  "scan_route",
  "scan_route_attention",
]
