"""Documents from this Python, files, folders and jsonl."""

import json
import random
import sys
import textwrap

import pytest

from multihead.data import sources
from multihead.errors import UserError


def _write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(
    content if isinstance(content, bytes) else content.encode("utf-8")
  )
  return path


def _names(documents):
  return [d.name for d in documents]


class TestStandardLibrary:
  def test_default_is_the_topics_of_pydoc(self):
    from pydoc_data import topics

    documents = sources.load_documents()
    assert {d.name: d.text for d in documents} == topics.topics
    assert _names(documents) == sorted(topics.topics)
    assert sum(d.num_bytes for d in documents) > 400_000
    assert sources.load_documents("") == documents
    assert sources.load_documents("stdlib:topics") == documents

  def test_docstrings_are_read_without_importing(self):
    before = set(sys.modules)
    documents = {d.name: d for d in sources.load_documents("stdlib:docstrings")}
    assert not {"antigravity", "this", "turtle"} & (set(sys.modules) - before)
    assert list(documents) == sorted(documents)
    assert sum(d.num_bytes for d in documents.values()) > 1_000_000
    assert textwrap.dedent.__doc__.split("\n")[0] in (
      documents["textwrap.py"].text
    )
    assert not any(n.startswith(("test/", "idlelib/")) for n in documents)

  def test_unknown_name_gives_the_nearest(self):
    with pytest.raises(UserError, match=r"did you mean 'stdlib:topics'"):
      sources.load_documents("stdlib:topic")


class TestFolder:
  def test_reads_text_beneath_it_in_sorted_order(self, tmp_path):
    _write(tmp_path / "b.txt", "bee")
    _write(tmp_path / "a" / "z.md", "zed")
    _write(tmp_path / "a" / "c.TXT", "sea")
    _write(tmp_path / "image.png", b"\x89PNG\xff")
    _write(tmp_path / ".git" / "config.txt", "hidden")
    _write(tmp_path / "empty.txt", " \n")
    _write(tmp_path / "d.jsonl", '{"text": "line", "id": 7}\n')
    documents = sources.load_documents(tmp_path)
    assert [(d.name, d.text) for d in documents] == [
      ("a/c.TXT", "sea"),
      ("a/z.md", "zed"),
      ("b.txt", "bee"),
      ("d.jsonl#7", "line"),
    ]

  def test_names_do_not_depend_on_where_the_folder_lies(self, tmp_path):
    for folder in ("one", "two/deep"):
      _write(tmp_path / folder / "x" / "a.txt", "a")
      _write(tmp_path / folder / "b.txt", "b")
    assert sources.load_documents(tmp_path / "one") == sources.load_documents(
      tmp_path / "two" / "deep"
    )

  def test_without_text_says_what_is_read(self, tmp_path):
    _write(tmp_path / "image.png", b"\x89PNG")
    with pytest.raises(UserError, match=r"no text files.*\.jsonl.*\.txt"):
      sources.load_documents(tmp_path)


class TestFile:
  @pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", "\n", " ", ""])
  @pytest.mark.parametrize("length", [700, 30_000, 400_000])
  def test_one_document_is_cut_and_joins_again(
    self, tmp_path, separator, length
  ):
    rng = random.Random(length)
    text = ""
    while len(text) < length:
      text += "é" * rng.randrange(1, 200) + separator
    path = _write(tmp_path / "book.anything", text)
    documents = sources.load_documents(path)
    assert "".join(d.text for d in documents) == text
    assert len(documents) >= 2
    assert len(set(_names(documents))) == len(documents)
    size = min(max(length // 20, 256), sources.PIECE_CHARACTERS)
    assert all(len(d.text) <= 1.3 * size for d in documents)
    if separator:
      assert all(d.text.endswith(separator) for d in documents[:-1])

  def test_prefers_a_blank_line_to_a_line(self, tmp_path):
    paragraph = "line one\nline two\nline three\n\n"
    path = _write(tmp_path / "a.txt", paragraph * 400)
    documents = sources.load_documents(path)
    assert len(documents) > 10
    assert all(d.text.startswith("line one") for d in documents)

  def test_a_long_gap_makes_no_blank_document(self, tmp_path):
    text = "start\n" + "\n" * 5000 + "end of it\n" + " \n" * 900
    documents = sources.load_documents(_write(tmp_path / "a.txt", text))
    assert "".join(d.text for d in documents) == text
    assert all(d.text.strip() for d in documents)

  def test_byte_order_mark_is_no_text(self, tmp_path):
    path = _write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")
    assert sources.load_documents(path)[0].text == "hello"

  @pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
  def test_not_utf8_names_file_and_offset(self, tmp_path, prefix):
    path = _write(tmp_path / "latin.txt", prefix + b"caf\xe9 au lait")
    with pytest.raises(UserError) as error:
      sources.load_documents(path)
    assert str(path) in str(error.value)
    assert f"byte 0xe9 at offset {len(prefix) + 3};" in str(error.value)

  def test_missing(self, tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
      sources.load_documents(tmp_path / "nothing.txt")

  @pytest.mark.parametrize("content", ["", "\n \n\t"])
  def test_blank(self, tmp_path, content):
    path = _write(tmp_path / "blank.txt", content)
    with pytest.raises(UserError, match=r"blank\.txt: no text in it"):
      sources.load_documents(path)


class TestJsonl:
  def _lines(self, tmp_path, *lines):
    return _write(tmp_path / "corpus.jsonl", "\n".join(lines) + "\n")

  def test_a_document_a_line(self, tmp_path):
    path = self._lines(
      tmp_path,
      json.dumps({"text": "first\nof two", "id": "a"}),
      "",
      json.dumps({"text": "second\u2028line"}, ensure_ascii=False),
      json.dumps({"text": " "}),
    )
    assert sources.load_documents(path) == [
      sources.Document("corpus.jsonl#a", "first\nof two"),
      sources.Document("corpus.jsonl#line-3", "second\u2028line"),
    ]

  def test_other_fields(self, tmp_path):
    path = self._lines(
      tmp_path, '{"body": "x", "key": 1}', '{"body": "y", "key": 2}'
    )
    documents = sources.load_documents(path, text_field="body", id_field="key")
    assert _names(documents) == ["corpus.jsonl#1", "corpus.jsonl#2"]
    with pytest.raises(UserError, match=r"line 1: no field 'bodi'.*'body'"):
      sources.load_documents(path, text_field="bodi")

  @pytest.mark.parametrize(
    ("line", "message"),
    [
      ("{'text': 1}", "line 2: not JSON"),
      ('{"text": "x"', "line 2: not JSON"),
      ('["text"]', "line 2: a list, not an object"),
      ("{}", "line 2: no field 'text'.*its fields: none"),
      ('{"text": 3}', "line 2: field 'text' is a int, not a string"),
      (r'{"text": "a\ud800"}', "line 2: .*unpaired surrogate at character 1"),
    ],
  )
  def test_mistakes_name_the_line(self, tmp_path, line, message):
    path = self._lines(tmp_path, '{"text": "good"}', line)
    with pytest.raises(UserError, match=message):
      sources.load_documents(path)
