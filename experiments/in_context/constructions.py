"""No training: constructed weights beside float64 loops of what they claim."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.in_context import figures
from experiments.in_context.outcome import Outcome
from experiments.in_context.settings import Settings
from multihead.models import icl_gd
from multihead.tasks.in_context_regression import (
  Tasks,
  classic_tokens,
  concat_tokens,
)

_TASKS, _LAYERS = 64, 20
# Each (d, o, N) of the check.
_SIZES = ((10, 1, 10), (12, 8, 45))


def construct(settings: Settings, workdir: str, writer: Any) -> Outcome:
  """Gradient descent, GD++, heads, copying and the delta rule, as weights."""
  del writer
  outcome, curves, residual = Outcome(), {}, 0.0
  seed = settings.seed
  for d, o, n in _SIZES:
    tasks = _draw(d, o, n, seed)
    layer = _one_layer(o)
    for start in ("zero", "W0"):
      initial = jnp.zeros((o, d))
      if start == "W0":
        rng = np.random.default_rng([seed, 1])
        initial = jnp.asarray(rng.normal(size=(o, d)), jnp.float32)
      # Stable for all: below 2 over the largest eigenvalue.
      top = icl_gd.gram_eigenvalues(tasks.x).max()
      errors, worst = _gd_errors(layer, tasks, initial, float(1 / top))
      curves[f"o = {o}, W from {start}"] = errors
      residual = max(residual, worst)
  for metric, value, limit, about in (
    ("gd_max_relative_error", max(e.max() for e in curves.values()), 1e-4,
     "K = 1 to 20 layers, o = 1 and 8, from W = 0 and not, relative"),
    ("residual_max_error", residual, 1e-4,
     "context targets are y - (W_k - W0) x after each layer"),
    ("gdpp_max_error", _gdpp_error(seed), 1e-5, "GD++, 3 layers"),
    ("multi_head_max_error", _multi_head_error(seed), 1e-5,
     "a step size of its own for each head"),
    ("copy_max_error", _copy_error(seed), 1e-5,
     "copying softmax layer, then a step of GD, on tokens x, y, x, y"),
    ("online_max_error", _online_error(seed), 1e-5,
     "the delta rule through linear attention: GD on one pair after another"),
  ):  # fmt: skip
    outcome.add(metric, value, f"below {limit:g}: {about}", value < limit)
  outcome.drawn["Constructed layers beside float64 loops"] = figures.plot(
    os.path.join(workdir, "construct.png"),
    [
      {
        "x": np.arange(1, _LAYERS + 1),
        "xlabel": "layers, steps of gradient descent",
        "ylabel": "largest relative error",
        "log": True,
        "lines": {**curves, "allowed": 1e-4},
      }
    ],
    size=(6.5, 4),
  )
  return outcome


def _draw(d: int, o: int, n: int, seed: int) -> Tasks:
  """Linear tasks from numpy, which has nothing to compile."""
  rng = np.random.default_rng(seed)
  x = rng.uniform(-0.5, 0.5, (_TASKS, n + 1, d)).astype(np.float32)
  weights = rng.normal(size=(_TASKS, o, d)).astype(np.float32)
  y = np.einsum("bnd,bod->bno", x, weights)
  x, x_query, y, y_query = x[:, :n], x[:, n], y[:, :n], y[:, n]
  tokens = concat_tokens(x, y, x_query)
  return Tasks(tokens, x, y, x_query, y_query, weights)


def _answers(model: icl_gd.ICLGD, params: Any, tasks: Tasks) -> jax.Array:
  return jax.jit(model.apply)({"params": params}, tasks.tokens)


def _double(*arrays: Any) -> list[np.ndarray]:
  return [np.asarray(array, np.float64) for array in arrays]


def _largest(first: Any, second: Any) -> float:
  first, second = _double(first, second)
  return float(np.abs(first - second).max())


def _descend(
  x: np.ndarray, y: np.ndarray, weights: np.ndarray, step: Any, count: int
) -> list[np.ndarray]:
  """W_1, ..., W_K of the loss 1/2 sum |W x - y|^2; step may be a matrix."""
  found = []
  for _ in range(count):
    error = np.einsum("bod,bnd->bno", weights, x) - y
    gradient = np.einsum("bno,bnd->bod", error, x)
    change = step * gradient if np.ndim(step) == 0 else gradient @ step
    weights = weights - change
    found.append(weights)
  return found


def _one_layer(output_size: int) -> Any:
  """Tokens after one layer, of weights and tokens; to be repeated."""
  model = icl_gd.ICLGD(output_size=output_size)
  apply = lambda params, h: model.apply({"params": params}, h, method="trace")
  return jax.jit(lambda params, h: apply(params, h)[1])


def _gd_errors(
  layer: Any, tasks: Tasks, initial: jax.Array, step: float
) -> tuple[np.ndarray, float]:
  """Relative error of the answer after each layer, and that of residuals."""
  o, d = initial.shape
  params = icl_gd.gd_weights(d, o, step=step, initial=initial)
  h = [concat_tokens(tasks.x, tasks.y, tasks.x_query, initial)]
  for _ in range(_LAYERS):
    h.append(layer(params, h[-1]))
  answers = [-after[:, -1, d:] for after in h]
  x, y, query, start = _double(tasks.x, tasks.y, tasks.x_query, initial)
  errors, worst = [], 0.0
  begin = np.broadcast_to(start, (len(x), o, d))
  for k, weights in enumerate(_descend(x, y, begin, step, _LAYERS), 1):
    want = np.einsum("bod,bd->bo", weights, query)
    errors.append(_largest(answers[k], want) / np.abs(want).max())
    left = y - np.einsum("bod,bnd->bno", weights - start, x)
    worst = max(worst, _largest(h[k][:, :-1, d:], left))
  return np.array(errors), worst


def _gdpp_error(seed: int) -> float:
  tasks = _draw(10, 1, 10, seed)
  step, gamma = 1.36, 0.178
  model = icl_gd.ICLGD(num_layers=3)
  params = icl_gd.gdpp_weights(10, step=step, curvature=gamma)
  x, residual, query = _double(tasks.x, tasks.y, tasks.x_query)
  answer = np.zeros((len(x), 1))
  for _ in range(3):
    change = step * np.einsum("bno,bnd->bod", residual, x)
    answer = answer + np.einsum("bod,bd->bo", change, query)
    residual = residual - np.einsum("bod,bnd->bno", change, x)
    damp = np.eye(10) - gamma * np.einsum("bni,bnj->bij", x, x)
    query = np.einsum("bij,bj->bi", damp, query)
    x = np.einsum("bij,bnj->bni", damp, x)
  return _largest(_answers(model, params, tasks), answer)


def _multi_head_error(seed: int) -> float:
  """Two heads on random halves of the space: a preconditioner of two steps."""
  tasks = _draw(10, 1, 10, seed)
  axes, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(10, 10)))
  directions = np.stack([axes[:, :5], axes[:, 5:]])
  steps = np.array([0.3, 0.7])
  params = icl_gd.multi_head_gd_weights(
    jnp.asarray(directions, jnp.float32), jnp.asarray(steps, jnp.float32)
  )
  model = icl_gd.ICLGD(num_layers=3, num_heads=2, key_size=5)
  x, y, query = _double(tasks.x, tasks.y, tasks.x_query)
  matrix = np.einsum("n,nir,njr->ij", steps, directions, directions)
  weights = _descend(x, y, np.zeros((len(x), 1, 10)), matrix, 3)[-1]
  want = np.einsum("bod,bd->bo", weights, query)
  return _largest(_answers(model, params, tasks), want)


def _copy_error(seed: int) -> float:
  tasks = _draw(9, 1, 10, seed)
  tokens = classic_tokens(tasks.x, tasks.y, tasks.x_query, wide=True)
  tasks = tasks._replace(tokens=tokens)
  model = icl_gd.ICLGD(
    num_layers=2,
    recurrent=False,
    first_layer_softmax=True,
    positions="concat",
    position_size=10,
  )
  params = icl_gd.copy_weights(9, 1, 10, step=0.6)
  x, y, query = _double(tasks.x, tasks.y, tasks.x_query)
  weights = _descend(x, y, np.zeros((len(x), 1, 9)), 0.6, 1)[-1]
  want = np.einsum("bod,bd->bo", weights, query)
  return _largest(_answers(model, params, tasks), want)


def _online_error(seed: int) -> float:
  tasks = _draw(6, 2, 50, seed)
  run = jax.jit(lambda x, y: icl_gd.online_gd(x, y, 0.5, chunk_size=16))
  _, found = run(tasks.x, tasks.y)
  x, y = _double(tasks.x, tasks.y)
  weights = np.zeros((len(x), 2, 6))
  for t in range(50):
    error = y[:, t] - np.einsum("bod,bd->bo", weights, x[:, t])
    weights = weights + 0.5 * np.einsum("bo,bd->bod", error, x[:, t])
  return _largest(found, weights)
