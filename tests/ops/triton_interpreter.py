"""Runs the Triton kernels of an operation in Triton's interpreter, on a CPU."""

import importlib.util
import os
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead.ops import triton_compat


def use(monkeypatch, package):
  """Lets the interpreter run the kernels that `package` launches.

  It needs the packages triton and torch, which only the extras `gpu` and
  `parity` bring; without them the test is skipped.
  """
  torch = pytest.importorskip("torch", reason="the interpreter needs torch")
  pytest.importorskip("triton", reason="needs triton: pip install triton")
  # Kernels know from when they are defined: tests/conftest.py sees to that.
  if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton compiles kernels where there is a GPU")
  path = pathlib.Path(package.__file__).with_name("kernels.py")
  spec = importlib.util.spec_from_file_location("interpreted_kernels", path)
  kernels = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(kernels)
  monkeypatch.setattr(package, "kernels", kernels, raising=False)
  monkeypatch.setattr(triton_compat, "refusal", lambda: None)
  _allow_bounds(monkeypatch)

  def to_torch(array):
    array = np.asarray(array)
    if array.dtype == jnp.bfloat16:
      return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array.copy())

  one_at_a_time = threading.Lock()

  def call(kernel, *inputs, out, grid, num_warps, num_stages, **constants):
    def launch(*inputs):
      # What a kernel leaves out is seen.
      results = [
        torch.full(s.shape, torch.nan, dtype=getattr(torch, s.dtype.name))
        for s in out
      ]
      # Callbacks may run side by side; the interpreter has one grid.
      with one_at_a_time:
        kernel[grid](*map(to_torch, inputs), *results, **constants)
      return tuple(
        r.float().numpy().astype(s.dtype)
        for r, s in zip(results, out, strict=True)
      )

    return tuple(jax.pure_callback(launch, tuple(out), *inputs))

  monkeypatch.setattr(triton_compat, "call", call)


def _allow_bounds(monkeypatch):
  """Numbers that a kernel computes as bounds of its loops.

  The interpreter has them as arrays of one element, which newer numpy does not
  take for an integer.
  """
  from triton.runtime import interpreter

  patch = interpreter._patch_lang_tensor

  def patch_all(tensor, scope):
    patch(tensor, scope)
    scope.set_attr(
      tensor, "__index__", lambda self: int(self.handle.data.item())
    )

  monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_all)
