"""MHS-VM beside VM-UNet: a training step of the multi-head scan and of SS2D.

Both networks have the same shape and read the same images: on a GPU the
published one, in float32 as published and in bfloat16, on a CPU a smaller one
in float32. The step is that of `experiments.train`: BCE and Dice, the guard
against losses that are not finite, AdamW, donated state.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.suites.timing import OURS, Case, Job
from multihead import models, parallel
from multihead.parallel import sharding
from multihead.train import state as train_state
from multihead.train.step import TrainStep

BASELINE = "SS2D"
# Name -> variant of the model; the first and the last are timed.
NETWORKS = {
  OURS: "mhs_vm_4_heads",
  "3 heads": "mhs_vm_3_heads",
  "no projection": "mhs_vm_4_heads_no_projection",
  BASELINE: "vm_unet",
}
_CPU = dict(
  embed_dim=32, depths=(1, 1, 1, 1), depths_decoder=(1, 1, 1, 1), img_size=128
)
_TINY = dict(
  embed_dim=16, depths=(1,), depths_decoder=(1,), img_size=16, state_size=4
)


def cases(tiny: bool) -> Iterable[Case]:
  """The cases of the device that JAX uses; `tiny` ones for tests."""
  dtypes = ("float32",)
  if tiny:
    shape, batch = _TINY, 2
  elif jax.default_backend() == "cpu":
    shape, batch = _CPU, 4
  else:
    shape, batch, dtypes = {}, 32, ("float32", "bfloat16")
  for dtype in dtypes:
    nets = networks(shape, dtype)
    side = nets[OURS].img_size
    yield Case(
      f"train_step {side}x{side} B{batch} {dtype}",
      batch,
      {
        name: functools.partial(_step, nets[name], batch)
        for name in (OURS, BASELINE)
      },
      unit="images",
      flops={
        name: 3 * batch * forward_flops(model) for name, model in nets.items()
      },
    )


def notes(tiny: bool) -> str:
  """Parameters and multiply-adds of the published shape, as a table."""
  nets = networks(_TINY if tiny else {}, "float32")
  side = nets[OURS].img_size
  lines = [
    f"Of a forward pass of one image of {side}x{side}; a scan's operations are "
    "9 M + 1 a step and channel.",
    "",
    "| | parameters | of SS2D | conv + linear G MAC | einsum G MAC | scan G |",
    "|---|---:|---:|---:|---:|---:|",
  ]
  counts = {name: parameters(model) for name, model in nets.items()}
  for name, model in nets.items():
    work = [f"{1e-9 * n:.3f}" for n in forward_macs(model).values()]
    share = counts[name] / counts[BASELINE]
    row = [name, f"{counts[name]:,}", f"{share:.3f}", *work]
    lines.append(f"| {' | '.join(row)} |")
  return "\n".join(lines)


def networks(shape: dict[str, Any], dtype: str) -> dict[str, Any]:
  """The networks of `NETWORKS`, some fields changed."""
  return {
    name: models.create("mhs_vm", variant, dtype=jnp.dtype(dtype), **shape)
    for name, variant in NETWORKS.items()
  }


def parameters(model: Any) -> int:
  """How many numbers are trained."""
  return sharding.param_count(sharding.abstract_params(model))


def forward_macs(model: Any) -> dict[str, int]:
  """Multiply-adds of one image of the model's size, by kind.

  Counters that look at modules alone see only the first kind.

  Args:
    model: an MHSVM.

  Returns:
    "layers": of convolutions and linear maps; "einsum": what the published
    code does outside of its modules, the projections to the subspaces and to
    the scans' step sizes, B and C; "scan": of the scans, 9 M + 1 for each step
    of each channel. Norms, gates and activations are left out.
  """
  m = model
  height, width = (side // m.patch_size for side in m.image_shape)
  pixels, first, p = height * width, m.embed_dim, m.patch_size
  found = dict(
    layers=pixels * first * p * p * (m.in_chans + first // 4)
    + pixels * p * p * (first // 4) * m.num_classes,
    einsum=0,
    scan=0,
  )
  for level, blocks in enumerate(
    zip(m.depths, m.depths_decoder[::-1], strict=True)
  ):
    here, c = pixels >> 2 * level, first << level
    if level:
      # Merging four pixels, and expanding one to four.
      found["layers"] += here * 2 * c * c + here * 2 * c * c
    if m.heads:
      inner, size, scans = c, c // m.heads, 4 * m.heads
      rank = math.ceil(size / 16)
      inward = c * m.heads * size
      linear = 2 * c * c + (inward if m.projection else 0)
    else:
      inner, size, scans = 2 * c, 2 * c, 4
      rank, inward = math.ceil(c / 16), 0
      linear = c * 4 * c + 2 * c * c
    count = here * sum(blocks)
    found["layers"] += count * (linear + 9 * inner)
    steering = scans * size * (2 * rank + 2 * m.state_size)
    found["einsum"] += count * (inward + steering)
    found["scan"] += count * scans * size * (9 * m.state_size + 1)
  return found


def forward_flops(model: Any) -> float:
  """Operations of one image: two a multiply-add, and those of the scans."""
  macs = forward_macs(model)
  return 2 * (macs["layers"] + macs["einsum"]) + macs["scan"]


def _step(model: Any, batch: int) -> Job:
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  schedule = optax.constant_schedule(1e-3)
  optimizer = optax.adamw(schedule, weight_decay=1e-2)
  abstract = train_state.abstract_state(
    sharding.abstract_params(model), optimizer
  )
  shardings = train_state.state_shardings(
    abstract, optimizer, sharding.param_shardings(model, mesh), mesh
  )
  rng = np.random.default_rng(0)
  shape = (batch, *model.image_shape)
  data = dict(
    images=jnp.asarray(rng.normal(size=(*shape, 3)), jnp.float32),
    masks=jnp.asarray(rng.random(shape) < 0.3, jnp.float32),
  )

  def loss_fn(params, batch, rng, train):
    del train
    logits = model.apply(
      {"params": params},
      batch["images"],
      deterministic=False,
      rngs={"dropout": rng},
    )[..., 0]
    masks, p = batch["masks"], jax.nn.sigmoid(logits)
    cross = optax.sigmoid_binary_cross_entropy(logits, masks).mean()
    both, sums = (p * masks).sum((1, 2)), (p + masks).sum((1, 2))
    dice = jnp.mean((2 * both + 1) / (sums + 1))
    return cross + 1 - dice, {"weight": jnp.float32(len(masks))}

  step = TrainStep(loss_fn, optimizer, schedule, shardings)
  with jax.set_mesh(mesh):
    state = train_state.init_state(
      functools.partial(_values, model),
      optimizer,
      shardings,
      seed=0,
      mesh=mesh,
    )
  compiled = None

  def job():
    nonlocal state, compiled
    with jax.set_mesh(mesh):
      if compiled is None:
        compiled = step.lower(state, data).compile()
      state, metrics = compiled(state, data, None)
    return jax.block_until_ready(metrics)

  def peak_memory():
    job()
    use = compiled.memory_analysis()
    # The new state lies where the old one did.
    return (
      use.temp_size_in_bytes
      + use.output_size_in_bytes
      - use.alias_size_in_bytes
    )

  job.peak_memory = peak_memory
  return job


@functools.partial(jax.jit, static_argnums=(0, 2))
def _values(model: Any, rng: jax.Array, mesh: Any = None) -> Any:
  """Small random parameters: initial ones take longer to compile."""
  del mesh
  leaves, tree = jax.tree.flatten(sharding.abstract_params(model))
  sizes = [math.prod(leaf.shape) for leaf in leaves]
  drawn = 0.02 * jax.random.normal(rng, (sum(sizes),))
  parts = jnp.split(drawn, np.cumsum(sizes)[:-1])
  return jax.tree.unflatten(
    tree,
    [x.reshape(leaf.shape) for x, leaf in zip(parts, leaves, strict=True)],
  )
