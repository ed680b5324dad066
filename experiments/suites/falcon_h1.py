"""Falcon-H1 beside `transformers`: a training step, prefill and generation.

Both run the same shape in the same dtype on the same device with random
weights. On a GPU that is the 0.5B model in bfloat16 (weights and optimizer
state in float32 when training), on a CPU a model of seven million parameters
in float32.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.suites.timing import OURS, Case, Job, Unavailable
from multihead import generation, models, parallel
from multihead.checkpoints import falcon_h1 as hub
from multihead.parallel import sharding
from multihead.tasks import language_modelling
from multihead.train import state as train_state
from multihead.train.step import TrainStep

PEER = "transformers"

_CPU = dict(
  vocab_size=4096, hidden_size=256, intermediate_size=768,
  num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
  head_dim=64, mamba_n_heads=8, mamba_d_head=64, mamba_d_state=64,
  mamba_rms_norm=False, scan_layers=False,
)  # fmt: skip
_TINY = dict(
  vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
  num_attention_heads=2, num_key_value_heads=1, head_dim=8, mamba_n_heads=2,
  mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=16,
)  # fmt: skip


def cases(tiny: bool) -> Iterable[Case]:
  """The cases of the device that JAX uses; `tiny` ones for tests."""
  if tiny:
    model, sizes = models.create("falcon_h1", **_TINY), (2, 16, 8, 4)
  elif jax.default_backend() == "cpu":
    model, sizes = models.create("falcon_h1", **_CPU), (4, 256, 64, 128)
  else:
    model = models.create("falcon_h1", "0.5b", dtype=jnp.bfloat16, remat="dots")
    sizes = (4, 2048, 128, 128)
  batch, length, prompt, new = sizes
  flops = functools.partial(forward_flops, model)
  yield Case(
    f"train_step B{batch} T{length}",
    batch * length,
    {
      OURS: lambda: _our_step(model, batch, length),
      PEER: lambda: _their_step(model, batch, length),
    },
    flops=3 * flops(batch, length),
  )
  yield Case(
    f"prefill B{batch} T{length}",
    batch * length,
    {
      OURS: lambda: _our_prefill(model, batch, length),
      PEER: lambda: _their_prefill(model, batch, length),
    },
    flops=flops(batch, length, scored=1),
  )
  for rows in (1, batch):
    yield Case(
      f"generate B{rows} T{prompt}+{new}",
      rows * new,
      {
        OURS: functools.partial(_our_generation, model, rows, prompt, new),
        PEER: functools.partial(_their_generation, model, rows, prompt, new),
      },
    )


def forward_flops(
  model: Any, batch: int, length: int, scored: int | None = None
) -> float:
  """Operations of a forward pass, a multiply-add counted as two.

  Matrix products with weights, causal attention (half of all pairs) and the
  chunked scan; norms, convolutions and activations are left out.

  Args:
    model: a FalconH1.
    batch: B.
    length: T.
    scored: positions per row whose logits are computed; all by default.
  """
  m = model
  scored = length if scored is None else scored
  width, keys = m.num_attention_heads * m.head_dim, m.num_key_value_heads
  scan = m.mamba_n_heads * m.mamba_d_head
  groups = m.mamba_n_groups * m.mamba_d_state
  chunk = min(m.mamba_chunk_size, length)
  weights = m.hidden_size * (
    2 * width
    + 2 * keys * m.head_dim
    + 3 * scan
    + 2 * groups
    + m.mamba_n_heads
    + 3 * m.intermediate_size
  )
  token = 2 * weights + 2 * length * width
  token += 2 * chunk * (groups + scan) + 4 * m.mamba_d_state * scan
  head = 2 * m.hidden_size * m.vocab_size * scored
  return batch * (length * m.num_hidden_layers * token + head)


def _tokens(model: Any, batch: int, length: int) -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.integers(1, model.vocab_size, (batch, length), dtype=np.int32)


# Ours.


def _our_params(model: Any) -> tuple[Any, Any]:
  """The model for inference: weights in the dtype of the computation."""
  model = model.clone(param_dtype=model.dtype)
  return model, sharding.init_params(model, jax.random.key(0))


def _our_step(model: Any, batch: int, length: int) -> Job:
  """The step of `experiments.train`: guard, AdamW, donated state."""
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  optimizer = optax.adamw(1e-4, weight_decay=0.1)
  abstract = train_state.abstract_state(
    sharding.abstract_params(model), optimizer
  )
  shardings = train_state.state_shardings(
    abstract, optimizer, sharding.param_shardings(model, mesh), mesh
  )
  tokens = jnp.asarray(_tokens(model, batch, length + 1))

  def loss_fn(params, batch, rng, train):
    del rng, train
    logits = model.apply({"params": params}, batch[:, :-1])
    losses, _ = language_modelling.token_losses(logits, batch[:, 1:])
    weight = jnp.asarray(losses.size, jnp.float32)
    return losses.mean(), {"weight": weight}

  step = TrainStep(loss_fn, optimizer, optax.constant_schedule(1e-4), shardings)
  with jax.set_mesh(mesh):
    state = train_state.init_state(
      functools.partial(sharding.init_params, model),
      optimizer,
      shardings,
      seed=0,
      mesh=mesh,
    )

  def job():
    nonlocal state
    with jax.set_mesh(mesh):
      state, metrics = step(state, tokens)
    return jax.block_until_ready((state, metrics))

  return job


def _our_prefill(model: Any, batch: int, length: int) -> Job:
  generator = generation.Generator(*_our_params(model))
  tokens = _tokens(model, batch, length)
  return lambda: jax.block_until_ready(generator.prefill(tokens).logits)


def _our_generation(model: Any, batch: int, length: int, new: int) -> Job:
  generator = generation.Generator(*_our_params(model))
  tokens = _tokens(model, batch, length)
  return lambda: generator(tokens, max_new_tokens=new)


# Theirs.


def _torch(jobs: Callable[..., Job]) -> Callable[..., Job]:
  """Makes a contender of a function of torch; what it lacks is Unavailable."""

  @functools.wraps(jobs)
  def prepare(*args):
    try:
      import torch
      import transformers
    except ImportError as error:
      raise Unavailable(f"{error.name} is not installed") from None
    if not hasattr(transformers, "FalconH1ForCausalLM"):
      raise Unavailable("this transformers has no Falcon-H1")
    gpu = jax.default_backend() == "gpu"
    if gpu and not torch.cuda.is_available():
      raise Unavailable("this torch has no CUDA")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)

    def guarded(call):
      try:
        result = call()
        if gpu:
          torch.cuda.synchronize()
        return result
      except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        raise Unavailable("out of memory") from None

    job = guarded(lambda: jobs(torch, "cuda" if gpu else "cpu", *args))
    return lambda: guarded(job)

  return prepare


def _their_model(torch: Any, device: str, model: Any, dtype: Any) -> Any:
  import transformers

  config = hub.hub_config(model)
  config = transformers.FalconH1Config(**config)
  # No special tokens: generation runs to its end.
  config.bos_token_id = config.eos_token_id = config.pad_token_id = None
  return transformers.FalconH1ForCausalLM(config).to(device, dtype)


def _their_dtype(torch: Any, model: Any) -> Any:
  return getattr(torch, jnp.dtype(model.dtype).name)


@_torch
def _their_step(
  torch: Any, device: str, model: Any, batch: int, length: int
) -> Job:
  net = _their_model(torch, device, model, torch.float32).train()
  optimizer = torch.optim.AdamW(
    net.parameters(), lr=1e-4, weight_decay=0.1, fused=True
  )
  dtype = _their_dtype(torch, model)
  tokens = torch.from_numpy(_tokens(model, batch, length + 1)).long().to(device)
  inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1)

  def job():
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
      logits = net(input_ids=inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
      logits.flatten(0, 1).float(), targets
    )
    loss.backward()
    optimizer.step()
    return loss.item()

  return job


@_torch
def _their_prefill(
  torch: Any, device: str, model: Any, batch: int, length: int
) -> Job:
  net = _their_model(torch, device, model, _their_dtype(torch, model)).eval()
  tokens = torch.from_numpy(_tokens(model, batch, length)).long().to(device)

  def job():
    with torch.inference_mode():
      return net(input_ids=tokens, use_cache=True, logits_to_keep=1).logits

  return job


@_torch
def _their_generation(
  torch: Any, device: str, model: Any, batch: int, length: int, new: int
) -> Job:
  net = _their_model(torch, device, model, _their_dtype(torch, model)).eval()
  tokens = torch.from_numpy(_tokens(model, batch, length)).long().to(device)
  mask = torch.ones_like(tokens)

  def job():
    with torch.inference_mode():
      out = net.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        use_cache=True,
      )
    if out.shape[1] != length + new:
      raise RuntimeError(f"generated {out.shape[1] - length} tokens, not {new}")
    return out

  return job
