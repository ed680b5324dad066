"""What attention is tested with: shapes, every option, and an oracle.

Each implementation's tests take from here what it computes. `check` compares
any function of the signature of `ops.attention` with `oracle`, a double loop
over rows in float64 that shares no code with the library.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from multihead import ops

# Many small programs that run once: what counts is the time to compile.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


class Shape(NamedTuple):
  """q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv]."""

  B: int
  T: int
  S: int
  N: int
  K: int
  H: int
  Hv: int


def small(T: int, S: int, N: int = 4, K: int = 2) -> Shape:
  return Shape(2, T, S, N, K, 6, 5)


# No length is a multiple of a block, nor the head dims of anything.
SHAPES = {
  "odd": small(13, 19),
  "square": small(17, 17),
  "more keys": small(5, 21),
  "more queries": small(23, 9),
  "one query": small(1, 19),
  "one key": small(11, 1),
  "one of each": small(1, 1),
  "one head": small(9, 12, 1, 1),
  "all heads": small(9, 12, 4, 4),
  "one key head": small(9, 12, 8, 1),
}


def _random(*shape: int) -> np.ndarray:
  return np.random.default_rng(8).normal(size=shape)


def _spread(shape: Shape, low: int, high: int) -> np.ndarray:
  """One integer per item of the batch, from low to high."""
  return np.linspace(low, high, shape.B).astype(np.int32)


def _documents(B: int, length: int, count: int) -> np.ndarray:
  """[B, length] ids of documents one after the other, unlike in each item."""
  ends = np.random.default_rng(9).integers(0, length + 1, (B, 1, count - 1))
  return np.sum(np.arange(length)[:, None] >= ends, axis=2)


def _packed(shape: Shape, count: int = 3) -> dict[str, np.ndarray]:
  longest = max(shape.T, shape.S)
  ids = _documents(shape.B, longest, count)
  # The last query stands at the last key.
  return dict(
    q_segment_ids=ids[:, longest - shape.T :],
    kv_segment_ids=ids[:, longest - shape.S :],
  )


# name: the options for a shape. Arrays of options are numpy.
OPTIONS: dict[str, Callable[[Shape], dict[str, Any]]] = {
  "plain": lambda s: {},
  "scale": lambda s: dict(scale=1.7),
  "causal": lambda s: dict(causal=True),
  "offset": lambda s: dict(causal=True, q_offset=2),
  "negative offset": lambda s: dict(causal=True, q_offset=-s.T // 3),
  "far offset": lambda s: dict(window=(3, 3), q_offset=2 * s.S + 3),
  "offset per item": lambda s: dict(
    causal=True,
    window=(s.S // 3, None),
    q_offset=_spread(s, -(s.T // 3), s.S // 2),
  ),
  "window": lambda s: dict(window=(s.S // 4, s.S // 6)),
  "window left": lambda s: dict(window=(s.S // 4, None)),
  "window right": lambda s: dict(window=(None, 1)),
  "window zero": lambda s: dict(window=(0, 0)),
  "window causal": lambda s: dict(window=(s.S // 4, 9), causal=True),
  "softcap": lambda s: dict(softcap=0.8, scale=1.0),
  "bias": lambda s: dict(bias=_random(s.B, s.N, s.T, s.S)),
  "bias of heads": lambda s: dict(bias=_random(s.N, 1, s.S), causal=True),
  "bias of rows": lambda s: dict(bias=_random(s.B, 1, s.T, 1), softcap=1.5),
  "bias of items": lambda s: dict(bias=_random(s.B, 1, 1, 1)),
  "bias of positions": lambda s: dict(bias=_random(s.T, s.S)),
  "mask": lambda s: dict(mask=_random(s.B, s.N, s.T, s.S) < 0.3),
  "mask of keys": lambda s: dict(mask=_random(s.B, 1, 1, s.S) < 0.3),
  "mask of rows": lambda s: dict(mask=_random(1, s.N, s.T, 1) < 0.3),
  "mask of positions": lambda s: dict(mask=_random(s.T, s.S) < 0.3),
  "mask of nothing": lambda s: dict(mask=np.zeros((1, 1), bool)),
  "segments": lambda s: dict(**_packed(s), causal=True),
  "segments in disorder": lambda s: dict(
    q_segment_ids=np.arange(s.B * s.T).reshape(s.B, s.T) * 7 % 4,
    kv_segment_ids=np.arange(s.B * s.S).reshape(s.B, s.S) * 5 % 3,
  ),
  "length": lambda s: dict(kv_lengths=s.S // 2, bias=_random(s.N, 1, s.S)),
  "lengths": lambda s: dict(kv_lengths=_spread(s, s.S // 3, s.S)),
  "lengths, some empty": lambda s: dict(
    kv_lengths=_spread(s, 0, s.S - 2), causal=True
  ),
  "sinks": lambda s: dict(sinks=_random(s.N)),
  "sinks in empty rows": lambda s: dict(
    sinks=_random(s.N), causal=True, q_offset=-s.T // 3
  ),
  "dropout": lambda s: dict(dropout_rate=0.3),
  "dropout, causal": lambda s: dict(dropout_rate=0.6, causal=True),
  "deterministic": lambda s: dict(deterministic=True, causal=True),
  "everything": lambda s: dict(
    causal=True,
    window=(s.S // 2 + 1, 3),
    softcap=1.2,
    scale=0.6,
    q_offset=_spread(s, s.S // 4, 1),
    bias=_random(s.B, s.N, 1, s.S),
    mask=_random(1, 1, s.T, s.S) < 0.5,
    **_packed(s, 2),
    kv_lengths=_spread(s, s.S, s.S // 2),
    sinks=_random(s.N),
    dropout_rate=0.2,
  ),
}
DROPOUT_KEY = 5


def draw(
  T,
  S,
  *,
  heads=4,
  kv_heads=2,
  width=6,
  v_width=5,
  seed=0,
  batch=2,
  scale=1.0,
):
  """Inputs by name and cotangents of out and lse, float64."""
  rng = np.random.default_rng(seed)
  arrays = {
    "q": scale * rng.normal(size=(batch, T, heads, width)),
    "k": rng.normal(size=(batch, S, kv_heads, width)),
    "v": rng.normal(size=(batch, S, kv_heads, v_width)),
  }
  d_out = rng.normal(size=(batch, T, heads, v_width))
  return arrays, d_out, rng.normal(size=(batch, heads, T))


def draw_shape(shape: Shape, **kwargs):
  """As `draw`."""
  B, T, S, N, K, H, Hv = shape
  return draw(T, S, heads=N, kv_heads=K, width=H, v_width=Hv, batch=B, **kwargs)


def dropout_factors(rate: float, B: int, N: int, T: int, S: int):
  """[B, N, T, S]: 0 or 1 / (1 - rate), from the definition in the docs."""
  word = 2**32

  def mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B % word
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % word
    return x ^ (x >> 16)

  key = jax.random.bits(jax.random.key(DROPOUT_KEY), (2,), jnp.uint32)
  first, second = (np.uint64(x) for x in np.asarray(key))
  rows = np.arange(B * N * T, dtype=np.uint64).reshape(B, N, T, 1)
  states = mix((mix(first ^ rows) + second) % word)
  bits = mix((states + np.arange(S, dtype=np.uint64) * 0x9E3779B9) % word)
  return np.where(bits >= round(rate * word), 1 / (1 - rate), 0)


def visible(shape: Shape, **options) -> np.ndarray:
  """bool [B, N, T, S]: which key a row may see."""
  B, T, S, N, *_ = shape
  offset = options.get("q_offset")
  offset = np.broadcast_to(S - T if offset is None else offset, (B,))
  place = (offset[:, None] + np.arange(T))[:, None, :, None]
  key = np.arange(S)
  left, right = options.get("window") or (None, None)
  sees = np.ones((B, N, T, S), bool)
  if options.get("causal"):
    sees &= key <= place
  if left is not None:
    sees &= place - key <= left
  if right is not None:
    sees &= key - place <= right
  if options.get("mask") is not None:
    sees &= options["mask"]
  if options.get("q_segment_ids") is not None:
    q_ids, kv_ids = options["q_segment_ids"], options["kv_segment_ids"]
    sees &= (q_ids[:, :, None] == kv_ids[:, None])[:, None]
  if options.get("kv_lengths") is not None:
    length = np.broadcast_to(options["kv_lengths"], (B,))
    sees &= key < length[:, None, None, None]
  return sees


def oracle(q, k, v, d_out, d_lse, **options):
  """out, lse and the gradients by name; touches only what is visible."""
  B, T, N, H = q.shape
  S, group = k.shape[1], N // k.shape[2]
  full = (B, N, T, S)
  scale = options.get("scale") or H**-0.5
  cap = options.get("softcap")
  bias, sinks = options.get("bias"), options.get("sinks")
  sees = visible(Shape(B, T, S, N, N // group, H, v.shape[3]), **options)
  keep = dropout_factors(options.get("dropout_rate") or 0.0, B, N, T, S)
  whole_bias = np.broadcast_to(0.0 if bias is None else bias, full)
  out, lse = np.zeros((*q.shape[:3], v.shape[-1])), np.zeros(full[:3])
  grads = {n: np.zeros(x.shape) for n, x in (("q", q), ("k", k), ("v", v))}
  d_bias, d_sinks = np.zeros(full), np.zeros(N)
  for b, n, i in np.ndindex(*full[:3]):
    seen = np.flatnonzero(sees[b, n, i])
    sink = -np.inf if sinks is None else sinks[n]
    row, keys, values = (
      q[b, i, n],
      k[b, seen, n // group],
      v[b, seen, n // group],
    )
    if not len(seen):
      lse[b, n, i] = sink
      d_sinks[n] += d_lse[b, n, i]
      continue
    x = scale * keys @ row
    bent = np.tanh(x / cap) if cap else None
    z = (cap * bent if cap else x) + whole_bias[b, n, i, seen]
    # A bias of -inf hides a key too.
    top = max(np.max(z), sink)
    if top == -np.inf:
      lse[b, n, i] = top
      d_sinks[n] += d_lse[b, n, i]
      continue
    lse[b, n, i] = top + np.log(np.sum(np.exp(z - top)) + np.exp(sink - top))
    p, z_keep = np.exp(z - lse[b, n, i]), keep[b, n, i, seen]
    out[b, i, n] = (p * z_keep) @ values
    d_p = z_keep * (values @ d_out[b, i, n])
    common = d_lse[b, n, i] - p @ d_p
    d_sinks[n] += np.exp(sink - lse[b, n, i]) * common
    d_z = p * (d_p + common)
    d_bias[b, n, i, seen] = d_z
    d_x = scale * d_z * (1 - bent**2 if cap else 1)
    grads["q"][b, i, n] = keys.T @ d_x
    grads["k"][b, seen, n // group] += np.outer(d_x, row)
    grads["v"][b, seen, n // group] += np.outer(p * z_keep, d_out[b, i, n])
  if bias is not None:
    shape = (1,) * (4 - bias.ndim) + bias.shape
    axes = tuple(a for a in range(4) if shape[a] == 1)
    d_bias = d_bias.sum(axis=axes, keepdims=True)
    grads["bias"] = np.reshape(d_bias, bias.shape)
  if sinks is not None:
    grads["sinks"] = d_sinks
  return out, lse, grads


def evaluate(arrays, d_out, d_lse, attend, dtype, **options):
  """out, lse and gradients of `attend` in `dtype`, as float64 numpy.

  Args:
    arrays: q, k and v by name.
    d_out: cotangent.
    d_lse: cotangent.
    attend: a function with the signature of `ops.attention`, or the name of an
      implementation of it.
    dtype: of q, k, v and bias.
    **options: of `ops.attention`, without dropout_key.
  """
  if isinstance(attend, str):
    attend = functools.partial(ops.attention, implementation=attend)
  dtype = jnp.dtype(dtype)
  lse_dtype = jnp.promote_types(dtype, jnp.float32)
  fields = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
  # What has a gradient besides.
  for name, kind in (("bias", dtype), ("sinks", lse_dtype)):
    if options.get(name) is not None:
      fields[name] = jnp.asarray(options.pop(name), kind)
  traced = {
    name: jnp.asarray(options.pop(name))
    for name in list(options)
    if isinstance(options[name], np.ndarray)
  }
  if options.get("dropout_rate"):
    traced["dropout_key"] = jax.random.key(DROPOUT_KEY)

  @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
  def both(fields, traced, d_out, d_lse):
    def f(fields):
      return attend(**fields, **traced, **options, return_lse=True)

    results, vjp = jax.vjp(f, fields)
    return results, vjp((d_out, d_lse))[0]

  (out, lse), grads = both(
    fields, traced, jnp.asarray(d_out, dtype), jnp.asarray(d_lse, lse_dtype)
  )
  assert out.dtype == dtype
  assert lse.dtype == lse_dtype
  for name, grad in grads.items():
    assert grad.dtype == fields[name].dtype
    assert grad.shape == fields[name].shape
  as64 = lambda x: np.asarray(x, np.float64)
  return as64(out), as64(lse), {name: as64(x) for name, x in grads.items()}


def check(arrays, d_out, d_lse, attend, dtype, tolerance, **options):
  """Asserts that `attend` agrees with the oracle, gradients included.

  The oracle starts from inputs rounded to `dtype`. The tolerance is absolute,
  times the largest entry where that is above 1. Arguments as in `evaluate`;
  returns what it does.
  """
  rounded = lambda x: np.asarray(jnp.asarray(x, dtype), np.float64)
  if jnp.dtype(dtype).itemsize < 8:
    arrays = {name: rounded(x) for name, x in arrays.items()}
    d_out = rounded(d_out)
    if options.get("bias") is not None:
      options = {**options, "bias": rounded(options["bias"])}
  got = evaluate(arrays, d_out, d_lse, attend, dtype, **options)
  want = oracle(**arrays, d_out=d_out, d_lse=d_lse, **options)
  assert got[2].keys() == want[2].keys()
  names = ("out", "lse", *(f"d_{name}" for name in got[2]))
  pairs = zip(
    (*got[:2], *got[2].values()),
    (*want[:2], *(want[2][name] for name in got[2])),
    strict=True,
  )
  for name, (a, b) in zip(names, pairs, strict=True):
    size = np.abs(b[np.isfinite(b)]).max(initial=1)
    np.testing.assert_allclose(
      a, b, atol=tolerance * size, rtol=0, err_msg=name
    )
  return got


def check_case(shape, option, attend, dtype, tolerance, **more):
  """As `check`, of an entry of OPTIONS at a Shape, with inputs from `draw`.

  The keyword arguments are options beside those of the entry.
  """
  return check(
    *draw_shape(shape),
    attend,
    dtype,
    tolerance,
    **{**OPTIONS[option](shape), **more},
  )
