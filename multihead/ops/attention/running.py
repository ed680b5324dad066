"""Softmax over columns that come in parts: arXiv 2307.08691, section 3.1.

A state holds for every row the largest logit so far, the sum of exponentials
relative to it, and the values under these weights. -inf is a hidden logit.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from multihead.ops import manual_axes


class State(NamedTuple):
  """What is known of each row after some of its columns.

  Attributes:
    top: [..., rows, 1] largest logit, -inf if all were hidden.
    total: [..., rows, 1] sum of exp(logit - top).
    out: [..., rows, Hv] sum of exp(logit - top) * value.
  """

  top: jax.Array
  total: jax.Array
  out: jax.Array


def start(
  shape: Sequence[int], width: int, dtype: str, like: jax.Array
) -> State:
  """The state of rows [*shape] before any column; see `manual_axes.full`."""
  return State(
    manual_axes.full((*shape, 1), -jnp.inf, dtype, like),
    manual_axes.zeros((*shape, 1), dtype, like),
    manual_axes.zeros((*shape, width), dtype, like),
  )


def merge(
  state: State, x: jax.Array, mix: Callable[[jax.Array], jax.Array]
) -> State:
  """The state after columns with logits x; `mix` sums values under weights."""
  new = jnp.maximum(state.top, jnp.max(x, axis=-1, keepdims=True))
  base = finite(new)
  p = jnp.exp(x - base)
  shrink = jnp.exp(state.top - base)
  total = shrink * state.total + jnp.sum(p, axis=-1, keepdims=True)
  return State(new, total, shrink * state.out + mix(p))


def finish(state: State) -> tuple[jax.Array, jax.Array]:
  """Output [..., rows, Hv] and lse [..., rows]; zeros and -inf if empty."""
  return normalise(state.out, state.total, finite(state.top))


def finite(top: jax.Array) -> jax.Array:
  """A row's maximum, 0 for an empty row: -inf - -inf would be NaN."""
  return jnp.where(top == -jnp.inf, 0, top)


def normalise(
  out: jax.Array, total: jax.Array, top: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Output and lse from sums relative to a finite `top`."""
  out = out / jnp.where(total == 0, 1, total)
  return out, (top + jnp.log(total))[..., 0]
