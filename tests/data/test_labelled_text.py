"""Labelled texts: sources, repetitions, ids and the word-counting baseline."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from multihead.data import labelled, labelled_text, tokenizers
from multihead.errors import UserError


def jsonl(path, *records):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n".join(map(json.dumps, records)), "utf-8")
  return path


def test_docstrings_by_package():
  found = labelled_text.load_texts()
  assert found.classes == tuple(sorted(labelled_text.PACKAGES))
  counts = np.bincount(found.labels)
  assert counts.min() >= 80 and len(found.texts) >= 1500
  assert len(set(found.texts)) == len(found.texts)
  text = found.texts[int(np.flatnonzero(found.labels == 0)[0])]
  folder = Path(sysconfig.get_path("stdlib"), "asyncio")
  first = text.splitlines()[0]
  assert any(first in file.read_text("utf-8") for file in folder.glob("*.py"))
  # Words say much about the package, but not all.
  chosen = labelled.select(found.names, found.labels, found.classes)
  error = labelled_text.naive_bayes_error(found, chosen)
  assert 0.1 < error < 0.5


def test_repeated_texts_count_once(tmp_path):
  file = jsonl(
    tmp_path / "x.jsonl",
    {"text": "One  text", "label": "a"},
    {"text": "one text ", "label": "a"},
    {"text": "ambiguous", "label": "a"},
    {"text": "Ambiguous", "label": "b"},
    {"text": "another", "label": "b"},
  )
  found = labelled_text.load_texts(file)
  assert found.texts == ("One  text", "another")
  np.testing.assert_array_equal(found.labels, [0, 1])
  assert found.validation is None


def test_a_validation_text_is_not_trained_on(tmp_path):
  jsonl(
    tmp_path / "train.jsonl",
    {"s": "both", "y": 10},
    {"s": "train", "y": 9},
  )
  jsonl(tmp_path / "dev.jsonl", {"s": "both", "y": 10})
  found = labelled_text.load_texts(tmp_path, text_field="s", label_field="y")
  assert found.classes == ("9", "10")
  assert dict(zip(found.texts, found.validation)) == {
    "both": True, "train": False
  }  # fmt: skip


def test_pairs_and_folders(tmp_path):
  file = jsonl(
    tmp_path / "pairs.jsonl",
    {"q": "same", "a": "x", "label": "yes"},
    {"q": "same", "a": "y", "label": "no"},
  )
  found = labelled_text.load_texts(file, text_field="q", pair_field="a")
  assert found.pairs == ("x", "y")
  assert len(set(found.names)) == 2
  for kind in ("b", "a"):
    folder = tmp_path / "folders" / kind
    folder.mkdir(parents=True)
    (folder / "1.txt").write_text(f"text of {kind}")
    (folder / "2.png").write_bytes(b"\xff")
    (folder / "3.txt").write_text("  ")
  found = labelled_text.load_texts(tmp_path / "folders")
  assert found.texts == ("text of a", "text of b")
  assert found.pairs is None


@pytest.mark.parametrize("record, text", [
  ({"txt": "a", "label": 1}, "no field 'text'.*did you mean|its fields"),
  ({"text": 3, "label": 1}, "must be a string"),
  ({"text": "a", "label": 1.5}, "string or an integer"),
  ({"text": "a", "label": True}, "string or an integer"),
  (["a"], "a list, not an object"),
])  # fmt: skip
def test_lines_that_cannot_be_read(record, text, tmp_path):
  with pytest.raises(UserError, match=text) as error:
    labelled_text.load_texts(jsonl(tmp_path / "x.jsonl", record))
  assert "x.jsonl, line 1" in str(error.value)


def test_sources_that_are_not_there(tmp_path):
  with pytest.raises(UserError, match="did you mean 'stdlib:packages'"):
    labelled_text.load_texts("stdlib:package")
  with pytest.raises(UserError, match="no such file"):
    labelled_text.load_texts(tmp_path / "nothing")
  (tmp_path / "x.csv").write_text("a")
  with pytest.raises(UserError, match="must be a .jsonl"):
    labelled_text.load_texts(tmp_path / "x.csv")
  jsonl(tmp_path / "split" / "train.jsonl", {})
  with pytest.raises(UserError, match="train.jsonl and validation.jsonl"):
    labelled_text.load_texts(tmp_path / "split")
  with pytest.raises(UserError, match="1 classes"):
    labelled_text.load_texts(
      jsonl(tmp_path / "one.jsonl", {"text": "a", "label": "b"})
    )


def texts(first, second=None):
  return labelled_text.TextSet(
    first, second, np.zeros(len(first)), ("a",), None, ""
  )


BOS, EOS = 256, 257


def test_ids_of_texts():
  found = labelled_text.encode(
    texts(("ab", "abcdefgh", "")), tokenizers.ByteTokenizer(), 6
  )
  batch = found.batch(np.array([2, 0, 1]), 6)
  np.testing.assert_array_equal(
    batch["tokens"],
    [
      [BOS, EOS, 0, 0, 0, 0],
      [BOS, 97, 98, EOS, 0, 0],
      [BOS, 97, 98, 99, 100, EOS],
    ],
  )
  np.testing.assert_array_equal(batch["mask"].sum(1), [2, 4, 6])
  assert batch["mask"].dtype == bool
  np.testing.assert_array_equal(batch["token_types"], np.zeros((3, 6)))
  assert found.cut == 1


def test_ids_of_pairs():
  found = labelled_text.encode(
    texts(("ab", "abcdef", "a"), ("c", "uvwxyz", "uvwxyz")),
    tokenizers.ByteTokenizer(),
    9,
  )
  batch = found.batch(np.arange(3), 9)
  a, u = ord("a"), ord("u")
  np.testing.assert_array_equal(
    batch["tokens"],
    [
      [BOS, a, a + 1, EOS, a + 2, EOS, 0, 0, 0],
      [BOS, a, a + 1, a + 2, EOS, u, u + 1, u + 2, EOS],
      [BOS, a, EOS, u, u + 1, u + 2, u + 3, u + 4, EOS],
    ],
  )
  np.testing.assert_array_equal(
    batch["token_types"],
    [
      [0, 0, 0, 0, 1, 1, 0, 0, 0],
      [0, 0, 0, 0, 0, 1, 1, 1, 1],
      [0, 0, 0, 1, 1, 1, 1, 1, 1],
    ],
  )
  assert found.cut == 2
  with pytest.raises(UserError, match="at least 4"):
    labelled_text.encode(texts(("a",)), tokenizers.ByteTokenizer(), 3)


def test_naive_bayes_by_hand():
  """Class a: "x x", "y"; class b: "z". P(x|a) = 3/6, P(x|b) = 1/4."""
  found = texts(("x x", "y", "z", "x", "z w", "q"))
  labels = np.array([0, 0, 1, 0, 1, 0])
  chosen = labelled.Selection(np.arange(3), np.arange(3, 6), labels, ("a", "b"))
  # "q" is in no training text: the commoner class a, which is right.
  assert labelled_text.naive_bayes_error(found, chosen) == 0
  wrong = labelled.Selection(
    np.arange(3), np.arange(3, 6), np.array([0, 0, 1, 1, 1, 0]), ("a", "b")
  )
  assert labelled_text.naive_bayes_error(found, wrong) == pytest.approx(1 / 3)
