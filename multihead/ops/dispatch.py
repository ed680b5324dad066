"""Chooses the implementation of an operation, and says why.

An implementation is a module with two functions: `supports(args)`, which
returns None when it can serve these arguments on this device and else one
sentence that names the limit, and `run(**args)`. `args` is a dict of every
argument of the operation by name. `supports` looks at shapes, dtypes, Python
values and `jax.default_backend()`, never at the values of arrays: under jit
there are none. A program that compiles for another device than the default one
names the implementation.
"""

import contextvars
import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np
from absl import logging

from multihead import errors

Implementation = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class Selection:
  """What was chosen for one call, and each implementation's answer.

  Attributes:
    op: name of the operation.
    arguments: the arguments in words, e.g. 'q=float32[1,8,2,4], causal=True'.
    chosen: name of the implementation that runs, None if none can.
    reasons: for every implementation None (supported) or why it is not.
    error: what the call raises when `chosen` is None.
  """

  op: str
  arguments: str
  chosen: str | None
  reasons: dict[str, str | None]
  error: str | None = None

  def __str__(self) -> str:
    width = max(map(len, self.reasons))
    lines = [f"{self.op}({self.arguments})"]
    for name, reason in self.reasons.items():
      mark = "->" if name == self.chosen else "  "
      lines.append(f"{mark} {name:<{width}}  {reason or 'supported'}")
    if self.error:
      lines.append(self.error)
    return "\n".join(lines)


class _Described(Exception):
  """Leaves an operation at its choice; only raised under `describe`."""

  def __init__(self, selection: Selection):
    super().__init__(str(selection))
    self.selection = selection


_describing: contextvars.ContextVar[str | None] = contextvars.ContextVar(
  "multihead_ops_describing", default=None
)
_logged: set[tuple[str, str, str]] = set()


def select(
  op: str,
  table: Mapping[str, ModuleType],
  preference: Sequence[str],
  implementation: Implementation,
  args: Mapping[str, Any],
) -> ModuleType:
  """Returns the module of `table` that serves `args`.

  Args:
    op: name of the operation, for messages.
    table: every implementation by name.
    preference: names to try, best first, when `implementation` is None.
    implementation: None, one name, or names of which the first that supports
      the arguments is taken.
    args: all arguments of the call by name.

  Raises:
    ValueError: a name that is not in `table`, or an empty sequence.
    NotImplementedError: no allowed implementation supports the arguments; the
      text has the reasons and, where one exists, a name that would serve.
  """
  allowed = _allowed(op, table, preference, implementation)
  # The order of the table shown to people: preferred first, then the rest.
  names = list(preference) + [n for n in table if n not in preference]
  args = dict(args)
  reasons = {name: table[name].supports(args) for name in names}
  chosen = next((n for n in allowed if reasons[n] is None), None)
  error = None
  if chosen is None:
    error = _refusal(op, allowed, reasons, implementation)
  describing = _describing.get() == op
  summary = _summary(args)
  if describing:
    raise _Described(Selection(op, summary, chosen, reasons, error))
  if chosen is None:
    raise NotImplementedError(error)
  if (op, summary, chosen) not in _logged:
    _logged.add((op, summary, chosen))
    logging.info("ops.%s: %s runs %s", op, chosen, summary)
  return table[chosen]


def describe(op: str | Callable[..., Any], *args, **kwargs) -> Selection:
  """Says which implementation a call would run, and why not the others.

  Computes nothing: arrays may also be given as jax.ShapeDtypeStruct.

  Args:
    op: an operation of `multihead.ops` or its name.
    *args: what the operation would be called with.
    **kwargs: likewise, `implementation=` included.

  Returns:
    A Selection; print it for the table.

  Raises:
    ValueError: an unknown operation, or what the operation itself raises for
      arguments that do not fit together.
  """
  function, name = _operation(op)
  leaves, treedef = jax.tree.flatten((args, kwargs))
  is_array = [_is_array(leaf) for leaf in leaves]
  arrays = [leaf for leaf, yes in zip(leaves, is_array, strict=True) if yes]

  def call(*arrays):
    # Everything that is no array (causal=True, a scale) keeps its value.
    left = iter(arrays)
    full = [
      next(left) if yes else leaf
      for leaf, yes in zip(leaves, is_array, strict=True)
    ]
    positional, named = jax.tree.unflatten(treedef, full)
    return function(*positional, **named)

  token = _describing.set(name)
  try:
    jax.eval_shape(call, *arrays)
  except _Described as described:
    return described.selection
  finally:
    _describing.reset(token)
  raise ValueError(f"{name} chooses no implementation: nothing to describe")


def _operation(op: str | Callable[..., Any]) -> tuple[Callable[..., Any], str]:
  if callable(op):
    return op, op.__name__
  ops = importlib.import_module("multihead.ops")
  names = [n for n in ops.__all__ if n != "describe"]
  if op not in names:
    raise ValueError(
      f"unknown operation {op!r}{errors.nearest(op, names)}; allowed: "
      + ", ".join(names)
    )
  return getattr(ops, op), op


def _allowed(
  op: str,
  table: Mapping[str, ModuleType],
  preference: Sequence[str],
  implementation: Implementation,
) -> tuple[str, ...]:
  """The names that may run, best first."""
  if implementation is None:
    return tuple(preference)
  if isinstance(implementation, str):
    names = (implementation,)
  elif isinstance(implementation, Sequence):
    names = tuple(implementation)
  else:
    raise TypeError(
      f"{op}: implementation must be None, a name or a sequence of names, got "
      f"{implementation!r}; allowed: {', '.join(table)}"
    )
  if not names:
    raise ValueError(
      f"{op}: implementation is an empty sequence; give None for the best, or "
      f"one or more of: {', '.join(table)}"
    )
  for name in names:
    if name not in table:
      hint = errors.nearest(str(name), table)
      raise ValueError(
        f"{op}: unknown implementation {name!r}{hint}; allowed: "
        + ", ".join(table)
      )
  return names


def _refusal(
  op: str,
  allowed: Sequence[str],
  reasons: Mapping[str, str | None],
  implementation: Implementation,
) -> str:
  """The text of the error when no allowed implementation serves."""
  serves = next((n for n, reason in reasons.items() if reason is None), None)
  if serves is None:
    other = "no implementation supports these arguments"
  else:
    other = f"implementation={serves!r} supports these arguments"
  if isinstance(implementation, str):
    text = f"{op}: implementation {allowed[0]!r} refused: {reasons[allowed[0]]}"
    return f"{text}; {other}"
  why = "; ".join(f"{name}: {reasons[name]}" for name in allowed)
  return f"{op}: none of {', '.join(allowed)} is possible ({why}); {other}"


def _is_array(x: Any) -> bool:
  return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def _summary(args: Mapping[str, Any]) -> str:
  """'q=float32[1,8,2,4], causal=True': what decides the choice, in words."""
  words = []
  for name, value in args.items():
    if value is None or value is False:
      continue
    if hasattr(value, "shape") and hasattr(value, "dtype"):
      shape = ",".join(map(str, value.shape))
      words.append(f"{name}={value.dtype}[{shape}]")
    else:
      words.append(f"{name}={value!r}")
  return ", ".join(words)
