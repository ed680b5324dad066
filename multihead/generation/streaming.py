"""Text from tokens that arrive one by one."""

from collections.abc import Callable, Iterable, Sequence

# What decoders put where bytes are not (yet) a character.
_REPLACEMENT = "\ufffd"


class TextStream:
  """Decodes a stream of ids, holding back characters that are not complete.

  A character may span several tokens, and a token's text may depend on the one
  before it; so the last piece is decoded together with the one before.
  """

  def __init__(self, decode: Callable[[Sequence[int]], str]):
    """Starts an empty stream.

    Args:
      decode: text of a sequence of ids, for example a tokenizer's `decode`.
    """
    self._decode = decode
    self._ids: list[int] = []
    self._start = self._shown = 0

  def add(self, ids: Iterable[int]) -> str:
    """Takes further ids and returns the text that they complete."""
    self._ids.extend(map(int, ids))
    before, now = self._texts()
    if now.endswith(_REPLACEMENT):
      return ""
    self._start, self._shown = self._shown, len(self._ids)
    return now[len(before) :]

  def finish(self) -> str:
    """Returns what is held back, incomplete as it may be."""
    before, now = self._texts()
    self._start = self._shown = len(self._ids)
    return now[len(before) :]

  def _texts(self) -> tuple[str, str]:
    """The last piece that was shown, without and with what came after it."""
    return (
      self._decode(self._ids[self._start : self._shown]),
      self._decode(self._ids[self._start :]),
    )
