"""Text that comes in pieces."""

import numpy as np
from absl.testing import parameterized

from multihead.data import tokenizers
from multihead.generation import TextStream

TEXT = "naïve — 漢字, ☃ and 🎈🎈 end"


class TextStreamTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 3, 7, 1000)
  def test_pieces_add_up_and_no_character_is_torn(self, size):
    tokenizer = tokenizers.ByteTokenizer()
    ids = tokenizer.encode(TEXT)
    stream = TextStream(tokenizer.decode)
    pieces = [stream.add(ids[i : i + size]) for i in range(0, len(ids), size)]
    pieces.append(stream.finish())
    self.assertEqual("".join(pieces), TEXT)
    self.assertNotIn("\ufffd", "".join(pieces))
    if size == 1:
      self.assertEqual(pieces[0], "n")

  def test_what_never_becomes_a_character_is_shown_in_the_end(self):
    stream = TextStream(tokenizers.ByteTokenizer().decode)
    shown = stream.add([104, 105, 0xF0, 0x9F])
    self.assertEqual(shown + stream.add([]), "")
    self.assertEqual(stream.finish(), "hi\ufffd")
    self.assertEqual(stream.add([33]), "!")

  def test_broken_bytes_in_the_middle_hold_nothing_up(self):
    stream = TextStream(tokenizers.ByteTokenizer().decode)
    pieces = [stream.add([i]) for i in (104, 0xC3, 40, 105)]
    self.assertEqual("".join(pieces), "h\ufffd(i")

  def test_text_that_depends_on_the_piece_before(self):
    # As sentencepiece: the first token of a text loses its space.
    words = [" the", " cat", "s", " sat"]
    decode = lambda ids: "".join(words[i] for i in ids).removeprefix(" ")
    stream = TextStream(decode)
    pieces = [stream.add(np.array([i])) for i in range(4)]
    self.assertEqual(pieces, ["the", " cat", "s", " sat"])

  def test_cost_does_not_grow_with_the_text(self):
    longest = 0

    def decode(ids):
      nonlocal longest
      longest = max(longest, len(ids))
      return "x" * len(ids)

    stream = TextStream(decode)
    for _ in range(1000):
      stream.add([0])
    self.assertLessEqual(longest, 3)
