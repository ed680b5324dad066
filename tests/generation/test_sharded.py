"""Generation on a mesh of eight devices."""

import re
import tempfile

import jax
import numpy as np
from absl.testing import absltest

from multihead import generation, parallel
from multihead.generation import programs, sampling
from multihead.parallel import sharding
from tests.generation.helpers import Compilations, prompts, tiny


class ShardedTest(absltest.TestCase):
  def test_equals_one_device(self):
    model, params = tiny()
    tokens, mask = prompts(30, 12, 21, 7)
    wanted = generation.generate(
      model, params, tokens, mask=mask, max_new_tokens=10
    )
    mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
    params = jax.device_put(params, sharding.param_shardings(model, mesh))
    # The mesh is that of the parameters, or the one in force.
    generator = generation.Generator(model, params)
    out = generator(tokens, mask=mask, max_new_tokens=10)
    np.testing.assert_array_equal(out, wanted)
    with jax.set_mesh(mesh):
      seen = []
      with Compilations() as more:
        streamed = generator(
          tokens, mask=mask, max_new_tokens=10, callback=seen.append
        )
    np.testing.assert_array_equal(streamed, wanted)
    np.testing.assert_array_equal(np.concatenate(seen, 1), wanted[:, 30:])
    self.assertEqual(more.count, 0)
    # A batch that the mesh does not divide runs too.
    prefix = generator.prefill(tokens[:1, -5:])
    out = generator(tokens[:3, :0], prefix=prefix, max_new_tokens=4)
    self.assertEqual(out.shape, (3, 4))
    # A snapshot goes from a mesh to one device and back.
    alone = generation.Generator(*tiny())
    with tempfile.TemporaryDirectory() as folder:
      generator.save(f"{folder}/mesh", prefix)
      loaded = alone.load(f"{folder}/mesh")
      alone.save(f"{folder}/one", loaded)
      back = generator.load(f"{folder}/one")
    with jax.set_mesh(mesh):
      cache, _ = programs.start(
        generator.model,
        (back.cache, back.logits),
        batch=4,
        slots=64,
        dtype=None,
      )
    keys = cache["layers"][0]["k"]
    self.assertEqual(keys.sharding.shard_shape(keys.shape), (1, 64, 8))
    for one, kept in ((alone, loaded), (generator, back)):
      again = one(tokens[:1, :0], prefix=kept, max_new_tokens=4)
      np.testing.assert_array_equal(again, out[:1])

  def test_the_cache_stays_where_it_is(self):
    model, params = tiny()
    mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
    params = jax.device_put(params, sharding.param_shardings(model, mesh))
    generator = generation.Generator(model, params)
    slots = 1024 * 4
    strategy, settings = sampling.plan(61)
    with jax.set_mesh(mesh):
      cache, progress = programs.start(
        generator.model.clone(max_position_embeddings=slots), None,
        batch=4, slots=slots, dtype=None,
      )  # fmt: skip
      shard = cache["layers"][0]["k"].sharding.shard_shape((4, slots, 16))
      compiled = programs.decode.lower(
        generator.model, strategy, generator.params, cache, progress, settings,
        np.array([-1], np.int32), None, np.int32(9),
      ).compile()  # fmt: skip
    self.assertEqual(shard, (1, slots, 8))
    for line in compiled.as_text().splitlines():
      if re.search(r"= .*(all-gather|all-to-all|collective-permute)\(", line):
        self.assertNotIn(str(slots), line)
