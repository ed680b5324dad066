"""What `selective_scan` and `selective_scan_step` refuse, in words."""

import jax
import jax.numpy as jnp


def check_kinds(op: str, **arrays: jax.Array | None) -> None:
  """Raises TypeError for an array that is not of real floating point."""
  for name, array in arrays.items():
    if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
      raise TypeError(
        f"{op}: {name} must be a real floating point array, got {array.dtype}"
      )


def check_shape(
  op: str,
  name: str,
  array: jax.Array | None,
  shape: tuple[int, ...],
  letters: str,
  u: jax.Array,
) -> None:
  """Raises ValueError for an array that is present and not of `shape`."""
  if array is not None and array.shape != shape:
    raise ValueError(
      f"{op}: {name} must be {letters} = {shape} to go with u {u.shape}, got "
      f"{array.shape}"
    )


def check_maps(
  op: str, B: jax.Array, C: jax.Array, letters: str, u: jax.Array
) -> tuple[int, int]:
  """Checks the input and output maps against u; returns (G, M)."""
  if B.ndim != letters.count(" ") + 1 or B.shape != C.shape:
    raise ValueError(
      f"{op}: B and C must have one shape {letters}, got B {B.shape} and C "
      f"{C.shape}"
    )
  groups, size = B.shape[-2:]
  if groups < 1 or u.shape[-1] % groups:
    raise ValueError(
      f"{op}: the {groups} groups of B and C do not divide the {u.shape[-1]} "
      f"channels of u {u.shape}"
    )
  return groups, size


def check_parameters(
  op: str,
  A: jax.Array,
  D: jax.Array | None,
  delta_bias: jax.Array | None,
  size: int,
  u: jax.Array,
) -> None:
  """Checks what belongs to the channels and not to the tokens."""
  channels = u.shape[-1]
  check_shape(op, "A", A, (channels, size), "[E, M]", u)
  check_shape(op, "D", D, (channels,), "[E]", u)
  check_shape(op, "delta_bias", delta_bias, (channels,), "[E]", u)
