"""Exact softmax attention: one function, several implementations."""

from multihead.ops.attention.api import attention

__all__ = ["attention"]
