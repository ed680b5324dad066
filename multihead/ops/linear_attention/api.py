"""The public function of this package: `linear_attention`."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from multihead.ops import dispatch
from multihead.ops.linear_attention import reference, xla

_IMPLEMENTATIONS = {"xla": xla, "reference": reference}
_PREFERENCE = ("xla", "reference")
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def linear_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K Hv"],
  *,
  causal: bool = True,
  log_decay: Float[Array, "B T N"] | None = None,
  normalize: bool = False,
  initial_state: Float[Array, "B N H Hs"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  chunk_size: int = 128,
  scale: float = 1.0,
  return_final_state: bool = False,
  implementation: dispatch.Implementation = None,
) -> (
  Float[Array, "B T N Hv"]
  | tuple[Float[Array, "B T N Hv"], Float[Array, "B N H Hs"]]
):
  """Linear attention, causal with an optional decay, or over all tokens.

  For each query head n, which reads key head n // (N // K):

    state_t = exp(log_decay_t) state_{t-1} + k_t (outer) v_t
    y_t = scale * q_t state_t

  No feature map is applied: q and k come with theirs. With causal=False every
  y_t reads the last state (log_decay and segment_ids are then errors).

  normalize divides y_t by q_t . z_t, where z_t is the same decaying sum of the
  keys alone (scale does not enter it); where that product is exactly 0, y_t is
  0. It is meant for features that are not negative. The state then has a last
  column for z: Hs = Hv + 1, else Hs = Hv.

  States are float32 (float64 for float64 inputs), matrix products within a
  chunk run in the dtype of q with that accumulation.

  Args:
    q: [B, T, N, H], of dtype float16, bfloat16, float32 or float64.
    k: [B, T, K, H] of the same dtype; K divides N.
    v: [B, T, K, Hv] of the same dtype.
    causal: whether y_t reads the state after token t or after the last one.
    log_decay: [B, T, N], at most 0; -inf forgets all before the token.
    normalize: whether to divide by the sum of the weights.
    initial_state: [B, N, H, Hs] before the first token; None is zero.
    segment_ids: [B, T] integers. Where the id changes the state restarts from
      zero; initial_state belongs to the first segment.
    chunk_size: tokens that are worked on at once; memory of a chunk grows with
      its square, memory of the kept states with T / chunk_size.
    scale: of the output.
    return_final_state: whether to return also the state after the last token.
    implementation: "xla" (chunks, backward by recomputation), "reference" (one
      token after the other), a sequence of these, or None for the best.

  Returns:
    y [B, T, N, Hv] in q's dtype; with return_final_state a pair of it and the
    state [B, N, H, Hs].

  Raises:
    ValueError: shapes or options that do not fit together, or an unknown
      implementation.
    TypeError: a dtype that is not allowed.

  References:
    arXiv 2006.16236 (section 3), 2312.06635 (the chunked form).
  """
  q, k, v = (jnp.asarray(x) for x in (q, k, v))
  _check_qkv(q, k, v)
  B, T, N, H = q.shape
  width = v.shape[-1] + bool(normalize)
  if log_decay is not None:
    log_decay = jnp.asarray(log_decay)
    _check("log_decay", log_decay, "[B, T, N]", (B, T, N), jnp.floating)
  if initial_state is not None:
    initial_state = jnp.asarray(initial_state)
    letters = "[B, N, H, Hv + 1]" if normalize else "[B, N, H, Hv]"
    shape = (B, N, H, width)
    _check("initial_state", initial_state, letters, shape, jnp.floating)
  if segment_ids is not None:
    segment_ids = jnp.asarray(segment_ids)
    _check("segment_ids", segment_ids, "[B, T]", (B, T), jnp.integer)
  if not causal:
    for name, x in (("log_decay", log_decay), ("segment_ids", segment_ids)):
      if x is not None:
        raise ValueError(
          f"{name} needs causal=True: without it no token has its own state"
        )
  if int(chunk_size) < 1:
    raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
  if not math.isfinite(scale):
    raise ValueError(f"scale must be finite, got {scale}")
  args = {
    "q": q,
    "k": k,
    "v": v,
    "causal": bool(causal),
    "log_decay": log_decay,
    "normalize": bool(normalize),
    "initial_state": initial_state,
    "segment_ids": segment_ids,
    "chunk_size": int(chunk_size),
    "scale": float(scale),
  }
  module = dispatch.select(
    "linear_attention", _IMPLEMENTATIONS, _PREFERENCE, implementation, args
  )
  y, state = module.run(**args)
  return (y, state) if return_final_state else y


def _check_qkv(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
  shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
  layout = "q [B, T, N, H], k [B, T, K, H], v [B, T, K, Hv]"
  if not q.ndim == k.ndim == v.ndim == 4:
    raise ValueError(f"linear_attention takes {layout}; got {shapes}")
  if q.dtype.name not in _DTYPES or not q.dtype == k.dtype == v.dtype:
    raise TypeError(
      f"q, k and v must have one dtype out of {', '.join(_DTYPES)}; got q "
      f"{q.dtype}, k {k.dtype}, v {v.dtype}"
    )
  wrong = None
  if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
    wrong = "batch sizes or lengths differ"
  elif k.shape[2] != v.shape[2]:
    wrong = "k and v differ in heads K"
  elif q.shape[3] != k.shape[3]:
    wrong = "q and k differ in head dim H"
  elif 0 in q.shape + v.shape:
    wrong = "an axis is empty"
  elif q.shape[2] % k.shape[2]:
    wrong = (
      f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key heads"
    )
  if wrong:
    raise ValueError(f"{wrong}: {shapes}; linear_attention takes {layout}")


def _check(
  name: str, x: jax.Array, letters: str, shape: tuple[int, ...], kind: type
) -> None:
  if x.shape != shape:
    raise ValueError(
      f"{name} must have shape {letters} = {list(shape)}, got {list(x.shape)}"
    )
  if not jnp.issubdtype(x.dtype, kind):
    raise TypeError(f"{name} must be {kind.__name__}, got {x.dtype}")
