"""Compiling these tiny models takes longer than running them."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _compile_fast_and_once(tmp_path_factory):
  """Programs are not optimised, and those of one test serve the others."""
  before = jax.config.jax_compilation_cache_dir
  folder = tmp_path_factory.getbasetemp() / "programs"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
  jax.config.update("jax_compilation_cache_dir", before)
