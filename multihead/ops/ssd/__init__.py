"""State space duality: the scan of Mamba-2, chunked into matrix products."""

from multihead.ops.ssd.api import ssd, ssd_step

__all__ = ["ssd", "ssd_step"]
