"""Generation on a mesh of eight devices."""

import re

from absl.testing import parameterized
import jax
import numpy as np
import pytest

from multihead import generation, parallel
from multihead.generation import decode
from multihead.parallel import sharding
from tests.generation.test_decode import Compilations, prompts, tiny


class ShardedTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=4, tensor=2)
  )
  def test_equals_one_device(self, **axes):
    model, params = tiny()
    tokens, mask = prompts(30, 12, 21, 7)
    wanted = generation.generate(
      model, params, tokens, mask=mask, max_new_tokens=10
    )
    mesh = parallel.make_mesh(**axes)
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
    self.assertEqual(
      generator(tokens[:3, :0], prefix=prefix, max_new_tokens=4).shape, (3, 4)
    )

  def test_the_cache_stays_where_it_is(self):
    model, params = tiny()
    mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
    params = jax.device_put(params, sharding.param_shardings(model, mesh))
    generator = generation.Generator(model, params)
    slots = 1024 * 4
    strategy, settings = generation.sampling.plan(61)
    with jax.set_mesh(mesh):
      cache, progress = decode._start(
        generator.model.clone(max_position_embeddings=slots), None,
        batch=4, slots=slots, dtype=None,
      )  # fmt: skip
      shard = cache["layers"][0]["k"].sharding.shard_shape((4, slots, 2, 8))
      compiled = decode._decode.lower(
        generator.model, strategy, generator.params, cache, progress, settings,
        np.array([-1], np.int32), None, np.int32(9),
      ).compile()  # fmt: skip
    self.assertEqual(shard, (1, slots, 1, 8))
    for line in compiled.as_text().splitlines():
      if re.search(r"= .*(all-gather|all-to-all|collective-permute)\(", line):
        self.assertNotIn(str(slots), line)


if __name__ == "__main__":
  pytest.main([__file__])
