"""The byte tokenizer, tokenizer.json and decoding of a stream."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multihead.data import sources, tokenizers
from multihead.errors import UserError

_TEXT = st.text(
  st.characters(codec="utf-8") | st.sampled_from("aé€😀🏳️‍🌈\ufffd "), max_size=40
)


def _train(folder, kind, special=("<|begin_of_text|>", "<|end_of_text|>")):
  """A small tokenizer.json, trained on a part of the default corpus."""
  hf = pytest.importorskip("tokenizers")
  texts = [d.text for d in sources.load_documents()[:6]]
  if kind == "byte_level":
    made = hf.Tokenizer(hf.models.BPE())
    made.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
      vocab_size=400,
      special_tokens=list(special),
      initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    )
  else:
    # As Llama 2 has it: spaces as a sign, unknown characters as bytes.
    made = hf.Tokenizer(hf.models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    made.decoder = hf.decoders.Sequence(
      [
        hf.decoders.ByteFallback(),
        hf.decoders.Metaspace(),
        hf.decoders.Fuse(),
      ]
    )
    trainer = hf.trainers.BpeTrainer(
      vocab_size=600,
      special_tokens=["<unk>", *special, *(f"<0x{b:02X}>" for b in range(256))],
      limit_alphabet=60,
      show_progress=False,
    )
  made.train_from_iterator(texts, trainer)
  if kind != "byte_level":
    # The byte tokens are ordinary ones, or decoding would leave them out.
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [
      t for t in spec["added_tokens"] if not t["content"].startswith("<0x")
    ]
    made = hf.Tokenizer.from_str(json.dumps(spec))
  folder.mkdir(parents=True, exist_ok=True)
  made.save(str(folder / "tokenizer.json"))
  return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
  return _train(tmp_path_factory.mktemp("byte_level"), "byte_level")


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory):
  return _train(tmp_path_factory.mktemp("metaspace"), "metaspace")


class TestBytes:
  def test_ids_are_the_bytes(self):
    tokenizer = tokenizers.load("byte")
    ids = tokenizer.encode("aé€😀\0")
    assert ids.dtype == np.int32
    assert bytes(ids.tolist()) == "aé€😀\0".encode()
    assert tokenizer.encode("").shape == (0,)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (256, 257)
    assert tokenizer.vocab_size == 258

  @given(_TEXT)
  @settings(max_examples=50, deadline=None)
  def test_round_trip_with_specials_left_out(self, text):
    tokenizer = tokenizers.ByteTokenizer()
    ids = np.concatenate([[256], tokenizer.encode(text), [257, 256]])
    assert tokenizer.decode(ids) == text

  def test_broken_bytes_become_replacement_characters(self):
    assert tokenizers.ByteTokenizer().decode([97, 0xC3, 98]) == "a\ufffdb"

  def test_takes_no_bos(self):
    with pytest.raises(UserError, match="byte tokenizer has its own bos"):
      tokenizers.load("byte", bos="<s>")


class TestJson:
  def test_specials_are_looked_up(self, byte_level):
    tokenizer = tokenizers.load(str(byte_level))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.vocab_size == 400
    folder = tokenizers.load(str(byte_level.parent))
    assert folder.fingerprint == tokenizer.fingerprint

  @given(text=_TEXT)
  @settings(max_examples=50, deadline=None)
  def test_round_trip(self, byte_level, text):
    tokenizer = _cached(byte_level)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode([0, *ids, 1]) == text
    assert np.array_equal(tokenizer.encode_batch([text, text])[1], ids)

  def test_text_cannot_close_its_document(self, byte_level):
    tokenizer = tokenizers.load(str(byte_level))
    text = "a<|end_of_text|>b<|begin_of_text|>"
    ids = tokenizer.encode(text)
    assert not {0, 1} & set(ids.tolist())
    assert tokenizer.decode(ids) == text
    assert np.array_equal(tokenizer.encode_batch([text])[0], ids)

  def test_truncation_padding_and_templates_are_not_for_a_corpus(
    self, byte_level, tmp_path
  ):
    hf = pytest.importorskip("tokenizers")
    made = hf.Tokenizer.from_file(str(byte_level))
    made.enable_truncation(4)
    made.enable_padding(length=64)
    made.post_processor = hf.processors.TemplateProcessing(
      single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    text = "a text of many more than four tokens"
    changed = tokenizers.load(str(tmp_path))
    plain = tokenizers.load(str(byte_level)).encode(text)
    assert len(plain) > 4
    assert np.array_equal(changed.encode(text), plain)
    assert np.array_equal(changed.encode_batch([text, "a"])[0], plain)

  def test_one_special_token_opens_and_closes(self, tmp_path):
    path = _train(tmp_path, "byte_level", ["<|endoftext|>"])
    tokenizer = tokenizers.load(str(path))
    assert tokenizer.bos_id == tokenizer.eos_id == 0

  def test_names_given_or_configured(self, tmp_path):
    path = _train(tmp_path, "byte_level", ["<|x|>", "<|y|>", "</s>"])
    with pytest.raises(UserError, match=r"'<\|z\|>' is not in its vocabulary"):
      tokenizers.load(str(path), eos="<|z|>")
    given = tokenizers.load(str(path), bos="<|x|>", eos="<|y|>")
    assert (given.bos_id, given.eos_id) == (0, 1)
    found = tokenizers.load(str(path))
    assert (found.bos_id, found.eos_id) == (2, 2)
    assert found.fingerprint != given.fingerprint
    (tmp_path / "tokenizer_config.json").write_text(
      json.dumps({"bos_token": {"content": "<|y|>"}, "eos_token": "<|x|>"})
    )
    configured = tokenizers.load(str(path))
    assert (configured.bos_id, configured.eos_id) == (1, 0)

  def test_no_special_tokens(self, tmp_path):
    path = _train(tmp_path, "byte_level", ["<pad>"])
    with pytest.raises(UserError, match=r"cannot tell which token is eos.*pad"):
      tokenizers.load(str(path))

  def test_no_file(self, tmp_path):
    pytest.importorskip("tokenizers")
    for spec in (tmp_path, tmp_path / "nothing.json", "bytes"):
      with pytest.raises(UserError, match="there is no file.*allowed: 'byte'"):
        tokenizers.load(str(spec))

  @pytest.mark.parametrize("content", [b"{}", b"no json", b"\xff"])
  def test_not_a_tokenizer(self, tmp_path, content):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
      tokenizers.load(str(path))

  def test_package_missing(self, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'multihead\[text\]'"):
      tokenizers.load("tokenizer.json")


_LOADED = {}


def _cached(path):
  if path not in _LOADED:
    _LOADED[path] = tokenizers.load(str(path))
  return _LOADED[path]


def _stream(tokenizer, ids):
  decoder = tokenizers.StreamDecoder(tokenizer)
  pushed = [decoder.push(i) for i in ids]
  return pushed, decoder.flush()


class TestStreamDecoder:
  @given(st.binary(max_size=24))
  @settings(max_examples=200, deadline=None)
  def test_any_bytes(self, data):
    tokenizer = tokenizers.ByteTokenizer()
    pushed, rest = _stream(tokenizer, data)
    assert "".join(pushed) + rest == data.decode("utf-8", errors="replace")

  def test_only_whole_characters_come_out(self):
    tokenizer = tokenizers.ByteTokenizer()
    pushed, rest = _stream(tokenizer, tokenizer.encode("aé😀"))
    assert pushed == ["a", "", "é", "", "", "", "😀"]
    assert rest == ""

  @pytest.mark.parametrize("kind", ["byte", "byte_level", "metaspace"])
  @given(text=_TEXT)
  @settings(max_examples=100, deadline=None)
  def test_joined_is_decode(self, kind, byte_level, metaspace, text):
    tokenizer = {
      "byte": tokenizers.ByteTokenizer(),
      "byte_level": _cached(byte_level),
      "metaspace": _cached(metaspace),
    }[kind]
    ids = tokenizer.encode(text)
    pushed, rest = _stream(tokenizer, ids)
    assert "".join(pushed) + rest == tokenizer.decode(ids)
    if "\ufffd" not in text:
      assert not any("\ufffd" in p for p in pushed)

  @given(ids=st.lists(st.integers(0, 399), max_size=30))
  @settings(max_examples=100, deadline=None)
  def test_what_a_model_may_generate(self, byte_level, ids):
    tokenizer = _cached(byte_level)
    pushed, rest = _stream(tokenizer, ids)
    assert "".join(pushed) + rest == tokenizer.decode(ids)

  @pytest.mark.parametrize("kind", ["byte", "byte_level", "metaspace"])
  def test_spaces_between_words_come_with_them(
    self, kind, byte_level, metaspace
  ):
    tokenizer = {
      "byte": tokenizers.ByteTokenizer(),
      "byte_level": _cached(byte_level),
      "metaspace": _cached(metaspace),
    }[kind]
    text = "the value of the object is an object of its type"
    ids = tokenizer.encode(text)
    pushed, rest = _stream(tokenizer, ids)
    assert all(pushed) and rest == ""
    assert "".join(pushed) == text

  def test_pushes_of_several_ids_and_a_second_text(self):
    tokenizer = tokenizers.ByteTokenizer()
    decoder = tokenizers.StreamDecoder(tokenizer)
    ids = tokenizer.encode("é😀é")
    assert decoder.push(ids[:3]) == "é"
    assert decoder.push(np.asarray(ids[3:5])) == ""
    assert decoder.push(i for i in ids[5:7].tolist()) == "😀"
    assert decoder.flush() == "\ufffd"
    assert decoder.push(np.int32(97)) == "a"
    assert decoder.push(np.asarray(257)) == ""
    assert decoder.flush() == ""

  def test_long_text_takes_constant_time_a_token(self, byte_level):
    class Counting:
      eos_id = bos_id = -1

      def __init__(self, inner):
        self.inner, self.decoded = inner, 0

      def decode(self, ids):
        self.decoded += len(ids)
        return self.inner.decode(ids)

    inner = _cached(byte_level)
    ids = inner.encode("the value of an object. " * 100)
    counting = Counting(inner)
    _stream(counting, ids)
    assert counting.decoded <= 4 * len(ids)
