"""Decode caches: pytrees in, pytrees out."""

from multihead.cache.static import advance, empty, nbytes

__all__ = ["advance", "empty", "nbytes"]
