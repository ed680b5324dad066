"""Checkpoints of a run: state, data position and what they belong to.

Written by orbax in the background and committed by one rename, so that a
killed process leaves the previous one whole. Restored onto whatever mesh is
present. Weights for others to read are in `multihead.checkpoints`.
"""

import importlib.metadata
import json
import os
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from multihead.errors import UserError
from multihead.train.state import TrainState

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
  """Versions of the packages that a result depends on."""
  found = {}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "missing"
  return found


def describe_tree(tree: Any) -> dict[str, str]:
  """Each array of a tree by its path, as 'float32[2,3]'."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


class Checkpoints:
  """The checkpoints in one directory, numbered by step."""

  def __init__(self, directory: str, keep: int = 3):
    """Opens the directory; it is made with the first checkpoint.

    Args:
      directory: where the numbered checkpoints are.
      keep: how many of the newest stay.
    """
    self.directory = os.path.abspath(directory)
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
      ),
    )

  def latest_step(self) -> int | None:
    """The newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def save(
    self,
    step: int,
    state: TrainState,
    data_state: Any,
    config: dict[str, Any],
  ) -> None:
    """Copies the state off the device and writes it in the background.

    Does nothing where this step is saved already.

    Args:
      step: updates made so far.
      state: the state; it may be donated as soon as this returns.
      data_state: what the data iterator's `get_state` gives (JSON values).
      config: what `TrainConfig.to_dict` gives.
    """
    if step in self._manager.all_steps():
      return
    metadata = {
      "config": config,
      "versions": versions(),
      "tree": describe_tree(state),
    }
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave(gather_data_state(data_state)),
        metadata=ocp.args.JsonSave(metadata),
      ),
      force=True,
    )

  def metadata(self, step: int) -> dict[str, Any]:
    """Config, versions and tree that a checkpoint was written with.

    Raises:
      UserError: the checkpoint cannot be read.
    """
    args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
    found = self._read(step, args).metadata
    if not isinstance(found, dict) or not {"config", "tree"} <= found.keys():
      raise self._refusal(step, "it was not written by this program")
    return found

  def check(self, step: int, target: TrainState) -> None:
    """Checks that a checkpoint holds the arrays of `target`.

    Raises:
      UserError: it does not, or cannot be read.
    """
    saved = self.metadata(step)["tree"]
    if target.opt_state is None:
      saved = {k: v for k, v in saved.items() if not k.startswith("opt_state")}
    reason = difference(saved, describe_tree(target))
    if reason:
      raise self._refusal(step, reason)

  def restore(self, step: int, target: TrainState) -> tuple[TrainState, Any]:
    """Reads a checkpoint onto the shapes and shardings of `target`.

    Args:
      step: which checkpoint.
      target: ShapeDtypeStructs with shardings on the mesh of today; one with
        `opt_state=None` reads the parameters alone.

    Returns:
      The state, and this process' data position (None for parameters alone).

    Raises:
      UserError: it is torn, or of another model or optimizer.
    """
    self.check(step, target)
    if target.opt_state is None:
      parts = {"step": target.step, "params": target.params}
      parts |= {"rng": target.rng, "ema": target.ema}
      args = ocp.args.PyTreeRestore(
        parts,
        restore_args=ocp.checkpoint_utils.construct_restore_args(parts),
        partial_restore=True,
      )
      found = self._read(step, ocp.args.Composite(state=args))
      return TrainState(opt_state=None, **found.state), None
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()
    )
    found = self._read(step, args)
    return found.state, self._own_data_state(step, found.data)

  def wait(self) -> None:
    """Waits until everything saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and lets go of the directory."""
    self._manager.close()

  def _read(self, step: int, args: ocp.args.Composite) -> Any:
    hook = sys.unraisablehook
    sys.unraisablehook = _drop_closed_loop
    try:
      found = self._manager.restore(step, args=args)
    except Exception as error:  # orbax and tensorstore raise many kinds
      # The filter stays: other reads may fail at any time from now on.
      first = str(error).strip().split("\n", maxsplit=1)[0]
      reason = f"{type(error).__name__}: {first[:200]}"
      raise self._refusal(step, f"it is torn or foreign ({reason})") from error
    sys.unraisablehook = hook
    for name in args:
      if found[name] is None:
        raise self._refusal(step, f"it is torn: its part {name!r} is missing")
    return found

  def _own_data_state(self, step: int, data: dict[str, Any]) -> Any:
    states, index = data["states"], jax.process_index()
    if len(states) == 1:
      return states[0]
    if len(states) != jax.process_count():
      raise self._refusal(
        step,
        f"its data position is that of {len(states)} processes; it continues "
        f"only on as many, and there are {jax.process_count()}",
      )
    return states[index]

  def _refusal(self, step: int, reason: str) -> UserError:
    path = os.path.join(self.directory, str(step))
    return UserError(
      f"cannot restore the checkpoint {path}: {reason}; use another workdir, "
      "or delete this checkpoint to fall back to the one before it"
    )


def gather_data_state(state: Any) -> dict[str, Any]:
  """The data positions of all processes, or the one that they share."""
  text = json.dumps(_jsonable(state), sort_keys=True).encode()
  if jax.process_count() == 1:
    return {"states": [json.loads(text)]}
  size = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
  padded = np.zeros(size, np.uint8)
  padded[: len(text)] = np.frombuffer(text, np.uint8)
  rows = np.asarray(multihost_utils.process_allgather(padded))
  texts = [bytes(row).rstrip(b"\0") for row in rows]
  if len(set(texts)) == 1:
    texts = texts[:1]
  return {"states": [json.loads(text) for text in texts]}


def difference(saved: dict[str, str], wanted: dict[str, str]) -> str:
  """What sets two tree descriptions apart in words, or ''."""
  names = sorted(saved.keys() | wanted.keys())
  if any(saved.get(n) != wanted.get(n) for n in names if _is_param(n)):
    # The optimizer's copies of the same parameters would hide them.
    names = [name for name in names if _is_param(name)]
  both = [name for name in names if name in saved and name in wanted]
  other = [
    f"{name} is {saved[name]} there and {wanted[name]} here"
    for name in both
    if saved[name] != wanted[name]
  ]
  parts = []
  for label, found in (
    ("differ", other),
    ("are only in the checkpoint", [n for n in names if n not in wanted]),
    ("are only in this config", [n for n in names if n not in saved]),
  ):
    if found:
      more = f" and {len(found) - 3} more" if len(found) > 3 else ""
      parts.append(f"{len(found)} arrays {label}: {', '.join(found[:3])}{more}")
  if not parts:
    return ""
  return "it is of another model or optimizer; " + "; ".join(parts)


def _is_param(name: str) -> bool:
  return name.startswith("params/")


def _drop_closed_loop(raised: Any) -> None:
  """Keeps reader threads quiet that answer after the first read has failed."""
  if "loop is closed" not in str(raised.exc_value):
    sys.__unraisablehook__(raised)


def _jsonable(state: Any) -> Any:
  """Data positions as JSON values; grain gives dicts, or bytes of JSON."""
  if isinstance(state, bytes):
    return json.loads(state.decode())
  if isinstance(state, dict):
    return {str(key): _jsonable(value) for key, value in state.items()}
  if isinstance(state, list | tuple):
    return [_jsonable(value) for value in state]
  return state.item() if isinstance(state, np.generic) else state
