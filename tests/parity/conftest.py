"""timm beside a torch of another build than torchvision's."""

import importlib
import importlib.util
import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def torchvision_operators():
  """Lets torchvision be imported beside a CPU build of torch.

  A torchvision built for CUDA registers nothing with a torch built without,
  and then fails while it is imported, for want of operators that no model here
  uses; timm and parts of transformers import it.
  """
  if not importlib.util.find_spec("torchvision"):
    yield
    return
  torch = pytest.importorskip("torch")
  library = None
  try:
    importlib.import_module("torchvision")
  except RuntimeError as error:
    if "torchvision::" not in str(error):
      raise
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
      del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
      library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
    importlib.import_module("torchvision")
  yield library  # the operators live as long as it does
