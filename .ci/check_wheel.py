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
    importlib.import_module(name)

  import jax

  from multihead import models

  for name in models.list():
    model = models.create(name)
    tokens = jax.ShapeDtypeStruct((1, 8), "int32")
    jax.eval_shape(model.init, jax.random.key(0), tokens)
  print(
    f"wheel {multihead.__version__} in {installed}: {len(modules)} modules "
    f"import; models: {', '.join(models.list())}"
  )


if __name__ == "__main__":
  main()
