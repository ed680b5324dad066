"""Checks an installed wheel against the repository that it was built from.

Usage: python -I check_wheel.py REPOSITORY, from outside of the repository.
"""

import importlib
import pathlib
import pkgutil
import sys

import multihead


def main() -> None:
  """Exits with what is missing, or prints what was found."""
  repository = pathlib.Path(sys.argv[1]) / "multihead"
  installed = pathlib.Path(multihead.__file__).parent
  if installed == repository:
    sys.exit(f"this is the repository, not an installed wheel: {installed}")

  def files(root: pathlib.Path) -> set[str]:
    return {
      str(path.relative_to(root))
      for path in root.rglob("*")
      if path.is_file() and path.suffix not in (".pyc", ".md")
    }

  missing = sorted(files(repository) - files(installed))
  if missing:
    sys.exit(f"the wheel lacks {', '.join(missing)}")

  modules = [
    info.name
    for info in pkgutil.walk_packages(multihead.__path__, "multihead.")
  ]
  for name in modules:
    try:
      importlib.import_module(name)
    except ModuleNotFoundError as error:
      # Triton's kernels are imported where there is a GPU to launch them.
      kernels = name.endswith(
        (".triton.kernels", ".triton.parts", ".triton_probe")
      )
      if not kernels or error.name != "triton":
        raise

  from multihead import models
  from multihead.parallel import sharding

  for name in models.list():
    sharding.abstract_params(models.create(name))
  print(
    f"wheel {multihead.__version__} in {installed}: {len(modules)} modules "
    f"import; models: {', '.join(models.list())}"
  )


if __name__ == "__main__":
  main()
