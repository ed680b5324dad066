"""Prefill and decode loops over a cache, sampling and streaming."""

from multihead.generation.generator import Generator, Prefix, bucket, generate
from multihead.generation.streaming import TextStream

__all__ = ["Generator", "Prefix", "TextStream", "bucket", "generate"]
