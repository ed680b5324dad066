"""Linear attention: a decaying sum of key-value products, read by queries."""

from multihead.ops.linear_attention.api import linear_attention

__all__ = ["linear_attention"]
