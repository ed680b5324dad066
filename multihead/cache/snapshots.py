"""Caches taken apart and put together: other sizes, branches, files.

A hybrid's cache cannot be cropped back to an earlier token as a cache of keys
can: the state of the scan has forgotten how it got there. What can be done is
to keep a copy at a prefix, and to continue from it as often as one likes.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from multihead.cache.static import Cache
from multihead.errors import UserError

# init_cache(batch_size, max_length) of a model.
InitCache = Callable[[int, int], Cache]

_FORMAT = "multihead cache snapshot 1"


# Fields of a module that say how it computes, not what.
_EXECUTION = ("parent", "name", "scan_layers", "remat", "param_dtype")


def architecture(model: Any) -> dict[str, str]:
  """What a linen module computes: its class and fields, in words.

  Two modules of one architecture are one function of parameters and inputs,
  up to the order of the parameters' layers and rounding.
  """
  fields = {
    field.name: repr(getattr(model, field.name))
    for field in dataclasses.fields(model)
    if field.name not in _EXECUTION
    and not field.name.startswith("initializer")
    and not field.name.endswith("_implementation")
  }
  return {"model": type(model).__name__, **fields}


def _shapes(init_cache: InitCache, batch_size: int, max_length: int) -> Cache:
  return jax.eval_shape(lambda: init_cache(batch_size, max_length))


def _axis(small: Any, large: Any) -> int | None:
  """The one axis along which two shapes differ, or None."""
  pairs = zip(small.shape, large.shape, strict=True)
  differ = [axis for axis, (a, b) in enumerate(pairs) if a != b]
  return differ[0] if differ else None


def size(cache: Cache) -> tuple[int, int]:
  """Batch size and slots of a cache."""
  return cache["valid"].shape


def resize(
  init_cache: InitCache, cache: Cache, batch_size: int, max_length: int
) -> Cache:
  """The same cache for another batch size and number of slots.

  Which axes of an array count rows and slots is seen from how its shape
  changes with them, so this serves any model.

  Args:
    init_cache: of the model that the cache belongs to.
    cache: to be changed; its arrays stay as they are.
    batch_size: that of the cache, or any if that is 1: its row is repeated.
    max_length: slots; fewer than before keep the first ones, which must
      include all used ones.

  Returns:
    A new cache.

  Raises:
    ValueError: the cache has several rows and `batch_size` is another number.
  """
  rows, slots = size(cache)
  if rows not in (1, batch_size):
    raise ValueError(
      f"a cache of {rows} rows cannot serve a batch of {batch_size}; it must "
      f"have 1 row, or {batch_size}"
    )
  old = _shapes(init_cache, 1, slots)
  wide = _shapes(init_cache, 2, slots)
  long = _shapes(init_cache, 1, slots + 1)

  def change(leaf: Any, old: Any, wide: Any, long: Any) -> Any:
    axis = _axis(old, long)
    if axis is not None and max_length < slots:
      leaf = jax.lax.slice_in_dim(leaf, 0, max_length, axis=axis)
    elif axis is not None and max_length > slots:
      pad = [(0, 0)] * leaf.ndim
      pad[axis] = (0, max_length - slots)
      leaf = jnp.pad(leaf, pad)
    axis = _axis(old, wide)
    if axis is not None and batch_size != rows:
      leaf = jnp.repeat(leaf, batch_size, axis=axis)
    return leaf

  return jax.tree.map(change, cache, old, wide, long)


def save(
  path: str | pathlib.Path,
  cache: Cache,
  logits: Any,
  identity: Mapping[str, str],
) -> None:
  """Writes a cache and the logits that go with it as a directory.

  Args:
    path: a directory that does not exist yet.
    cache: with the slots in use, see `resize`.
    logits: [B, V], the scores of the token that comes next.
    identity: what the snapshot belongs to, by name; `load` compares it.

  Raises:
    UserError: the path exists.
  """
  path = pathlib.Path(path).absolute()
  if path.exists():
    raise UserError(f"{path} exists; give a path for a new snapshot")
  rows, slots = size(cache)
  arrays = {"cache": cache, "logits": logits}
  metadata = {
    "format": _FORMAT,
    "identity": {**identity, **_describe(arrays)},
    "rows": rows,
    "slots": slots,
  }
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
    writer.save(
      path,
      ocp.args.Composite(
        metadata=ocp.args.JsonSave(metadata),
        arrays=ocp.args.StandardSave(arrays),
      ),
    )


def load(
  path: str | pathlib.Path,
  init_cache: InitCache,
  vocab_size: int,
  identity: Mapping[str, str],
  sharding: jax.sharding.Sharding | None = None,
) -> tuple[Cache, Any]:
  """Reads what `save` wrote.

  Args:
    path: the directory.
    init_cache: of the model that will use the cache.
    vocab_size: V.
    identity: of that model.
    sharding: where the arrays go; the default device if None. It need not be
      where they were when they were saved.

  Returns:
    The cache, with as many slots as it was saved with, and the logits.

  Raises:
    UserError: there is no snapshot, it is torn, or it belongs to something
      else; the text says what differs.
  """
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  path = pathlib.Path(path).absolute()
  if not path.is_dir():
    raise UserError(f"there is no snapshot at {path}")
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    found = _read(reader, path, metadata=ocp.args.JsonRestore())
    metadata = found.metadata
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
      raise UserError(f"{path} is not a cache snapshot of this program")
    rows, slots = metadata["rows"], metadata["slots"]
    target = {
      "cache": _shapes(init_cache, rows, slots),
      "logits": jax.ShapeDtypeStruct((rows, vocab_size), jnp.float32),
    }
    _compare(path, metadata["identity"], {**identity, **_describe(target)})
    arrays = _read(
      reader,
      path,
      arrays=ocp.args.StandardRestore(
        jax.tree.map(lambda leaf: leaf.update(sharding=sharding), target)
      ),
    ).arrays
  return arrays["cache"], arrays["logits"]


def _read(reader: ocp.Checkpointer, path: pathlib.Path, **args: Any) -> Any:
  try:
    return reader.restore(path, ocp.args.Composite(**args))
  except Exception as error:  # orbax and tensorstore raise many kinds
    first = str(error).strip().split("\n", maxsplit=1)[0]
    raise UserError(
      f"{path} is torn, or not a cache snapshot "
      f"({type(error).__name__}: {first[:200]})"
    ) from error


def _describe(arrays: Any) -> dict[str, str]:
  """Each array of a tree by its path, as 'float32[2, 3]'."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{leaf.dtype}{list(leaf.shape)}"
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
  }


def _compare(
  path: pathlib.Path, saved: Mapping[str, str], wanted: Mapping[str, str]
) -> None:
  differ = [
    f"{key} is {saved.get(key)} there and {wanted.get(key)} here"
    for key in [*wanted, *(key for key in saved if key not in wanted)]
    if saved.get(key) != wanted.get(key)
  ]
  if differ:
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    raise UserError(
      f"the snapshot {path} is of another model: {'; '.join(differ[:3])}{more}"
    )
