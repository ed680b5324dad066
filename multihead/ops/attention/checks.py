"""Checks of arguments that the operations of attention have in common."""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

_DTYPES = ("float16", "bfloat16", "float32", "float64")


def qkv(
  op: str, q: jax.Array, k: jax.Array, v: jax.Array, *, paged: bool = False
) -> None:
  """Raises if queries, keys and values do not fit together.

  Args:
    op: name of the operation, for messages.
    q: [B, T, N, H].
    k: [B, S, K, H], or [P, page, K, H] if `paged`.
    v: [B, S, K, Hv], or [P, page, K, Hv] if `paged`.
    paged: whether k and v are pools of pages, whatever the batch.
  """
  shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
  rows = "P, page" if paged else "B, S"
  layout = f"q [B, T, N, H], k [{rows}, K, H], v [{rows}, K, Hv]"
  if not q.ndim == k.ndim == v.ndim == 4:
    raise ValueError(f"{op} takes {layout}; got {shapes}")
  if q.dtype.name not in _DTYPES or not q.dtype == k.dtype == v.dtype:
    raise TypeError(
      f"q, k and v must have one dtype out of {', '.join(_DTYPES)}; got q "
      f"{q.dtype}, k {k.dtype}, v {v.dtype}"
    )
  wrong = None
  if paged and k.shape[:2] != v.shape[:2]:
    wrong = "k and v differ in number or size of pages"
  elif paged and 0 in k.shape[:2]:
    wrong = "the pools hold no page"
  elif not paged and not q.shape[0] == k.shape[0] == v.shape[0]:
    wrong = "the batch sizes differ"
  elif k.shape[1:3] != v.shape[1:3]:
    wrong = "k and v differ in length S or heads K"
  elif q.shape[3] != k.shape[3]:
    wrong = "q and k differ in head dim H"
  elif 0 in (q.shape[2], k.shape[2]) or q.shape[2] % k.shape[2]:
    wrong = (
      f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key heads"
    )
  elif 0 in (q.shape[3], v.shape[3]):
    wrong = "the head dim is zero"
  if wrong:
    raise ValueError(f"{wrong}: {shapes}; {op} takes {layout}")


def per_item(
  name: str, x: int | jax.Array | None, batch: int, default: int
) -> int | jax.Array:
  """An int where it is known while tracing, else int32 [B]."""
  if x is None:
    return default
  if isinstance(x, numbers.Integral) and not isinstance(x, bool):
    return int(x)
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise TypeError(f"{name} must be an integer, got {x.dtype}")
  if x.shape not in ((), (1,), (batch,)):
    raise ValueError(
      f"{name} must be an int or have shape [B] = [{batch}], got "
      f"{list(x.shape)}"
    )
  return jnp.broadcast_to(x.astype(jnp.int32), (batch,))


def window(
  sides: tuple[int | None, int | None] | None,
) -> tuple[int | None, int | None]:
  """(left, right), None for a side without a bound."""
  if sides is None:
    return None, None
  given = tuple(sides) if isinstance(sides, (tuple, list)) else ()
  good = [
    x is None or (isinstance(x, numbers.Integral) and int(x) >= 0)
    for x in given
  ]
  if len(good) != 2 or not all(good):
    raise ValueError(
      "window must be (left, right), each an int >= 0 or None for no bound; "
      f"got {sides!r}"
    )
  left, right = (None if x is None else int(x) for x in given)
  return left, right


def softcap(x: float | None) -> float | None:
  """A positive number or None."""
  if x is None:
    return None
  value = number("softcap", x)
  if not value > 0:
    raise ValueError(f"softcap must be positive, got {x}")
  return value


def number(name: str, x: float) -> float:
  """A finite number, known while tracing."""
  if isinstance(x, jax.core.Tracer):
    instead = "; multiply q by it" if name == "scale" else ""
    raise TypeError(
      f"{name} must be a Python number, got a traced array{instead}"
    )
  try:
    x = float(np.asarray(x))
  except (TypeError, ValueError):
    raise TypeError(f"{name} must be a number, got {x!r}") from None
  if not math.isfinite(x):
    raise ValueError(f"{name} must be finite, got {x}")
  return x


def rate(name: str, x: float) -> float:
  """A share in [0, 1), known while tracing."""
  value = number(name, x)
  if not 0 <= value < 1:
    raise ValueError(f"{name} must lie in [0, 1), got {x}")
  return value
