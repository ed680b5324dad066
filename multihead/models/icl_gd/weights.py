"""Weights under which self-attention is gradient descent, and back again.

Constructions give parameter trees of `ICLGD`; y = h @ W, rows are input
channels. Tokens are (x, y) of widths d and o, D = d + o (section 2 and appendix
A.1 of arXiv 2212.07677).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from multihead import ops

Rates = float | Sequence[float] | Array


def gd_weights(
  input_size: int,
  output_size: int = 1,
  *,
  step: Rates,
  num_layers: int | None = None,
  initial: Float[Array, "o d"] | None = None,
) -> dict[str, Any]:
  """One layer is one step of gradient descent: y <- y - dW x for all tokens.

  dW = step sum_j (y_j - W0 x_j) x_j^T. Stacked layers go on from there, with
  the same W0 in each: context targets hold y - (W_k - W0) x. The query's token
  begins at -W0 x_q.

  Args:
    input_size: d.
    output_size: o.
    step: c, the learning rate over N; with num_layers one for each, if given.
    num_layers: untied layers; None: the weights of a recurrent model.
    initial: W0; None is zero.

  Returns:
    Parameters of ICLGD(num_heads=1, output_size=o).
  """
  return _layers(
    lambda step, _: _gd_layer(input_size, output_size, step, 0.0, initial),
    (step, 0.0),
    num_layers,
  )


def gdpp_weights(
  input_size: int,
  output_size: int = 1,
  *,
  step: Rates,
  curvature: Rates,
  num_layers: int | None = None,
) -> dict[str, Any]:
  """GD++: a step from W = 0, and x <- (I - curvature sum_j x_j x_j^T) x.

  Args:
    input_size: d.
    output_size: o.
    step: c.
    curvature: gamma.
    num_layers: see `gd_weights`.

  Returns:
    Parameters of ICLGD(num_heads=1, output_size=o).
  """
  return _layers(
    lambda step, gamma: _gd_layer(input_size, output_size, step, gamma, None),
    (step, curvature),
    num_layers,
  )


def _gd_layer(
  d: int, o: int, step: Any, gamma: Any, initial: Array | None
) -> dict[str, Array]:
  inputs = jnp.concatenate([jnp.ones(d), jnp.zeros(o)])
  value = -jnp.diag(1 - inputs)
  if initial is not None:
    value = value.at[:d, d:].set(jnp.asarray(initial, value.dtype).T)
  output = jnp.diag((1 - inputs) * step - inputs * gamma)
  # Without curvature, values of the inputs would only be multiplied by zero.
  if not (isinstance(gamma, float) and gamma == 0.0):
    value = value + jnp.diag(inputs)
  return {
    "query": jnp.diag(inputs)[:, None],
    "key": jnp.diag(inputs)[:, None],
    "value": value[:, None],
    "output": output[None],
  }


def multi_head_gd_weights(
  directions: Float[Array, "N d r"],
  steps: Float[Array, "N"],
  output_size: int = 1,
  *,
  num_layers: int | None = None,
) -> dict[str, Any]:
  """One step size per head: preconditioned gradient descent from W = 0.

  Head n sees inputs in the span of its directions U_n and steps there with its
  own step c_n: the gradient is multiplied by P = sum_n c_n U_n U_n^T.

  Args:
    directions: U_n, orthonormal columns.
    steps: c_n.
    output_size: o.
    num_layers: see `gd_weights`; the same weights in each.

  Returns:
    Parameters of ICLGD(num_heads=N, key_size=max(r, o), output_size=o).
  """
  N, d, r = directions.shape
  o, H = output_size, max(directions.shape[-1], output_size)
  look = jnp.zeros((d + o, N, H))
  look = look.at[:d, :, :r].set(jnp.swapaxes(directions, 0, 1))
  value = jnp.zeros((d + o, N, H))
  value = value.at[d:, :, :o].set(-jnp.eye(o)[:, None])
  output = jnp.zeros((N, H, d + o))
  steps = jnp.asarray(steps)[:, None, None]
  output = output.at[:, :o, d:].set(steps * jnp.eye(o))
  layer = {"query": look, "key": look, "value": value, "output": output}
  return _layers(lambda *_: layer, (0.0, 0.0), num_layers)


def copy_weights(
  input_size: int,
  output_size: int,
  position_size: int,
  *,
  step: float,
  sharpness: float = 3000.0,
) -> dict[str, Any]:
  """A softmax layer that copies the next token, then a step of GD (section 5).

  For classic tokens of layout "classic_wide" behind concatenated sinusoids.
  Layer 0 looks one position ahead, replaces the positions by what it sees
  there, and so joins x_j with y_j; layer 1 is the step. Targets, whose x
  channels are empty, have the key 0 and do not disturb it.

  Args:
    input_size: d.
    output_size: o.
    position_size: C, even, at least d + o.
    step: c.
    sharpness: factor of the logits of layer 0: its softmax is all but hard.

  Returns:
    Parameters of ICLGD(num_layers=2, recurrent=False, first_layer_softmax=True,
    positions="concat", position_size=C, output_size=o).
  """
  d, o, C = input_size, output_size, position_size
  if C % 2 or d + o > C:
    raise ValueError(
      f"position_size is {C}; it must be even and at least d + o = {d + o}, "
      "the room that a copied token needs"
    )
  D = C + d + o
  # Rows of sinusoids times `ahead` are those of the next position.
  ahead = np.zeros((C, C))
  for i in range(0, C, 2):
    angle = 10000.0 ** (-i / C)
    c, s = np.cos(angle), np.sin(angle)
    ahead[i : i + 2, i : i + 2] = [[c, -s], [s, c]]
  query, key, value, output = (np.zeros((D, D)) for _ in range(4))
  query[:C, :C] = sharpness * ahead
  key[:C, :C] = np.eye(C)
  value[:] = np.eye(D)
  # The next token's positions, turned back by one, take away this one's.
  output[:C, :C] = -ahead.T
  output[C:, : d + o] = np.eye(d + o)
  copy = {"query": query, "key": key, "value": value, "output": output}
  query, value, output = (np.zeros((D, D)) for _ in range(3))
  query[C : C + d, :d] = np.eye(d)
  # The copied target stands where the copied token's last channels are.
  value[d : d + o, D - o :] = -np.eye(o)
  output[D - o :, D - o :] = step * np.eye(o)
  descend = {"query": query, "key": query, "value": value, "output": output}

  def tree(layer: dict[str, np.ndarray]) -> dict[str, Any]:
    heads = {n: jnp.asarray(w, jnp.float32)[:, None] for n, w in layer.items()}
    heads["output"] = jnp.swapaxes(heads["output"], 0, 1)
    return {"attention": heads}

  return {"layers_0": tree(copy), "layers_1": tree(descend)}


def _layers(make: Any, rates: tuple, num_layers: int | None) -> dict[str, Any]:
  if num_layers is None:
    if any(np.ndim(rate) for rate in rates):
      raise ValueError("one rate for each layer needs num_layers")
    return {"layer": {"attention": make(*rates)}}
  rates = [rate if np.ndim(rate) else [rate] * num_layers for rate in rates]
  if any(len(rate) != num_layers for rate in rates):
    raise ValueError(
      f"rates of lengths {[len(rate) for rate in rates]} for {num_layers} "
      "layers; give one for all or one for each"
    )
  return {
    f"layers_{i}": {"attention": make(*(rate[i] for rate in rates))}
    for i in range(num_layers)
  }


def invariants(
  attention: dict[str, Array],
) -> tuple[Float[Array, "N D D"], Float[Array, "N D D"]]:
  """KQ = Wq Wk^T and PV = Wv Wp of each head of linear attention.

  The layer depends on its weights through these alone, and only up to a factor
  that moves from one to the other.

  Args:
    attention: query, key, value and output of one layer.
  """
  kq = jnp.einsum("dnh,enh->nde", attention["query"], attention["key"])
  pv = jnp.einsum("dnh,nhe->nde", attention["value"], attention["output"])
  return kq, pv


def learned_preconditioner(
  attention: dict[str, Array], input_size: int, output_size: int = 1
) -> Float[Array, "d d"]:
  """P of the step x_q^T P sum_j y_j x_j that a linear layer makes.

  Sum over heads of minus KQ of the inputs times PV of the targets, averaged
  over outputs; the identity times the step for `gd_weights`.

  Args:
    attention: query, key, value and output of one layer.
    input_size: d.
    output_size: o.
  """
  kq, pv = invariants(attention)
  d, o = input_size, output_size
  scale = jnp.trace(pv[:, d : d + o, d : d + o], axis1=1, axis2=2) / o
  return -jnp.einsum("nij,n->ij", kq[:, :d, :d], scale)


def interpolate(
  first: dict[str, Array],
  second: dict[str, Array],
  input_size: int,
  share: float = 0.5,
) -> dict[str, Array]:
  """Weights between two layers of one head, (1 - share) first + share second.

  Both are brought to the same scale, a mean of 1 over the first d diagonal
  entries of KQ, and their KQ and PV are mixed.

  Args:
    first: query, key, value and output of one layer.
    second: likewise.
    input_size: d.
    share: of the second.

  Raises:
    ValueError: more than one head.
  """
  scaled = []
  for attention in (first, second):
    kq, pv = invariants(attention)
    if len(kq) != 1:
      raise ValueError(
        f"weights of {len(kq)} heads cannot be averaged: heads have no order; "
        "only one head can"
      )
    mean = jnp.mean(jnp.diagonal(kq[0])[:input_size])
    scaled.append((kq[0] / mean, pv[0] * mean))
  kq, pv = ((1 - share) * a + share * b for a, b in zip(*scaled, strict=True))
  eye = jnp.eye(len(kq), dtype=kq.dtype)
  return {
    "query": kq[:, None],
    "key": eye[:, None],
    "value": pv[:, None],
    "output": eye[None],
  }


def online_gd(
  x: Float[Array, "B T d"],
  y: Float[Array, "B T o"],
  step: float,
  *,
  initial: Float[Array, "B o d"] | None = None,
  queries: Float[Array, "B T d"] | None = None,
  chunk_size: int = 64,
) -> tuple[Float[Array, "B T o"], Float[Array, "B o d"]]:
  """Gradient descent on one pair after the other: the delta rule.

  W_t = W_{t-1} + step (y_t - W_{t-1} x_t) x_t^T. Within a chunk the errors
  u_t = step (y_t - W_{t-1} x_t) solve one triangular system; with them the rule
  is plain linear attention of values u, and `ops.linear_attention` runs it.

  Args:
    x: inputs.
    y: targets.
    step: the learning rate.
    initial: W_0; None is zero.
    queries: what W_t is asked at time t; None asks x itself.
    chunk_size: pairs that are worked on at once.

  Returns:
    W_t queries_t [B, T, o], and W_T [B, o, d].

  References:
    arXiv 2406.06484 (the delta rule in chunks).
  """
  B, T, d = x.shape
  o = y.shape[-1]
  queries = x if queries is None else queries
  state = jnp.zeros((B, d, o), x.dtype)
  if initial is not None:
    state = jnp.swapaxes(initial, 1, 2).astype(x.dtype)
  size = min(chunk_size, T)
  # A padded pair (0, 0) has no error and changes nothing.
  cut = lambda a: jnp.moveaxis(
    jnp.pad(a, ((0, 0), (0, -T % size), (0, 0))).reshape(
      B, -1, size, a.shape[-1]
    ),
    *(1, 0),
  )

  def chunk(state, xs):
    q, k, v = xs
    error = step * (v - jnp.einsum("btd,bdo->bto", k, state))
    earlier = jnp.tril(jnp.einsum("btd,bsd->bts", k, k), -1)
    system = jnp.eye(size, dtype=k.dtype) + step * earlier
    u = solve_triangular(system, error, lower=True, unit_diagonal=True)
    out, state = ops.linear_attention(
      *(a[:, :, None] for a in (q, k, u)),
      initial_state=state[:, None],
      chunk_size=size,
      return_final_state=True,
    )
    return state[:, 0].astype(x.dtype), out[:, :, 0]

  state, out = jax.lax.scan(chunk, state, (cut(queries), cut(x), cut(y)))
  out = jnp.moveaxis(out, 0, 1).reshape(B, -1, o)[:, :T]
  return out, jnp.swapaxes(state, 1, 2)
