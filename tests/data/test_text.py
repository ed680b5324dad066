"""Windows, order, sharding by process and resuming of the text pipeline."""

import itertools
import json
import random

import numpy as np
import pytest

from multihead.data import splits, text, tokenizers
from multihead.data.sources import Document
from multihead.errors import UserError

_BOS, _EOS = 256, 257
_FIELDS = {
  "tokens": np.int32,
  "targets": np.int32,
  "segment_ids": np.int32,
  "weights": np.float32,
}


def _documents(lengths, seed=0):
  rng = random.Random(seed)
  return [
    Document(f"d{i}", "".join(rng.choice("abcdefgh é") for _ in range(n)))
    for i, n in enumerate(lengths)
  ]


def _split(train, validation=(5,)):
  return splits.Split(
    tuple(_documents(train)), tuple(_documents(validation, seed=1))
  )


def _flat(documents):
  """An independent flat array: ids, and the document of each."""
  ids, owner = [], []
  for i, document in enumerate(documents):
    part = [_BOS, *document.text.encode(), _EOS]
    ids += part
    owner += [i] * len(part)
  return np.asarray(ids), np.asarray(owner)


def _take(dataset, count):
  return list(itertools.islice(iter(dataset), count))


def _assert_equal(first, second):
  assert len(first) == len(second)
  for a, b in zip(first, second, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)


class TestTrainingWindows:
  @pytest.mark.parametrize("length", [1, 2, 7, 16])
  def test_one_epoch_against_the_flat_array(self, length):
    split = _split((9, 1, 30, 2, 17, 4))
    flat, owner = _flat(split.train)
    dataset = text.build(split, "byte", length, 1, prefetch=0)
    pairs = len(flat) - 1
    assert dataset.num_records == -(-pairs // length)
    batches = _take(dataset, dataset.num_records)
    starts = [
      min(r * length, pairs - length) for r in range(dataset.num_records)
    ]
    expected = {}
    for start in starts:
      inputs = slice(start, start + length)
      targets = slice(start + 1, start + length + 1)
      expected[start] = {
        "tokens": flat[inputs],
        "targets": flat[targets],
        "segment_ids": owner[inputs] - owner[start] + 1,
        "weights": flat[targets] != _BOS,
      }
    found = []
    for batch in batches:
      matches = [
        start
        for start, window in expected.items()
        if start not in found
        and all(np.array_equal(batch[k][0], window[k]) for k in window)
      ]
      assert matches
      found.append(matches[0])
      for key, dtype in _FIELDS.items():
        assert batch[key].dtype == dtype and batch[key].shape == (1, length)
    assert sorted(found) == starts

  def test_targets_across_a_border_have_no_weight_and_eos_has(self):
    split = _split((3, 3, 3))
    dataset = text.build(split, "byte", 14, 1, prefetch=0)
    batch = _take(dataset, 1)[0]
    tokens, targets = batch["tokens"][0], batch["targets"][0]
    weights, segments = batch["weights"][0], batch["segment_ids"][0]
    borders = tokens == _EOS
    assert borders.any()
    np.testing.assert_array_equal(targets[borders], _BOS)
    np.testing.assert_array_equal(weights[borders], 0)
    np.testing.assert_array_equal(weights[~borders], 1)
    assert (targets == _EOS).any()
    np.testing.assert_array_equal(np.diff(segments)[borders[:-1]], 1)
    np.testing.assert_array_equal(np.diff(segments)[~borders[:-1]], 0)

  def test_epochs_are_different_permutations(self):
    split = _split((200,))
    dataset = text.build(split, "byte", 3, 1, seed=5, prefetch=0)
    n = dataset.num_records
    batches = _take(dataset, 3 * n)
    epochs = [
      [tuple(b["tokens"][0]) for b in batches[e * n : (e + 1) * n]]
      for e in range(3)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({tuple(e) for e in epochs}) == 3

  def test_batches_run_on_over_the_end_of_an_epoch(self):
    split = _split((50,))
    one = text.build(split, "byte", 5, 1, prefetch=0)
    many = text.build(split, "byte", 5, 32, prefetch=0)
    assert 1 < one.num_records < 16
    rows = [b["tokens"][0] for b in _take(one, 96)]
    batches = _take(many, 3)
    np.testing.assert_array_equal(
      np.concatenate([b["tokens"] for b in batches]), np.stack(rows)
    )

  def test_seed_changes_the_order_only(self):
    split = _split((300,))
    first, again, other = (
      _take(dataset, dataset.num_records)
      for dataset in (
        text.build(split, "byte", 4, 1, seed=s) for s in (0, 0, 1)
      )
    )
    _assert_equal(first, again)
    rows = [[tuple(b["tokens"][0]) for b in bs] for bs in (first, other)]
    assert rows[0] != rows[1] and sorted(rows[0]) == sorted(rows[1])

  def test_order_is_a_promise(self):
    dataset = text.build(_split((95,)), "byte", 8, 4, seed=3, prefetch=0)
    order = dataset.source._order
    assert dataset.num_records == 14
    assert order(0).tolist() == [
      0, 1, 2, 10, 12, 13, 7, 5, 6, 11, 9, 8, 4, 3
    ]  # fmt: skip
    assert order(1).tolist() == [
      10, 5, 8, 9, 13, 6, 12, 3, 7, 0, 11, 1, 2, 4
    ]  # fmt: skip

  @pytest.mark.parametrize("excess", [0, 1])
  def test_sequence_longer_than_the_text(self, excess):
    split = _split((10,))
    size = len(_flat(split.train)[0])
    if not excess:
      assert text.build(split, "byte", size - 1, 2).num_records == 1
      return
    with pytest.raises(UserError, match=f"has only {size} tokens.*{size - 1},"):
      text.build(split, "byte", size, 2)


class TestValidationWindows:
  @pytest.mark.parametrize("overlap", [0, 1, 5])
  @pytest.mark.parametrize("length", [6, 7, 64, 1000])
  @pytest.mark.parametrize("size", [1, 3, 8])
  def test_each_byte_is_scored_once(self, length, size, overlap):
    split = _split((40,), (9, 1, 30, 2, 17, 14))
    flat, owner = _flat(split.validation)
    dataset = text.build(
      split, "byte", length, size, split="validation", overlap=overlap
    )
    batches = list(dataset)
    assert len(batches) == dataset.num_batches
    _assert_equal(batches, list(dataset))
    rows = {k: np.concatenate([b[k] for b in batches]) for k in _FIELDS}
    assert len(rows["tokens"]) == size * len(batches)
    stride = length - overlap
    count = np.zeros(len(flat), int)
    for r, weights in enumerate(rows["weights"]):
      for t in np.flatnonzero(weights):
        place = r * stride + t + 1
        count[place] += 1
        assert weights[t] == 1
        assert rows["targets"][r, t] == flat[place]
        assert rows["tokens"][r, t] == flat[place - 1]
        start = r * stride
        segment = owner[place] - owner[start] + 1
        assert rows["segment_ids"][r, t] == segment
        if r and overlap:
          # What comes before is there, as context.
          assert t >= overlap
          np.testing.assert_array_equal(
            rows["tokens"][r, : t + 1], flat[start:place]
          )
    np.testing.assert_array_equal(count, (flat != _BOS) & (flat != _EOS))
    assert count.sum() == dataset.num_bytes == dataset.num_text_tokens
    assert dataset.bytes_per_token == 1
    padding = rows["segment_ids"] == 0
    for key in _FIELDS:
      assert not rows[key][padding].any()

  def test_first_byte_is_predicted_from_bos(self):
    split = _split((40,), (4, 4))
    batch = next(iter(text.build(split, "byte", 64, 1, split="validation")))
    after_bos = batch["tokens"][0] == _BOS
    assert after_bos.sum() == 2
    assert (batch["weights"][0][after_bos] == 1).all()

  def test_last_batch_is_padded(self):
    split = splits.Split(
      tuple(_documents((40,))), (Document("v", "abcdefghij" * 2 + "abcdefgh"),)
    )
    flat, _ = _flat(split.validation)
    dataset = text.build(split, "byte", 8, 3, split="validation")
    batches = list(dataset)
    assert len(batches) == 2 and all(
      b["tokens"].shape == (3, 8) for b in batches
    )
    used = len(flat) - 1 - 3 * 8
    assert 0 < used < 8
    last = batches[1]
    assert (last["segment_ids"][0] > 0).sum() == used
    assert not last["segment_ids"][1:].any() and not last["weights"][1:].any()

  def test_seed_makes_no_difference(self):
    split = _split((40,), (50, 20))
    first, second = (
      list(text.build(split, "byte", 8, 3, seed=s, split="validation"))
      for s in (0, 1)
    )
    _assert_equal(first, second)


class TestProcesses:
  @pytest.mark.parametrize("kind", splits.SPLITS)
  @pytest.mark.parametrize("count", [2, 3, 6])
  def test_processes_share_the_global_batch(self, kind, count):
    split = _split((100, 30), (100, 30))
    whole = _take(text.build(split, "byte", 5, 6, split=kind), 9)
    parts = [
      _take(
        text.build(
          split, "byte", 5, 6, split=kind, process_index=i, process_count=count
        ),
        9,
      )
      for i in range(count)
    ]
    assert {len(p) for p in parts} == {len(whole)}
    joined = [
      {k: np.concatenate([part[b][k] for part in parts]) for k in _FIELDS}
      for b in range(len(whole))
    ]
    _assert_equal(joined, whole)

  def test_mistakes(self):
    split = _split((100,))
    with pytest.raises(UserError, match="use a multiple of 4"):
      text.build(split, "byte", 5, 6, process_count=4)
    with pytest.raises(UserError, match="process_index is 2 of 2"):
      text.build(split, "byte", 5, 6, process_index=2, process_count=2)


class TestResume:
  @pytest.mark.parametrize("prefetch", [0, 1, 3])
  @pytest.mark.parametrize("kind", splits.SPLITS)
  def test_continues_at_the_exact_record(self, kind, prefetch):
    split = _split((200, 30), (200, 30))

    def build():
      return text.build(
        split, "byte", 5, 4, seed=2, split=kind, prefetch=prefetch
      )

    whole = _take(build(), 12)
    for position in (0, 1, 5, 11):
      iterator = iter(build())
      for _ in range(position):
        next(iterator)
      state = json.loads(json.dumps(iterator.get_state()))
      _assert_equal(
        list(itertools.islice(iterator, 12 - position)), whole[position:]
      )
      fresh = iter(build())
      fresh.set_state(state)
      assert fresh.get_state() == state
      _assert_equal(
        list(itertools.islice(fresh, 12 - position)), whole[position:]
      )
      # Back again with batches read ahead already.
      iterator.set_state(state)
      _assert_equal([next(iterator)], whole[position : position + 1])
      iterator.close()
      fresh.close()

  def test_far_away_in_no_time(self):
    dataset = text.build(_split((200,)), "byte", 5, 4, prefetch=0)
    iterator = iter(dataset)
    state = iterator.get_state() | {"next_index": 10**9 + 1}
    iterator.set_state(state)
    records = np.arange(4) + 4 * (10**9 + 1)
    epochs, within = np.divmod(records, dataset.num_records)
    order = [
      dataset.source._order(int(e))[w]
      for e, w in zip(epochs, within, strict=True)
    ]
    flat, _ = _flat(_split((200,)).train)
    starts = np.minimum(np.asarray(order) * 5, len(flat) - 6)
    expected = flat[starts[:, None] + np.arange(5)]
    np.testing.assert_array_equal(next(iterator)["tokens"], expected)

  def test_on_another_number_of_processes(self):
    split = _split((100, 30))

    def iterators(count):
      return [
        iter(
          text.build(split, "byte", 5, 6, process_index=i, process_count=count)
        )
        for i in range(count)
      ]

    before = iterators(2)
    for iterator in before:
      for _ in range(4):
        next(iterator)
    states = [i.get_state() for i in before]
    assert states[0] == states[1]
    after = iterators(3)
    for iterator in after:
      iterator.set_state(states[0])
    halves = [next(i) for i in before]
    thirds = [next(i) for i in after]
    for key in _FIELDS:
      np.testing.assert_array_equal(
        np.concatenate([b[key] for b in halves]),
        np.concatenate([b[key] for b in thirds]),
      )

  @pytest.mark.parametrize(
    ("change", "named"),
    [
      ({"sequence_length": 6}, "sequence_length was 5 then and is 6 now"),
      ({"batch_size": 8}, "batch_size was 4 then and is 8 now"),
      ({"seed": 1}, "seed was 0 then and is 1 now"),
      ({"path": _split((100, 31))}, "corpus was"),
      ({"split": "validation"}, "split was"),
    ],
  )
  def test_refuses_the_position_of_other_batches(self, change, named):
    settings = {
      "path": _split((100, 30)),
      "sequence_length": 5,
      "batch_size": 4,
      "seed": 0,
    }
    state = iter(text.build(**settings)).get_state()
    with pytest.raises(UserError, match=named):
      iter(text.build(**settings | change)).set_state(state)

  def test_refuses_a_foreign_state(self):
    iterator = iter(text.build(_split((100,)), "byte", 5, 4))
    with pytest.raises(UserError, match="cannot continue"):
      iterator.set_state({"next_index": 3})


class _OneTokenForBoth(tokenizers.ByteTokenizer):
  """As GPT-2: one token opens and closes; here text can hold it, too."""

  fingerprint = "one"
  bos_id = eos_id = ord("a")


class _Words:
  """A tokenizer of three bytes a token and a large vocabulary."""

  name = fingerprint = "words"
  vocab_size = 2**17
  bos_id = 0
  eos_id = 2**17 - 1

  def encode(self, text):
    data = text.encode()
    return np.asarray(
      [2**16 + len(data[i : i + 3]) for i in range(0, len(data), 3)], np.int32
    )

  def encode_batch(self, texts):
    return [self.encode(t) for t in texts]

  def decode(self, ids):
    return ""


class TestTokenArray:
  def test_borders_are_told_by_place_not_by_id(self):
    split = _split((40,), (20, 20))
    plain, both = (
      list(text.build(split, t, 8, 2, split="validation"))
      for t in ("byte", _OneTokenForBoth())
    )
    for a, b in zip(plain, both, strict=True):
      for key in ("segment_ids", "weights"):
        np.testing.assert_array_equal(a[key], b[key])
      scored = a["weights"] > 0
      np.testing.assert_array_equal(a["targets"][scored], b["targets"][scored])

  def test_large_ids_and_bytes_per_token(self):
    split = _split((40,), (31, 20))
    dataset = text.build(split, _Words(), 8, 2, split="validation")
    batches = list(dataset)
    counts = [-(-d.num_bytes // 3) for d in split.validation]
    assert dataset.num_text_tokens == sum(counts)
    assert sum(b["weights"].sum() for b in batches) == sum(counts)
    assert dataset.num_bytes == split.validation_bytes
    assert dataset.bytes_per_token == split.validation_bytes / sum(counts)
    assert max(b["tokens"].max() for b in batches) == 2**17 - 1
    assert dataset.source._array.tokens.dtype == np.uint32

  def test_says_if_the_tokenizer_loses_text(self, caplog):
    text.build(_split((40,)), _Words(), 8, 2, split="validation")
    assert "does not give document 'd0' back" in caplog.text

  def test_cache_is_used_and_keyed_by_text_and_tokenizer(self, tmp_path):
    class Counting(tokenizers.ByteTokenizer):
      calls = 0

      def encode_batch(self, texts):
        self.calls += 1
        return super().encode_batch(texts)

    tokenizer = Counting()
    documents = _documents((20, 30))
    plain = text.tokenise(documents, tokenizer)
    for calls in (2, 2):
      cached = text.tokenise(documents, tokenizer, tmp_path / "cache")
      assert tokenizer.calls == calls
      np.testing.assert_array_equal(cached.tokens, plain.tokens)
      np.testing.assert_array_equal(cached.starts, plain.starts)
      assert cached.fingerprint == plain.fingerprint
      assert isinstance(cached.tokens, np.memmap)
    text.tokenise(_documents((20, 31)), tokenizer, tmp_path / "cache")
    assert tokenizer.calls == 3
    tokenizer.fingerprint = "other"
    text.tokenise(documents, tokenizer, tmp_path / "cache")
    assert tokenizer.calls == 4
    names = [p.suffix for p in (tmp_path / "cache").iterdir()]
    assert names == [".npy"] * 6

  def test_batches_from_a_memory_map(self, tmp_path):
    split = _split((200, 30))
    _assert_equal(
      _take(text.build(split, "byte", 5, 4, cache_dir=tmp_path), 5),
      _take(text.build(split, "byte", 5, 4), 5),
    )

  def test_borders_between_documents_move_the_fingerprint(self):
    tokenizer = tokenizers.ByteTokenizer()
    prints = {
      text.tokenise([Document("", t) for t in ts], tokenizer).fingerprint
      for ts in (["ab", "c"], ["a", "bc"], ["abc"])
    }
    assert len(prints) == 3


class TestBuild:
  def test_default_corpus(self):
    train = text.build(None, "byte", 128, 16)
    validation = text.build(None, "byte", 128, 16, split="validation")
    split = splits.load_split()
    assert train.num_bytes == split.train_bytes
    assert validation.num_bytes == split.validation_bytes
    assert train.num_batches is None
    batch = next(iter(train))
    assert batch["tokens"].shape == (16, 128)
    assert sum(b["weights"].sum() for b in validation) == validation.num_bytes
    assert "windows of 128" in str(train)

  def test_a_file_of_ones_own(self, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(
      "\n\n".join(f"Paragraph {i} says {i * i}." for i in range(900))
    )
    parts = [
      text.build(path, "byte", 32, 4, split=kind, validation_fraction=0.2)
      for kind in splits.SPLITS
    ]
    whole = path.stat().st_size
    assert sum(p.num_bytes for p in parts) == whole
    assert 0.1 < parts[1].num_bytes / whole < 0.25

  @pytest.mark.parametrize(
    ("settings", "message"),
    [
      ({"split": "valid"}, "did you mean 'validation'"),
      ({"sequence_length": 0}, "sequence_length is 0; it must be at least 1"),
      ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
      ({"seed": -1}, "seed is -1; it must be at least 0"),
      ({"prefetch": -1}, "prefetch is -1"),
      ({"overlap": 1}, "overlap is 1 for split 'train'"),
      ({"overlap": 5, "split": "validation"}, "from 0 to .* = 4"),
      ({"process_count": 0}, "process_index is 0 of 0"),
    ],
  )
  def test_mistakes(self, settings, message):
    defaults = {"path": _split((99,)), "sequence_length": 5, "batch_size": 4}
    with pytest.raises(UserError, match=message):
      text.build(**defaults | settings)
