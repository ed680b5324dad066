"""Attention of a few new queries to a long cache."""

from multihead.ops.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
