"""Any task, learnt by an adapter and chosen parameters over a frozen base."""

import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any

import flax.traverse_util
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float

from multihead import adapters
from multihead.adapters.linear_maps import flatten
from multihead.errors import UserError
from multihead.parallel import sharding

FILE = "adapter.safetensors"


def _unflatten(tree: dict[str, Any]) -> Any:
  return flax.traverse_util.unflatten_dict(tree, sep="/")


def divide(params: Any, trained: str | None) -> tuple[Any, Any]:
  """Splits a tree into what stays frozen and what is trained in full.

  Args:
    params: of a model.
    trained: a regular expression for the beginning of paths, e.g. "head"; None:
      nothing.

  Returns:
    (frozen, trained), both parts of the tree.

  Raises:
    UserError: no parameter has such a path.
  """
  flat = flatten(params)
  if trained is None:
    return params, {}
  try:
    chosen = {p: x for p, x in flat.items() if re.match(trained, p)}
  except re.error as error:
    raise UserError(
      f"config.adapter.trained={trained!r} is not a regular expression: {error}"
    ) from None
  if not chosen:
    raise UserError(
      f"config.adapter.trained={trained!r} begins the path of no parameter; "
      f"there are {', '.join(sorted(flat)[:5])}, ..."
    )
  frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
  return _unflatten(frozen), _unflatten(chosen)


def _join(*trees: Any) -> Any:
  flat: dict[str, Any] = {}
  for tree in trees:
    flat |= flatten(tree)
  return _unflatten(flat)


@dataclasses.dataclass(frozen=True, eq=False)
class Adaptation:
  """Wraps a task; only what it trains is the run's parameters.

  Those are {"adapter": ..., "trained": ...}. The rest of the model is `frozen`,
  which the compiled step takes beside its state: it has no gradient, no
  optimizer state, and is in no checkpoint.

  Attributes:
    inner: the task of the whole model.
    adapter: its adapter; None trains `start` alone.
    frozen: the parameters that stay, on the mesh.
    start: where those trained in full begin, on the mesh.
    base: fingerprint of `frozen`.
  """

  inner: Any
  adapter: adapters.Hydra | None
  frozen: Any
  start: Any
  base: str

  def __getattr__(self, name: str) -> Any:
    # What is not below (units, summaries, batches) is the inner task's.
    if name.startswith("__") or name == "inner":
      raise AttributeError(name)
    found = getattr(self.inner, name)
    if name in ("final_metrics", "draw"):
      return lambda params, *rest: found(self.merged(params), *rest)
    return found

  def _init(self, rng: jax.Array) -> Any:
    if self.adapter is None:
      return {}
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.frozen
    )
    return self.adapter.init(rng, shapes)

  def init_params(self, rng: jax.Array, mesh: Mesh | None = None) -> Any:
    """A new adapter, and copies of the other parameters' starts."""
    where = None if mesh is None else self.param_shardings(mesh)["adapter"]
    return {
      "adapter": jax.jit(self._init, out_shardings=where)(rng),
      "trained": jax.tree.map(lambda x: x.copy(), self.start),
    }

  def abstract_params(self) -> Any:
    """Shapes and dtypes of what is trained."""
    return {
      "adapter": jax.eval_shape(self._init, jax.random.key(0)),
      "trained": jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.start
      ),
    }

  def param_shardings(self, mesh: Mesh) -> Any:
    """The trained ones lie as in the model, low-rank parts as they need."""
    base = flatten(self.inner.param_shardings(mesh))
    frozen = _unflatten({path: base[path] for path in flatten(self.frozen)})
    trained = {path: base[path] for path in flatten(self.start)}
    placed = {}
    if self.adapter is not None:
      placed = self.adapter.shardings(self.frozen, frozen)
    return {"adapter": placed, "trained": _unflatten(trained)}

  def loss_fn(
    self, params: Any, batch: Any, rng: jax.Array, train: bool, *, frozen: Any
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The inner task's loss of the adapted model.

    Args:
      params: what is trained.
      batch: of the inner task.
      rng: for dropout, the adapter's and the model's.
      train: whether dropout is on.
      frozen: `self.frozen`, as an argument of the compiled step.
    """
    own, inner = jax.random.split(rng)
    tree = self._adapted(params, frozen, own if train else None)
    with adapters.branches.running():
      return self.inner.loss_fn(tree, batch, inner, train)

  def eval_fn(self, params: Any, batch: Any, *, frozen: Any) -> Any:
    """The inner task's sums of the adapted model."""
    with adapters.branches.running():
      return self.inner.eval_fn(self._adapted(params, frozen), batch)

  def _adapted(
    self, params: Any, frozen: Any, rng: jax.Array | None = None
  ) -> Any:
    if self.adapter is not None:
      frozen = self.adapter.insert(frozen, params["adapter"], dropout_rng=rng)
    return _join(frozen, params["trained"])

  def merged(self, params: Any) -> Any:
    """The model's own parameters, with what was learnt folded in."""
    frozen = self.frozen
    if self.adapter is not None:
      adapter = self.adapter.deterministic()
      frozen = adapter.merge(frozen, params["adapter"])
    return _join(frozen, params["trained"])

  def sample(self, params: Any, **options: Any) -> Any:
    """The inner task's sample of the merged model."""
    return self.inner.sample(self.merged(params), **options)

  def export(self, workdir: str, params: Any) -> None:
    """Writes the adapter, and what else was trained, into one file.

    All processes of a job call this; the first one writes.
    """
    if self.adapter is None:
      return
    if jax.process_count() > 1:
      params = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() == 0:
      adapters.save(
        os.path.join(workdir, FILE),
        self.adapter,
        params["adapter"],
        trained=params["trained"],
      )

  def facts(self) -> list[str]:
    """The data, and how little of the model is trained."""
    count = sharding.param_count(self.abstract_params())
    frozen = sharding.param_count(self.frozen)
    return [
      *self.inner.facts(),
      f"adapter: {self.adapter}; {count:,} trained, {frozen:,} frozen "
      f"parameters, base {self.base}",
    ]

  def train_iterator(self, index: int = 0, count: int = 1) -> Iterator[Any]:
    """The inner task's batches; their position knows the base."""
    return _Positions(self.inner.train_iterator(index, count), self.base)


class _Positions:
  """An iterator whose saved position continues over the same base only."""

  def __init__(self, inner: Any, base: str):
    self.inner, self.base = inner, base

  def __iter__(self) -> "_Positions":
    return self

  def __next__(self) -> Any:
    return next(self.inner)

  def get_state(self) -> dict[str, Any]:
    return {"base": self.base, "data": self.inner.get_state()}

  def set_state(self, state: dict[str, Any]) -> None:
    if state["base"] != self.base:
      raise UserError(
        f"this run began over a base with fingerprint {state['base']}, but "
        f"config.adapter.base gives one with {self.base}; use another workdir"
      )
    self.inner.set_state(state["data"])

  def close(self) -> None:
    self.inner.close()
