"""The networks: one file per system, found by the paper's name."""

import fnmatch
import importlib
from typing import Any

import flax.linen as nn

from multihead.errors import UserError, nearest

# Name -> the class in multihead.models.<name>, imported when asked for.
_MODELS = {
  "bert": "Bert",
  "falcon_h1": "FalconH1",
  "vit": "ViT",
  "icl_gd": "ICLGD",
  "mhs_vm": "MHSVM",
}


def list(pattern: str | None = None) -> tuple[str, ...]:
  """Names of the models, those that match a shell pattern if one is given."""
  return tuple(fnmatch.filter(sorted(_MODELS), pattern or "*"))


def _module(name: str) -> Any:
  if name not in _MODELS:
    raise UserError(
      f"unknown model {name!r}{nearest(name, _MODELS)}; the models are "
      f"{', '.join(sorted(_MODELS))}"
    )
  return importlib.import_module(f"multihead.models.{name}")


def variants(name: str) -> tuple[str, ...]:
  """Names of the published variants of a model, smallest first."""
  return tuple(_module(name).VARIANTS)


def create(
  name: str, variant: str | None = None, **overrides: Any
) -> nn.Module:
  """Makes a model: a variant's fields, changed by the overrides.

  Args:
    name: one of `models.list()`.
    variant: one of `models.variants(name)`; None starts from the defaults of
      the model's class.
    **overrides: fields of the model's class.

  Returns:
    A linen module.

  Raises:
    UserError: an unknown name, variant or field; the nearest is named.
  """
  module = _module(name)
  if variant is not None and variant not in module.VARIANTS:
    raise UserError(
      f"{name} has no variant {variant!r}{nearest(variant, module.VARIANTS)}; "
      f"its variants are {', '.join(module.VARIANTS)}"
    )
  cls = getattr(module, _MODELS[name])
  fields = [f for f in cls.__dataclass_fields__ if f not in ("parent", "name")]
  for key in overrides:
    if key not in fields:
      raise UserError(
        f"{name} has no field {key!r}{nearest(key, fields)}; its fields are "
        f"{', '.join(fields)}"
      )
  return cls(**{**(module.VARIANTS[variant] if variant else {}), **overrides})


__all__ = ["create", "list", "variants"]
