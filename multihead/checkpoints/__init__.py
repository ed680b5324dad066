"""Weights in and out of published formats; nothing is ever unpickled."""

from multihead.checkpoints.installed import MINILM, locate
from multihead.checkpoints.pretrained import (
  SpecialTokens,
  from_pretrained,
  read_special_tokens,
  save_pretrained,
)

__all__ = [
  "MINILM",
  "SpecialTokens",
  "from_pretrained",
  "locate",
  "read_special_tokens",
  "save_pretrained",
]
