"""Multi-head scans in float64 NumPy, from the equations of the papers.

Written without the library: routes from sorting keys and walks, scans as loops
over steps, one head and one direction at a time. Parameters are trees of the
library's modules, since they have no other home.
"""

import numpy as np


def silu(v):
  return v / (1 + np.exp(-v))


def layer_norm(p, x, epsilon=1e-5):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
  return x * p["scale"] + p["bias"]


def walk(height, width):
  """Straight on, and to the right where the way is barred."""
  i = j = turn = 0
  seen = [(0, 0)]
  ways = ((0, 1), (1, 0), (0, -1), (-1, 0))
  while len(seen) < height * width:
    a, b = i + ways[turn][0], j + ways[turn][1]
    if 0 <= a < height and 0 <= b < width and (a, b) not in seen:
      i, j = a, b
      seen.append((i, j))
    else:
      turn = (turn + 1) % 4
  return seen


def paths(name, height, width):
  pixels = [(i, j) for i in range(height) for j in range(width)]
  if name == "S":
    first = walk(height, width)
    second = [(height - 1 - i, j) for i, j in first]
  elif name == "X":
    first = sorted(
      pixels, key=lambda p: (sum(p), p[0] if sum(p) % 2 else -p[0])
    )
    line = lambda p: p[0] + width - 1 - p[1]
    second = sorted(
      pixels, key=lambda p: (line(p), p[0] if line(p) % 2 else -p[0])
    )
  elif name == "C":
    first = sorted(pixels, key=lambda p: (p[0], -p[1] if p[0] % 2 else p[1]))
    second = sorted(pixels, key=lambda p: (p[1], -p[0] if p[1] % 2 else p[0]))
  else:
    first, second = pixels, sorted(pixels, key=lambda p: p[::-1])
  return first, second


def selective_scan(p, g, x):
  """One scan of the sequence x [L, S] with the g-th set of parameters."""
  size = p["A_log"].shape[-1]
  rank = p["dt"].shape[1]
  steering = x @ p["steering"][g]
  low, B, C = np.split(steering, [rank, rank + size], axis=-1)
  delta = np.logaddexp(low @ p["dt"][g] + p["dt_bias"][g], 0)
  A = -np.exp(p["A_log"][g])
  h, ys = np.zeros_like(A), []
  for t in range(len(x)):
    h = np.exp(delta[t][:, None] * A) * h
    h += np.outer(delta[t] * x[t], B[t])
    ys.append(h @ C[t] + p["D"][g] * x[t])
  return np.stack(ys)


def four_scans(p, x, route, sets):
  """Results [4, height, width, S] of one image x, per path and direction."""
  ys = []
  for number, path in enumerate(paths(route, *x.shape[:2])):
    for backwards in (False, True):
      order = path[::-1] if backwards else path
      rows, columns = np.array(order).T
      y = np.zeros_like(x)
      g = sets[2 * number + backwards]
      y[rows, columns] = selective_scan(p, g, x[rows, columns])
      ys.append(y)
  return np.stack(ys)


def gate(ys, threshold):
  sigma = np.std(ys, axis=0, ddof=1)
  mu = np.mean(ys - ys.min(0), axis=0)
  return np.maximum(sigma / (mu + 1e-5) - threshold, 0)


def multi_head(p, x, threshold=0.5, routes="CXSZ"):
  v = np.einsum("hwc,cns->nhws", x, p["inward"]["kernel"])
  out = []
  for head, route in enumerate(routes[: len(v)]):
    sets = range(4 * head, 4 * head + 4)
    ys = four_scans(p["routes"], v[head], route, sets)
    factor = 1 if threshold is None else gate(ys, threshold)
    out.append(ys.sum(0) * factor)
  y = np.concatenate(out, axis=-1)
  if "outward" not in p:
    return y
  kernel = p["outward"]["kernel"]
  return layer_norm(p["norm"], y) @ kernel.reshape(-1, kernel.shape[-1])


def ss2d(p, x):
  # Parameters: rows, columns, rows backwards, columns backwards.
  return four_scans(p["routes"], x, "Z", (0, 2, 1, 3)).sum(0)


def depthwise(p, x):
  height, width = x.shape[:2]
  y = np.zeros_like(x) + p["bias"]
  for i in range(height):
    for j in range(width):
      for a in range(max(0, i - 1), min(height, i + 2)):
        for b in range(max(0, j - 1), min(width, j + 2)):
          y[i, j] += p["kernel"][a - i + 1, b - j + 1] * x[a, b]
  return y


def block(p, f, **options):
  """The VSS block on one map f [height, width, C]."""
  u = layer_norm(p["norm"], f)
  x, z = u @ p["x"]["kernel"], u @ p["z"]["kernel"]
  x = silu(depthwise(p["conv"], x))
  if "inward" in p["scan"]:
    y = multi_head(p["scan"], x, **options)
  else:
    y = ss2d(p["scan"], x)
  y = layer_norm(p["scan_norm"], y) * silu(z)
  if "outward" in p:
    y = y @ p["outward"]["kernel"]
  return f + y
