"""Which stored tensor holds which parameters of ours, and in which layout."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

Layout = Literal["matrix", "vector", "linear", "conv", "conv2d"]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One stored tensor and the parameters of ours that it holds.

  Attributes:
    name: name of the stored tensor; `{layer}` stands for the layer's number.
    paths: our parameters, joined along the first axis of the stored tensor.
      Where the name has `{layer}`, the first part of the path is the stack.
    layout: how one parameter is stored. `matrix`: as it is. `vector`: all axes
      flattened. `linear`: [inputs, outputs] stored as [outputs, inputs].
      `conv`: [W, channels] stored as [channels, 1, W]. `conv2d`: [height,
      width, inputs, outputs] stored as [outputs, inputs, height, width].
    inputs: number of leading axes of a `linear` kernel that are its input.
  """

  name: str
  paths: tuple[str, ...]
  layout: Layout
  inputs: int = 1

  def axes(self, ndim: int) -> tuple[tuple[int, ...], ...]:
    """The axes of a parameter that each stored axis flattens."""
    every = tuple(range(ndim))
    match self.layout:
      case "matrix":
        return tuple((axis,) for axis in every)
      case "vector":
        return (every,)
      case "linear":
        return every[self.inputs :], every[: self.inputs]
      case "conv":
        return every[1:], (), every[:1]
      case "conv2d":
        return (3,), (2,), (0,), (1,)

  def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stored shape of one of our parameters of this shape."""
    groups = self.axes(len(shape))
    return tuple(math.prod(shape[axis] for axis in group) for group in groups)

  def to_stored(self, value: np.ndarray) -> np.ndarray:
    """One of our parameters as it is stored."""
    order = sum(self.axes(value.ndim), ())
    return value.transpose(order).reshape(self.stored_shape(value.shape))

  def from_stored(
    self, stored: np.ndarray, shape: tuple[int, ...]
  ) -> np.ndarray:
    """A view of contiguous stored rows in our layout; copies nothing."""
    order = sum(self.axes(len(shape)), ())
    split = stored.reshape([shape[axis] for axis in order])
    return split.transpose(np.argsort(order))

  def window(
    self, index: Sequence[slice], shape: Sequence[int]
  ) -> tuple[list[slice], tuple[slice, ...], tuple[int, ...]]:
    """What to read for a part of a parameter, and how to cut that further.

    The first of the axes that a stored axis flattens is cut while reading;
    cuts of the others are not contiguous there and are made afterwards.

    Args:
      index: the part, a slice of step 1 per axis.
      shape: of the whole parameter.

    Returns:
      A slice per stored axis, the index of the part in what they hold, and
      the shape of what they hold, both in our layout.
    """
    window, inner, shape = [], list(index), list(shape)
    for group in self.axes(len(shape)):
      if not group:
        window.append(slice(0, 1))
        continue
      first = group[0]
      start, stop, _ = index[first].indices(shape[first])
      size = math.prod(shape[axis] for axis in group[1:])
      window.append(slice(start * size, stop * size))
      inner[first], shape[first] = slice(None), stop - start
    return window, tuple(inner), tuple(shape)


@dataclasses.dataclass(frozen=True)
class Part:
  """A parameter, or one layer's slice of a stacked one."""

  path: str
  layer: int | None
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A stored tensor, resolved for one model."""

  name: str
  entry: Entry
  parts: tuple[Part, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    shapes = [self.entry.stored_shape(part.shape) for part in self.parts]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def resolve(
  entries: Sequence[Entry], shapes: Mapping[str, tuple[int, ...]], layers: int
) -> list[Tensor]:
  """Spells out a key map for a parameter tree, stacked or not."""

  def part(path: str, layer: int | None) -> Part:
    if layer is None:
      return Part(path, None, shapes[path])
    if path in shapes:
      return Part(path, layer, shapes[path][1:])
    stack, _, rest = path.partition("/")
    path = f"{stack}_{layer}/{rest}"
    return Part(path, None, shapes[path])

  def tensor(entry: Entry, layer: int | None) -> Tensor:
    parts = tuple(part(path, layer) for path in entry.paths)
    return Tensor(entry.name.format(layer=layer), entry, parts)

  per_layer = [e for e in entries if "{layer}" in e.name]
  tensors = [tensor(e, None) for e in entries if e not in per_layer]
  tensors += [tensor(e, i) for i in range(layers) for e in per_layer]
  covered = {part.path for t in tensors for part in t.parts}
  if covered != shapes.keys():
    raise ValueError(
      f"the key map and the model differ in {sorted(covered ^ shapes.keys())}"
    )
  return tensors
