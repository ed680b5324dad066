"""Prefill and decode loops over a cache, sampling and streaming."""

from multihead.generation.decode import Generator, Prefix, bucket, generate

__all__ = ["Generator", "Prefix", "bucket", "generate"]
