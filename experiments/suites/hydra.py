"""Hydra and LoRA beside full fine-tuning, and beside `peft` on the same ViT.

A training step of each, with the memory it takes at its peak, weights and
optimizer state included; and the forward pass of the base, of the merged and
of the unmerged model. The torch model is transformers' ViT of the same shape;
where that or peft is not installed, ours stand alone.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.suites.timing import (
  OURS,
  Case,
  Job,
  Unavailable,
  growth,
)
from multihead import adapters, models, parallel
from multihead.parallel import sharding
from multihead.train import state as train_state
from multihead.train.step import TrainStep

RANK = 4
TARGETS = ("attention/out", "mlp/down")
CPU = dict(
  img_size=64, patch_size=8, embed_dim=384, depth=6, num_heads=6, mlp_dim=1536,
  num_classes=10,
)  # fmt: skip
TINY = dict(
  img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, mlp_dim=32,
  num_classes=3,
)  # fmt: skip


def _shape(tiny: bool) -> tuple[dict[str, int], int]:
  return (TINY, 2) if tiny else (CPU, 16)


def _contenders(tiny: bool) -> dict[str, Callable[[], Job]]:
  """Training steps by name."""
  shape, batch = _shape(tiny)
  ours = functools.partial(_our_step, shape, batch)
  theirs = functools.partial(_their_step, shape, batch)
  return {
    OURS: functools.partial(ours, "lora"),
    "multihead, Hydra": functools.partial(ours, "hydra"),
    "multihead, full fine-tuning": functools.partial(ours, "full"),
    "peft": functools.partial(theirs, "lora"),
    "torch, full fine-tuning": functools.partial(theirs, "full"),
  }


def cases(tiny: bool) -> Iterable[Case]:
  """Training steps and forward passes; `tiny` ones for tests."""
  shape, batch = _shape(tiny)
  name = f"ViT {shape['embed_dim']}x{shape['depth']} B{batch}"
  yield Case(
    f"train_step LoRA r={RANK} {name}",
    batch,
    _contenders(tiny),
    unit="images",
  )
  forward = functools.partial(_forward, shape, batch)
  yield Case(
    f"forward merged {name}",
    batch,
    {
      OURS: functools.partial(forward, "merged"),
      "base": functools.partial(forward, "base"),
      "unmerged": functools.partial(forward, "unmerged"),
    },
    unit="images",
  )


def _batch(shape: dict[str, int], batch: int) -> tuple[Any, Any]:
  rng = np.random.default_rng(0)
  side = shape["img_size"]
  images = rng.standard_normal((batch, side, side, 3)).astype(np.float32)
  return images, rng.integers(0, shape["num_classes"], batch)


# Ours.


def _adapter(model: Any, kind: str) -> adapters.Hydra:
  maps = adapters.linear_maps(model)
  ranks = dict(r_par=RANK) if kind == "lora" else dict(r_par=2, r_seq=2)
  return adapters.Hydra(list(TARGETS), **ranks, maps=maps)


def _model(shape: dict[str, int]) -> Any:
  # One block after another, as the peer runs them.
  return models.create("vit", scan_layers=False, **shape)


def _our_step(shape: dict[str, int], batch: int, kind: str) -> Job:
  """The step of `experiments.train`: guard, AdamW, donated state."""
  model = _model(shape)
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  optimizer = optax.adamw(1e-4, weight_decay=0.1)
  params = sharding.init_params(model, jax.random.key(0), mesh)
  images, labels = map(jnp.asarray, _batch(shape, batch))

  def mean_loss(logits: jax.Array, labels: jax.Array) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), {"weight": jnp.asarray(losses.size, jnp.float32)}

  if kind == "full":
    frozen, places = None, sharding.param_shardings(model, mesh)
    init = lambda rng, mesh: params

    def loss_fn(params, batch, rng, train):
      del rng, train
      logits = model.apply({"params": params}, batch["images"])
      return mean_loss(logits, batch["labels"])

  else:
    adapter = _adapter(model, kind)
    frozen = params
    places = adapter.shardings(params, sharding.param_shardings(model, mesh))
    init = lambda rng, mesh: jax.jit(
      lambda rng: adapter.init(rng, jax.eval_shape(lambda: params)),
      out_shardings=places,
    )(rng)

    def loss_fn(params, batch, rng, train, *, frozen):
      del rng, train
      logits = adapter.apply(model, frozen, params, batch["images"])
      return mean_loss(logits, batch["labels"])

  abstract = train_state.abstract_state(
    jax.eval_shape(lambda: init(jax.random.key(0), mesh)), optimizer
  )
  shardings = train_state.state_shardings(abstract, optimizer, places, mesh)
  step = TrainStep(
    loss_fn,
    optimizer,
    optax.constant_schedule(1e-4),
    shardings,
    frozen=frozen,
  )
  with jax.set_mesh(mesh):
    state = train_state.init_state(
      init, optimizer, shardings, seed=0, mesh=mesh
    )

  def job():
    nonlocal state
    with jax.set_mesh(mesh):
      state, metrics = step(state, {"images": images, "labels": labels})
    return jax.block_until_ready((state, metrics))

  def peak_memory():
    with jax.set_mesh(mesh):
      step_batch = {"images": images, "labels": labels}
      use = step.lower(state, step_batch).compile().memory_analysis()
    return (
      use.argument_size_in_bytes
      + use.temp_size_in_bytes
      + use.output_size_in_bytes
      - use.alias_size_in_bytes  # donated: what goes in comes out there
    )

  job.peak_memory = peak_memory
  return job


def _forward(shape: dict[str, int], batch: int, kind: str) -> Job:
  model = _model(shape)
  params = sharding.init_params(model, jax.random.key(0))
  images = jnp.asarray(_batch(shape, batch)[0])
  adapter = _adapter(model, "hydra")
  ours = adapter.init(jax.random.key(1), params)
  ours = jax.tree.map(lambda x: x + 0.01, ours)
  plain = jax.jit(
    lambda params, images: model.apply({"params": params}, images)
  )
  if kind == "unmerged":
    run = jax.jit(
      lambda params, images: adapter.apply(model, params, ours, images)
    )
  else:
    run = plain
    if kind == "merged":
      params = adapter.merge(params, ours)
  return lambda: jax.block_until_ready(run(params, images))


# Theirs.


def _their_step(shape: dict[str, int], batch: int, kind: str) -> Job:
  try:
    import torch
    import transformers
  except ImportError as error:
    raise Unavailable(f"{error.name} is not installed") from None
  gpu = jax.default_backend() == "gpu"
  if gpu and not torch.cuda.is_available():
    raise Unavailable("this torch has no CUDA")
  device = "cuda" if gpu else "cpu"
  torch.manual_seed(0)
  config = transformers.ViTConfig(
    hidden_size=shape["embed_dim"], num_hidden_layers=shape["depth"],
    num_attention_heads=shape["num_heads"], intermediate_size=shape["mlp_dim"],
    image_size=shape["img_size"], patch_size=shape["patch_size"],
    num_labels=shape["num_classes"], hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
  )  # fmt: skip
  net = transformers.ViTForImageClassification(config).to(device).train()
  if kind == "lora":
    try:
      import peft
    except ImportError as error:
      raise Unavailable(f"{error.name} is not installed") from None
    names = [
      name
      for name, module in net.named_modules()
      if isinstance(module, torch.nn.Linear)
      and (name.endswith(("output.dense", "o_proj", "mlp.fc2")))
    ]
    if len(names) != 2 * shape["depth"]:
      raise Unavailable("this transformers names the maps of its ViT otherwise")
    net = peft.get_peft_model(
      net, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names)
    )
  trained = [value for value in net.parameters() if value.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1, fused=True)
  images, labels = _batch(shape, batch)
  images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
  labels = torch.from_numpy(labels).to(device)

  def job():
    optimizer.zero_grad(set_to_none=True)
    logits = net(pixel_values=images).logits
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    return loss.item()

  def peak_memory():
    job()  # makes the optimizer's state, which stays
    optimizer.zero_grad(set_to_none=True)
    kept = [*net.parameters()]
    for values in optimizer.state.values():
      kept += [v for v in values.values() if torch.is_tensor(v)]
    stays = sum(value.numel() * value.element_size() for value in kept)
    if gpu:
      before = torch.cuda.memory_allocated()
      torch.cuda.reset_peak_memory_stats()
      job()
      return stays + torch.cuda.max_memory_allocated() - before
    grown = growth(job)
    return None if grown is None else stays + grown

  job.peak_memory = peak_memory
  return job
