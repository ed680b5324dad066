"""Weights in and out of published formats; nothing is ever unpickled."""

from multihead.checkpoints.pretrained import (
  SpecialTokens,
  from_pretrained,
  read_special_tokens,
  save_pretrained,
)

__all__ = [
  "SpecialTokens",
  "from_pretrained",
  "read_special_tokens",
  "save_pretrained",
]
