"""The multi-head scan against its equations in float64, and its gate."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead import layers, parallel
from multihead.layers import multi_head_scan as mhs
from multihead.parallel import sharding
from tests.layers import scan_reference as reference

C, M = 9, 3


def make_block(scan="mhs", drop_path_rate=0.0, dtype=jnp.float32, **options):
  types = dict(state_size=M, parent=None, dtype=dtype)
  shared = dict(drop_path_rate=drop_path_rate, dtype=dtype)
  if scan == "ss2d":
    scan = layers.SS2D(**types, **options)
    return layers.VSSBlock(scan, expand=2, output_projection=True, **shared)
  return layers.VSSBlock(layers.MultiHeadScan(**types, **options), **shared)


def make_params(module, channels=C, seed=0, scale=0.5):
  """Random values everywhere, so that no parameter can be forgotten."""
  shapes = jax.eval_shape(
    module.init, jax.random.key(0), jnp.zeros((1, 2, 2, channels))
  )
  leaves, tree = jax.tree.flatten(nn.meta.unbox(shapes["params"]))
  draw = np.random.default_rng(seed).normal
  values = [jnp.float32(draw(size=leaf.shape) * scale) for leaf in leaves]
  return jax.tree.unflatten(tree, values)


def maps(batch=2, height=3, width=4, channels=C, seed=1):
  draw = np.random.default_rng(seed).normal
  return jnp.float32(draw(size=(batch, height, width, channels)))


@functools.partial(jax.jit, static_argnums=0, static_argnames="mutable")
def apply(module, params, x, **options):
  return module.apply({"params": params}, x, **options)


def float64(tree):
  return jax.tree.map(lambda v: np.asarray(v, np.float64), tree)


CASES = {
  "4 heads": (dict(), dict()),
  "3 heads": (dict(heads=3, threshold=0.0), dict(threshold=0.0)),
  "no projection": (dict(heads=3, projection=False), dict()),
  "one head, no gate": (dict(heads=1, threshold=None), dict(threshold=None)),
  "all Z": (
    dict(heads=2, routes=("Z", "Z"), threshold=0.9),
    dict(routes="ZZ", threshold=0.9),
  ),
  "ss2d": (dict(scan="ss2d"), dict()),
  "ss2d, rank 2": (dict(scan="ss2d", dt_rank=2), dict()),
}


@pytest.mark.parametrize("case", CASES)
def test_block_follows_the_equations(case):
  options, expected = CASES[case]
  block = make_block(**options)
  params = make_params(block)
  for size in ((3, 4), (1, 1)) if case == "4 heads" else ((2, 3),):
    f = maps(2, *size)
    got = apply(block, params, f)
    assert got.dtype == jnp.float32
    for x, y in zip(float64(f), got):
      want = reference.block(float64(params), x, **expected)
      np.testing.assert_allclose(y, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("scan", ("mhs", "ss2d"))
def test_gradient_is_that_of_the_equations(scan):
  """Central differences of the float64 equations, leaf by leaf."""
  block = make_block(scan, **({} if scan == "ss2d" else dict(heads=3)))
  params, f = make_params(block), maps(1, 2, 3)
  weight = np.asarray(maps(1, 2, 3, seed=3)[0], np.float64)

  @jax.jit
  def gradient(params, f):
    loss = lambda params, f: jnp.sum(
      jnp.float32(weight) * block.apply({"params": params}, f)[0]
    )
    return jax.grad(loss, argnums=(0, 1))(params, f)

  got = gradient(params, f)
  at = float64((params, f))
  rng = np.random.default_rng(4)
  leaves, tree = jax.tree.flatten(at)

  def value(leaves):
    params, f = jax.tree.unflatten(tree, leaves)
    return np.sum(weight * reference.block(params, f[0]))

  for number, slope in enumerate(jax.tree.leaves(got)):
    direction = rng.normal(size=slope.shape)
    ends = []
    for step in (1e-6, -1e-6):
      moved = list(leaves)
      moved[number] = leaves[number] + step * direction
      ends.append(value(moved))
    want = (ends[0] - ends[1]) / 2e-6
    size = np.linalg.norm(slope) * np.linalg.norm(direction)
    # Small sums of large terms lose digits.
    assert abs(np.sum(slope * direction) - want) < 1e-3 * size


@pytest.mark.parametrize(
  "ys, threshold, want",
  (
    ((1, 2, 3, 4), 0.0, 8.606572),
    ((1, 2, 3, 4), 0.5, 3.606572),
    ((0, 0, 0, 1), 0.0, 1.9999199),
    ((0.7, 0.7, 0.7, 0.7), 0.0, 0.0),
  ),
)
def test_published_gates(ys, threshold, want):
  got = layers.scan_route_attention(jnp.float32(ys), threshold)
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("scale_free", (False, True))
@pytest.mark.parametrize("value", (0.0, 0.7))
def test_gradient_of_equal_scans_is_finite(value, scale_free):
  ys = jnp.full((4, 3), value).at[:, 1].set(jnp.arange(4.0))
  grad = jax.grad(
    lambda ys: layers.scan_route_attention(ys, 0.0, scale_free=scale_free).sum()
  )(ys)
  assert np.isfinite(grad).all() and (np.abs(grad[:, 1]) > 0).all()
  np.testing.assert_array_equal(grad[:, (0, 2)], 0)


def test_bounds_and_symmetries_of_the_gate():
  for scans in (3, 4, 7):
    ys = jnp.float32(np.random.default_rng(0).normal(size=(scans, 5000)))
    cv = mhs.scan_route_gate(ys, 0.0)
    low, high = scans**0.5 / (scans - 1), scans**0.5
    assert low * 0.999 <= cv.min() and cv.max() <= high * 1.001
    assert cv.min() < low * 1.3 and cv.max() > high * 0.6
    np.testing.assert_allclose(mhs.scan_route_gate(ys + 8, 0.0), cv, rtol=1e-2)
  # The share of open gates falls with the scale, where it is not free of it.
  ys = ys[:4]
  share = lambda scale, **kind: np.mean(
    mhs.scan_route_gate(ys * scale, 0.5, **kind) > 0
  )
  assert share(1.0) == 1 and share(1e-3) == 1
  assert abs(share(1e-5) - 0.28) < 0.03 and share(1e-6) == 0
  assert share(1e-6, scale_free=True) == share(1e-12, scale_free=True) == 1
  half = mhs.scan_route_gate(jnp.bfloat16(ys), 0.0)
  assert half.dtype == jnp.float32


def test_open_gates_are_sown():
  block = make_block(threshold=0.9)
  params, f = make_params(block), maps()
  _, seen = apply(block, params, f, mutable=("intermediates",))
  (got,) = seen["intermediates"]["scan"]["open_gate"]
  p = float64(params)
  opened = []
  for x in float64(f):
    u = reference.layer_norm(p["norm"], x)
    u = reference.silu(reference.depthwise(p["conv"], u @ p["x"]["kernel"]))
    v = np.einsum("hwc,cns->nhws", u, p["scan"]["inward"]["kernel"])
    ys = [
      reference.four_scans(
        p["scan"]["routes"], v[n], "CXSZ"[n], range(4 * n, 4 * n + 4)
      )
      for n in range(4)
    ]
    opened.append([np.mean(reference.gate(y, 0.9) > 0) for y in ys])
  assert np.min(got) > 0 and np.max(got) < 1
  np.testing.assert_allclose(got, np.mean(opened, axis=0), atol=1e-6)


def test_scans_that_agree_give_nothing():
  """Without B, every scan gives D u, and the gate is shut."""
  scan = layers.MultiHeadScan(state_size=M, projection=False, threshold=0.0)
  params = make_params(scan, channels=8)
  routes = params["routes"]
  steering = routes["steering"].at[..., 1 : 1 + M].set(0)
  same = jnp.ones_like(routes["D"])
  params["routes"] = {**routes, "steering": steering, "D": same}
  y = apply(scan, params, maps(channels=8))
  np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize(
  "route, turn",
  (
    ("X", lambda x: x[:, :, ::-1]),
    ("S", lambda x: x[:, ::-1]),
    ("C", lambda x: x.swapaxes(1, 2)),
    ("Z", lambda x: x.swapaxes(1, 2)),
  ),
)
def test_turning_the_map_exchanges_the_paths(route, turn):
  scan = layers.MultiHeadScan(heads=1, routes=(route,), state_size=M)
  params, x = make_params(scan, channels=4), maps(2, 4, 4, 4)
  other = {
    **params,
    "routes": jax.tree.map(
      lambda v: v[jnp.array([2, 3, 0, 1])], params["routes"]
    ),
  }
  want = turn(apply(scan, params, x))
  np.testing.assert_allclose(
    apply(scan, other, turn(x)), want, rtol=1e-4, atol=1e-5
  )
  assert np.abs(apply(scan, params, turn(x)) - want).max() > 1e-2


def test_a_route_of_the_user_is_followed():
  def columns(height, width):
    grid = np.arange(height * width).reshape(height, width)
    return np.stack([grid.ravel(), grid.T.ravel()])

  named = layers.MultiHeadScan(heads=1, routes=("Z",), state_size=M)
  given = layers.MultiHeadScan(heads=1, routes=(columns,), state_size=M)
  params, x = make_params(named, channels=4), maps(1, 3, 5, 4)
  np.testing.assert_array_equal(
    apply(given, params, x), apply(named, params, x)
  )


def test_bfloat16_scans_in_float32():
  block = make_block(dtype=jnp.bfloat16, heads=3, threshold=0.0)
  params, f = make_params(block), maps(1)
  got = apply(block, params, f)
  assert got.dtype == jnp.float32  # that of the residual stream
  text = jax.jit(block.scan.apply).lower(
    {"params": params["scan"]}, jnp.bfloat16(f)
  )
  assert text.out_info.dtype == jnp.bfloat16
  want = reference.block(
    float64(params), np.asarray(f[0], np.float64), threshold=0.0
  )
  assert np.abs(np.float64(got[0]) - want).max() < 0.05 * np.abs(want).max()


def test_stochastic_depth_keeps_or_drops_whole_maps():
  block = make_block(drop_path_rate=0.5, heads=1)
  params, f = make_params(block), maps(16, 2, 2)
  branch = apply(block, params, f) - f
  got = jax.jit(
    lambda f: block.apply(
      {"params": params},
      f,
      deterministic=False,
      rngs={"dropout": jax.random.key(0)},
    )
  )(f)
  share = np.array((got - f) / (2 * branch)).reshape(16, -1)
  kept = np.round(share[:, 0])
  assert set(kept) == {0, 1}
  np.testing.assert_allclose(share, np.tile(kept[:, None], (1, 36)), atol=0.02)


def test_initial_values():
  scan = layers.MultiHeadScan(heads=2)
  params = nn.meta.unbox(
    jax.jit(scan.init)(jax.random.key(0), jnp.zeros((1, 2, 2, 64)))["params"]
  )
  routes = params["routes"]
  for name, shape, bound in (
    ("steering", (8, 32, 34), 32**-0.5),
    ("dt", (8, 2, 32), 2**-0.5),
  ):
    assert routes[name].shape == shape
    assert 0.97 * bound < np.abs(routes[name]).max() <= bound
  np.testing.assert_allclose(
    np.exp(routes["A_log"]), np.tile(np.arange(1, 17), (8, 32, 1)), rtol=1e-6
  )
  np.testing.assert_array_equal(routes["D"], 1)
  steps = np.asarray(jax.nn.softplus(routes["dt_bias"]))
  assert steps.min() >= 0.999e-3 and steps.max() <= 0.1001


def test_mistakes_are_named():
  for options, text in (
    (dict(heads=5), r"heads=5; without routes it must lie in 1..4"),
    (dict(heads=0), "heads=0"),
    (dict(heads=2, routes=("Z",)), "1 routes for heads=2"),
    (dict(heads=1, routes=("spiral",)), "unknown scan route 'spiral'"),
    (dict(threshold=-0.1), "threshold=-0.1 must not be negative"),
  ):
    with pytest.raises(ValueError, match=text):
      layers.MultiHeadScan(**options)
  init = lambda module, *shape: jax.eval_shape(
    module.init, jax.random.key(0), jnp.zeros(shape)
  )
  with pytest.raises(ValueError, match="9 channels do not divide into 4"):
    init(layers.MultiHeadScan(projection=False), 1, 2, 2, 9)
  with pytest.raises(ValueError, match="3 channels are too few for 4"):
    init(layers.MultiHeadScan(), 1, 2, 2, 3)
  with pytest.raises(ValueError, match=r"must be \[B, height, width, C\]"):
    init(layers.SS2D(), 2, 4, 8)
  with pytest.raises(ValueError, match="expand=2 needs output_projection"):
    init(layers.VSSBlock(layers.SS2D(), expand=2), 1, 2, 2, 4)
  with pytest.raises(ValueError, match="K > 1 scans"):
    layers.scan_route_attention(jnp.ones((1, 3)), 0.5)


def test_same_numbers_on_a_mesh():
  block = make_block(heads=4)
  params = make_params(block, channels=16)
  f, weight = maps(4, 4, 4, 16), maps(4, 4, 4, 16, seed=2)

  def step(params, f):
    loss = lambda params, f: jnp.sum(
      weight * block.apply({"params": params}, f)
    )
    return jax.value_and_grad(loss, argnums=(0, 1))(params, f)

  want = jax.device_get(jax.jit(step)(params, f))
  mesh = parallel.make_mesh(data=2, tensor=4)
  boxed = jax.eval_shape(block.init, jax.random.key(0), f)

  def place(box, value):
    spec = sharding.partition_spec(value.shape, box.names, mesh)
    return jax.device_put(value, jax.NamedSharding(mesh, spec))

  is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
  with jax.set_mesh(mesh):
    placed = jax.tree.map(place, boxed["params"], params, is_leaf=is_box)
    assert "tensor" in placed["scan"]["routes"]["A_log"].sharding.spec
    f = jax.device_put(f, jax.NamedSharding(mesh, jax.P("data")))
    compiled = jax.jit(step).lower(placed, f).compile()
    got = jax.device_get(compiled(placed, f))
  close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3)
  jax.tree.map(close, got, want)
  # No device ever holds the scans of another one.
  shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
  assert "2,16,4,4" in shapes  # Those of one head: four, of four channels.
  assert not {"2,16,16,4", "2,16,64"} & set(shapes)
