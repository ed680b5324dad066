"""Falcon-H1 against logits that `transformers` computed (goldens)."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead import checkpoints

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import falcon_h1_cases as cases  # noqa: E402

TOLERANCE = 2e-5  # of the largest logit
CHUNK = 12
# Compiling is most of the time here; tests/parity runs the optimised code.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module", params=cases.CASES)
def case(request):
  return request.param


@pytest.fixture(scope="module")
def loaded(case, tmp_path_factory):
  """(compiled apply, model) of the case, loaded from a directory."""
  path = tmp_path_factory.mktemp(case)
  cases.write_directory(path, case)
  model, params = checkpoints.from_pretrained(path)

  def apply(tokens, mask=None, cache=None):
    return model.apply({"params": params}, tokens, mask, cache=cache)

  return jax.jit(apply, compiler_options=FAST_COMPILE), model


@pytest.fixture(scope="module")
def golden(case):
  with np.load(GOLDEN / f"falcon_h1_{case}.npz") as stored:
    return {name: stored[name] for name in stored}


def check(logits, expected):
  worst = np.abs(np.asarray(logits) - expected).max()
  assert worst <= TOLERANCE * np.abs(expected).max()


def run_cached(apply, cache, tokens, lengths, mask=None):
  """Feeds pieces of these lengths through the cache; logits of all tokens."""
  out, start = [], 0
  for length in lengths:
    piece = slice(start, start + length)
    part = None if mask is None else jnp.asarray(mask[:, piece])
    logits, cache = apply(tokens[:, piece], part, cache)
    out.append(logits)
    start += length
  assert start == tokens.shape[1]
  return np.concatenate(out, axis=1)


def test_whole_prefill(case, loaded, golden):
  apply, _ = loaded
  logits = apply(cases.tokens(case))
  assert logits.dtype == jnp.float32
  check(logits, golden["logits"])


def test_token_by_token(case, loaded, golden):
  apply, model = loaded
  tokens = cases.tokens(case)
  cache = model.init_cache(2, 50)
  check(
    run_cached(apply, cache, tokens, [1] * tokens.shape[1]), golden["logits"]
  )


def test_chunked_prefill_then_decoding(case, loaded, golden):
  apply, model = loaded
  tokens = cases.tokens(case)
  chunks, rest = divmod(tokens.shape[1], CHUNK)
  lengths = [CHUNK] * chunks + [1] * rest
  cache = model.init_cache(2, 50)
  check(run_cached(apply, cache, tokens, lengths), golden["logits"])


def test_left_padding_changes_nothing(case, loaded, golden):
  apply, _ = loaded
  tokens, mask = cases.padded_batch(case)
  logits = np.asarray(apply(tokens, mask))
  check(logits[mask], golden["padded_logits"][mask])


@pytest.mark.parametrize(
  "case", ["norm_after_gate_g2", "biases_g2", "time_step_limit"], indirect=True
)
def test_left_padding_with_a_cache(case, loaded, golden):
  apply, model = loaded
  tokens, mask = cases.padded_batch(case)
  # The first two chunks of the third row are padding alone.
  cache = model.init_cache(len(tokens), 20)
  logits = run_cached(apply, cache, tokens, [7, 7, 1, 1, 1, 1], mask)
  check(logits[mask], golden["padded_logits"][mask])
