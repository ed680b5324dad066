"""Snapshots of the state: continue, branch, save and load."""

import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from multihead import generation
from multihead.errors import UserError
from tests.generation.helpers import prompts, tiny


def split(tokens, at):
  return tokens[:, :at], tokens[:, at:]


class PrefixTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.model, self.params = tiny()
    self.generator = generation.Generator(self.model, self.params)

  @parameterized.parameters(1, 3, 40, 49, 50)
  def test_continuation_equals_the_whole_prompt(self, at):
    tokens, _ = prompts(50)
    whole = self.generator.prefill(tokens)
    first, rest = split(tokens, at)
    prefix = self.generator.prefill(first)
    out = self.generator(rest, prefix=prefix, max_new_tokens=9)
    wanted = self.generator(tokens, max_new_tokens=9)
    np.testing.assert_array_equal(out, wanted[:, at:])
    if rest.shape[1]:
      longer = self.generator.prefill(rest, prefix=prefix)
      np.testing.assert_allclose(
        longer.logits,
        whole.logits,
        rtol=0,
        atol=1e-5 * np.abs(whole.logits).max(),
      )

  def test_a_prefix_serves_again_and_again(self):
    first, rest = split(prompts(30)[0], 20)
    prefix = self.generator.prefill(first)
    before = jax.tree.map(np.asarray, prefix.cache)
    wanted = self.generator(rest, prefix=prefix, max_new_tokens=5)
    for tokens in (rest, prompts(0)[0], rest):
      out = self.generator(tokens, prefix=prefix, max_new_tokens=5)
    np.testing.assert_array_equal(out, wanted)
    jax.tree.map(np.testing.assert_array_equal, prefix.cache, before)

  def test_branches_of_one_row(self):
    first, _ = split(prompts(30)[0], 20)
    prefix = self.generator.prefill(first)
    branches, mask = prompts(2, 9, 5, seed=1)
    out = self.generator(branches, mask=mask, prefix=prefix, max_new_tokens=7)
    for row in range(3):
      alone = np.concatenate([first[0], branches[row][mask[row]]])[None]
      wanted = self.generator(alone, max_new_tokens=7)
      np.testing.assert_array_equal(out[row, 9:], wanted[0, -7:])

  def test_rows_with_padding_go_on(self):
    tokens, mask = prompts(30, 11)
    prefix = self.generator.prefill(tokens, mask=mask)
    more, more_mask = prompts(4, 6, seed=1)
    out = self.generator(more, mask=more_mask, prefix=prefix, max_new_tokens=7)
    for row in range(2):
      alone = np.concatenate(
        [tokens[row][mask[row]], more[row][more_mask[row]]]
      )[None]
      wanted = self.generator(alone, max_new_tokens=7)
      np.testing.assert_array_equal(out[row, 6:], wanted[0, -7:])

  def test_a_prefix_grows_beyond_its_slots(self):
    tokens, _ = prompts(200)
    first, rest = split(tokens, 60)
    prefix = self.generator.prefill(first)
    self.assertEqual(prefix.cache["valid"].shape[1], 64)
    out = self.generator(
      rest, prefix=prefix, max_new_tokens=9, prefill_chunk=32
    )
    wanted = self.generator(tokens, max_new_tokens=9)
    np.testing.assert_array_equal(out[:, 140:], wanted[:, 200:])

  def test_too_long_after_a_prefix(self):
    prefix = self.generator.prefill(prompts(100)[0])
    with self.assertRaisesRegex(UserError, "128 of the prefix, 100 of the"):
      self.generator(prompts(100)[0], prefix=prefix, max_new_tokens=60)

  def test_batches_that_do_not_fit(self):
    prefix = self.generator.prefill(prompts(5, 5)[0])
    with self.assertRaisesRegex(ValueError, "2 rows cannot serve a batch of 3"):
      self.generator(prompts(4, 4, 4)[0], prefix=prefix, max_new_tokens=2)


class SnapshotTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.model, self.params = tiny()
    self.generator = generation.Generator(self.model, self.params)
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.path = f"{folder.name}/prefix"

  def test_round_trip(self):
    tokens, _ = prompts(50)
    first, rest = split(tokens, 37)
    prefix = self.generator.prefill(first)
    self.generator.save(self.path, prefix)
    # A new generator, as in a new process.
    other = generation.Generator(self.model, self.params)
    loaded = other.load(self.path)
    self.assertEqual(loaded.used, prefix.used)
    np.testing.assert_array_equal(loaded.logits, prefix.logits)
    np.testing.assert_array_equal(
      other(rest, prefix=loaded, max_new_tokens=9),
      self.generator(rest, prefix=prefix, max_new_tokens=9),
    )

  def test_bfloat16_round_trip(self):
    generator = generation.Generator(
      self.model, self.params, cache_dtype=jnp.bfloat16
    )
    prefix = generator.prefill(prompts(5)[0])
    generator.save(self.path, prefix)
    loaded = generator.load(self.path)
    self.assertEqual(loaded.cache["layers"][1]["v"].dtype, jnp.bfloat16)
    np.testing.assert_array_equal(
      loaded.cache["layers"][1]["v"],
      prefix.cache["layers"][1]["v"][:, : prefix.used],
    )

  def test_what_does_not_fit_is_refused(self):
    self.generator.save(self.path, self.generator.prefill(prompts(5)[0]))
    changed = jax.tree.map(lambda leaf: leaf + 0, self.params)
    changed["final_norm"]["scale"] = changed["final_norm"]["scale"].at[0].add(1)
    half = generation.Generator(
      self.model, self.params, cache_dtype=jnp.bfloat16
    )
    for generator, text in (
      (generation.Generator(*tiny(num_hidden_layers=1)), "num_hidden_layers"),
      (generation.Generator(*tiny(rope_theta=1e4)), "rope_theta"),
      (generation.Generator(self.model, changed), "parameters"),
      (half, "cache_dtype"),
    ):
      with self.assertRaisesRegex(UserError, f"another model: .*{text}"):
        generator.load(self.path)
    # How a model computes is its own affair.
    plain = self.model.clone(remat="full", ssd_implementation="xla")
    generation.Generator(plain, self.params).load(self.path)

  def test_broken_and_missing_files(self):
    with self.assertRaisesRegex(UserError, "no snapshot at"):
      self.generator.load(self.path)
    self.generator.save(self.path, self.generator.prefill(prompts(5)[0]))
    with self.assertRaisesRegex(UserError, "exists"):
      self.generator.save(self.path, self.generator.prefill(prompts(5)[0]))
    shutil.rmtree(f"{self.path}/arrays")
    with self.assertRaisesRegex(UserError, "torn"):
      self.generator.load(self.path)
    shutil.rmtree(f"{self.path}/metadata")
    with self.assertRaisesRegex(UserError, "not a cache snapshot"):
      self.generator.load(self.path)
