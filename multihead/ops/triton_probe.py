"""The smallest Triton kernel: whether kernels compile and run here at all."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from multihead.ops import triton_compat


@triton.jit
def _double(x, y, size: tl.constexpr):
  places = tl.arange(0, size)
  tl.store(y + places, tl.load(x + places) * 2)


def works() -> bool:
  """Whether twice a number comes out."""
  x = jnp.arange(128, dtype=jnp.float32)
  (y,) = triton_compat.call(
    _double,
    x,
    out=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    grid=(1,),
    num_warps=1,
    num_stages=1,
    size=128,
  )
  return bool(jnp.all(y == 2 * x))
