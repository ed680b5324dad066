"""Small networks that differ in their scans, trained on drawn masks."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from multihead import models
from multihead.data import segmentation
from multihead.layers.multi_head_scan import RouteScan
from multihead.parallel import sharding
from multihead.tasks.segmentation import forward, mask_losses
from multihead.train import optimizers, seeds
from multihead.train.config import OptimizerConfig

# Variant -> fields of the model. The last one is made narrower until it has
# about the parameters of the multi-head scan.
BASELINE, OURS, CONTROL = "SS2D", "4 heads, t = 0", "SS2D, equal parameters"
VARIANTS: dict[str, dict[str, Any]] = {
  BASELINE: dict(heads=0),
  OURS: dict(threshold=0.0),
  "4 heads, t = 0.5": dict(threshold=0.5),
  "4 heads, sum": dict(threshold=None),
  "4 heads, all Z, t = 0": dict(threshold=0.0, routes=("Z",) * 4),
  CONTROL: dict(heads=0),
}
TASKS = ("lesions", "maze")


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes of the study.

  Attributes:
    size: side of the images.
    examples: images of a task; a fifth is for validation.
    embed_dim: width of the first stage; all stages have one block.
    state_size: M.
    batch_size: B.
    steps: updates.
    log_every: updates between two evaluations.
    seeds: runs of each variant.
    lr: peak of the learning rate, which falls along a cosine.
  """

  size: int = 64
  examples: int = 500
  embed_dim: int = 16
  state_size: int = 4
  batch_size: int = 16
  steps: int = 750
  log_every: int = 25
  seeds: int = 3
  lr: float = 1e-3

  @property
  def stages(self) -> int:
    """As many as leave a map of 2 x 2, and four at most."""
    return min(4, (self.size // 4).bit_length() - 1)


@dataclasses.dataclass(frozen=True)
class Images:
  """A split in arrays: images [n, S, S, 3] and masks [n, S, S]."""

  images: np.ndarray
  masks: np.ndarray


@dataclasses.dataclass(frozen=True)
class Fit:
  """What training a variant from all seeds leaves.

  Attributes:
    model: the network.
    result: see `train.seeds.SeedResult`; "iou" is of the validation images,
      "open_gate" [logs, seeds, heads] the mean over blocks.
    parameters: how many.
    seconds: of everything.
  """

  model: nn.Module
  result: seeds.SeedResult
  parameters: int
  seconds: float

  @property
  def iou(self) -> np.ndarray:
    """Of every seed, at the end."""
    return self.result.history["iou"][-1]


def load(task: str, plan: Plan) -> tuple[Images, Images]:
  """Training and validation images of a task, normalised."""
  # A place of a maze is a sixteenth of a side: a patch, at 64 pixels.
  path = f"maze:{max(1, plan.size // 16)}" if task == "maze" else task
  data = segmentation.SegmentationData(
    path=path, size=plan.size, examples=plan.examples, augment="none"
  )
  source = segmentation.load_pairs(data)
  pairs = segmentation.Pairs(source, segmentation.split(source, data), data)

  def arrays(part: str) -> Images:
    count = pairs.counts[part]
    samples = [pairs.sample(part, number) for number in range(count)]
    return Images(*map(np.stack, zip(*samples, strict=True)))

  return arrays("train"), arrays("validation")


def network(variant: str, plan: Plan) -> nn.Module:
  """The network of a variant."""

  def make(name: str, width: int) -> nn.Module:
    return models.create(
      "mhs_vm",
      img_size=plan.size,
      embed_dim=width,
      depths=(1,) * plan.stages,
      depths_decoder=(1,) * plan.stages,
      state_size=plan.state_size,
      drop_path_rate=0.0,
      **VARIANTS[name],
    )

  if variant != CONTROL:
    return make(variant, plan.embed_dim)
  wanted = parameters(make(OURS, plan.embed_dim))
  widths = range(4, plan.embed_dim + 1, 4)
  return min(
    (make(variant, width) for width in widths),
    key=lambda model: abs(math.log(parameters(model) / wanted)),
  )


def parameters(model: nn.Module) -> int:
  """How many numbers are trained."""
  return sharding.param_count(sharding.abstract_params(model))


def fit(
  model: nn.Module,
  data: tuple[Images, Images],
  plan: Plan,
  on_log: Callable[[int, dict[str, np.ndarray]], None],
) -> Fit:
  """Trains a network from every seed, all seeds in one program.

  Batches are drawn with replacement and turned or mirrored, by one of the
  eight symmetries of the square, which mazes and lesions do not tell apart.

  Args:
    model: the network.
    data: training and validation images.
    plan: sizes.
    on_log: see `train.seeds.train_seeds`.
  """
  train, held = (jax.tree.map(jnp.asarray, (d.images, d.masks)) for d in data)
  optimizer, _ = optimizers.make_optimizer(
    OptimizerConfig(
      lr=plan.lr, weight_decay=1e-2, b2=0.999, end_factor=0.01, clip_norm=0.0
    ),
    plan.steps,
  )

  def init(key: jax.Array) -> Any:
    return nn.meta.unbox(model.init(key, *model.init_inputs())["params"])

  def loss(params: Any, key: jax.Array) -> Array:
    which, turn = jax.random.split(key)
    rows = jax.random.randint(which, (plan.batch_size,), 0, len(train[0]))
    images, masks = _turned((train[0][rows], train[1][rows]), turn)
    logits = model.apply({"params": params}, images)[..., 0]
    return sum(jnp.mean(part) for part in mask_losses(logits, masks))

  def evaluate(params: Any) -> dict[str, Array]:
    logits, gates = forward(model, params, held[0])
    pixel, dice = mask_losses(logits[..., 0], held[1])
    found = {
      "loss": jnp.mean(pixel + dice),
      "iou": pooled_iou(logits[..., 0] >= 0, held[1] > 0.5),
    }
    if gates:
      found["open_gate"] = jnp.mean(jnp.stack(list(gates.values())), axis=0)
    return found

  began = time.perf_counter()
  result = seeds.train_seeds(
    init,
    loss,
    optimizer,
    seeds=range(plan.seeds),
    total_steps=plan.steps,
    log_every=plan.log_every,
    evaluate=evaluate,
    on_log=on_log,
  )
  seconds = time.perf_counter() - began
  return Fit(model, result, parameters(model), seconds)


def _turned(arrays: Any, key: jax.Array) -> Any:
  """The whole batch by one symmetry of the square."""
  turns = (
    lambda x: x[:, ::-1],
    lambda x: x[:, :, ::-1],
    lambda x: x.swapaxes(1, 2),
  )
  for turn, chosen in zip(
    turns, jax.random.bernoulli(key, shape=(3,)), strict=True
  ):
    arrays = [jnp.where(chosen, turn(x), x) for x in arrays]
  return arrays


def pooled_iou(predicted: Array, truth: Array) -> Float[Array, ""]:
  """Intersection over union of the pixels of all images together."""
  both = jnp.sum(predicted & truth)
  return both / jnp.maximum(jnp.sum(predicted | truth), 1)


def routes_of(
  model: nn.Module, params: Any, image: Array, block: str
) -> Float[np.ndarray, "N K rows columns S"]:
  """The scans of a block at their pixels, four for each head."""
  _, state = model.apply(
    {"params": params},
    image[None],
    capture_intermediates=lambda module, _: isinstance(module, RouteScan),
    mutable=["intermediates"],
  )
  ys = state["intermediates"][block]["scan"]["routes"]["__call__"][0][0]
  side = math.isqrt(len(ys))  # The images are squares.
  return np.asarray(jnp.moveaxis(ys, 0, 2)).reshape(
    *ys.shape[1:3], side, side, ys.shape[-1]
  )
