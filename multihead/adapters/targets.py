"""Chooses modules by regular expression or by name."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from multihead.adapters.linear_maps import (
  KERNEL,
  LinearMap,
  maps_from_shapes,
  module_paths,
)
from multihead.errors import UserError

ALL_LINEAR = "all-linear"
Targets = str | Sequence[str]


def select(
  targets: Targets,
  params: Any,
  maps: Mapping[str, LinearMap] | None = None,
) -> dict[str, LinearMap]:
  """The linear maps that `targets` names.

  Args:
    targets: a regular expression that matches whole paths of modules; or
      several names, each a path or the end of one ("mlp/down", "down"); or
      "all-linear": every linear map that is known.
    params: the base's parameters, arrays or shapes.
    maps: from `linear_maps`; without it shapes tell, where they can.

  Returns:
    Path -> map, in the order of the paths.

  Raises:
    UserError: a name or the expression matches nothing (the nearest paths are
      named), something that is no linear map, or a map whose shape in `params`
      is another.
  """
  known = maps_from_shapes(params)
  if maps is not None:
    known = {
      path: maps.get(path, "the model does not call it as a linear map")
      for path in known
    }
    _check_shapes(known, params)
  if targets == ALL_LINEAR:
    chosen = {p: m for p, m in known.items() if isinstance(m, LinearMap)}
    if not chosen:
      raise UserError("targets='all-linear': no linear map is known here")
    return dict(sorted(chosen.items()))
  matched: list[str] = []
  for name, matches in _matchers(targets):
    hits = [path for path in known if matches(path)]
    if not hits:
      raise UserError(
        f"targets: {name!r} matches no module; the nearest are "
        f"{', '.join(map(repr, _nearest(name, known)))}. A regular expression "
        "matches the whole path, a name in a list also its end"
      )
    matched += hits
  for path in matched:
    if not isinstance(known[path], LinearMap):
      raise UserError(
        f"targets: {path!r} is not known to be a linear map: {known[path]}"
      )
  return {path: known[path] for path in sorted(set(matched))}


def _matchers(targets: Targets) -> list[tuple[str, Any]]:
  if isinstance(targets, str):
    try:
      pattern = re.compile(targets)
    except re.error as error:
      raise UserError(
        f"targets={targets!r} is not a regular expression: {error}"
      ) from None
    return [(targets, pattern.fullmatch)]
  names = list(targets)
  if not names or not all(isinstance(name, str) for name in names):
    raise UserError(
      f"targets={targets!r}: give a regular expression or a list of names"
    )
  return [
    (name, lambda path, name=name: f"/{path}".endswith(f"/{name}"))
    for name in names
  ]


def _nearest(name: str, known: Mapping[str, Any]) -> list[str]:
  """The three paths most like a name, linear maps before other modules."""
  linear = [path for path in known if isinstance(known[path], LinearMap)]
  plain = re.sub(r"[\\.*^$()|+?\[\]]+", "", name)

  def likeness(path: str) -> float:
    whole = difflib.SequenceMatcher(None, plain, path).ratio()
    end = path.split("/")[-len(plain.split("/")) :]
    return max(
      whole, difflib.SequenceMatcher(None, plain, "/".join(end)).ratio()
    )

  return sorted(linear or known, key=likeness, reverse=True)[:3]


def _check_shapes(known: Mapping[str, Any], params: Any) -> None:
  modules = module_paths(params)
  for path, found in known.items():
    if isinstance(found, LinearMap):
      expected = found.stack + found.inputs + found.features
      shape = tuple(modules[path][KERNEL].shape)
      if shape != expected:
        raise UserError(
          f"maps: {path!r} has a kernel {list(expected)}, but in the "
          f"parameters it is {list(shape)}; trace the model they belong to"
        )
