"""Array operations: pure functions, each with several implementations.

Every operation takes `implementation=`: None for the best that supports the
arguments on this device, a name for that one or an error with the reason, or a
sequence of names for the first that supports them. `describe` prints for one
call what would run and why the others would not.
"""

from multihead.ops.attention import attention
from multihead.ops.causal_conv1d import causal_conv1d
from multihead.ops.decode_attention import decode_attention
from multihead.ops.dispatch import describe
from multihead.ops.linear_attention import linear_attention
from multihead.ops.selective_scan import selective_scan, selective_scan_step
from multihead.ops.ssd import ssd, ssd_step

__all__ = [
  "attention",
  "causal_conv1d",
  "decode_attention",
  "describe",
  "linear_attention",
  "selective_scan",
  "selective_scan_step",
  "ssd",
  "ssd_step",
]
