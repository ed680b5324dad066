"""What other libraries call the linear maps of our models."""

from typing import Any

import flax.linen as nn

from multihead.checkpoints import pretrained


def module_names(model: nn.Module, format: str | None = None) -> dict[str, str]:
  """Our path -> the name of the module in a published format, for adapters.

  For `adapters.load_peft(..., names=module_names(model))` and `save_peft`. A
  map that the format stores joined with others (the state-space mixer's input
  projection, timm's qkv) has no module of its own there and is left out.

  Args:
    model: a model with a published format, its layers stacked or not.
    format: see `save_pretrained`.

  Returns:
    Names with "{layer}" for stacked layers.

  Raises:
    UserError: no format for this model.
  """
  entries: Any = pretrained.writer(model, format).key_map(model)
  names = {}
  for entry in entries:
    if entry.layout != "linear" or len(entry.paths) > 1:
      continue
    path = entry.paths[0].removesuffix("/kernel")
    name = entry.name.removesuffix(".weight")
    if "{layer}" not in name or model.scan_layers:
      names[path] = name
      continue
    stack, _, rest = path.partition("/")
    for i in range(model.num_hidden_layers):
      names[f"{stack}_{i}/{rest}"] = name.format(layer=i)
  return names
