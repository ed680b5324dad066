"""Every module imports where no optional package is installed."""

import subprocess
import sys

import pytest

# What the extras bring, and companions that the required packages go without.
OPTIONAL = (
  "IPython",
  "PIL",
  "beartype",
  "hypothesis",
  "jax_triton",
  "mambapy",
  "nbformat",
  "peft",
  "pytest",
  "sentencepiece",
  "sklearn",
  "soundfile",
  "tensorboard",
  "tensorflow",
  "timm",
  "tokenizers",
  "torch",
  "transformers",
  "triton",
)

_BLOCK = f"""
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in {OPTIONAL!r}:
      raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
"""


def _run(code: str) -> str:
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
  )
  assert result.returncode == 0, result.stderr[-4000:]
  return result.stdout


def test_every_module_imports_without_optional_packages():
  # The names come from the files, so a folder that lacks its __init__.py and
  # would be left out of the wheel is found too.
  out = _run(
    _BLOCK
    + """
import importlib, pathlib
import multihead

root = pathlib.Path(multihead.__file__).parent
names = []
for path in sorted(root.rglob("*.py")):
  parts = path.relative_to(root.parent).with_suffix("").parts
  if parts[-1] == "__init__":
    parts = parts[:-1]
  names.append(".".join(parts))
for name in names:
  # The kernels' own files, which are imported where one is launched.
  kernels = name.endswith((".triton.kernels", ".triton.parts", ".triton_probe"))
  try:
    module = importlib.import_module(name)
  except ModuleNotFoundError as error:
    assert kernels and error.name == "triton", name
    continue
  assert not kernels, name
  assert module.__file__, f"{name} is a folder without an __init__.py"
print(len(names))
"""
  )
  assert int(out) > 20


def test_scripts_import_without_optional_packages():
  _run(
    _BLOCK
    + """
import importlib, os, pathlib, sys

for path in sorted(pathlib.Path("experiments").rglob("*.py")):
  if path.stem == "__init__":
    continue
  child = os.fork()  # two scripts may have a flag of the same name
  if not child:
    importlib.import_module(".".join(path.with_suffix("").parts))
    os._exit(0)
  if os.waitpid(child, 0)[1]:
    sys.exit(f"{path} cannot be imported")
"""
  )


def test_the_block_blocks():
  # Otherwise the tests above would prove nothing.
  with pytest.raises(AssertionError, match="No module named 'tokenizers'"):
    _run(_BLOCK + "import tokenizers")


@pytest.mark.parametrize(
  "statement",
  ["import multihead", "from multihead import models, ops, generation"],
)
def test_library_import_leaves_heavy_packages_alone(statement):
  out = _run(
    f"""
import sys
{statement}
heavy = "matplotlib tensorboardX grain torch transformers tokenizers".split()
print([name for name in heavy if name in sys.modules])
"""
  )
  assert out.strip() == "[]"
