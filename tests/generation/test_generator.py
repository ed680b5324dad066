"""Generation against recomputing the whole text for every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from multihead import generation
from multihead.errors import UserError
from multihead.generation import programs, sampling
from tests.generation.helpers import (
  VOCAB,
  Compilations,
  prompts,
  recompute,
  tiny,
  unpadded,
)

# With these, most tests share two programs: lengths up to 64, 128 slots.
LENGTHS = (23, 1, 11, 60)
NEW = 30


class GenerateTest(parameterized.TestCase):
  @parameterized.parameters(1, 5, 64, 70)
  def test_equals_recomputation(self, length):
    model, params = tiny()
    tokens, _ = prompts(length)
    out = generation.generate(model, params, tokens, max_new_tokens=NEW)
    self.assertEqual(out.shape, (1, length + NEW))
    self.assertEqual(out.dtype, np.int32)
    np.testing.assert_array_equal(out[:, :length], tokens)
    wanted = recompute(model, params, tokens, NEW)
    np.testing.assert_array_equal(out[:, length:], wanted)

  @parameterized.parameters(True, False)
  def test_stacked_layers(self, unroll):
    model, params = tiny()
    stacked, stacked_params = model.stack(params)
    tokens, mask = prompts(*LENGTHS)
    generator = generation.Generator(stacked, stacked_params, unroll=unroll)
    self.assertEqual(generator.model.scan_layers, not unroll)
    np.testing.assert_array_equal(
      generator(tokens, mask=mask, max_new_tokens=NEW),
      generation.generate(model, params, tokens, mask=mask, max_new_tokens=NEW),
    )

  @parameterized.parameters(None, 7, 1000)
  def test_padded_batch_equals_each_row_alone(self, prefill_chunk):
    model, params = tiny()
    tokens, mask = prompts(*LENGTHS)
    out = generation.generate(
      model,
      params,
      tokens,
      mask=mask,
      max_new_tokens=NEW,
      prefill_chunk=prefill_chunk,
    )
    wanted = recompute(model, params, unpadded(tokens, mask), NEW)
    np.testing.assert_array_equal(out[:, -NEW:], wanted)

  def test_chunked_prefill_leaves_the_same_state(self):
    model, params = tiny()
    generator = generation.Generator(model, params)
    tokens, mask = prompts(*LENGTHS)
    whole = generator.prefill(tokens, mask=mask)
    chunked = generator.prefill(tokens, mask=mask, prefill_chunk=7)
    scale = np.abs(whole.logits).max()
    np.testing.assert_allclose(
      chunked.logits, whole.logits, rtol=0, atol=1e-5 * scale
    )
    for name in ("ssm", "conv_x", "conv_bc"):
      found, wanted = (
        np.asarray(prefix.cache["layers"][1][name])
        for prefix in (chunked, whole)
      )
      np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)

  def test_eos_ends_each_row_on_its_own(self):
    model, params = tiny()
    tokens, mask = prompts(*LENGTHS)
    generator = generation.Generator(model, params)
    draw = functools.partial(generator, tokens, mask=mask, max_new_tokens=NEW)
    free = draw()[:, -NEW:]
    eos = [int(free[0, 3]), int(free[3, 7])]
    seen = []
    out = draw(eos_id=eos, callback=seen.append)[:, -NEW:]
    ends = []
    for row, wanted in zip(out, free.copy(), strict=True):
      hits = np.flatnonzero(np.isin(wanted, eos))
      ends.append(hits[0] if len(hits) else NEW - 1)
      wanted[ends[-1] :] = wanted[ends[-1]]
      np.testing.assert_array_equal(row, wanted)
    self.assertGreater(len(set(ends)), 1)
    # Nothing is made, or handed over, once the last row is done.
    seen = np.concatenate(seen, axis=1)
    np.testing.assert_array_equal(seen, out[:, : max(ends) + 1])

  def test_stops_early_when_all_rows_are_done(self):
    model, params = tiny()
    tokens, mask = prompts(*LENGTHS)
    generator = generation.Generator(model, params)
    out = generator(
      tokens, mask=mask, max_new_tokens=NEW, eos_id=list(range(VOCAB))
    )
    np.testing.assert_array_equal(out[:, -NEW:], out[:, [-NEW]] + [[0] * NEW])
    cache, progress = programs.prefill(
      generator.model, generator.params, tokens, mask, slots=128, dtype=None
    )
    strategy, settings = sampling.plan(VOCAB)
    eos = np.arange(VOCAB, dtype=np.int32)
    _, progress = programs.decode(
      generator.model, strategy, generator.params, cache, progress, settings,
      eos, None, np.int32(NEW - 1),
    )  # fmt: skip
    self.assertEqual(progress["step"], 0)

  @parameterized.product(every=(1, 4, 100), temperature=(0.0, 1.5))
  def test_streaming_gives_the_same_tokens(self, every, temperature):
    model, params = tiny()
    tokens, mask = prompts(*LENGTHS)
    generator = generation.Generator(model, params)
    settings = dict(
      mask=mask,
      max_new_tokens=NEW,
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
    np.testing.assert_array_equal(np.concatenate(seen, 1), whole[:, -NEW:])
    # The first token comes as soon as it is there.
    sizes = [new.shape[1] for new in seen]
    self.assertEqual(sizes[0], 1)
    self.assertEqual(max(sizes), min(every, NEW - 1))

  def test_draws_depend_on_the_key_alone(self):
    model, params = tiny()
    tokens, mask = prompts(*LENGTHS)
    generator = generation.Generator(model, params)

    def draw(seed):
      return generator(
        tokens, mask=mask, max_new_tokens=NEW, temperature=1.0, top_k=20,
        rng=jax.random.key(seed),
      )  # fmt: skip

    np.testing.assert_array_equal(draw(0), draw(0))
    self.assertTrue((draw(0) != draw(1)).any())

  def test_draws_follow_the_models_distribution(self):
    model, params = tiny(num_hidden_layers=1)
    tokens, _ = prompts(6)
    rows = 2048
    generator = generation.Generator(model, params)
    out = generator(
      np.zeros((rows, 0), np.int32),
      prefix=generator.prefill(tokens),
      max_new_tokens=1,
      temperature=1.0,
      rng=jax.random.key(0),
    )
    logits = np.asarray(model.apply({"params": params}, tokens), np.float64)
    wanted = np.exp(logits[0, -1] - logits[0, -1].max())
    wanted /= wanted.sum()
    found = np.bincount(out[:, -1], minlength=VOCAB) / rows
    # Five standard deviations of a frequency.
    margin = 5 * np.sqrt(wanted * (1 - wanted) / rows) + 3e-4
    np.testing.assert_array_less(np.abs(found - wanted), margin)

  def test_fills_the_models_maximum_exactly(self):
    model, params = tiny()
    tokens, _ = prompts(241)
    out = generation.generate(model, params, tokens, max_new_tokens=15)
    wanted = recompute(model, params, tokens, 15)
    np.testing.assert_array_equal(out[:, 241:], wanted)
    # No room for padding: the first piece is the odd one.
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
    (dict(tokens=np.full((1, 3), VOCAB)), "vocabulary is 0 to 60"),
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


class DtypeTest(parameterized.TestCase):
  def test_weights_are_converted_once(self):
    model, params = tiny(scan_layers=True, num_hidden_layers=1)
    half = model.clone(dtype=jnp.bfloat16)
    generator = generation.Generator(half, params)
    layer = generator.params["layers_0"]
    for path in (
      ("mlp", "gate", "kernel"),
      ("attention", "out", "kernel"),
      ("mamba", "bc", "kernel"),
    ):
      leaf = functools.reduce(lambda tree, key: tree[key], path, layer)
      self.assertEqual(leaf.dtype, jnp.bfloat16, path)
    # These are read in float32.
    self.assertEqual(layer["mamba"]["A_log"].dtype, jnp.float32)
    self.assertEqual(layer["mamba"]["norm"]["scale"].dtype, jnp.float32)
    tokens, mask = prompts(*LENGTHS)
    found = generator.prefill(tokens, mask=mask)
    self.assertEqual(found.cache["layers"][0]["k"].dtype, jnp.bfloat16)
    wanted = half.apply({"params": params}, tokens, mask)[:, -1]
    np.testing.assert_allclose(
      found.logits, wanted, rtol=0, atol=0.03 * np.abs(wanted).max()
    )
    out = generator(tokens, mask=mask, max_new_tokens=3)
    self.assertEqual(out.shape, (4, 63))

  def test_parameters_that_fit_stay_as_they_are(self):
    model, params = tiny()
    generator = generation.Generator(model, params)
    self.assertIs(generator.params, params)


class CompilationTest(parameterized.TestCase):
  def test_two_programs_serve_all_prompts_of_a_bucket(self):
    # A shape of its own: other tests have compiled nothing for it.
    model, params = tiny(hidden_size=24, num_hidden_layers=1)
    generator = generation.Generator(model, params)
    with Compilations() as first:
      generator(prompts(5)[0], max_new_tokens=20)
    self.assertEqual(first.count, 2)
    with Compilations() as more:
      for length in (1, 33, 60):
        tokens, _ = prompts(length)
        generator(tokens, max_new_tokens=4 + length)
        generator(tokens, max_new_tokens=9, eos_id=3)
        generator(tokens, max_new_tokens=5, callback=lambda new: None)
      other = generation.Generator(model, params)
      other(prompts(8)[0], max_new_tokens=4)
    self.assertEqual(more.count, 0)

  def test_settings_of_sampling_share_a_program(self):
    model, params = tiny(num_hidden_layers=1)
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
    model, params = tiny(num_hidden_layers=1)
    generator = generation.Generator(model, params)
    before = programs.extend._cache_size()
    for length in (100, 81, 70):
      generator.prefill(prompts(length)[0], prefill_chunk=16)
    self.assertEqual(programs.extend._cache_size() - before, 1)

  def test_the_cache_is_updated_in_place(self):
    model, params = tiny(max_position_embeddings=8192)
    cache, progress = programs.start(
      model, None, batch=2, slots=8192, dtype=None
    )
    strategy, settings = sampling.plan(VOCAB)
    compiled = programs.decode.lower(
      model, strategy, params, cache, progress, settings,
      np.array([-1], np.int32), None, np.int32(9),
    ).compile()  # fmt: skip
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    alias = compiled.memory_analysis().alias_size_in_bytes
    self.assertGreaterEqual(alias, size)
    keys = cache["layers"][0]["k"].shape
    shape = ",".join(map(str, keys))
    copies = [
      line
      for line in compiled.as_text().splitlines()
      if f"= f32[{shape}]" in line and " copy(" in line
    ]
    self.assertEmpty(copies)


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
