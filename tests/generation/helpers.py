"""What the tests of generation share: a small model, prompts, an oracle."""

import functools

import jax
import numpy as np

from multihead import models
from multihead.parallel import sharding

VOCAB = 61
SHAPE = dict(
  vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
  num_attention_heads=4, num_key_value_heads=2, head_dim=8, mamba_n_heads=4,
  mamba_d_head=8, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=16,
  max_position_embeddings=256, mamba_proj_bias=True, initializer_range=0.3,
  scan_layers=False,
)  # fmt: skip


@functools.cache
def tiny(**overrides):
  """A model whose logits lie far apart, and its parameters."""
  model = models.create("falcon_h1", **{**SHAPE, **overrides})
  return model, sharding.init_params(model, jax.random.key(1))


def prompts(*lengths, seed=0):
  """Rows of random tokens padded on the left, and their mask."""
  rng = np.random.default_rng(seed)
  shape = (len(lengths), max(lengths))
  tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
  for row, length in enumerate(lengths):
    tokens[row, shape[1] - length :] = rng.integers(0, VOCAB, length)
    mask[row, shape[1] - length :] = True
  return tokens, mask


@functools.partial(jax.jit, static_argnums=0)
def _scores(model, params, tokens):
  return model.apply({"params": params}, tokens)


def recompute(model, params, rows, count):
  """Greedy tokens [B, count] by whole forward passes, without a cache.

  Every text, without padding, stands on the left of a row of fixed length:
  what follows cannot reach it, since the model is causal.
  """
  texts = [list(row) for row in rows]
  for _ in range(count):
    padded = np.zeros((len(texts), 256), np.int32)
    for row, text in enumerate(texts):
      padded[row, : len(text)] = text
    logits = np.asarray(_scores(model, params, padded))
    for row, text in enumerate(texts):
      text.append(int(logits[row, len(text) - 1].argmax()))
  return np.array([text[len(text) - count :] for text in texts], np.int32)


def unpadded(tokens, mask):
  """The rows without their padding."""
  return [row[real] for row, real in zip(tokens, mask, strict=True)]


class Compilations:
  """Counts the programs that XLA compiles inside a `with`."""

  def __enter__(self):
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def _listen(self, event, *args, **kwargs):
    self.count += event == "/jax/core/compile/backend_compile_duration"

  def __exit__(self, *args):
    jax.monitoring.unregister_event_duration_listener(self._listen)
