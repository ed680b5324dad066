"""What `jax.vmap` of a launch is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from multihead.ops.attention.triton.launches import Arrays


def mappable(launch: Callable[..., Any]) -> Callable[..., Any]:
  """`launch(own, arrays)` that `vmap` may map over any of them.

  The mapped axis joins the batch. Where a bias or mask would have to be
  repeated for that, or the key of dropout is mapped, it launches as often as it
  is mapped instead.
  """
  mapped_launch = jax.custom_batching.custom_vmap(launch)

  @mapped_launch.def_vmap
  def rule(size, mapped, own, arrays):
    batch = own[0].shape[1 if mapped[0][0] else 0]
    some = mapped[1]

    def joins(x, is_mapped):
      return x is None or not is_mapped or x.shape[1] == batch

    if (
      not some.words
      and joins(arrays.bias, some.bias)
      and joins(arrays.mask, some.mask)
    ):
      out = _joined(mapped_launch, size, mapped, own, arrays)
    else:
      out = _in_turn(mapped_launch, mapped, own, arrays)
    return out, jax.tree.map(lambda _: True, out)

  return mapped_launch


def _joined(launch, size, mapped, own, arrays):
  """One launch, whose batch is the mapped axis times the batch."""

  def join(x, is_mapped):
    if not is_mapped:
      x = jnp.broadcast_to(x, (size, *x.shape))
    return x.reshape(-1, *x.shape[2:])

  def shared(x, is_mapped):
    return x if not is_mapped and x.shape[0] == 1 else join(x, is_mapped)

  joined = [
    x if x is None or name == "words" else how(x, is_mapped)
    for name, x, is_mapped, how in zip(
      Arrays._fields,
      arrays,
      mapped[1],
      [shared, shared, *[join] * 6],
      strict=True,
    )
  ]
  out = launch(jax.tree.map(join, own, tuple(mapped[0])), Arrays(*joined))
  return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)


def _in_turn(launch, mapped, own, arrays):
  """A launch for each place of the mapped axis."""
  leaves, tree = jax.tree.flatten((own, arrays))
  moves = jax.tree.leaves(tuple(mapped))

  def one(moving):
    moving = iter(moving)
    now = [
      next(moving) if yes else x for x, yes in zip(leaves, moves, strict=True)
    ]
    return launch(*jax.tree.unflatten(tree, now))

  return lax.map(one, [x for x, yes in zip(leaves, moves, strict=True) if yes])
