"""Hydra: low-rank branches on the linear maps of a frozen model.

"Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning",
arXiv 2309.06922. A parallel branch reads a layer's input (alone, it is LoRA), a
sequential one its frozen output (alone, SeqLoRA); a third reads the input and
goes through the frozen weight. All are linear and fold into the weight.

An adapter acts on any linen model by the paths of its parameters. Its own
parameters are a tree of their own, with the same paths.
"""

import copy
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from multihead.adapters import branches, merging, placement, tenants
from multihead.adapters.fingerprint import fingerprint, is_concrete
from multihead.adapters.linear_maps import (
  BIAS,
  KERNEL,
  LinearMap,
  flatten,
)
from multihead.adapters.settings import (
  Ranks,
  Settings,
  branch_shapes,
  init_branch,
)
from multihead.adapters.targets import Targets, select
from multihead.errors import UserError

Params = Any


@dataclasses.dataclass(frozen=True)
class Rounding:
  """What a merge lost at one target when it rounded to the weight's dtype.

  Attributes:
    largest: the largest change of a number.
    of_update: the norm of all changes, as a share of the update's norm.
  """

  largest: float
  of_update: float


def _unflatten(tree: Mapping[str, Any]) -> Params:
  return flax.traverse_util.unflatten_dict(dict(tree), sep="/")


def _is_leaf(node: Any) -> bool:
  return isinstance(node, tuple)


class Hydra:
  """Which maps of a model are adapted, and how.

  The object holds the choices and, from the first `init` or `bind` on, the
  fingerprint of the base it belongs to. It holds no arrays.
  """

  def __init__(
    self,
    targets: Targets,
    r_par: Ranks = 0,
    r_seq: Ranks = 0,
    *,
    r_pre: Ranks = 0,
    scale: float = 1.0,
    scale_par: float | None = None,
    scale_seq: float | None = None,
    scale_pre: float | None = None,
    scaling: str = "constant",
    learn_scale: bool = False,
    bias: bool | str = False,
    dropout: float = 0.0,
    init: str = "kaiming_uniform",
    maps: Mapping[str, LinearMap] | None = None,
  ):
    """Checks the choices; the targets are looked up when parameters come.

    Args:
      targets: a regular expression for whole paths of modules, a list of names
        (paths or their ends), or "all-linear".
      r_par: rank of the parallel branch, 0 for none; or a dict path -> rank.
      r_seq: of the sequential branch.
      r_pre: of the branch on the input side.
      scale: s, the factor on every branch.
      scale_par: that of one branch, where it differs.
      scale_seq: likewise.
      scale_pre: likewise.
      scaling: "constant" (the factor is s, as in the paper), "rank" (s / r, as
        alpha / r in LoRA) or "rank_stabilised" (s / sqrt(r)).
      learn_scale: the factors are parameters that start there.
      bias: True: both projections have one; "up": only the second.
      dropout: share of the low-rank activations set to zero in training.
      init: of the down projections: "kaiming_uniform" (bound 1 / sqrt(width)),
        "xavier_uniform" or "normal" (deviation 0.02). The rest starts at zero.
      maps: from `linear_maps`; needed for kernels with axes for heads.

    Raises:
      UserError: a choice that is not allowed.
    """
    self.settings = Settings(
      targets=targets, r_par=r_par, r_seq=r_seq, r_pre=r_pre, scale=scale,
      scale_par=scale_par, scale_seq=scale_seq, scale_pre=scale_pre,
      scaling=scaling, learn_scale=learn_scale, bias=bias, dropout=dropout,
      init=init,
    )  # fmt: skip
    self.maps = None if maps is None else dict(maps)
    self.base: str | None = None
    self._merged: set[str] = set()

  def replace(self, **changes: Any) -> "Hydra":
    """A copy with other settings, of the same base."""
    other = copy.copy(self)
    other.settings = dataclasses.replace(self.settings, **changes)
    return other

  def deterministic(self) -> "Hydra":
    """A copy without dropout: for evaluation and merging."""
    return self.replace(dropout=0.0)

  def __repr__(self) -> str:
    return f"Hydra({self.settings}, base={self.base})"

  # What belongs to which base.

  def bind(self, params: Params) -> None:
    """Ties the adapter to a base; `init` does so too.

    Raises:
      UserError: it belongs to another base already.
    """
    if not is_concrete(params):
      return
    found = fingerprint(params)
    if self.base is None:
      self.base = found
    self._check_base(found)

  def _check_base(self, found: str) -> None:
    if self.base is not None and found != self.base:
      if found in self._merged:
        raise UserError(
          "this adapter is merged into these parameters already; unmerge it "
          "first, or use the base's own parameters"
        )
      raise UserError(
        f"these parameters (fingerprint {found}) are not the base that the "
        f"adapter belongs to ({self.base}): another model, other values, "
        "another dtype, or an adapter is merged into them"
      )

  def select(self, params: Params) -> dict[str, LinearMap]:
    """The targets in a base, by path; see `targets.select` for errors."""
    chosen = select(self.settings.targets, params, self.maps)
    self.settings.check_paths(chosen)
    return {p: m for p, m in chosen.items() if self.settings.ranks_of(p)}

  def shapes(self, params: Params) -> Params:
    """The adapter's parameters as shapes (tuples)."""
    made = {}
    for path, target in self.select(params).items():
      for name, rank in self.settings.ranks_of(path).items():
        made[f"{path}/{name}"] = branch_shapes(
          name, target, rank, self.settings
        )
    return _unflatten(made)

  def init(self, rng: Array, params: Params) -> Params:
    """Makes the adapter's parameters; the model's output stays as it is.

    Args:
      rng: a key.
      params: of the base; shapes suffice, but then the base stays unknown.

    Returns:
      A tree of float32 arrays: at the path of each target, "par", "seq" and
      "pre" with "down" and "up", each a "kernel" and perhaps a "bias".

    Raises:
      UserError: targets that are not there or are no linear maps; another base
        than before.
    """
    chosen = self.select(params)
    self.bind(params)
    made = {}
    for path, target in chosen.items():
      for name, rank in self.settings.ranks_of(path).items():
        rng, key = jax.random.split(rng)
        made[f"{path}/{name}"] = init_branch(
          key, name, target, rank, self.settings
        )
    return _unflatten(made)

  def counts(self, params: Params) -> dict[str, int]:
    """Number of the adapter's parameters at each target."""
    shapes = self.shapes(params)
    return {
      path: sum(
        int(np.prod(shape))
        for shape in jax.tree.leaves(_at(shapes, path), is_leaf=_is_leaf)
      )
      for path in self.select(params)
    }

  def shardings(self, params: Params, base: Params) -> Params:
    """Where the adapter's parameters live, given where the base's do.

    A low-rank projection is split over the mesh's tensor axis where it meets a
    split axis of the weight, and whole elsewhere; see `placement`.

    Args:
      params: the base's parameters or shapes.
      base: a NamedSharding for each of them.
    """
    flat = flatten(base)
    targets = self.select(params)
    return placement.shardings(
      self.shapes(params),
      targets,
      {path: flat[f"{path}/{KERNEL}"] for path in targets},
    )

  # Running.

  def insert(
    self,
    params: Params,
    adapter_params: Params,
    *,
    dropout_rng: Array | None = None,
    adapter_ids: Int[Array, "B"] | None = None,
  ) -> Params:
    """The base's tree with the branches beside their kernels.

    A model that is applied to it within `branches.running()` runs them;
    outside, it does not see them.

    Args:
      params: of the base.
      adapter_params: of this adapter; with adapter_ids, several, stacked on a
        first axis (see `tenants.stack_adapters`).
      dropout_rng: a key turns dropout on.
      adapter_ids: the adapter of each example of the batch.

    Raises:
      UserError: adapter_params are not this adapter's.
    """
    chosen = self.select(params)
    self.check_params(adapter_params, params, adapter_ids is not None)
    rate = self.settings.dropout
    slots = {}
    for number, (path, target) in enumerate(chosen.items()):
      slot = {}
      for name, rank in self.settings.ranks_of(path).items():
        branch = dict(_at(adapter_params, f"{path}/{name}"))
        if adapter_ids is not None:
          branch = tenants.gather(branch, adapter_ids, len(target.stack))
        if "scale" not in branch:
          rows = target.stack
          if adapter_ids is not None:
            rows = (*rows, adapter_ids.shape[0])
          scale = self.settings.scale_of(name, rank)
          branch["scale"] = jnp.full(rows, scale, jnp.float32)
        slot[name] = branch
      if dropout_rng is not None and rate > 0:
        key = jax.random.fold_in(dropout_rng, number)
        keys = jax.random.split(key, (*target.stack, len(branches.BRANCHES)))
        slot["key"] = jax.random.key_data(keys)
        slot["rate"] = jnp.full(target.stack, rate, jnp.float32)
      slots[path] = slot
    return _with_leaves(
      params, {f"{p}/{branches.SLOT}": s for p, s in slots.items()}
    )

  def apply(
    self,
    model: nn.Module,
    params: Params,
    adapter_params: Params,
    *args: Any,
    dropout_rng: Array | None = None,
    adapter_ids: Int[Array, "B"] | None = None,
    **kwargs: Any,
  ) -> Any:
    """`model.apply({"params": params}, *args, **kwargs)` with the branches.

    Only shapes are checked here, so that it can be compiled: that the values
    are those of the adapter's base is checked by `bind`, `merge` and `load`.

    Args:
      model: the base model.
      params: its parameters.
      adapter_params: of this adapter.
      *args: of the model.
      dropout_rng: a key turns dropout on; without one there is none.
      adapter_ids: [B], for stacked adapters: that of each example. The first
        axis of what the targets read must then be the batch.
      **kwargs: of `model.apply`, "rngs" or "mutable" for example.

    Raises:
      UserError: adapter_params are not this adapter's.
      NotImplementedError: the model uses a target otherwise than as a map.
      ValueError: a target turns out to be no linear map.
    """
    tree = self.insert(
      params,
      adapter_params,
      dropout_rng=dropout_rng,
      adapter_ids=adapter_ids,
    )
    with branches.running():
      return model.apply({"params": tree}, *args, **kwargs)

  def check_params(
    self, adapter_params: Params, params: Params, stacked: bool = False
  ) -> None:
    """Raises UserError unless paths and shapes are those of this adapter."""
    expected = flatten(self.shapes(params))
    found = {p: tuple(x.shape) for p, x in flatten(adapter_params).items()}
    if stacked:
      found = {path: shape[1:] for path, shape in found.items()}
    if found != expected:
      wrong = sorted(
        path
        for path in found.keys() | expected.keys()
        if found.get(path) != expected.get(path)
      )
      path = wrong[0]
      raise UserError(
        f"these are not the parameters of this adapter: {len(wrong)} leaves "
        f"differ, e.g. {path}, which is {found.get(path, 'missing')} and "
        f"should be {expected.get(path, 'missing')}"
      )

  # Merging.

  def _merge_targets(self, params: Params, adapter_params: Params) -> dict:
    """Path -> (kernel, bias, branches), kernels as [stack, D, F]."""
    self.check_params(adapter_params, params)
    found = {}
    for path, target in self.select(params).items():
      module = _at(params, path)
      parts = {}
      for name, rank in self.settings.ranks_of(path).items():
        parts[name] = dict(_at(adapter_params, f"{path}/{name}"))
        scale = jnp.full(target.stack, self.settings.scale_of(name, rank))
        parts[name].setdefault("scale", scale)
      kernel = module[KERNEL].reshape(*target.stack, target.d_in, target.d_out)
      bias = module.get(BIAS)
      if bias is not None:
        bias = bias.reshape(*target.stack, target.d_out)
      found[path] = (kernel, bias, parts)
    return found

  def merge(self, params: Params, adapter_params: Params) -> Params:
    """Folds the adapter into the weights: the base's tree, other numbers.

    Sums are in float32 and rounded once, to the dtype of each weight; how much
    that loses is logged, and `rounding` has it by target.

    Args:
      params: of the base; they stay as they are.
      adapter_params: of this adapter.

    Raises:
      UserError: dropout is on; the parameters are not the base's, or the
        adapter is merged already; biases for a map without one.
    """
    if self.settings.dropout:
      raise UserError(
        f"this adapter trains with dropout={self.settings.dropout}, which no "
        "weight can hold; merge adapter.deterministic() instead"
      )
    concrete = is_concrete((params, adapter_params))
    if concrete:
      self.bind(params)
    targets = self._merge_targets(params, adapter_params)
    for path, (_, bias, parts) in targets.items():
      if bias is None and merging.has_bias(parts):
        raise UserError(
          f"{path!r} has no bias that could take up the adapter's; adapt it "
          "with bias=False to be able to merge"
        )
    leaves, exact = _fold(params, targets)
    merged = _with_leaves(params, leaves)
    if concrete:
      self._merged.add(fingerprint(merged))
      lost = _rounding(params, leaves, exact)
      worst = max(lost, key=lambda path: lost[path].of_update)
      logging.info(
        "merged %d targets; rounding loses at most %.1e of an update (%s)",
        len(targets), lost[worst].of_update, worst,
      )  # fmt: skip
    return merged

  def rounding(
    self, params: Params, adapter_params: Params
  ) -> dict[str, Rounding]:
    """What `merge` loses at each weight and bias by rounding to its dtype."""
    targets = self._merge_targets(params, adapter_params)
    leaves, exact = _fold(params, targets)
    return _rounding(params, leaves, exact)

  def keep(self, params: Params) -> Params:
    """The part of a base that a merge changes, for an exact `unmerge`."""
    found = {}
    for path in self.select(params):
      for name, leaf in _at(params, path).items():
        found[f"{path}/{name}"] = leaf
    return _unflatten(found)

  def unmerge(
    self,
    params: Params,
    adapter_params: Params,
    original: Params | None = None,
  ) -> Params:
    """Takes the adapter out of merged parameters.

    Args:
      params: what `merge` returned.
      adapter_params: those that were merged.
      original: the base's parameters, or what `keep` returned before the merge:
        the result is then the base bit for bit. Without it the weights are
        solved for in float32, exact to rounding.

    Raises:
      UserError: nothing is merged into these parameters, or `original` is not
        the base's.
    """
    concrete = is_concrete(params)
    if concrete and fingerprint(params) == self.base:
      raise UserError(
        "these are the base's own parameters: no adapter is merged into them"
      )
    if original is not None:
      leaves = {
        f"{path}/{name}": _at(original, path)[name]
        for path in self.select(params)
        for name in _at(params, path)
      }
      restored = _with_leaves(params, leaves)
      if concrete:
        self._check_base(fingerprint(restored))
      return restored
    leaves = {}
    for path, parts in self._merge_targets(params, adapter_params).items():
      found = merging.unmerge(*parts)
      for name, value in zip((KERNEL, BIAS), found, strict=True):
        if value is not None:
          leaves[f"{path}/{name}"] = _like(value, _at(params, path)[name])
    return _with_leaves(params, leaves)

  def to_lora(
    self, params: Params, adapter_params: Params
  ) -> tuple["Hydra", Params]:
    """The same function as a LoRA, whose rank is the sum of the ranks.

    Biases, those that a sequential branch makes of the base's included, become
    biases of the up projection.

    Returns:
      (adapter, adapter_params) with a parallel branch alone and scale 1.
    """
    ranks, made = {}, {}
    targets = self._merge_targets(params, adapter_params)
    shifts = any(
      merging.has_bias(parts) or ("seq" in parts and bias is not None)
      for _, bias, parts in targets.values()
    )
    for path, parts in targets.items():
      down, up, shift = merging.as_lora(*parts)
      ranks[path] = down.shape[-1]
      branch = {"down": {KERNEL: down}, "up": {KERNEL: up}}
      if shifts:
        branch["up"][BIAS] = shift
      made[f"{path}/par"] = branch
    lora = Hydra(
      tuple(targets),
      r_par=ranks,
      bias="up" if shifts else False,
      dropout=self.settings.dropout,
      maps=self.maps,
    )
    lora.base = self.base
    return lora, _unflatten(made)


def _at(tree: Params, path: str) -> Any:
  """The node of a tree of nested dicts at a path."""
  for part in path.split("/"):
    tree = tree[part]
  return tree


def _like(value: Array, old: Array) -> Array:
  """A float32 result in the shape, dtype and place of what it replaces."""
  value = value.reshape(old.shape).astype(old.dtype)
  if is_concrete((value, old)) and isinstance(old, jax.Array):
    value = jax.device_put(value, old.sharding)
  return value


def _fold(
  params: Params, targets: Mapping[str, tuple]
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Merged leaves by path: in the base's dtype, and before that rounding."""
  leaves, exact = {}, {}
  for path, parts in targets.items():
    for name, value in zip((KERNEL, BIAS), merging.merge(*parts), strict=True):
      if value is not None:
        old = _at(params, path)[name]
        exact[f"{path}/{name}"] = value.reshape(old.shape)
        leaves[f"{path}/{name}"] = _like(value, old)
  return leaves, exact


def _with_leaves(tree: Params, leaves: Mapping[str, Any]) -> Params:
  """A copy of a tree of nested dicts with nodes at some paths set."""
  here, below = {}, {}
  for path, leaf in leaves.items():
    first, _, rest = path.partition("/")
    if rest:
      below.setdefault(first, {})[rest] = leaf
    else:
      here[first] = leaf
  changed = {name: _with_leaves(tree[name], sub) for name, sub in below.items()}
  return {**tree, **changed, **here}


@jax.jit
def _rounding_of(old: Array, new: Array, exact: Array) -> tuple[Array, Array]:
  lost = new.astype(jnp.float32) - exact
  update = jnp.linalg.norm((exact - old.astype(jnp.float32)).ravel())
  share = jnp.linalg.norm(lost.ravel()) / jnp.where(update > 0, update, 1.0)
  return jnp.max(jnp.abs(lost)), share


def _rounding(
  params: Params, leaves: Mapping[str, Array], exact: Mapping[str, Array]
) -> dict[str, Rounding]:
  old = flatten(params)
  return {
    path: Rounding(
      *map(float, _rounding_of(old[path], leaves[path], exact[path]))
    )
    for path in leaves
  }
