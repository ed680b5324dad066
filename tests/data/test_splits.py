"""The split by document and the removal of repeated passages."""

import random

import pytest

from multihead.data import sources, splits
from multihead.data.sources import Document
from multihead.errors import UserError

_WORDS = [
  f"{a}{b}{c}" for a in "bdfgkl" for b in "aeiou" for c in ("m", "n", "rt", "s")
]


def _prose(rng, words):
  return " ".join(rng.choice(_WORDS) for _ in range(words))


def _documents(count, seed=0):
  rng = random.Random(seed)
  return [
    Document(
      f"d{i}", "\n\n".join(_prose(rng, 30) for _ in range(rng.randrange(1, 9)))
    )
    for i in range(count)
  ]


class TestSplit:
  def test_parts_are_disjoint_and_complete(self):
    documents = _documents(50)
    split = splits.split_documents(documents, shared_words=None)
    assert {*split.train, *split.validation} == set(documents)
    assert len(split.train) + len(split.validation) == len(documents)
    whole = split.train_bytes + split.validation_bytes
    assert 0.05 <= split.validation_bytes / whole <= 0.125

  def test_order_of_the_documents_makes_no_difference(self):
    documents = _documents(50)
    split = splits.split_documents(documents)
    random.Random(1).shuffle(documents)
    assert splits.split_documents(documents) == split

  def test_is_the_same_on_every_machine(self):
    split = splits.split_documents(_documents(20), shared_words=None)
    assert sorted(d.name for d in split.validation) == ["d5", "d9"]

  def test_seed_chooses_other_documents(self):
    documents = _documents(50)
    chosen = {
      splits.split_documents(documents, seed=s).validation for s in range(5)
    }
    assert len(chosen) == 5

  def test_documents_of_one_name_are_told_apart(self):
    documents = [Document("same", d.text) for d in _documents(30)]
    split = splits.split_documents(documents, shared_words=None)
    assert len(split.train) + len(split.validation) == 30
    assert splits.split_documents(documents[::-1], shared_words=None) == split

  @pytest.mark.parametrize("fraction", [1e-6, 0.1, 0.5, 0.999])
  @pytest.mark.parametrize("count", [2, 3, 7])
  def test_at_least_one_document_in_each(self, count, fraction):
    split = splits.split_documents(
      _documents(count), validation_fraction=fraction, shared_words=None
    )
    assert split.train and split.validation
    assert len(split.train) + len(split.validation) == count

  def test_one_huge_document_is_trained_on(self):
    documents = [*_documents(3), Document("huge", "word " * 10_000)]
    for seed in range(8):
      split = splits.split_documents(documents, seed=seed, shared_words=None)
      assert "huge" in {d.name for d in split.train}

  def test_one_document_cannot_be_split(self):
    with pytest.raises(UserError, match="at least two documents"):
      splits.split_documents(_documents(1))

  @pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
  def test_fraction_out_of_range(self, fraction):
    with pytest.raises(UserError, match="validation_fraction"):
      splits.split_documents(_documents(3), validation_fraction=fraction)

  def test_names_the_corpus(self, tmp_path):
    (tmp_path / "short.txt").write_text("too short to cut")
    with pytest.raises(UserError, match=r"short\.txt: 1 document"):
      splits.load_split(tmp_path / "short.txt")


class TestRepeated:
  def _remove(self, text, *reference, **kwargs):
    kept, removed_bytes, count = splits.remove_repeated(
      [Document("v", text)],
      [Document(f"r{i}", r) for i, r in enumerate(reference)],
      **kwargs,
    )
    kept = kept[0].text if kept else ""
    assert removed_bytes == len(text.encode()) - len(kept.encode())
    return kept, count

  @pytest.mark.parametrize(
    "change",
    [
      lambda p: p,
      lambda p: "    " + p.replace("\n", "\n    "),
      lambda p: "> " + p.replace("\n", "\n> "),
      lambda p: p.replace("\n", " "),
      lambda p: p.replace(" ", "\n"),
      lambda p: p.upper().replace(" ", ",  "),
    ],
    ids=["exact", "indented", "quoted", "one line", "narrow", "shouted"],
  )
  def test_planted_paragraph_is_found(self, change):
    rng = random.Random(0)
    planted = _prose(rng, 20) + "\n" + _prose(rng, 20)
    before, after = _prose(rng, 40), _prose(rng, 40)
    text = f"{before}\n\n{change(planted)}\n\n{after}"
    reference = f"{_prose(rng, 50)}\n\n{planted}\n\n{_prose(rng, 50)}"
    assert self._remove(text, _prose(rng, 90), reference) == (
      f"{before}\n\n{after}",
      1,
    )

  def test_run_within_longer_paragraphs_is_found(self):
    rng = random.Random(1)
    run = _prose(rng, 12)
    text = f"{_prose(rng, 9)} {run} {_prose(rng, 9)}\n\nanother paragraph"
    reference = f"{_prose(rng, 5)} {run} {_prose(rng, 5)}"
    assert self._remove(text, reference) == ("another paragraph", 1)

  def test_run_one_word_short_stays(self):
    rng = random.Random(1)
    run = _prose(rng, 11)
    text = f"one {run} two and more words here"
    reference = f"three {run} four and so on"
    assert self._remove(text, reference) == (text, 0)
    assert self._remove(text, reference, shared_words=11) == ("", 1)

  def test_run_over_several_short_paragraphs_is_found(self):
    rng = random.Random(2)
    lines = [_prose(rng, 5) for _ in range(3)]
    text = "first paragraph\n\n" + "\n\n".join(lines) + "\n\nlast paragraph"
    kept, count = self._remove(text, " ".join(lines))
    assert (kept, count) == ("first paragraph\n\nlast paragraph", 3)

  def test_short_paragraph_goes_if_it_is_one_there_too(self):
    text = "See also:\n\nfresh text"
    assert self._remove(text, "a\n\n  see also\n\nb") == ("fresh text", 1)
    # Not if the words only stand within a paragraph.
    assert self._remove(text, "a\n\nPlease see also:\n\nb") == (text, 0)

  @pytest.mark.parametrize("there", ["also see", "see also xyzzy", "see", ""])
  def test_short_paragraph_stays_if_only_like_one_there(self, there):
    text = "See also:\n\nfresh text"
    assert self._remove(text, f"a\n\n{there}\n\nb") == (text, 0)

  def test_rulers_go_with_the_passage_before(self):
    text = "Title\n\n=====\n\nfresh text\n\n----\n\nmore text"
    assert self._remove(text, "Title\n\n****") == (
      "fresh text\n\n----\n\nmore text",
      2,
    )

  def test_long_paragraph_goes_line_by_line(self):
    rng = random.Random(3)
    lines = [_prose(rng, 20) for _ in range(40)]
    text = "\n".join(lines)
    assert len(text) > 2000
    kept, count = self._remove(text, lines[7])
    assert count == 1
    assert kept == "\n".join(lines[:7] + lines[8:])

  def test_long_line_goes_sentence_by_sentence(self):
    rng = random.Random(4)
    sentences = [_prose(rng, 20) + "." for _ in range(40)]
    kept, count = self._remove(" ".join(sentences), sentences[7])
    assert count == 1
    assert kept == " ".join(sentences[:7] + sentences[8:])

  def test_scripts_without_spaces(self):
    shared = "これは訓練の文書にもある長い文です"
    text = f"まったく別の段落。\n\n{shared}。"
    assert self._remove(text, f"前置き、{shared}！") == (
      "まったく別の段落。\n\n",
      1,
    )

  def test_words_that_only_training_has_match_nothing(self):
    rng = random.Random(5)
    text = _prose(rng, 30)
    words = text.split()
    words[5:30:6] = ["strange", "unknown", "foreign", "odd", "new"]
    assert self._remove(text, " ".join(words), shared_words=6) == (text, 0)

  def test_nothing_in_common(self):
    rng = random.Random(6)
    text = "\n\n".join(_prose(rng, 30) for _ in range(10))
    assert self._remove(text, _prose(rng, 5000)) == (text, 0)
    assert self._remove(text) == (text, 0)

  def test_brute_force_on_the_default_corpus(self):
    """No run of 12 words, and no paragraph, is left in both parts."""
    import re

    split = splits.load_split()

    def runs(text):
      words = re.findall(r"[^\W_]+", text.casefold())
      return {tuple(words[i : i + 12]) for i in range(len(words) - 11)}

    train = set().union(*(runs(d.text) for d in split.train))
    train_paragraphs = {
      " ".join(p.split()) for d in split.train for p in d.text.split("\n\n")
    }
    original = {d.name: d.text for d in sources.load_documents()}
    leaked = 0
    for document in split.validation:
      assert document.name not in {d.name for d in split.train}
      for paragraph in document.text.split("\n\n"):
        assert not runs(paragraph) & train
        assert " ".join(paragraph.split()) not in train_paragraphs - {""}
        lines = original[document.name].splitlines()
        assert set(paragraph.splitlines()) <= set(lines)
      leaked += bool(runs(original[document.name]) & train)
    # It mattered: topics repeat one another.
    assert leaked
    assert 0.2 < split.removed_fraction < 0.6
    assert split.validation_bytes > 20_000
    whole = sum(len(t.encode()) for t in original.values())
    assert (
      split.train_bytes + split.validation_bytes + split.removed_bytes == whole
    )
    assert "repeated passages" in str(split)

  def test_copies_all_over_leave_nothing(self):
    text = _prose(random.Random(7), 50)
    documents = [Document(f"d{i}", text) for i in range(5)]
    with pytest.raises(UserError, match="every passage of the 1 validation"):
      splits.split_documents(documents)
    split = splits.split_documents(documents, shared_words=None)
    assert split.validation[0].text == text and split.removed_fraction == 0
