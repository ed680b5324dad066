"""A small ViT learns five digits, then five others from a few examples each.

Pre-training: digits 0 to 4, each turned by 0, 90, 180 or 270 degrees; which
digit and which turn is asked for (20 classes). Transfer: digits 5 to 9, `shots`
examples of each, a new head, and one of five methods. All adapters have equally
many parameters and sit on the attention's output projection and the second map
of the MLP, as in the paper's VTAB experiments. The learning rate of each method
is chosen on seeds of its own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from multihead import adapters, models
from multihead.adapters.overlap import subspace_overlap
from multihead.data import images
from multihead.parallel import sharding
from multihead.tasks.adaptation import divide

TARGETS = ("attention/out", "mlp/down")
SIDES = ("input", "output")
# Path -> rank. On the MLP's map (256 to 64) a parallel rank costs 320 numbers,
# a sequential one 128; on the projection (64 to 64) either costs 128.
_OUT, _DOWN = "blocks/attention/out", "blocks/mlp/down"
METHODS: dict[str, dict[str, Any] | None] = {
  "full": None,
  "head alone": None,
  "LoRA": dict(r_par={_OUT: 4, _DOWN: 4}),
  "SeqLoRA": dict(r_seq={_OUT: 7, _DOWN: 7}),
  "Hydra": dict(r_par={_OUT: 2, _DOWN: 2}, r_seq={_OUT: 3, _DOWN: 4}),
}
ADAPTERS = tuple(name for name, ranks in METHODS.items() if ranks)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes of the study.

  Attributes:
    pretrain_steps: of Adam, on `batch` images each.
    batch: see above.
    shots: examples of a new class.
    steps: of the transfer, on all examples.
    rates: learning rates to choose from.
    seeds: repetitions that are reported: other examples, head and adapter.
    selection_seeds: repetitions that choose the rate.
    dim, depth: of the ViT.
  """

  pretrain_steps: int = 1500
  batch: int = 64
  shots: int = 5
  steps: int = 150
  rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
  seeds: int = 5
  selection_seeds: int = 2
  dim: int = 64
  depth: int = 4


TINY = Plan(
  pretrain_steps=3, batch=16, steps=2, rates=(1e-3, 1e-2), seeds=2,
  selection_seeds=1, depth=1,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came out.

  Attributes:
    pretrained: accuracy on held-out images of the pre-training classes.
    accuracy: method -> [seeds], on all images of the new classes left over.
    train_loss: method -> [seeds], at the end.
    rates: method -> the learning rate that was chosen.
    counts: method -> trained parameters without the head.
    overlap: method -> what `overlaps` returns.
    ks: the numbers of directions.
    chance: target -> side -> [k], the overlap of a random update.
  """

  pretrained: float
  accuracy: dict[str, np.ndarray]
  train_loss: dict[str, np.ndarray]
  rates: dict[str, float]
  counts: dict[str, int]
  overlap: dict[str, Any]
  ks: tuple[int, ...]
  chance: dict[str, dict[str, np.ndarray]]


def _digits() -> tuple[Float[Array, "N 8 8 1"], np.ndarray]:
  found = images.load_images("digits")
  pixels = np.stack([found.read(i) for i in range(len(found.labels))])
  return jnp.asarray(pixels, jnp.float32) / 127.5 - 1.0, found.labels


def _loss(logits: Array, labels: Array) -> Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _model(plan: Plan, classes: int) -> Any:
  return models.create(
    "vit", img_size=8, patch_size=2, in_chans=1, num_classes=classes,
    embed_dim=plan.dim, depth=plan.depth, num_heads=4, mlp_dim=4 * plan.dim,
  )  # fmt: skip


def pretrain(plan: Plan, say: Callable[[str], None]) -> tuple[Any, float]:
  """Parameters of the ViT, and its accuracy on a fifth of its images."""
  pixels, labels = _digits()
  known = np.flatnonzero(labels < 5)
  order = np.random.default_rng(0).permutation(known)
  held, used = np.split(order, [len(order) // 5])
  model = _model(plan, 20)
  params = sharding.init_params(model, jax.random.key(0))
  optimizer = optax.adamw(
    optax.cosine_decay_schedule(2e-3, plan.pretrain_steps), weight_decay=1e-4
  )

  def turned(index: Array, turn: Array) -> tuple[Array, Array]:
    x = pixels[index]
    choices = jnp.stack([jnp.rot90(x, i, (1, 2)) for i in range(4)])
    x = choices[turn, jnp.arange(len(index))]
    return x, jnp.asarray(labels)[index] * 4 + turn

  @jax.jit
  def step(params: Any, state: Any, key: Array) -> tuple[Any, Any, Array]:
    k_index, k_turn = jax.random.split(key)
    index = jax.random.choice(k_index, jnp.asarray(used), (plan.batch,))
    x, y = turned(index, jax.random.randint(k_turn, (plan.batch,), 0, 4))
    loss, grads = jax.value_and_grad(
      lambda p: _loss(model.apply({"params": p}, x), y)
    )(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  state = optimizer.init(params)
  for i in range(plan.pretrain_steps):
    params, state, loss = step(params, state, jax.random.key(i))
    if (i + 1) % 250 == 0:
      say(f"pre-training, step {i + 1}: loss {float(loss):.3f}")
  index = jnp.asarray(np.tile(held, 4))
  x, y = turned(index, jnp.repeat(jnp.arange(4), len(held)))
  hits = jax.jit(model.apply)({"params": params}, x).argmax(-1) == y
  return params, float(hits.mean())


def adapter_of(name: str, model: Any) -> adapters.Hydra | None:
  """The adapter of a method; None for those without one."""
  ranks = METHODS[name]
  if ranks is None:
    return None
  maps = adapters.linear_maps(model)
  return adapters.Hydra(list(TARGETS), **ranks, maps=maps)


def _choose(labels: np.ndarray, shots: int, seed: int) -> tuple[Any, Any]:
  """Images of the new classes: `shots` of each, and all that are left."""
  rng = np.random.default_rng(1000 + seed)
  train, rest = [], []
  for digit in range(5, 10):
    order = rng.permutation(np.flatnonzero(labels == digit))
    train.append(order[:shots])
    rest.append(order[shots:])
  # Equally many for every seed; they are, since the shots are.
  return np.concatenate(train), np.concatenate(rest)


def class_means(plan: Plan) -> np.ndarray:
  """Accuracy of the nearest class mean of the pixels, for each seed."""
  pixels, labels = _digits()
  flat = np.asarray(pixels).reshape(len(labels), -1)
  found = []
  for seed in range(plan.seeds):
    train, rest = _choose(labels, plan.shots, seed)
    means = flat[train].reshape(5, plan.shots, -1).mean(axis=1)
    squares = ((flat[rest][:, None] - means) ** 2).sum(axis=-1)
    found.append(np.mean(squares.argmin(axis=1) + 5 == labels[rest]))
  return np.asarray(found)


class Transfer:
  """One method; compiled once for all seeds and rates."""

  def __init__(self, name: str, plan: Plan, params: Any):
    """Takes the pre-trained parameters; their head is left out."""
    self.plan = plan
    self.pixels, labels = _digits()
    self.labels, self.targets = labels, jnp.asarray(labels - 5)
    self.model = _model(plan, 5)
    self.body, _ = divide(params, "head")
    self.adapter = adapter_of(name, self.model)
    self.full = name == "full"
    self.optimizer = optax.inject_hyperparams(optax.adamw)(
      learning_rate=1.0, weight_decay=1e-4
    )
    self._run = jax.jit(self._train)

  @property
  def count(self) -> int:
    """Trained parameters without the head."""
    if self.adapter is not None:
      return sum(self.adapter.counts(self.body).values())
    return sharding.param_count(self.body) if self.full else 0

  def _logits(self, trained: Any, x: Array) -> Array:
    tree = {**trained.get("body", self.body), "head": trained["head"]}
    if self.adapter is None:
      return self.model.apply({"params": tree}, x)
    return self.adapter.apply(self.model, tree, trained["adapter"], x)

  def _start(self, key: Array) -> Any:
    k_head, k_adapter = jax.random.split(key)
    head = 0.02 * jax.random.normal(k_head, (self.plan.dim, 5))
    trained = {"head": {"kernel": head, "bias": jnp.zeros(5)}}
    if self.full:
      trained["body"] = self.body
    if self.adapter is not None:
      shapes = jax.eval_shape(lambda: self.body)
      trained["adapter"] = self.adapter.init(k_adapter, shapes)
    return trained

  def _train(self, key: Array, index: Array, left: Array, rate: Array) -> Any:
    x, y = self.pixels[index], self.targets[index]
    loss = lambda trained: _loss(self._logits(trained, x), y)
    schedule = optax.cosine_decay_schedule(1.0, self.plan.steps)

    def step(carry: Any, i: Array) -> tuple[Any, None]:
      trained, state = carry
      state.hyperparams["learning_rate"] = rate * schedule(i)
      updates, state = self.optimizer.update(
        jax.grad(loss)(trained), state, trained
      )
      return (optax.apply_updates(trained, updates), state), None

    trained = self._start(key)
    carry = (trained, self.optimizer.init(trained))
    (trained, _), _ = jax.lax.scan(step, carry, jnp.arange(self.plan.steps))
    hits = self._logits(trained, self.pixels[left]).argmax(-1)
    hits = hits == self.targets[left]
    return hits.mean(), loss(trained), trained.get("adapter", {})

  def __call__(self, rate: float, seeds: range) -> dict[str, Any]:
    """Trains and tests from each seed.

    Returns:
      "accuracy" and "train_loss" [seeds]; "adapter", its parameters stacked.
    """
    outcomes = []
    for seed in seeds:
      picked = _choose(self.labels, self.plan.shots, seed)
      key = jax.random.key(seed)
      outcomes.append(self._run(key, *map(jnp.asarray, picked), rate))
    accuracy, loss, learnt = zip(*outcomes, strict=True)
    return {
      "accuracy": np.asarray(accuracy),
      "train_loss": np.asarray(loss),
      "adapter": jax.tree.map(lambda *x: jnp.stack(x), *learnt),
    }


def overlaps(
  params: Any, learnt: Any, ks: tuple[int, ...]
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
  """Share of each branch's update in the top-k directions of its weight.

  On the input side (what the update reads) and on the output side (where it
  writes).

  Returns:
    Target -> side -> branch -> [k, seeds], the mean over blocks.
  """
  found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
  for target in TARGETS:
    part, layer = target.split("/")
    kernel = params["blocks"][part][layer]["kernel"]
    kernel = kernel.reshape(kernel.shape[0], -1, kernel.shape[-1])
    branches = learnt["blocks"][part][layer]
    found[target] = {side: {} for side in SIDES}
    for name, branch in branches.items():
      update = branch["down"]["kernel"] @ branch["up"]["kernel"]
      if name == "seq":
        update = kernel @ update
      weight = jnp.broadcast_to(kernel, update.shape)
      for side in SIDES:
        share = functools.partial(subspace_overlap, weight, update, side=side)
        rows = [share(k).mean(axis=1) for k in ks]
        found[target][side][name] = np.stack(rows)
  return found


def run(plan: Plan, say: Callable[[str], None]) -> Outcome:
  """Pre-trains, chooses rates, transfers with every method.

  Args:
    plan: the sizes.
    say: called with a line now and then.
  """
  params, pretrained = pretrain(plan, say)
  say(f"pre-trained: {pretrained:.1%} of 20 classes on held-out images")
  accuracy, train_loss, rates, counts = {}, {}, {}, {}
  overlap: dict[str, Any] = {}
  ks = tuple(k for k in (1, 2, 4, 8, 16, 32, 48) if k < plan.dim)
  for name in METHODS:
    method = Transfer(name, plan, params)
    first = range(1000, 1000 + plan.selection_seeds)
    trials = {r: method(r, first)["accuracy"].mean() for r in plan.rates}
    rates[name] = max(trials, key=trials.get)
    found = method(rates[name], range(plan.seeds))
    accuracy[name], train_loss[name] = found["accuracy"], found["train_loss"]
    counts[name] = method.count
    if METHODS[name]:
      overlap[name] = overlaps(params, found["adapter"], ks)
    say(
      f"{name}: {found['accuracy'].mean():.1%} of 5 new classes "
      f"(rate {rates[name]:g}, {counts[name]:,} parameters and the head)"
    )
  return Outcome(
    pretrained,
    accuracy,
    train_loss,
    rates,
    counts,
    overlap,
    ks,
    {
      "attention/out": dict.fromkeys(SIDES, np.asarray(ks) / plan.dim),
      "mlp/down": {
        "input": np.asarray(ks) / (4 * plan.dim),
        "output": np.asarray(ks) / plan.dim,
      },
    },
  )
