"""Scan routes: the orders in which a scan reads the pixels of a map.

The scan patterns of "MHS-VM: Multi-Head Scanning in Parallel Subspaces for
Vision Mamba", arXiv 2406.05992. A path lists the pixels i * width + j in the
order they are read. A route has two paths, and each is read in both directions:
four scans a head. Routes are data: arrays made from height and width when a map
of that size is first seen.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from multihead.errors import nearest

# The name of a route, or what makes the two paths [2, height * width] of a map.
Route = str | Callable[[int, int], np.ndarray]


def _snake(grid: np.ndarray) -> np.ndarray:
  """Row by row, every second one backwards."""
  grid = grid.copy()
  grid[1::2] = grid[1::2, ::-1]
  return grid.ravel()


def _diagonals(grid: np.ndarray) -> np.ndarray:
  """Anti-diagonal by anti-diagonal, up the first, down the next."""
  height, width = grid.shape
  path = []
  for k in range(height + width - 1):
    rows = np.arange(max(0, k - width + 1), min(height, k + 1))
    line = grid[rows, k - rows]
    path.append(line if k % 2 else line[::-1])
  return np.concatenate(path)


def _spiral(grid: np.ndarray) -> np.ndarray:
  """Clockwise from the corner to the centre."""
  path = []
  while grid.size:
    path.append(grid[0])
    grid = np.rot90(grid[1:])
  return np.concatenate(path)


def _hilbert(grid: np.ndarray) -> np.ndarray:
  """The Hilbert curve of the next power of two, without what lies outside."""
  height, width = grid.shape
  curve, side = np.zeros((1, 2), np.int32), 1
  while side < max(height, width):
    swapped = curve[:, ::-1]
    last = np.array([2 * side - 1, side - 1]) - swapped
    curve = np.concatenate([swapped, curve + (0, side), curve + side, last])
    side *= 2
  inside = (curve < (height, width)).all(axis=1)
  return grid[tuple(curve[inside].T)]


# Name -> the first path, and which turn of the map gives the second one.
_PATHS = {
  "C": (_snake, np.transpose),
  "X": (_diagonals, np.fliplr),
  "S": (_spiral, np.flipud),
  "Z": (np.ravel, np.transpose),
  "hilbert": (_hilbert, np.transpose),
}
_RANDOM = "random"
# The routes of the paper, in the order in which its heads have them.
ROUTES = ("C", "X", "S", "Z")


def check_name(name: str) -> None:
  """Raises ValueError unless `scan_route` knows the name."""
  kind, _, seed = name.partition(":")
  if (
    name in _PATHS or name == _RANDOM or (kind == _RANDOM and seed.isdecimal())
  ):
    return
  raise ValueError(
    f"unknown scan route {name!r}{nearest(name, [*_PATHS, _RANDOM])}; the "
    f"routes are {', '.join(_PATHS)}, {_RANDOM} and {_RANDOM}:SEED"
  )


@functools.lru_cache(maxsize=256)
def scan_route(name: str, height: int, width: int) -> Int32[np.ndarray, "2 L"]:
  """The two paths of a route over a map.

  Args:
    name: "C" (continuous: rows, every second one backwards; columns), "X"
      (diagonals, from the left and from the right), "S" (spirals, from the top
      and from the bottom), "Z" (raster: rows; columns), "hilbert" (the curve
      and its transpose; consecutive pixels touch where the sides are one power
      of two), "random" or "random:SEED" (two permutations).
    height: rows of the map.
    width: its columns.

  Returns:
    Pixels i * width + j in the order in which they are read; not writeable.

  Raises:
    ValueError: an unknown name, or a map without pixels.
  """
  check_name(name)
  if height < 1 or width < 1:
    raise ValueError(f"a map of {height}x{width} has no pixels to scan")
  grid = np.arange(height * width, dtype=np.int32).reshape(height, width)
  if name in _PATHS:
    path, turn = _PATHS[name]
    route = np.stack([path(grid), path(turn(grid))])
  else:
    rng = np.random.default_rng(int(name.partition(":")[2] or 0))
    route = np.stack([rng.permutation(grid.ravel()) for _ in range(2)])
  route.setflags(write=False)
  return route


def check_route(
  route: Int[np.ndarray, "2 L"], height: int, width: int
) -> Int32[np.ndarray, "2 L"]:
  """A route given by the user, as int32, once it is known to be one.

  Raises:
    TypeError: it does not hold integers.
    ValueError: it has another shape, or a path that does not read every pixel
      exactly once.
  """
  route = np.asarray(route)
  if not np.issubdtype(route.dtype, np.integer):
    raise TypeError(f"a route holds integers, got {route.dtype}")
  length = height * width
  if route.shape != (2, length):
    raise ValueError(
      f"the route of a map of {height}x{width} must be [2, {length}], got "
      f"{list(route.shape)}"
    )
  for number, path in enumerate(route):
    outside = path[(path < 0) | (path >= length)]
    if outside.size:
      raise ValueError(
        f"path {number} of the route reads pixel {outside[0]}; a map of "
        f"{height}x{width} has pixels 0 to {length - 1}"
      )
    reads = np.bincount(path, minlength=length)
    if (reads != 1).any():
      pixel = int(np.argmax(reads != 1))
      raise ValueError(
        f"path {number} of the route reads pixel {pixel} {reads[pixel]} times; "
        "it must read every pixel exactly once"
      )
  return route.astype(np.int32)


def scan_orders(
  routes: Sequence[Route], height: int, width: int
) -> tuple[Int32[np.ndarray, "G L"], Int32[np.ndarray, "G L"]]:
  """The four scans of each route, and their inverses.

  Args:
    routes: one per head: a name, or a function that is called with height and
      width, and whose result goes through `check_route`.
    height: rows of the map.
    width: its columns.

  Returns:
    order[g, t], the pixel that scan g reads at step t, and inverse[g, pixel],
    the step at which it does. G = 4 len(routes); the scans of a route are its
    first path, that backwards, its second path, that backwards.
  """
  orders = []
  for route in routes:
    if callable(route):
      paths = check_route(route(height, width), height, width)
    else:
      paths = scan_route(route, height, width)
    orders += [paths[0], paths[0, ::-1], paths[1], paths[1, ::-1]]
  order = np.stack(orders)
  return order, np.argsort(order, axis=1).astype(np.int32)


@jax.custom_vjp
def route_gather(
  x: Float[Array, "B L G S"],
  order: Int[Array, "G L"],
  inverse: Int[Array, "G L"],
) -> Float[Array, "B L G S"]:
  """y[b, t, g] = x[b, order[g, t], g]; its gradient is a gather too.

  The gradient of a gather is a scatter in general. Of a permutation it is the
  gather by the inverse, which needs no additions in memory.

  Args:
    x: values per pixel, or per step.
    order: permutations of L.
    inverse: their inverses. With the two exchanged, the function undoes itself.
  """
  del inverse

  def take(x, order):
    return x.at[:, order].get(mode="promise_in_bounds", unique_indices=True)

  # Mapped over G, so that a mesh axis can split it.
  return jax.vmap(take, in_axes=(2, 0), out_axes=2)(x, order)


def _forward(x, order, inverse):
  return route_gather(x, order, inverse), (order, inverse)


def _backward(orders, gradient):
  order, inverse = orders
  return route_gather(gradient, inverse, order), None, None


route_gather.defvjp(_forward, _backward)
