"""Causal depthwise convolution over time."""

from multihead.ops.causal_conv1d.api import causal_conv1d

__all__ = ["causal_conv1d"]
