"""The public function of this package: `attention`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from multihead.ops import dispatch
from multihead.ops.attention import (
  checks,
  cudnn,
  dropout,
  mosaic_gpu,
  reference,
  splash,
  triton,
  xla,
)
from multihead.ops.attention import sinks as sinks_

_IMPLEMENTATIONS = {
  "mosaic_gpu": mosaic_gpu,
  "cudnn": cudnn,
  "splash": splash,
  "triton": triton,
  "xla": xla,
  "reference": reference,
}
# Head dims at which mosaic_gpu has been timed, and is the faster.
_MOSAIC_WIDTHS = (64, 128)
# A program of mosaic_gpu holds at least so many rows.
_MOSAIC_ROWS = 64
# And one of splash at least so many.
_SPLASH_ROWS = 128


def attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K Hv"],
  *,
  bias: Float[Array, "#B #N #T #S"] | None = None,
  mask: Bool[Array, "#B #N #T #S"] | None = None,
  causal: bool = False,
  q_offset: int | Int[Array, "#B"] | None = None,
  scale: float | None = None,
  window: tuple[int | None, int | None] | None = None,
  softcap: float | None = None,
  q_segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | None = None,
  kv_lengths: int | Int[Array, "#B"] | None = None,
  sinks: Float[Array, "N"] | None = None,
  dropout_rate: float = 0.0,
  dropout_key: Key[Array, ""] | UInt32[Array, "2"] | None = None,
  deterministic: bool = False,
  return_lse: bool = False,
  implementation: dispatch.Implementation = None,
) -> (
  Float[Array, "B T N Hv"]
  | tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]
):
  """Exact softmax attention with masks, bias, grouped heads and any lengths.

  Query i stands at position i + q_offset, key j at position j. Query head n
  reads key head n // (N // K). With x = scale * q . k the logits are
  softcap * tanh(x / softcap) (just x without softcap), plus bias. All
  restrictions combine by AND. A row that may attend to nothing gives zeros,
  lse = -inf and zero gradients. A NaN or Inf in a key or value reaches the rows
  that may see it (whole, as NaN) and no other; xla and reference promise that,
  kernels only as far as whole blocks are not visited, and what lies past the
  arrays. cudnn does not promise zeros where a bias of -inf empties a row.

  Softmax, sums and lse are computed in float32 (float64 for float64 inputs),
  matrix products in the dtype of q with that accumulation.

  Args:
    q: [B, T, N, H] queries, of dtype float16, bfloat16, float32 or float64.
    k: [B, S, K, H] keys of the same dtype; K divides N.
    v: [B, S, K, Hv] values of the same dtype.
    bias: added to the logits, broadcast to [B, N, T, S]; differentiable. Its
      gradient has its own shape: broadcast axes are summed as it is computed.
    mask: bool, broadcast to [B, N, T, S]; True = attend.
    causal: whether row i keeps only keys j <= i + q_offset.
    q_offset: position of the first query: an int, or an integer array with one
      per batch item. None is S - T: the last query stands at the last key.
    scale: of the products q . k; None is H**-0.5.
    window: (left, right) keeps keys i + q_offset - left <= j <= i + q_offset +
      right; None on a side is no bound on that side.
    softcap: bound of the logits before bias, positive.
    q_segment_ids: [B, T] integers. A row keeps the keys of equal id; given
      together with kv_segment_ids.
    kv_segment_ids: [B, S] integers.
    kv_lengths: how many keys there are: keys j >= kv_lengths are invisible, be
      they padding or NaN. An int, or an integer array with one per batch item.
      The default of q_offset stays S - T.
    sinks: [N], one more logit per query head, without a value: it enters the
      denominator of the softmax and lse; differentiable. A row without keys
      gives zeros and lse = sink.
    dropout_rate: share in [0, 1) of the weights that is dropped after the
      softmax; the others grow by 1 / (1 - rate). lse knows nothing of it.
    dropout_key: a key of jax.random, given if and only if the rate is above 0.
      The kept weights depend on it and on (b, n, i, j) alone: they are the same
      in every implementation, and again in the backward pass.
    deterministic: whether only an implementation may run whose gradients are
      the same bits each time that the compiled program runs on a device.
    return_lse: whether to return also the natural log of the sum of the
      exponentials of each row's logits; differentiable.
    implementation: "mosaic_gpu" (Hopper), "cudnn", "triton" (NVIDIA GPUs since
      Ampere; runs by name only), "splash" (TPU), "xla" (memory linear in T and
      S, backward by recomputation), "reference" (holds [B, N, T, S]), a
      sequence of these, or None for the fastest that supports the arguments. On
      a TPU that is the first of splash, xla; elsewhere of mosaic_gpu, cudnn,
      xla where H and Hv are 64 or 128, and of cudnn, mosaic_gpu, xla at others.
      Fewer than 128 rows are too few for splash, fewer than 64 for mosaic_gpu.
      Calls with ids, bias, mask, dropout, or lengths or offsets in an array
      take mosaic_gpu only if it is named.

  Returns:
    [B, T, N, Hv] in q's dtype; with return_lse a pair of it and [B, N, T] in
    float32 (float64 for float64 inputs).

  Raises:
    ValueError: shapes that do not fit together, a value out of its range, or
      an unknown implementation.
    TypeError: a dtype that is not allowed.
    NotImplementedError: the named implementation does not support this.

  References:
    arXiv 2205.14135, 2307.08691 (section 3: the tiled forward and backward).
  """
  q, k, v = (jnp.asarray(x) for x in (q, k, v))
  checks.qkv("attention", q, k, v)
  B, T, N, H = q.shape
  S = k.shape[1]
  full = (B, N, T, S)
  if scale is None:
    scale = H**-0.5
  if sinks is not None:
    sinks = sinks_.check(sinks, N)
  rate = checks.rate("dropout_rate", dropout_rate)
  if (rate > 0) != (dropout_key is not None):
    raise ValueError(
      "dropout_key goes with a dropout_rate above 0 and only with one; got "
      f"dropout_rate={rate} {'without' if rate else 'with'} a key"
    )
  args = {
    "q": q,
    "k": k,
    "v": v,
    "bias": _broadcastable("bias", bias, full),
    "mask": _broadcastable("mask", mask, full),
    "causal": bool(causal),
    "q_offset": checks.per_item("q_offset", q_offset, B, S - T),
    "scale": checks.number("scale", scale),
    "window": checks.window(window),
    "softcap": checks.softcap(softcap),
    **_segments(q_segment_ids, kv_segment_ids, B, T, S),
    "kv_lengths": None,
    "dropout_rate": rate,
    "dropout_words": dropout.words(dropout_key) if rate else None,
    "deterministic": bool(deterministic),
    "return_lse": bool(return_lse) or sinks is not None,
  }
  if kv_lengths is not None:
    lengths = checks.per_item("kv_lengths", kv_lengths, B, S)
    args |= _shortened(args, lengths)
    full = (B, N, T, args["k"].shape[1])
  preference = _preference(T, H, v.shape[-1])
  if not mosaic_gpu.confirmed(args):
    preference = tuple(n for n in preference if n != "mosaic_gpu")
  module = dispatch.select(
    "attention",
    _IMPLEMENTATIONS,
    preference,
    implementation,
    args,
  )
  if 0 in full:
    # No key or no query: every row is empty.
    out = jnp.zeros((B, T, N, v.shape[-1]), q.dtype)
    lse = jnp.full((B, N, T), -jnp.inf, jnp.promote_types(q.dtype, "float32"))
    result = (out, lse) if args["return_lse"] else out
  else:
    result = module.run(**args)
  if sinks is None:
    return result
  out, lse = sinks_.add(*result, sinks)
  return (out, lse) if return_lse else out


def _preference(T: int, width: int, v_width: int) -> tuple[str, ...]:
  """What to try, best first.

  The reference holds [B, N, T, S] arrays: it runs only when it is named.
  """
  if jax.default_backend() == "tpu":
    return ("xla",) if T < _SPLASH_ROWS else ("splash", "xla")
  if T < _MOSAIC_ROWS:
    return "cudnn", "xla"
  if width in _MOSAIC_WIDTHS and v_width in _MOSAIC_WIDTHS:
    return "mosaic_gpu", "cudnn", "xla"
  return "cudnn", "mosaic_gpu", "xla"


def _shortened(
  args: dict[str, Any], lengths: int | jax.Array
) -> dict[str, Any]:
  """What kv_lengths changes: an int cuts the keys, an array is passed on."""
  if not isinstance(lengths, int):
    return {"kv_lengths": lengths}
  S = args["k"].shape[1]
  if not 0 <= lengths <= S:
    raise ValueError(f"kv_lengths must be in 0..S = 0..{S}, got {lengths}")
  cut = {name: args[name][:, :lengths] for name in ("k", "v")}
  for name in ("bias", "mask"):
    if (x := args[name]) is not None and x.shape[3] > 1:
      cut[name] = x[..., :lengths]
  if (ids := args["kv_segment_ids"]) is not None:
    cut["kv_segment_ids"] = ids[:, :lengths]
  return cut


def _broadcastable(
  name: str, x: jax.Array | None, full: tuple[int, ...]
) -> jax.Array | None:
  """Checks a bias or mask and gives it four axes, each of size 1 or full."""
  if x is None:
    return None
  x = jnp.asarray(x)
  if name == "mask" and x.dtype != jnp.bool_:
    raise TypeError(
      f"mask must be bool (True = attend), got {x.dtype}; what is added to the "
      "logits is called bias"
    )
  if name == "bias" and not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(
      f"bias must be floating, got {x.dtype}; a bool is called mask"
    )
  shape = (1,) * (4 - x.ndim) + x.shape
  fits = len(shape) == 4 and all(
    a in (1, b) for a, b in zip(shape, full, strict=True)
  )
  if not fits:
    raise ValueError(
      f"{name} {list(x.shape)} does not broadcast to [B, N, T, S] = "
      f"{list(full)}"
    )
  return x.reshape(shape)


def _segments(
  q_ids: jax.Array | None, kv_ids: jax.Array | None, B: int, T: int, S: int
) -> dict[str, jax.Array | None]:
  if (q_ids is None) != (kv_ids is None):
    given = "q_segment_ids" if kv_ids is None else "kv_segment_ids"
    raise ValueError(
      f"only {given} is given; give q_segment_ids [B, T] and kv_segment_ids "
      "[B, S] together"
    )
  out = {}
  for name, ids, letter, length in (
    ("q_segment_ids", q_ids, "T", T),
    ("kv_segment_ids", kv_ids, "S", S),
  ):
    if ids is not None:
      ids = jnp.asarray(ids)
      if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
      if ids.shape != (B, length):
        raise ValueError(
          f"{name} must have shape [B, {letter}] = [{B}, {length}], got "
          f"{list(ids.shape)}"
        )
    out[name] = ids
  return out
