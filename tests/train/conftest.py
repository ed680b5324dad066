"""A task small enough to test the machinery of training with."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from multihead.train import config as config_lib
from multihead.train import run as run_lib


class ToyModel(nn.Module):
  """Predicts the next id from this one; every kind of parameter has a place."""

  vocab_size: int = 16
  width: int = 8
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    x = nn.Embed(self.vocab_size, self.width, dtype=self.dtype)(tokens)
    x = nn.LayerNorm(dtype=self.dtype)(x)
    x = nn.Dense(self.width, dtype=self.dtype, name="hidden")(x)
    x = nn.Dense(self.vocab_size, dtype=self.dtype, name="out")(nn.silu(x))
    return x.astype(jnp.float32)


class ToyIterator:
  """Batch n is a function of n; rows [index * b, (index + 1) * b)."""

  def __init__(self, batch: int, length: int, rows: tuple[int, int], end=None):
    self.batch, self.length, self.rows, self.end = batch, length, rows, end
    self.next = 0
    self.poison: int | None = None
    self.before_batch = lambda number: None

  def __iter__(self):
    return self

  def __next__(self):
    if self.next == self.end:
      raise StopIteration
    self.before_batch(self.next)
    rng = np.random.default_rng(self.next)
    shape = (self.batch, self.length)
    tokens = rng.integers(0, 16, shape).astype(np.int32)
    weights = (rng.random(shape) < 0.7).astype(np.float32)
    if self.next == self.poison:
      weights[:] = np.nan
    index, count = self.rows
    size = self.batch // count
    mine = slice(index * size, (index + 1) * size)
    batch = {"tokens": tokens, "targets": (tokens * 3 + 1) % 16}
    self.next += 1
    return {k: v[mine] for k, v in {**batch, "weights": weights}.items()}

  def get_state(self):
    return {"next": self.next}

  def set_state(self, state):
    self.next = state["next"]

  def close(self):
    self.closed = True


@dataclasses.dataclass
class ToyTask:
  """The protocol of `multihead.tasks` around ToyModel."""

  unit: ClassVar[str] = "tokens"
  headline: ClassVar[str] = "loss"

  model: nn.Module
  batch_size: int = 8
  length: int = 4
  poison: int | None = None
  before_batch: Any = lambda number: None
  iterators: list = dataclasses.field(default_factory=list)

  @property
  def units_per_step(self):
    return self.batch_size * self.length

  def init_params(self, rng, mesh=None):
    init = lambda rng: self.model.init(rng, jnp.zeros((1, 1), jnp.int32))
    where = None if mesh is None else self.param_shardings(mesh)
    return jax.jit(lambda r: init(r)["params"], out_shardings=where)(rng)

  def abstract_params(self):
    return jax.eval_shape(self.init_params, jax.random.key(0))

  def param_shardings(self, mesh):
    def place(path, leaf):
      if leaf.ndim < 2:
        return NamedSharding(mesh, PartitionSpec())
      return NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))

    return jax.tree_util.tree_map_with_path(place, self.abstract_params())

  def loss_fn(self, params, batch, rng, train):
    del rng, train
    logits = self.model.apply({"params": params}, batch["tokens"])
    targets = jax.nn.one_hot(batch["targets"], logits.shape[-1])
    losses = -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)
    weight = jnp.sum(batch["weights"])
    loss = jnp.sum(losses * batch["weights"]) / jnp.maximum(weight, 1e-30)
    hits = (jnp.argmax(logits, -1) == batch["targets"]) * batch["weights"]
    accuracy = jnp.sum(hits) / jnp.maximum(weight, 1e-30)
    return loss, {"weight": weight, "accuracy": accuracy}

  def eval_fn(self, params, batch):
    loss, metrics = self.loss_fn(params, batch, None, False)
    return {"loss": loss * metrics["weight"], "weight": metrics["weight"]}

  def summarise(self, sums):
    return {"loss": float(sums["loss"] / sums["weight"])}

  def train_iterator(self, index=0, count=1):
    made = ToyIterator(self.batch_size, self.length, (index, count))
    made.poison, made.before_batch = self.poison, self.before_batch
    self.iterators.append(made)
    return made

  def eval_iterator(self, index=0, count=1):
    return ToyIterator(self.batch_size, self.length, (index, count), end=3)

  def baselines(self):
    return {"uniform_loss": float(np.log(16))}

  def sample(self, params, *, prompt, length, temperature, seed):
    del params, temperature, seed
    return f"{prompt}``` {length} made-up words"

  def facts(self):
    return ["data: ids"]


def toy_config(**settings):
  """A config for ToyTask on one device; the model section is not read."""
  defaults = dict(
    total_steps=12,
    batch_size=8,
    sequence_length=4,
    log_every_steps=3,
    optimizer=dict(lr=0.05, schedule="constant"),
    checkpoint=dict(every_steps=5, keep=2),
    eval=dict(every_steps=6),
  )
  return config_lib.read_config({**defaults, **settings})


def toy_run(config, devices=1, task=None):
  """What `run_lib.prepare` makes of a ToyTask on the first devices."""
  task = task or ToyTask(ToyModel(), config.batch_size, config.sequence_length)
  return run_lib.prepare(config, task=task, devices=jax.devices()[:devices])


@pytest.fixture(autouse=True, scope="session")
def _compile_each_program_once(tmp_path_factory):
  """Most tests compile the same few programs; keep them for this session."""
  before = jax.config.jax_compilation_cache_dir
  folder = str(tmp_path_factory.mktemp("programs"))
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  yield
  jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def toy():
  """The names of this file, for tests to use."""

  class Names:
    Model, Task, Iterator = ToyModel, ToyTask, ToyIterator
    config, run = staticmethod(toy_config), staticmethod(toy_run)

  return Names
