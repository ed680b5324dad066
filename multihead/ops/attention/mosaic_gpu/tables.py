"""Where the kernels find a table of block sizes: given, or shipped as JSON.

`experiments.benchmark --suite=attention --tune` times block sizes and writes
those that won as a file, by the name that `file_name` gives the device kind.
In the folder tables/ beside this module it ships with the library, and goes
before what `blocks` has for the device.
"""

import contextlib
import contextvars
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

FOLDER = pathlib.Path(__file__).with_name("tables")

_given: contextvars.ContextVar[Any] = contextvars.ContextVar(
  "multihead_attention_blocks", default=None
)


def file_name(device_kind: str) -> str:
  """'nvidia_h100_80gb_hbm3.json' for "NVIDIA H100 80GB HBM3"."""
  return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()) + ".json"


@contextlib.contextmanager
def using(table: Any) -> Iterator[None]:
  """Calls that are traced in this block take their sizes from `table`."""
  token = _given.set(table)
  try:
    yield
  finally:
    _given.reset(token)


def current(device_kind: str, base: Any) -> Any:
  """The table in force: given explicitly, else shipped, else `base`."""
  given = _given.get()
  return _shipped(device_kind, base) if given is None else given


def to_json(table: Any) -> dict[str, dict[str, dict[str, Any]]]:
  """A `blocks.Table` as JSON has it: kernel, "head dim, rows", sizes."""
  return {
    field.name: {
      f"{width} {'full' if full else 'part'}": dataclasses.asdict(sizes)
      for (width, full), sizes in getattr(table, field.name).items()
    }
    for field in dataclasses.fields(table)
  }


def read(path: pathlib.Path, base: Any) -> Any:
  """The table of a file; `base` has what the file leaves out.

  Raises:
    ValueError: no JSON of this form, or names that no kernel knows.
  """
  found = {}
  for kernel, families in _object(path, path.read_text()).items():
    known = getattr(base, kernel, None)
    if known is None:
      raise ValueError(f"{path}: there is no kernel {kernel!r}")
    kind = type(next(iter(known.values())))
    found[kernel] = dict(known)
    for family, sizes in _object(path, families, kernel).items():
      match = re.fullmatch(r"(\d+) (full|part)", family)
      if match is None:
        raise ValueError(
          f"{path}: {family!r} is no head dim followed by full or part"
        )
      try:
        sizes = kind(**_object(path, sizes, f"{kernel} {family}"))
        found[kernel][int(match[1]), match[2] == "full"] = sizes
      except TypeError as error:
        raise ValueError(f"{path}: {kernel} {family}: {error}") from None
  return dataclasses.replace(base, **found)


def _object(path: pathlib.Path, found: Any, name: str = "it") -> dict[str, Any]:
  if isinstance(found, str):
    try:
      found = json.loads(found)
    except json.JSONDecodeError as error:
      raise ValueError(f"{path} is no JSON: {error}") from None
  if not isinstance(found, dict):
    raise ValueError(f"{path}: {name} must be a JSON object, got {found!r}")
  return found


def _shipped(device_kind: str, base: Any) -> Any:
  path = FOLDER / file_name(device_kind)
  # A call is traced once for its shapes: the file need not be kept.
  return read(path, base) if path.exists() else base
