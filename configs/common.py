"""The keys that every training config has, with their defaults."""

import difflib
from typing import Any

from ml_collections import ConfigDict, config_dict


def training() -> ConfigDict:
  """All keys but the model's; what they mean: multihead/train/config.py."""
  return ConfigDict(
    {
      "task": "language_modelling",
      "total_steps": 1000,
      "batch_size": 8,
      "sequence_length": 256,
      "grad_accum_steps": 1,
      "dtype": "float32",
      "remat": "none",
      "ema_decay": 0.0,
      "seed": 0,
      "log_every_steps": 10,
      "model": {},
      "mesh": {"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1},
      "data": {
        "path": config_dict.placeholder(str),
        "tokenizer": "byte",
        "validation_fraction": 0.1,
        "split_seed": 0,
        "shared_words": 12,
        "text_field": "text",
        "overlap": 0,
        "cache_dir": config_dict.placeholder(str),
        "prefetch": 2,
      },
      "optimizer": {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 0,
        "decay_steps": 0,
        "end_factor": 0.1,
        "power": 0.25,
        "weight_decay": 0.1,
        "decay_all": False,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "clip_norm": 1.0,
      },
      "adapter": {
        "base": config_dict.placeholder(str),
        "targets": config_dict.placeholder(str),
        "trained": config_dict.placeholder(str),
        "r_par": 0,
        "r_seq": 0,
        "r_pre": 0,
        "scale": 1.0,
        "scaling": "constant",
        "learn_scale": False,
        "bias": False,
        "dropout": 0.0,
        "init": "kaiming_uniform",
        "fingerprint": config_dict.placeholder(str),
      },
      "checkpoint": {"every_steps": 500, "keep": 3},
      "eval": {
        "every_steps": 0,
        "max_batches": 0,
        "baselines": True,
        "sample_tokens": 256,
        "prompt": "",
        "temperature": 0.8,
      },
    }
  )


def model(name: str, **fields: type) -> ConfigDict:
  """The model section, whose keys stay as the model has them until set.

  Args:
    name: of the model.
    **fields: fields that a config or the command line may set, and their type.
  """
  keys = {"variant": str, "multipliers": str, **fields}
  unset = {key: config_dict.placeholder(kind) for key, kind in keys.items()}
  return ConfigDict({"name": name, **unset})


def image_data(**values: Any) -> ConfigDict:
  """The data section of task image_classification, some keys changed.

  What they mean: multihead/tasks/classification.py.

  Args:
    **values: keys with their values.
  """
  keys = {
    "path": config_dict.placeholder(str),
    "validation_fraction": 0.2,
    "split_seed": 0,
    "classes": "",
    "train_per_class": 0,
    "normalise": "half",
    "centre_crop": 0.0,
    "random_crop": 0.0,
    "shift": 0,
    "flip": False,
    "mixup": 0.0,
    "label_smoothing": 0.0,
    "prefetch": 2,
  }
  data = ConfigDict(keys)
  data.update(values)
  return data


def text_data(**values: Any) -> ConfigDict:
  """The same of task text_classification."""
  keys = {
    "path": config_dict.placeholder(str),
    "text_field": "text",
    "pair_field": config_dict.placeholder(str),
    "label_field": "label",
    "tokenizer": "byte",
    "bos": config_dict.placeholder(str),
    "eos": config_dict.placeholder(str),
    "validation_fraction": 0.2,
    "split_seed": 0,
    "classes": "",
    "train_per_class": 0,
    "label_smoothing": 0.0,
    "prefetch": 2,
  }
  data = ConfigDict(keys)
  data.update(values)
  return data


def segmentation_data(**values: Any) -> ConfigDict:
  """The same of task segmentation; multihead/data/segmentation.py says more."""
  keys = {
    "path": config_dict.placeholder(str),
    "images": "images",
    "masks": "masks",
    "size": 256,
    "fit": "auto",
    "num_classes": 1,
    "instances": False,
    "classes": "",
    "normalise": "standard",
    "augment": "rotations",
    "soft_masks": False,
    "validation_fraction": 0.2,
    "split_seed": 0,
    "examples": 500,
    "cache_mb": 1024,
    "prefetch": 2,
    "pixel_weight": 1.0,
    "dice_weight": 1.0,
    "threshold": 0.5,
  }
  data = ConfigDict(keys)
  data.update(values)
  return data


def unknown_variant(variant: str, allowed: tuple[str, ...]) -> ValueError:
  """The error of a config file that is asked for a variant it lacks."""
  near = difflib.get_close_matches(variant, allowed, n=1)
  hint = f" (did you mean {near[0]!r}?)" if near else ""
  names = ", ".join(allowed)
  return ValueError(f"no variant {variant!r}{hint}; the variants are {names}")
