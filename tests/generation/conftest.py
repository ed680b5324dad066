"""Compiling these tiny models takes longer than running them."""

import jax
import pytest


@pytest.fixture(autouse=True)
def compile_fast(request):
  """Programs of a test are not optimised, unless it looks into them."""
  fast = "in_place" not in request.node.name
  jax.config.update("jax_disable_most_optimizations", fast)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
