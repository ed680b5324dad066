"""gzip and Markov baselines against brute force."""

import collections
import gzip
import math
import random

import numpy as np
import pytest

from multihead.data import splits
from multihead.metrics import compression

_BEGIN = "^"


def _documents(seed, count, length):
  rng = random.Random(seed)
  documents = []
  for _ in range(count):
    text = "ab"
    while len(text) < length:
      # A second-order source with four letters, so that counts of 1, 2, 3 and
      # more occur.
      weights = [
        1 + 5 * ((ord(text[-1]) * 3 + ord(text[-2]) + i) % 4 == 0)
        for i in range(4)
      ]
      text += rng.choices("abcd", weights)[0]
    documents.append(text[2:].encode())
  return documents


class _Brute:
  """Interpolated modified Kneser-Ney, straight from the definition."""

  def __init__(self, documents, order):
    self.order = order
    sequences = [[_BEGIN] * order + [bytes([b]) for b in d] for d in documents]
    # Counts of (context, byte) for every length of context.
    self.raw = [
      collections.Counter(
        (tuple(s[i - n : i]), s[i])
        for s in sequences
        for i in range(order, len(s))
      )
      for n in range(order + 1)
    ]
    self.levels = []
    for n in range(order + 1):
      if n == order:
        self.levels.append(dict(self.raw[n]))
        continue
      left = collections.defaultdict(set)
      for context, byte in self.raw[n + 1]:
        left[context[1:], byte].add(context[0])
      self.levels.append(
        {
          (context, byte): self.raw[n][context, byte]
          if context and context[0] == _BEGIN
          else len(signs)
          for (context, byte), signs in left.items()
        }
      )

  def _discount(self, n, count):
    if not count:
      return 0.0
    number = collections.Counter(self.levels[n].values())
    if not all(number[i] for i in (1, 2, 3, 4)):
      return (0.5, 1.0, 1.5)[min(count, 3) - 1]
    y = number[1] / (number[1] + 2 * number[2])
    i = min(count, 3)
    return min(max(i - (i + 1) * y * number[i + 1] / number[i], 0.05), i)

  def probability(self, context, byte, n=None):
    """P(byte | the last n signs of the context)."""
    n = self.order if n is None else n
    shorter = self.probability(context, byte, n - 1) if n else 1 / 256
    suffix = tuple(context[len(context) - n :])
    counts = {b: c for (s, b), c in self.levels[n].items() if s == suffix}
    if not counts:
      return shorter
    total = sum(counts.values())
    freed = sum(self._discount(n, c) for c in counts.values())
    count = counts.get(byte, 0)
    return (count - self._discount(n, count) + freed * shorter) / total

  def document(self, data):
    signs = [_BEGIN] * self.order + [bytes([b]) for b in data]
    return [
      math.log2(self.probability(signs[i - self.order : i], signs[i]))
      for i in range(self.order, len(signs))
    ]


class TestMarkov:
  @pytest.mark.parametrize("order", range(6))
  def test_against_brute_force(self, order):
    train = [*_documents(0, 3, 60), b"", b"a", b"\xff\x00"]
    brute = _Brute(train, order)
    model = compression.MarkovModel(train, order)
    for document in (*_documents(1, 2, 25), b"ab", b"zz\x00ba", b"\xff"):
      np.testing.assert_allclose(
        model.log2_probabilities(document), brute.document(document), rtol=1e-10
      )

  def test_both_ways_to_discount_are_used(self):
    train = _documents(0, 3, 400)
    brute = _Brute(train, 3)
    estimated = [
      all(collections.Counter(level.values())[i] for i in (1, 2, 3, 4))
      for level in brute.levels
    ]
    assert any(estimated) and not all(estimated)
    document = _documents(1, 1, 40)[0]
    np.testing.assert_allclose(
      compression.MarkovModel(train, 3).log2_probabilities(document),
      brute.document(document),
      rtol=1e-10,
    )

  def test_one_model_has_all_orders(self):
    train = _documents(0, 4, 100)
    document = _documents(1, 1, 30)[0]
    model = compression.MarkovModel(train, 4)
    for order in range(5):
      np.testing.assert_allclose(
        model.log2_probabilities(document, order),
        compression.MarkovModel(train, order).log2_probabilities(document),
        rtol=1e-12,
      )
    with pytest.raises(ValueError, match="orders 0 to 4"):
      model.log2_probabilities(document, 5)

  @pytest.mark.parametrize("order", range(7))
  @pytest.mark.parametrize(
    "context", [b"", b"a", b"abca", b"zzzzzz", b"abzabcd", bytes(9)]
  )
  def test_probabilities_sum_to_one(self, order, context):
    model = compression.MarkovModel(_documents(0, 4, 100), order)
    distribution = model.distribution(context)
    assert distribution.shape == (256,)
    assert distribution.min() > 0
    assert distribution.sum() == pytest.approx(1, abs=1e-12)

  def test_the_beginning_of_a_document_is_a_context(self):
    train = [b"Hello there", b"Hi you", b"Home again"] * 9
    model = compression.MarkovModel(train, 2)
    assert model.distribution(b"")[ord("H")] > 0.9
    assert model.distribution(b"xx")[ord("H")] < 0.5
    # Documents do not run into one another.
    assert model.distribution(b"re")[ord("H")] < 0.5
    assert model.distribution(b"ou")[ord("H")] < 0.5

  def test_knows_nothing_without_training(self):
    bits = compression.markov_bits_per_byte([], [b"abc"], (0, 3))
    assert bits == pytest.approx({0: 8.0, 3: 8.0})

  def test_order_of_the_source_is_found(self):
    train, validation = _documents(0, 20, 2000), _documents(1, 2, 2000)
    bits = compression.markov_bits_per_byte(train, validation, range(6))
    assert bits[2] < bits[1] - 0.1 < bits[0] - 0.1
    assert bits[2] < min(bits[3], bits[4], bits[5]) + 0.01

  def test_is_the_mean_over_bytes(self):
    train = _documents(0, 4, 100)
    validation = [b"abcd" * 5, b"", b"d"]
    model = compression.MarkovModel(train, 2)
    scores = np.concatenate([model.log2_probabilities(d) for d in validation])
    assert len(scores) == 21
    assert compression.markov_bits_per_byte(train, validation, [2]) == (
      pytest.approx({2: -scores.mean()})
    )

  def test_counting_in_chunks_makes_no_difference(self, monkeypatch):
    train, validation = _documents(0, 5, 90), _documents(1, 3, 50)
    whole = compression.markov_bits_per_byte(train, validation)
    for chunk in (1, 7, 64):
      monkeypatch.setattr(compression, "_CHUNK", chunk)
      assert compression.markov_bits_per_byte(train, validation) == (
        pytest.approx(whole, rel=1e-12)
      )

  @pytest.mark.parametrize("order", [-1, 7])
  def test_order_out_of_range(self, order):
    with pytest.raises(ValueError, match="allowed: 0 to 6"):
      compression.MarkovModel([b"abc"], order)


class TestGzip:
  def test_is_gzip_of_the_validation_text(self):
    documents = [b"some text, ", "some téxt"]
    data = b"some text, " + "some téxt".encode()
    expected = 8 * len(gzip.compress(data, 9)) / len(data)
    assert compression.gzip_bits_per_byte(documents) == expected

  def test_does_not_change_from_day_to_day(self, monkeypatch):
    first = compression.gzip_bits_per_byte([b"abc" * 99])
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert compression.gzip_bits_per_byte([b"abc" * 99]) == first


class TestBaselines:
  def test_default_corpus(self):
    split = splits.load_split()
    train = [d.text for d in split.train]
    validation = [d.text for d in split.validation]
    bits = compression.baselines(train, validation)
    assert list(bits) == ["gzip", *(f"markov_{k}" for k in range(1, 6))]
    orders = [bits[f"markov_{k}"] for k in range(1, 6)]
    assert orders == sorted(orders, reverse=True)
    # The text differs a little between versions of Python.
    expected = [3.59, 2.73, 2.14, 1.92, 1.86]
    np.testing.assert_allclose(orders, expected, atol=0.15)
    assert 2.0 < bits["gzip"] < 3.0

  def test_nothing_to_score(self):
    for documents in ([], [b""]):
      with pytest.raises(ValueError, match="no byte to score"):
        compression.baselines([b"abc"], documents)
