"""torchvision beside a torch of another build, before any test imports it.

A torchvision built for CUDA registers nothing with a torch built without, and
then fails while it is imported, for want of operators that no model here uses;
timm, peft and parts of transformers import it.
"""

import importlib
import importlib.util
import sys


def _import_torchvision():
  """What keeps the operators alive that torchvision asks for, or None."""
  packages = ("torch", "torchvision")
  if not all(importlib.util.find_spec(name) for name in packages):
    return None
  import torch

  try:
    importlib.import_module("torchvision")
    return None
  except RuntimeError as error:
    if "torchvision::" not in str(error):
      raise
  for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
    del sys.modules[name]
  library = torch.library.Library("torchvision", "DEF")
  for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
  importlib.import_module("torchvision")
  return library


_OPERATORS = _import_torchvision()
