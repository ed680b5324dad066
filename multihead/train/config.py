"""What a training run is told, as typed, strictly read dataclasses.

A config file makes an `ml_collections.ConfigDict`; `read_config` turns it into
a `TrainConfig` and refuses a key that no field reads, a value of the wrong
type and a number outside its range. So there is no key that is set and then
silently ignored.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from multihead import models, tasks
from multihead.errors import UserError, nearest
from multihead.models import falcon_h1

DTYPES = ("float32", "bfloat16")
REMAT = ("none", "full", "dots")
MULTIPLIERS = ("published", "shape", "none")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Which model; every further key is a field of that model.

  Attributes:
    name: a name of `models.list()`.
    variant: a name of `models.variants(name)`, or None for the model's
      defaults.
    multipliers: "published" keeps those of the variant (1.0 without one),
      "shape" takes the closed forms for the shape, "none" sets all to 1.0.
      None for a model that has none.
    overrides: fields of the model that differ from the variant.
  """

  name: str = "falcon_h1"
  variant: str | None = None
  multipliers: str | None = None
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one of them may be -1: what is left."""

  data: int = -1
  fsdp: int = 1
  sequence: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimizer and its schedules, see `train.optimizers`.

  Attributes:
    name: adamw, lion or sgd.
    lr: the peak learning rate.
    schedule: constant, linear, cosine, wave, wsd or power.
    warmup_steps: steps of linear rise from 0 to the peak.
    decay_steps: length of the decay; 0 = everything after the warm-up (for
      wsd: a tenth of the run).
    end_factor: the rate at the end of the decay, as a share of the peak.
    power: exponent p of the power schedule, rate ~ t^-p after the warm-up.
    weight_decay: decoupled, on matrices only.
    decay_all: weight decay is on every parameter.
    b1: first momentum (also sgd's).
    b2: second momentum.
    eps: added to Adam's denominator.
    clip_norm: global norm that gradients are clipped to; 0 = no clipping.
  """

  name: str = "adamw"
  lr: float = 1e-3
  schedule: str = "cosine"
  warmup_steps: int = 0
  decay_steps: int = 0
  end_factor: float = 0.1
  power: float = 0.25
  weight_decay: float = 0.1
  decay_all: bool = False
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  r"""Training of a part, over a base that stays; see `adapters.Hydra`.

  Attributes:
    base: the workdir of a run, or a directory of weights, to begin with; None:
      the model's initial values.
    targets: names of the adapted maps, separated by commas; "all-linear"; or,
      with any of the characters .*+?[](){}|^$\ in it, a regular expression for
      their whole paths. None: no adapter.
    trained: a regular expression for the beginning of the paths of parameters
      that are trained in full, e.g. "head"; they begin as in the base where
      their shapes agree. None: none.
    r_par, r_seq, r_pre: ranks of the branches.
    scale, scaling, learn_scale, bias, dropout, init: see `adapters.Hydra`.
    fingerprint: of the frozen parameters, checked if it is given; a run writes
      it into its config.json.
  """

  base: str | None = None
  targets: str | None = None
  trained: str | None = None
  r_par: int = 0
  r_seq: int = 0
  r_pre: int = 0
  scale: float = 1.0
  scaling: str = "constant"
  learn_scale: bool = False
  bias: bool = False
  dropout: float = 0.0
  init: str = "kaiming_uniform"
  fingerprint: str | None = None

  @property
  def active(self) -> bool:
    """Whether only a part is trained."""
    return self.targets is not None or self.trained is not None


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """How often checkpoints are written and how many are kept."""

  every_steps: int = 500
  keep: int = 3


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Evaluation while training and at its end.

  Attributes:
    every_steps: steps between evaluations; 0 = only at the end.
    max_batches: batches of an evaluation on the way; 0 = the whole split. The
      evaluation at the end always takes the whole split.
    baselines: whether the final report computes the task's baselines.
    sample_tokens: length of the sample in the report; 0 = none.
    prompt: what the sample continues.
    temperature: of the sample; 0 = the likeliest token each time.
  """

  every_steps: int = 0
  max_batches: int = 0
  baselines: bool = True
  sample_tokens: int = 256
  prompt: str = ""
  temperature: float = 0.8


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """All that a run is told.

  Attributes:
    task: a name of `tasks.TASKS`.
    batch_size: sequences per step, over all devices and processes.
    sequence_length: tokens per sequence.
    grad_accum_steps: micro-batches that one step is cut into.
    dtype: of the computation; parameters and optimizer state are float32.
    remat: what the backward pass recomputes.
    ema_decay: decay of the averaged parameters that evaluation uses; 0 = off.
    seed: of the initial values, the order of the data and dropout.
  """

  model: ModelConfig = ModelConfig()
  task: str = "language_modelling"
  total_steps: int = 1000
  batch_size: int = 8
  sequence_length: int = 256
  grad_accum_steps: int = 1
  dtype: str = "float32"
  remat: str = "none"
  ema_decay: float = 0.0
  seed: int = 0
  log_every_steps: int = 10
  mesh: MeshConfig = MeshConfig()
  data: Any = dataclasses.field(
    default_factory=tasks.TASKS["language_modelling"].data_config
  )
  optimizer: OptimizerConfig = OptimizerConfig()
  adapter: AdapterConfig = AdapterConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  eval: EvalConfig = EvalConfig()

  def __post_init__(self):
    _check_choice("task", self.task, tasks.TASKS)
    if self.adapter.base is not None and not self.adapter.active:
      raise UserError(
        "config.adapter.base is given, but neither targets nor trained: nothing"
        ' would be trained over it; trained="" trains all of it'
      )
    _check_choice("dtype", self.dtype, DTYPES)
    _check_choice("remat", self.remat, REMAT)
    if self.model.multipliers is not None:
      _check_choice("model.multipliers", self.model.multipliers, MULTIPLIERS)
    for name in (
      *("total_steps", "batch_size", "sequence_length", "grad_accum_steps"),
      *("log_every_steps", "checkpoint.every_steps", "checkpoint.keep"),
    ):
      _check_range(self, name, 1)
    for name in (
      *("seed", "ema_decay", "eval.every_steps", "eval.max_batches"),
      *("eval.sample_tokens", "eval.temperature", "optimizer.lr"),
      *("optimizer.warmup_steps", "optimizer.decay_steps"),
      *("optimizer.end_factor", "optimizer.weight_decay"),
      *("optimizer.clip_norm", "optimizer.power"),
    ):
      _check_range(self, name, 0)
    for name in ("ema_decay", "optimizer.b1", "optimizer.b2"):
      _check_range(self, name, 0, below=1)

  def to_dict(self) -> dict[str, Any]:
    """The config as plain nested dicts; `read_config` reads them back."""
    values = dataclasses.asdict(self)
    values["model"].update(values["model"].pop("overrides"))
    return values


def read_config(values: Mapping[str, Any]) -> TrainConfig:
  """Reads a ConfigDict (or nested dicts) strictly.

  Raises:
    UserError: a key that nothing reads (with the nearest one that exists), a
      value of the wrong type, or one outside its range.
  """
  values = dict(values.items())
  model = dict((values.pop("model", None) or {}).items())
  own = {"name", "variant", "multipliers"}
  overrides = {
    key: _plain(value)
    for key, value in model.items()
    if key not in own and value is not None
  }
  fields = {key: value for key, value in model.items() if key in own}
  task = values.get("task", TrainConfig.task)
  _check_choice("task", task, tasks.TASKS)
  data = values.pop("data", None)
  config = _read(TrainConfig, values, "", skip=("model", "data"))
  return dataclasses.replace(
    config,
    model=dataclasses.replace(
      _read(ModelConfig, fields, "model."), overrides=overrides
    ),
    data=_read(tasks.TASKS[task].data_config, data or {}, "data.", task=task),
  )


def read_json(path: str) -> TrainConfig:
  """Reads the config that a run left in its workdir.

  Raises:
    UserError: there is no such file, or it is not a config.
  """
  try:
    with open(path, encoding="utf-8") as file:
      return read_config(json.load(file))
  except OSError as error:
    raise UserError(
      f"no config at {path} ({error.strerror}); give --config, or the workdir "
      "of a training run"
    ) from None
  except json.JSONDecodeError as error:
    raise UserError(f"{path} is not JSON: {error}") from None


def build_model(config: TrainConfig) -> nn.Module:
  """Makes the model that the config names, in its dtype and remat policy.

  Raises:
    UserError: unknown model, variant or field, or a sequence longer than the
      model's maximum.
  """
  name, variant = config.model.name, config.model.variant
  fields = {"dtype": jnp.dtype(config.dtype), "remat": config.remat}
  model = models.create(name, variant, **{**fields, **config.model.overrides})
  if config.model.multipliers in ("shape", "none"):
    model = model.clone(multipliers=_multipliers(model, config.model))
  longest = getattr(model, "max_position_embeddings", None)
  if longest is not None and config.sequence_length > longest:
    raise UserError(
      f"config.sequence_length={config.sequence_length} is longer than the "
      f"{longest} positions of {name} {variant or ''}; shorten it or raise "
      "config.model.max_position_embeddings"
    )
  return model


def _multipliers(model: nn.Module, config: ModelConfig) -> Any:
  if config.name != "falcon_h1":
    raise UserError(
      f"config.model.multipliers={config.multipliers!r}: {config.name} has no "
      "multipliers; leave it at None"
    )
  if config.multipliers == "none":
    return falcon_h1.Multipliers()
  return falcon_h1.multipliers_for_shape(
    hidden_size=model.hidden_size,
    attention_width=model.num_attention_heads * model.head_dim,
    head_dim=model.head_dim,
    ssm_width=model.mamba_n_heads * model.mamba_d_head,
    intermediate_size=model.intermediate_size,
  )


def _plain(value: Any) -> Any:
  """Lists as tuples (hashable), ConfigDicts as dicts."""
  if isinstance(value, list | tuple):
    return tuple(_plain(item) for item in value)
  return dict(value.items()) if hasattr(value, "items") else value


def _read(
  kind: type,
  values: Mapping[str, Any],
  path: str,
  skip: tuple[str, ...] = (),
  task: str = TrainConfig.task,
) -> Any:
  hints = typing.get_type_hints(kind)
  allowed = [field.name for field in dataclasses.fields(kind)]
  if not hasattr(values, "items"):
    raise UserError(
      f"config.{path.rstrip('.')} is {values!r}; it must be a section with "
      f"the keys {', '.join(allowed)}"
    )
  read = {}
  for key, value in values.items():
    if key not in allowed:
      raise UserError(unknown_key(f"{path}{key}", allowed_paths(task)))
    if key not in skip:
      read[key] = _convert(hints[key], value, f"{path}{key}")
  return kind(**read)


def _convert(hint: Any, value: Any, path: str) -> Any:
  if dataclasses.is_dataclass(hint):
    return _read(hint, {} if value is None else value, f"{path}.")
  options = (hint,)
  if isinstance(hint, types.UnionType):
    options = typing.get_args(hint)
  for option in options:
    if option is float and type(value) is int:
      return float(value)
    # bool is an int for Python, but `batch_size = True` is a mistake.
    if isinstance(value, option) and (
      option is bool or not isinstance(value, bool)
    ):
      return value
  names = " or ".join(
    "None" if option is types.NoneType else option.__name__
    for option in options
  )
  raise UserError(
    f"config.{path} is {value!r} ({type(value).__name__}); it must be {names}"
  )


def allowed_paths(task: str = TrainConfig.task) -> list[str]:
  """Every key that `read_config` reads, dotted."""
  sections = {"data": tasks.TASKS[task].data_config}
  paths = []
  for field in dataclasses.fields(TrainConfig):
    kind = sections.get(field.name, field.type)
    if dataclasses.is_dataclass(kind):
      names = [part.name for part in dataclasses.fields(kind)]
      paths += [f"{field.name}.{part}" for part in names]
    else:
      paths.append(field.name)
  paths.remove("model.overrides")
  return paths


def unknown_key(path: str, allowed: typing.Iterable[str]) -> str:
  """The error text for a config key that does not exist.

  Args:
    path: the dotted key that was given.
    allowed: the dotted keys that exist.
  """
  allowed = list(allowed)
  section = path.rpartition(".")[0]
  hint = nearest(path, allowed)
  if not hint:
    # A right name in the wrong section is the usual slip.
    last = {key.rpartition(".")[2]: key for key in allowed}
    guess = nearest(path.rpartition(".")[2], last)
    if guess:
      hint = f" (did you mean {last[guess.split(chr(39))[1]]!r}?)"
  siblings = [key for key in allowed if key.rpartition(".")[0] == section]
  known = ", ".join(sorted(siblings or allowed))
  return f"unknown config key {path!r}{hint}; known here: {known}"


def _check_choice(name: str, value: Any, allowed: typing.Iterable[str]) -> None:
  if value not in allowed:
    raise UserError(
      f"config.{name} is {value!r}{nearest(str(value), allowed)}; it must be "
      f"one of {', '.join(allowed)}"
    )


def _check_range(
  config: TrainConfig, name: str, least: float, below: float = math.inf
) -> None:
  value = config
  for part in name.split("."):
    value = getattr(value, part)
  if not least <= value < below:
    limit = "" if below == math.inf else f" and less than {below}"
    raise UserError(
      f"config.{name} is {value}; it must be at least {least}{limit}"
    )
