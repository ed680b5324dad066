"""Scan routes: the paper's orders pixel by pixel, and the gather by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead.layers import scan_routes

SIZES = ((1, 1), (1, 5), (4, 1), (2, 2), (3, 5), (4, 4), (8, 8), (7, 6))
# Worked out from the authors' construction of their index files.
GOLDEN = {
  ("C", 4, 4): (
    "0 1 2 3 7 6 5 4 8 9 10 11 15 14 13 12",
    "0 4 8 12 13 9 5 1 2 6 10 14 15 11 7 3",
  ),
  ("X", 4, 4): (
    "0 1 4 8 5 2 3 6 9 12 13 10 7 11 14 15",
    "3 2 7 11 6 1 0 5 10 15 14 9 4 8 13 12",
  ),
  ("S", 4, 4): (
    "0 1 2 3 7 11 15 14 13 12 8 4 5 6 10 9",
    "12 13 14 15 11 7 3 2 1 0 4 8 9 10 6 5",
  ),
  ("Z", 4, 4): (
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15",
    "0 4 8 12 1 5 9 13 2 6 10 14 3 7 11 15",
  ),
  ("C", 3, 5): (
    "0 1 2 3 4 9 8 7 6 5 10 11 12 13 14",
    "0 5 10 11 6 1 2 7 12 13 8 3 4 9 14",
  ),
  ("X", 3, 5): (
    "0 1 5 10 6 2 3 7 11 12 8 4 9 13 14",
    "4 3 9 14 8 2 1 7 13 12 6 0 5 11 10",
  ),
  ("S", 3, 5): (
    "0 1 2 3 4 9 14 13 12 11 10 5 6 7 8",
    "10 11 12 13 14 9 4 3 2 1 0 5 6 7 8",
  ),
  ("Z", 3, 5): (
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14",
    "0 5 10 1 6 11 2 7 12 3 8 13 4 9 14",
  ),
}


@pytest.mark.parametrize(
  "case", GOLDEN, ids=lambda case: "-".join(map(str, case))
)
def test_reads_the_pixels_in_the_published_order(case):
  route = scan_routes.scan_route(*case)
  assert route.dtype == np.int32
  want = [[int(pixel) for pixel in path.split()] for path in GOLDEN[case]]
  np.testing.assert_array_equal(route, want)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", (*scan_routes.ROUTES, "hilbert", "random:3"))
def test_every_pixel_is_read_once(name, size):
  route = scan_routes.scan_route(name, *size)
  np.testing.assert_array_equal(
    np.sort(route, axis=1), np.tile(np.arange(size[0] * size[1]), (2, 1))
  )


def steps(path, width):
  return np.abs(np.diff(np.divmod(path, width), axis=1))


@pytest.mark.parametrize("size", SIZES)
def test_steps_are_short(size):
  for path in scan_routes.scan_route("C", *size):
    assert (steps(path, size[1]).sum(0) == 1).all()
  for path in scan_routes.scan_route("S", *size):
    assert (steps(path, size[1]).sum(0) == 1).all()
  for path in scan_routes.scan_route("X", *size):
    assert (steps(path, size[1]).max(0) == 1).all()


def test_hilbert_keeps_near_pixels_near():
  for path in scan_routes.scan_route("hilbert", 16, 16):
    assert (steps(path, 16).sum(0) == 1).all()
    # Each quarter is read before the next one.
    rows, columns = np.divmod(path, 16)
    quarter = (2 * (rows // 8) + columns // 8).reshape(4, 64)
    assert (quarter == quarter[:, :1]).all()


def test_random_routes_follow_their_seed():
  one, same, other = (
    scan_routes.scan_route(name, 4, 4)
    for name in ("random:1", "random:01", "random:2")
  )
  np.testing.assert_array_equal(one, same)
  assert (one != other).any() and (one[0] != one[1]).any()


def test_routes_are_not_writeable():
  with pytest.raises(ValueError, match="read-only"):
    scan_routes.scan_route("C", 4, 4)[0, 0] = 3


@pytest.mark.parametrize(
  "name, size, text",
  (
    ("spiral", (4, 4), "unknown scan route 'spiral'.*C, X, S, Z, hilbert"),
    ("hilbrt", (4, 4), "did you mean 'hilbert'"),
    ("random:x", (4, 4), "random:SEED"),
    ("C", (0, 4), "a map of 0x4 has no pixels"),
  ),
)
def test_refuses_what_is_no_route(name, size, text):
  with pytest.raises(ValueError, match=text):
    scan_routes.scan_route(name, *size)


@pytest.mark.parametrize(
  "route, error, text",
  (
    ([[0, 1, 2, 3]], ValueError, r"must be \[2, 4\], got \[1, 4\]"),
    ([[0, 1, 2, 3], [0, 1, 1, 3]], ValueError, "path 1 .* pixel 1 2 times"),
    ([[0, 1, 2, 4], [0, 1, 2, 3]], ValueError, "path 0 .* pixel 4; .* 0 to 3"),
    ([[0, 1, -1, 3], [0, 1, 2, 3]], ValueError, "pixel -1"),
    ([[0.0, 1, 2, 3], [0, 1, 2, 3]], TypeError, "integers, got float64"),
  ),
)
def test_refuses_what_is_no_bijection(route, error, text):
  with pytest.raises(error, match=text):
    scan_routes.check_route(np.array(route), 2, 2)
  with pytest.raises(error, match=text):
    scan_routes.scan_orders([lambda h, w: np.array(route)], 2, 2)


def test_four_scans_a_route():
  own = np.array([[3, 1, 0, 2], [2, 0, 1, 3]])
  order, inverse = scan_routes.scan_orders(["Z", lambda h, w: own], 2, 2)
  np.testing.assert_array_equal(
    order,
    [
      [0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3], [3, 1, 2, 0],
      [3, 1, 0, 2], [2, 0, 1, 3], [2, 0, 1, 3], [3, 1, 0, 2],
    ],
  )  # fmt: skip
  for there, back in zip(order, inverse):
    np.testing.assert_array_equal(there[back], np.arange(4))


def test_gather_and_back():
  order, inverse = scan_routes.scan_orders(["X", "S"], 3, 5)
  rng = np.random.default_rng(0)
  x, weight = (jnp.float32(rng.normal(size=(2, 15, 8, 3))) for _ in range(2))

  def plain(x):
    return jnp.stack([x[:, order[g], g] for g in range(8)], axis=2)

  there = lambda x: scan_routes.route_gather(x, order, inverse)
  np.testing.assert_array_equal(there(x), plain(x))
  back = scan_routes.route_gather(there(x), inverse, order)
  np.testing.assert_array_equal(back, x)
  # A loss that is not linear, so that the gradient depends on x.
  gradient = lambda fn: jax.grad(lambda x: jnp.sum(weight * fn(x) ** 2))
  np.testing.assert_array_equal(gradient(there)(x), gradient(plain)(x))
  text = jax.jit(gradient(there)).lower(x).as_text()
  assert (
    "scatter" not in text
    and "scatter" in jax.jit(gradient(plain)).lower(x).as_text()
  )
