"""The selective scan of Mamba-1: a diagonal recurrence that inputs steer."""

from multihead.ops.selective_scan.api import selective_scan
from multihead.ops.selective_scan.step import selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]
