"""What an adapter is told, checked once."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from multihead.adapters.branches import BRANCHES
from multihead.adapters.linear_maps import LinearMap
from multihead.adapters.targets import Targets
from multihead.errors import UserError, nearest

# A rank for all targets, or one for each path; what is not named has none.
Ranks = int | Mapping[str, int]
SCALINGS = ("constant", "rank", "rank_stabilised")
BIASES = (False, True, "up")


def _uniform(bound: float) -> Callable[..., jax.Array]:
  return lambda key, shape: jax.random.uniform(
    key, shape, jnp.float32, -bound, bound
  )


def _down_initializer(name: str, width: int, rank: int) -> Any:
  """The initialiser of a down projection [width, rank]."""
  match name:
    case "kaiming_uniform":  # a = sqrt(5), torch's default for linear layers
      return _uniform(1 / math.sqrt(width))
    case "xavier_uniform":
      return _uniform(math.sqrt(6 / (width + rank)))
    case _:
      return lambda key, shape: 0.02 * jax.random.normal(key, shape)


INITIALIZERS = ("kaiming_uniform", "xavier_uniform", "normal")


@dataclasses.dataclass(frozen=True)
class Settings:
  """All choices of an adapter; see `hydra.Hydra`."""

  targets: Targets
  r_par: Ranks = 0
  r_seq: Ranks = 0
  r_pre: Ranks = 0
  scale: float = 1.0
  scale_par: float | None = None
  scale_seq: float | None = None
  scale_pre: float | None = None
  scaling: str = "constant"
  learn_scale: bool = False
  bias: bool | str = False
  dropout: float = 0.0
  init: str = "kaiming_uniform"

  def __post_init__(self) -> None:
    if not isinstance(self.targets, str):
      object.__setattr__(self, "targets", tuple(self.targets))
    for name in BRANCHES:
      ranks = getattr(self, f"r_{name}")
      values = ranks.values() if isinstance(ranks, Mapping) else [ranks]
      if not all(type(r) is int and r >= 0 for r in values):
        raise UserError(
          f"r_{name}={ranks!r}: a rank is an integer, 0 for no such branch; or "
          "give a dict of them by path"
        )
    if not any(self._any_rank(name) for name in BRANCHES):
      raise UserError(
        "r_par, r_seq and r_pre are all 0: the adapter would be empty"
      )
    for key, allowed in (
      ("scaling", SCALINGS),
      ("init", INITIALIZERS),
      ("bias", BIASES),
    ):
      value = getattr(self, key)
      if value not in allowed:
        raise UserError(
          f"{key}={value!r}{nearest(str(value), map(str, allowed))}; allowed "
          f"are {', '.join(map(repr, allowed))}"
        )
    if not 0 <= self.dropout < 1:
      raise UserError(f"dropout={self.dropout} must be in [0, 1)")

  def _any_rank(self, name: str) -> bool:
    ranks = getattr(self, f"r_{name}")
    return any(ranks.values()) if isinstance(ranks, Mapping) else ranks > 0

  def ranks_of(self, path: str) -> dict[str, int]:
    """Branch -> rank at a target, those that are there."""
    ranks = {}
    for name in BRANCHES:
      found = getattr(self, f"r_{name}")
      if isinstance(found, Mapping):
        found = found.get(path, 0)
      if found:
        ranks[name] = found
    return ranks

  def check_paths(self, paths: Mapping[str, Any]) -> None:
    """Refuses ranks for a path that is no target."""
    for name in BRANCHES:
      ranks = getattr(self, f"r_{name}")
      for path in ranks if isinstance(ranks, Mapping) else ():
        if path not in paths:
          raise UserError(
            f"r_{name} names {path!r}{nearest(path, paths)}, which is no target"
          )

  def scale_of(self, name: str, rank: int) -> float:
    """The factor on a branch's output."""
    own = getattr(self, f"scale_{name}")
    scale = self.scale if own is None else own
    divisor = {
      "constant": 1.0,
      "rank": rank,
      "rank_stabilised": math.sqrt(rank),
    }
    return scale / divisor[self.scaling]


def branch_widths(name: str, target: LinearMap) -> tuple[int, int]:
  """What a branch maps from and to."""
  return {
    "pre": (target.d_in, target.d_in),
    "par": (target.d_in, target.d_out),
    "seq": (target.d_out, target.d_out),
  }[name]


def branch_shapes(
  name: str, target: LinearMap, rank: int, settings: Settings
) -> dict[str, Any]:
  """The leaves of one branch and their shapes."""
  wide_in, wide_out = branch_widths(name, target)
  stack = target.stack
  shapes: dict[str, Any] = {
    "down": {"kernel": (*stack, wide_in, rank)},
    "up": {"kernel": (*stack, rank, wide_out)},
  }
  if settings.bias is True:
    shapes["down"]["bias"] = (*stack, rank)
  if settings.bias:
    shapes["up"]["bias"] = (*stack, wide_out)
  if settings.learn_scale:
    shapes["scale"] = stack
  return shapes


def init_branch(
  rng: jax.Array, name: str, target: LinearMap, rank: int, settings: Settings
) -> dict[str, Any]:
  """A branch that adds nothing yet: its up projection is zero."""
  shapes = branch_shapes(name, target, rank, settings)
  branch = jax.tree.map(
    lambda shape: jnp.zeros(shape, jnp.float32),
    shapes,
    is_leaf=lambda node: isinstance(node, tuple),
  )
  make = _down_initializer(settings.init, branch_widths(name, target)[0], rank)
  branch["down"]["kernel"] = make(rng, shapes["down"]["kernel"])
  if settings.learn_scale:
    scale = settings.scale_of(name, rank)
    branch["scale"] = jnp.full(target.stack, scale, jnp.float32)
  return branch
