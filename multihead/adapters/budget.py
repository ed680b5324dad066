"""Spends a number of parameters on ranks, by what a rank costs."""

import heapq
from collections.abc import Mapping, Sequence

from multihead.adapters.branches import BRANCHES
from multihead.adapters.linear_maps import LinearMap
from multihead.adapters.settings import branch_widths
from multihead.errors import UserError


def price(name: str, target: LinearMap) -> int:
  """Parameters of one rank of a branch, over all stacked layers.

  A parallel rank costs D + F, a sequential one 2 F, one on the input side 2 D.
  On the second map of an MLP with F = 4 D, five sequential ranks cost what two
  parallel ones do.
  """
  return target.copies * sum(branch_widths(name, target))


def allocate(
  maps: Mapping[str, LinearMap],
  budget: int,
  *,
  branches: Sequence[str] = ("par", "seq"),
  importance: Mapping[str, float] | None = None,
  max_rank: int = 64,
) -> dict[str, dict[str, int]]:
  """Ranks for each target and branch that together cost at most the budget.

  A rank r of weight w is worth w log(1 + r); ranks are bought one by one, each
  time the one worth most for its price. Without `importance`, every branch of
  every target ends up with about the same number of parameters, so the cheap
  ones get the higher ranks.

  Args:
    maps: the targets, from `Hydra.select` or `linear_maps`.
    budget: number of parameters, biases and scales not counted.
    branches: of "pre", "par" and "seq", those to spend on.
    importance: weight of a target ("path") or of one branch of it
      ("path/branch"); 1 where neither is named.
    max_rank: no branch gets more; nor more than the widths it joins.

  Returns:
    {"r_par": {path: rank}, ...}, arguments for `Hydra`.

  Raises:
    UserError: an unknown branch, or a budget below one rank.
  """
  for name in branches:
    if name not in BRANCHES:
      raise UserError(
        f"branches names {name!r}; there are {', '.join(BRANCHES)}"
      )
  weights = importance or {}
  queue, ranks = [], {}
  for path, target in maps.items():
    for name in branches:
      key = f"{path}/{name}"
      weight = weights.get(key, weights.get(path, 1.0))
      cost = price(name, target)
      limit = min(max_rank, *branch_widths(name, target))
      ranks[name, path] = 0
      if weight > 0:
        queue.append((-weight / cost, name, path, weight, cost, limit))
  heapq.heapify(queue)
  cheapest = min((item[4] for item in queue), default=0)
  if not queue or budget < cheapest:
    raise UserError(
      f"budget={budget} buys no rank: the cheapest here costs {cheapest}"
    )
  while queue:
    _, name, path, weight, cost, limit = heapq.heappop(queue)
    if cost > budget or ranks[name, path] >= limit:
      continue
    budget -= cost
    ranks[name, path] += 1
    # The next rank's worth is that of log(1 + r), in its derivative.
    worth = weight / (1 + ranks[name, path]) / cost
    heapq.heappush(queue, (-worth, name, path, weight, cost, limit))
  found: dict[str, dict[str, int]] = {f"r_{name}": {} for name in branches}
  for (name, path), rank in ranks.items():
    if rank:
      found[f"r_{name}"][path] = rank
  return {name: by_path for name, by_path in found.items() if by_path}
