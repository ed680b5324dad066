r"""In-context learning by gradient descent (arXiv 2212.07677), its studies.

  python -m experiments.icl_gd --config=configs/icl_gd.py:one_layer \
    --workdir=runs/one_layer

| variant | hardware | expect |
|---|---|---|
| construct | 1 CPU core, seconds | constructed weights equal to float64 loops |
| tiny | 1 CPU core, seconds | nothing: for tests |
| one_layer ... copy | 2 CPU cores, minutes | table of docs/systems/icl_gd.md |
| sine_paper, copy_paper | 1 GPU, minutes | the published sizes and steps |
"""

from ml_collections import ConfigDict, config_dict

from configs import common

# Fields of the model that may be set, with their types; unset: the variant's.
_MODEL = dict(
  variant=str, num_layers=int, recurrent=bool, output_size=int, num_heads=int,
  key_size=int, attention=str, first_layer_softmax=bool, include_query=bool,
  layer_norm=bool, mlp_widening=int, embedding_size=int, embedding_mlp=int,
  positions=str, position_size=int, position_flip=bool, position_zero=bool,
  update_targets_only=bool, dampening=float, clip=float, init_scale=float,
  implementation=str,
)  # fmt: skip
_TASK = dict(
  input_size=int, output_size=int, context_size=int, inputs=str, function=str,
  layout=str, input_range=float, weight_scale=float, normalize=bool,
  noise=float, distractors=int, spectrum=tuple, rotation_seed=int,
)  # fmt: skip
_FALLING = dict(schedule="cosine", end_factor=0.02)
_SINE = dict(
  study="sine", model=dict(variant="sine"), optimizer=dict(clip_norm=100.0),
  task=dict(input_size=1, function="sine", input_range=10.0),
)  # fmt: skip

# Variant -> what differs from the defaults below.
_VARIANTS = {
  "construct": dict(study="construct"),
  "tiny": dict(
    task=dict(input_size=3, context_size=4), total_steps=20, log_every_steps=10,
    batch_size=16, seeds=2, eval_tasks=64, final_tasks=128,
  ),
  "one_layer": dict(optimizer=_FALLING),
  "two_layer": dict(
    model=dict(variant="two_layer"), total_steps=6000, log_every_steps=300,
    optimizer=dict(lr=1.5e-3, **_FALLING),
  ),
  "deep": dict(
    model=dict(variant="deep"), total_steps=6000, log_every_steps=300, seeds=3,
    optimizer=dict(lr=3e-3, clip_norm=10.0, **_FALLING),
  ),
  "softmax": dict(
    study="softmax", model=dict(variant="softmax", init_scale=0.05),
    total_steps=4000, optimizer=dict(lr=2e-3, **_FALLING),
  ),
  "anisotropic": dict(
    study="anisotropic", total_steps=4000, optimizer=dict(lr=2e-3, **_FALLING),
    task=dict(
      inputs="anisotropic", context_size=20,
      spectrum=(0.25, 0.32, 0.42, 0.54, 0.7, 0.9, 1.16, 1.5, 1.94, 2.5),
    ),
  ),
  "real": dict(study="real", optimizer=_FALLING),
  "sine": dict(_SINE, total_steps=2000, batch_size=256, seeds=3),
  "sine_paper": dict(
    _SINE, total_steps=20_000, log_every_steps=200, batch_size=2048, seeds=3,
    reference=dict(lr=3e-4), eval_tasks=10_000,
  ),
  "copy": dict(
    study="copy", model=dict(variant="copy", init_scale=0.1), seeds=3,
    total_steps=4000, log_every_steps=50, batch_size=256,
    optimizer=dict(clip_norm=10.0, lr=4e-3),
    task=dict(
      layout="classic_wide", input_size=3, context_size=6, input_range=2.0,
    ),
  ),
  "copy_paper": dict(
    study="copy", model=dict(variant="copy", implementation="xla"),
    task=dict(layout="classic"), optimizer=dict(clip_norm=10.0, lr=4e-3),
    total_steps=10_000, log_every_steps=200, batch_size=2048, eval_tasks=10_000,
  ),
}  # fmt: skip


def _open(kinds: dict[str, type]) -> dict:
  return {key: config_dict.placeholder(kind) for key, kind in kinds.items()}


def get_config(variant: str = "one_layer") -> ConfigDict:
  """The config of a variant of the table above."""
  if variant not in _VARIANTS:
    raise common.unknown_variant(variant, tuple(_VARIANTS))
  config = ConfigDict(
    dict(
      script="icl_gd", study="layers", task=_open(_TASK),
      model={**_open(_MODEL), "variant": "one_layer"},
      optimizer=dict(
        name="adamw", lr=1e-3, schedule="constant", warmup_steps=0,
        decay_steps=0, end_factor=0.1, power=0.25, weight_decay=0.0, b1=0.9,
        b2=0.98, eps=1e-8, clip_norm=1e-3,
      ),
      reference={"lr": config_dict.placeholder(float)},
      total_steps=2500, log_every_steps=125, batch_size=512, seeds=5, seed=0,
      eval_tasks=5000, final_tasks=100_000, cycle_data=0, mesh={"data": -1},
    )
  )  # fmt: skip
  config.update(_VARIANTS[variant])
  return config
