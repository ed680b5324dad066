"""BERT beside live models of `transformers`, random and with real weights."""

import pydoc_data.topics as topics
import re

import jax
import numpy as np
import pytest

from multihead import checkpoints
from multihead.errors import UserError
from multihead.parallel import sharding

torch = pytest.importorskip(
  "torch", reason="torch is not installed: pip install 'multihead[parity]'"
)
transformers = pytest.importorskip(
  "transformers",
  reason="transformers is not installed: pip install 'multihead[parity]'",
)

pytestmark = pytest.mark.parity

TOLERANCE = 2e-5  # of the largest value
SHAPE = dict(
  hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
  intermediate_size=40, vocab_size=60, max_position_embeddings=40,
)  # fmt: skip


@pytest.fixture(autouse=True)
def two_threads():
  before = torch.get_num_threads()
  torch.set_num_threads(2)
  yield
  torch.set_num_threads(before)


def perturb(net):
  """Weights far from their initial values, norms and biases too."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in net.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      scale = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
      parameter.add_(scale * noise)
  return net.eval()


def batch(padding, seed=0):
  """Ids, mask and types of three texts of 17, 9 and 1 tokens."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, SHAPE["vocab_size"], (3, 17))
  mask = np.arange(17) < np.array([[17], [9], [1]])
  types = (np.arange(17) >= 6).astype(int) * np.ones_like(tokens)
  return np.where(mask, tokens, padding), mask, types


def theirs(net, tokens, mask=None, types=None):
  inputs = {
    "input_ids": tokens,
    "attention_mask": mask,
    "token_type_ids": types,
  }
  inputs = {
    name: torch.from_numpy(np.asarray(value, np.int64))
    for name, value in inputs.items()
    if value is not None
  }
  with torch.inference_mode():
    out = net(**inputs)
  return out.logits if "logits" in out else out.last_hidden_state


def check(record, ours, expected, name, tolerance=TOLERANCE):
  ours, expected = np.asarray(ours), np.asarray(expected)
  error = np.abs(ours - expected).max() / np.abs(expected).max()
  record(name, float(error))
  print(f"{name}: max |difference| / max |value| = {error:.1e}")
  assert error <= tolerance


def apply(model, params, *inputs, **options):
  run = jax.jit(lambda p, x: model.apply({"params": p}, *x, **options))
  return run(params, inputs)


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "Model"])
def test_random(kind, head, tmp_path, record_property):
  config = getattr(transformers, f"{kind}Config")(
    **SHAPE,
    num_labels=5,
    hidden_act="gelu_new" if head == "Model" else "gelu",
  )
  cls = getattr(transformers, kind + head)
  net = perturb(cls(config))
  net.save_pretrained(tmp_path / "theirs")
  model, params = checkpoints.from_pretrained(tmp_path / "theirs")
  count = sum(p.numel() for p in net.parameters())
  assert sharding.param_count(params) == count
  # RoBERTa has one type of tokens unless the config says otherwise.
  tokens, mask, types = batch(padding=config.pad_token_id)
  expected = theirs(net, tokens, mask, types)
  real = mask if head == "Model" else slice(None)
  ours = np.asarray(apply(model, params, tokens, mask, types))
  check(record_property, ours[real], expected[real], f"{kind}{head}")
  # Without a mask, and with nothing but tokens.
  tokens = tokens[:1]
  expected = theirs(net, tokens)
  ours = apply(model, params, tokens)
  check(record_property, ours, expected, "tokens alone")
  unrolled = model.unroll(params)
  check(record_property, apply(*unrolled, tokens), expected, "unrolled")

  checkpoints.save_pretrained(tmp_path / "ours", *unrolled)
  again = cls.from_pretrained(tmp_path / "ours").eval()
  assert again.config.to_diff_dict().keys() <= {
    *net.config.to_diff_dict(), "id2label", "label2id", "architectures",
    "dtype", "model_type", "pad_token_id",
  }  # fmt: skip
  before, after = net.state_dict(), again.state_dict()
  assert before.keys() == after.keys()
  assert all(torch.equal(before[name], after[name]) for name in before)
  check(record_property, theirs(again, tokens), expected, "export")


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_encoder_of_a_masked_language_model(kind, tmp_path, record_property):
  config = getattr(transformers, f"{kind}Config")(**SHAPE)
  net = perturb(getattr(transformers, f"{kind}ForMaskedLM")(config))
  net.save_pretrained(tmp_path)
  model, params = checkpoints.from_pretrained(tmp_path)
  assert not model.add_pooling_layer
  tokens, mask, types = batch(padding=config.pad_token_id)
  expected = theirs(getattr(net, kind.lower()), tokens, mask, types)
  ours = np.asarray(apply(model, params, tokens, mask, types))
  check(record_property, ours[mask], expected[mask], kind)


def real_texts():
  """Sentences of Python's documentation, of many lengths."""
  sentences = []
  for text in list(topics.topics.values())[:12]:
    plain = re.sub(r"\s+", " ", text)
    sentences += re.findall(r"[A-Z][^.]{20,400}\.", plain)[:5]
  return sentences[:48]


def minilm():
  try:
    return checkpoints.locate(checkpoints.MINILM)
  except UserError as error:
    pytest.skip(str(error))


def test_minilm(record_property):
  """Real weights on real text: hidden states and sentence embeddings."""
  path = minilm()
  model, params = checkpoints.from_pretrained(checkpoints.MINILM)
  assert sharding.param_count(params) == 22_713_216
  net = transformers.AutoModel.from_pretrained(path, dtype=torch.float32)
  net = net.eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  texts = real_texts()
  assert len(texts) == 48
  inputs = tokenizer(texts, padding=True, truncation=True, max_length=64)
  tokens = np.asarray(inputs["input_ids"])
  mask = np.asarray(inputs["attention_mask"]).astype(bool)
  lengths = mask.sum(1)
  assert lengths.min() < 12 and lengths.max() == 64
  expected = theirs(net, tokens, mask).numpy()
  ours = np.asarray(apply(model, params, tokens, mask))
  check(record_property, ours[mask], expected[mask], "hidden states")

  weights = mask[..., None].astype(np.float64)
  mean = (expected * weights).sum(1) / weights.sum(1)
  mean /= np.linalg.norm(mean, axis=1, keepdims=True)
  embedded = apply(model, params, tokens, mask, method="embed_sentences")
  check(record_property, embedded, mean, "sentence embeddings")
  # Padding further and packing into another batch change nothing.
  wide = np.pad(tokens[:3], ((0, 0), (0, 9)))
  alone = apply(
    model,
    params,
    wide,
    np.pad(mask[:3], ((0, 0), (0, 9))),
    method="embed_sentences",
  )
  check(record_property, alone, mean[:3], "padded further")


def test_minilm_knows_what_sentences_mean():
  """The weights are in their places: a paraphrase is nearer than the rest."""
  path = minilm()
  model, params = checkpoints.from_pretrained(path)
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  texts = [
    "A man is playing a guitar on the street.",
    "Someone performs music with a string instrument outdoors.",
    "The compiler reports a syntax error in the second line.",
    "The stock market fell sharply after the announcement.",
  ]
  inputs = tokenizer(texts, padding=True)
  embedded = apply(
    model,
    params,
    np.asarray(inputs["input_ids"]),
    np.asarray(inputs["attention_mask"]).astype(bool),
    method="embed_sentences",
  )
  similar = np.asarray(embedded @ embedded.T)
  assert similar[0, 1] > 0.4 > 0.2 > max(similar[0, 2], similar[0, 3])
