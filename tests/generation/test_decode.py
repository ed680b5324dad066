"""Generation against recomputing the whole text for every token."""

import functools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead import generation, models
from multihead.errors import UserError
from multihead.generation import decode
from multihead.parallel import sharding

SHAPE = dict(
  vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
  num_attention_heads=4, num_key_value_heads=2, head_dim=8, mamba_n_heads=4,
  mamba_d_head=8, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=16,
  max_position_embeddings=256, mamba_proj_bias=True, initializer_range=0.3,
)  # fmt: skip


@functools.cache
def tiny(**overrides):
  model = models.create("falcon_h1", **{**SHAPE, **overrides})
  return model, sharding.init_params(model, jax.random.key(1))


def prompts(*lengths, seed=0):
  """Rows of random tokens padded on the left, and their mask."""
  rng = np.random.default_rng(seed)
  width = max(lengths)
  tokens = np.zeros((len(lengths), width), np.int32)
  mask = np.zeros((len(lengths), width), bool)
  for row, length in enumerate(lengths):
    tokens[row, width - length :] = rng.integers(0, 61, length)
    mask[row, width - length :] = True
  return tokens, mask


@functools.partial(jax.jit, static_argnums=0)
def _scores(model, params, tokens):
  return model.apply({"params": params}, tokens)


def recompute(model, params, row, count):
  """Greedy tokens by a whole forward pass, without a cache, for each one.

  The text stands on the left of a row of fixed length: what follows cannot
  reach it, since the model is causal.
  """
  text = list(row)
  for _ in range(count):
    padded = np.zeros((1, 256), np.int32)
    padded[0, : len(text)] = text
    logits = np.asarray(_scores(model, params, padded))[0, len(text) - 1]
    text.append(int(logits.argmax()))
  return np.array(text[len(row) :], np.int32)


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


class GenerateTest(parameterized.TestCase):
  @parameterized.product(
    length=(1, 5, 64, 70), scan_layers=(True, False)
  )
  def test_equals_recomputation(self, length, scan_layers):
    model, params = tiny(scan_layers=scan_layers)
    tokens, _ = prompts(length)
    out = generation.generate(model, params, tokens, max_new_tokens=12)
    self.assertEqual(out.shape, (1, length + 12))
    self.assertEqual(out.dtype, np.int32)
    np.testing.assert_array_equal(out[:, :length], tokens)
    np.testing.assert_array_equal(
      out[0, length:], recompute(model, params, tokens[0], 12)
    )

  def test_stacked_layers_can_stay_as_they_are(self):
    model, params = tiny()
    tokens, _ = prompts(9)
    stacked = generation.Generator(model, params, unroll=False)
    self.assertTrue(stacked.model.scan_layers)
    np.testing.assert_array_equal(
      stacked(tokens, max_new_tokens=8),
      generation.generate(model, params, tokens, max_new_tokens=8),
    )

  @parameterized.parameters(None, 1, 7, 64, 1000)
  def test_padded_batch_equals_each_row_alone(self, prefill_chunk):
    model, params = tiny()
    tokens, mask = prompts(23, 1, 11, 40)
    out = generation.generate(
      model,
      params,
      tokens,
      mask=mask,
      max_new_tokens=10,
      prefill_chunk=prefill_chunk,
    )
    for row in range(len(tokens)):
      np.testing.assert_array_equal(
        out[row, tokens.shape[1] :],
        recompute(model, params, tokens[row][mask[row]], 10),
      )

  @parameterized.parameters(1, 7, 16, 64)
  def test_chunked_prefill_equals_whole(self, chunk):
    model, params = tiny()
    generator = generation.Generator(model, params)
    tokens, mask = prompts(50, 33)
    whole = generator.prefill(tokens, mask=mask)
    chunked = generator.prefill(tokens, mask=mask, prefill_chunk=chunk)
    np.testing.assert_allclose(
      chunked.logits, whole.logits, rtol=0, atol=1e-5 * np.abs(whole.logits).max()
    )
    for name in ("ssm", "conv_x", "conv_bc"):
      np.testing.assert_allclose(
        chunked.cache["layers"][2][name],
        whole.cache["layers"][2][name],
        atol=1e-4,
      )

  def test_bfloat16_stays_near_float32(self):
    model, params = tiny()
    tokens, mask = prompts(20, 13)
    wanted = generation.Generator(model, params).prefill(tokens, mask=mask)
    half = generation.Generator(model.clone(dtype=jnp.bfloat16), params)
    found = half.prefill(tokens, mask=mask)
    self.assertEqual(found.cache["layers"][0]["k"].dtype, jnp.bfloat16)
    error = np.abs(found.logits - wanted.logits).max()
    self.assertLess(error, 0.06 * np.abs(wanted.logits).max())
    self.assertEqual(half(tokens, mask=mask, max_new_tokens=3).shape, (2, 23))

  def test_eos_ends_each_row_on_its_own(self):
    model, params = tiny()
    tokens, mask = prompts(30, 12, 21)
    generator = generation.Generator(model, params)
    free = generator(tokens, mask=mask, max_new_tokens=20)[:, 30:]
    eos = [int(free[0, 3]), int(free[1, 7])]
    out = generator(tokens, mask=mask, max_new_tokens=20, eos_id=eos)[:, 30:]
    ended = 0
    for row, wanted in zip(out, free, strict=True):
      wanted = wanted.copy()
      hits = np.flatnonzero(np.isin(wanted, eos))
      if len(hits):
        ended += 1
        wanted[hits[0] :] = wanted[hits[0]]
      np.testing.assert_array_equal(row, wanted)
    self.assertGreaterEqual(ended, 2)

  def test_generation_stops_when_all_rows_are_done(self):
    model, params = tiny()
    tokens, mask = prompts(30, 12)
    generator = generation.Generator(model, params)
    free = generator(tokens, mask=mask, max_new_tokens=20)[:, 30:]
    eos = [int(free[0, 2]), int(free[1, 4])]
    seen = []
    out = generator(
      tokens, mask=mask, max_new_tokens=20, eos_id=eos, callback=seen.append
    )
    last = max(np.isin(free, eos).argmax(axis=1))
    seen = np.concatenate(seen, axis=1)
    self.assertEqual(seen.shape[1], last + 1)
    np.testing.assert_array_equal(seen, out[:, 30 : 30 + last + 1])
    np.testing.assert_array_equal(out[:, 30 + last :] == out[:, -1:], True)

  @parameterized.product(every=(1, 3, 100), temperature=(0.0, 1.5))
  def test_streaming_gives_the_same_tokens(self, every, temperature):
    model, params = tiny()
    tokens, mask = prompts(17, 4)
    generator = generation.Generator(model, params)
    settings = dict(
      mask=mask,
      max_new_tokens=11,
      temperature=temperature,
      top_k=20,
      rng=jax.random.key(3),
    )
    whole = generator(tokens, **settings)
    seen = []
    streamed = generator(
      tokens, **settings, callback=seen.append, callback_every=every
    )
    np.testing.assert_array_equal(streamed, whole)
    np.testing.assert_array_equal(np.concatenate(seen, axis=1), whole[:, 17:])
    # The first token comes as soon as it is there.
    sizes = [new.shape[1] for new in seen]
    self.assertEqual(sizes[0], 1)
    self.assertLessEqual(max(sizes), every)

  def test_draws_depend_on_the_key_alone(self):
    model, params = tiny()
    tokens, _ = prompts(6, 6)
    generator = generation.Generator(model, params)
    draw = lambda seed: generator(
      tokens, max_new_tokens=16, temperature=1.0, rng=jax.random.key(seed)
    )
    np.testing.assert_array_equal(draw(0), draw(0))
    self.assertTrue((draw(0) != draw(1)).any())

  def test_first_draws_follow_the_models_distribution(self):
    model, params = tiny()
    tokens = np.repeat(prompts(6)[0], 2048, axis=0)
    logits = np.asarray(
      model.apply({"params": params}, tokens[:1]), np.float64
    )[0, -1]
    out = generation.generate(
      model,
      params,
      tokens,
      max_new_tokens=1,
      temperature=1.0,
      rng=jax.random.key(0),
    )
    wanted = np.exp(logits - logits.max())
    wanted /= wanted.sum()
    found = np.bincount(out[:, -1], minlength=61) / len(tokens)
    margin = 5 * np.sqrt(wanted * (1 - wanted) / len(tokens)) + 5e-4
    np.testing.assert_array_less(np.abs(found - wanted), margin)

  def test_fills_the_models_maximum_exactly(self):
    model, params = tiny()
    tokens, _ = prompts(241)
    out = generation.generate(model, params, tokens, max_new_tokens=15)
    np.testing.assert_array_equal(
      out[0, 241:], recompute(model, params, tokens[0], 15)
    )
    chunked = generation.generate(
      model, params, tokens, max_new_tokens=15, prefill_chunk=100
    )
    np.testing.assert_array_equal(chunked, out)
    with self.assertRaisesRegex(UserError, "max_position_embeddings=256"):
      generation.generate(model, params, tokens, max_new_tokens=16)

  def test_nothing_to_generate(self):
    model, params = tiny()
    tokens, _ = prompts(3)
    out = generation.generate(model, params, tokens, max_new_tokens=0)
    np.testing.assert_array_equal(out, tokens)

  @parameterized.parameters(
    (dict(tokens=np.zeros(3, np.int32)), r"\[B, T\]"),
    (dict(tokens=np.zeros((1, 3), np.float32)), "integers"),
    (dict(tokens=np.zeros((1, 0), np.int32)), "at least one token"),
    (dict(tokens=np.full((1, 3), 61)), "vocabulary is 0 to 60"),
    (dict(mask=np.array([[True, True, False]])), "on the left"),
    (dict(mask=np.array([[True, False, True]])), "on the left"),
    (dict(mask=np.zeros((1, 3), bool)), "on the left"),
    (dict(mask=np.ones((1, 4), bool)), "must be equal"),
    (dict(temperature=1.0), "give rng"),
    (dict(temperature=-1.0), "temperature=-1.0"),
    (dict(max_new_tokens=-1), "max_new_tokens=-1"),
    (dict(prefill_chunk=0), "prefill_chunk=0"),
    (dict(callback_every=0), "callback_every=0"),
  )
  def test_mistakes_are_named(self, settings, text):
    model, params = tiny()
    arguments = dict(tokens=np.zeros((1, 3), np.int32), max_new_tokens=2)
    with self.assertRaisesRegex(ValueError, text):
      generation.generate(model, params, **{**arguments, **settings})


class CompilationTest(parameterized.TestCase):
  def test_two_programs_serve_all_prompts_of_a_bucket(self):
    # A shape of its own: other tests have compiled nothing for it.
    model, params = tiny(hidden_size=24, num_hidden_layers=2)
    generator = generation.Generator(model, params)
    with Compilations() as first:
      generator(prompts(5)[0], max_new_tokens=20)
    self.assertEqual(first.count, 2)
    with Compilations() as more:
      for length in (1, 33, 60):
        tokens, _ = prompts(length)
        generator(tokens, max_new_tokens=7 + length)
        generator(tokens, max_new_tokens=9, eos_id=3)
        generator(tokens, max_new_tokens=5, callback=lambda new: None)
      other = generation.Generator(model, params)
      other(prompts(8)[0], max_new_tokens=4)
    self.assertEqual(more.count, 0)

  def test_settings_of_sampling_share_a_program(self):
    model, params = tiny(hidden_size=24, num_hidden_layers=2)
    generator = generation.Generator(model, params)
    tokens, _ = prompts(5)
    key = jax.random.key(0)
    draw = functools.partial(generator, tokens, max_new_tokens=6, rng=key)
    draw(temperature=1.0, top_k=4)
    with Compilations() as more:
      draw(temperature=0.3, top_k=4)
      draw(temperature=2.0, top_k=30, top_p=0.9)
    self.assertEqual(more.count, 0)

  def test_chunked_prefill_compiles_the_chunk_once(self):
    model, params = tiny(hidden_size=24, num_hidden_layers=2)
    generator = generation.Generator(model, params)
    before = decode._extend._cache_size()
    for length in (17, 100, 81):
      generator(prompts(length)[0], max_new_tokens=8, prefill_chunk=16)
    # Two lengths of the cache: 17 fits the smaller one.
    self.assertLessEqual(decode._extend._cache_size() - before, 2)

  def test_the_cache_is_updated_in_place(self):
    model, params = tiny(max_position_embeddings=8192)
    generator = generation.Generator(model, params)
    cache, progress = decode._start(
      generator.model, None, batch=2, slots=8192, dtype=None
    )
    strategy, settings = generation.sampling.plan(61)
    compiled = decode._decode.lower(
      generator.model,
      strategy,
      generator.params,
      cache,
      progress,
      settings,
      np.array([-1], np.int32),
      None,
      np.int32(9),
    ).compile()
    used = compiled.memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    self.assertGreaterEqual(used.alias_size_in_bytes, size)
    self.assertLess(used.temp_size_in_bytes, size / 4)


class BucketTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, 0), (1, 64), (64, 64), (65, 128), (1000, 1024), (1025, 1152),
    (2048, 2048), (2049, 2304), (16384, 16384),
  )  # fmt: skip
  def test_values(self, length, wanted):
    self.assertEqual(generation.bucket(length), wanted)

  def test_padding_stays_small(self):
    for length in range(1, 20_000, 7):
      padded = generation.bucket(length)
      self.assertLessEqual(length, padded)
      self.assertLess(padded - length, max(64, length / 8))
      self.assertEqual(generation.bucket(padded), padded)


if __name__ == "__main__":
  pytest.main([__file__])
