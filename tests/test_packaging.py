"""The package, its configs, and what the documentation promises of them."""

import ast
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import shlex
import shutil
import stat
import subprocess
import sys
import types

import pytest

import multihead
from experiments import common
from multihead import models
from multihead.errors import UserError
from multihead.parallel import sharding
from multihead.train import build_model, read_config

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
  [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
)
CONFIGS = sorted(
  path
  for path in (ROOT / "configs").glob("*.py")
  if path.stem not in ("__init__", "common")
)
# Names to import -> names to install, where the two differ.
DISTRIBUTIONS = {
  "PIL": "pillow",
  "absl": "absl-py",
  "orbax": "orbax-checkpoint",
  "sklearn": "scikit-learn",
}


def _setup() -> dict:
  """The arguments that setup.py gives to setuptools."""
  given = {}
  setuptools = types.ModuleType("setuptools")
  setuptools.setup = given.update
  setuptools.find_packages = lambda include: include
  before = sys.modules.get("setuptools")
  sys.modules["setuptools"] = setuptools
  try:
    namespace = {"__file__": str(ROOT / "setup.py"), "__name__": "setup"}
    exec((ROOT / "setup.py").read_text("utf-8"), namespace)
  finally:
    sys.modules.pop("setuptools")
    if before is not None:
      sys.modules["setuptools"] = before
  return given


def _names(requirements: list[str]) -> set[str]:
  found = [re.match(r"[\w.-]+", line)[0] for line in requirements]
  return {name.lower().replace("_", "-") for name in found}


def _blocks(page: pathlib.Path, language: str) -> list[str]:
  text = page.read_text("utf-8")
  return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def _commands(page: pathlib.Path) -> list[list[str]]:
  """The commands of a page's bash blocks and tables, split into words."""
  found = []
  text = page.read_text("utf-8")
  inline = re.findall(r"`((?:python -m|make) [^`]+)`", text)
  for block in [*_blocks(page, "bash"), *inline]:
    for line in block.replace("\\\n", " ").splitlines():
      # A command may stand within the quotes of another, for another machine.
      inner = re.search(r"python -m experiments\.[^'&|]*", line)
      if inner and "--command=" in line:
        line = inner[0].replace("${HOSTNAME##*-}", "0")
      words = shlex.split(line, comments=True)
      while words and re.fullmatch(r"[A-Z_]+=.*|srun", words[0]):
        words.pop(0)
      if words:
        found.append(words)
  return found


def test_version_is_one():
  citation = (ROOT / "CITATION.cff").read_text("utf-8")
  assert _setup()["version"] == multihead.__version__
  assert f"\nversion: {multihead.__version__}\n" in citation


def test_wheel_takes_every_file():
  given = _setup()
  assert given["packages"] == ["multihead", "multihead.*"]
  suffixes = {".py"} | {
    pathlib.PurePath(pattern).suffix
    for pattern in given["package_data"]["multihead"]
  }
  left_out = [
    str(path.relative_to(ROOT))
    for path in (ROOT / "multihead").rglob("*")
    if path.is_file() and path.suffix not in suffixes | {".pyc"}
  ]
  assert not left_out


def _imports(folder: str) -> tuple[set[str], set[str]]:
  """Packages imported at the top of modules, and anywhere else in them."""
  top, inner = set(), set()
  for path in (ROOT / folder).rglob("*.py"):
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module]
      else:
        continue
      found = {name.partition(".")[0] for name in names}
      # Files of Triton kernels are imported where one is launched.
      late = path.parent.name == "triton" or path.stem == "triton_probe"
      (top if node in tree.body and not late else inner).update(found)
  own = {"multihead", "experiments", "configs", *sys.stdlib_module_names}
  return top - own, inner - own


def _distributions(packages: set[str]) -> set[str]:
  named = {DISTRIBUTIONS.get(name, name) for name in packages}
  return {name.lower().replace("_", "-") for name in named}


def test_imports_are_required_and_requirements_are_imported():
  given = _setup()
  required = _names(given["install_requires"])
  extras = set().union(*map(_names, given["extras_require"].values()))
  used = set()
  for folder in ("multihead", "experiments", "configs"):
    top, inner = map(_distributions, _imports(folder))
    # ml_dtypes comes with jax, which gives it its dtypes, and so does scipy.
    assert not top - required - {"ml-dtypes"}, f"{folder}: not in setup.py"
    with_jax = {"ml-dtypes", "jaxlib", "scipy"}
    assert not inner - required - extras - with_jax, folder
    used |= top | inner
  assert required <= used  # nothing is asked for in vain


def test_installed_requirements_are_those_of_setup():
  try:
    stated = importlib.metadata.requires("multihead")
  except importlib.metadata.PackageNotFoundError:
    pytest.skip("multihead is not installed, only on the path")
  core = [line for line in stated if "extra ==" not in line]
  assert _names(core) == _names(_setup()["install_requires"])


def test_extras():
  extras = _setup()["extras_require"]
  assert set(extras) == {
    *("gpu", "tpu", "text", "vision", "audio", "tables"),
    *("test", "parity", "notebooks", "dev"),
  }
  assert {*extras["test"], *extras["notebooks"]} < {*extras["dev"]}
  # Every text that says `pip install 'multihead[X]'` names an extra.
  for folder in ("multihead", "experiments"):
    for path in (ROOT / folder).rglob("*.py"):
      text = path.read_text("utf-8")
      named = re.findall(r"pip install '?multihead\[(\w+(?:,\w+)*)\]", text)
      for name in ",".join(named).split(","):
        assert not name or name in extras, f"{path}: multihead[{name}]"


def _variants(path: pathlib.Path) -> list[str]:
  """What a config file says it has when it is asked for what it has not."""
  try:
    common.load_config_file(f"{path}:no_such_variant")
  except UserError as error:
    found = re.search(r"the variants are ([\w., -]+)$", str(error))
    return found[1].split(", ") if found else []
  return []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_data(path):
  text = path.read_text("utf-8")
  assert len(text.splitlines()) <= 110
  imported = set().union(*_imports("configs"))
  assert imported <= {"ml_collections"}


@pytest.mark.parametrize(
  ("path", "variant"),
  [(path, variant) for path in CONFIGS for variant in _variants(path)],
  ids=lambda value: getattr(value, "stem", value),
)
def test_every_config_builds_its_model(path, variant):
  values = common.load_config_file(f"{path}:{variant}")
  if "script" in values:  # Not for experiments.train: a script of its own.
    script = importlib.import_module(f"experiments.{values.script}")
    assert script.read_config(values).model is not None
    return
  for key in (
    *("total_steps", "batch_size", "sequence_length", "seed", "data.path"),
    *("mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor"),
    *("optimizer.lr", "checkpoint.every_steps"),
  ):
    assert key in common.config_keys(values)
  config = read_config(values)
  model = build_model(config)
  count = sharding.param_count(sharding.abstract_params(model))
  assert count > 0
  if variant in models.variants(config.model.name):
    published = models.create(config.model.name, variant)
    assert count == sharding.param_count(sharding.abstract_params(published))


def test_config_variants():
  for path in CONFIGS:
    variants = _variants(path)
    assert "tiny" in variants
    if path.stem in models.list():
      values = [common.load_config_file(f"{path}:{v}") for v in variants]
      chosen = {v.model.get("variant") for v in values} | set(variants)
      assert chosen & set(models.variants(path.stem))


def test_readme_table_says_what_is_there():
  readme = (ROOT / "README.md").read_text("utf-8")
  rows = re.findall(r"^\| .*arxiv\.org/abs/.*\|$", readme, re.M)
  assert len(rows) == 16
  assert len(set(re.findall(r"abs/([\d.]+)", "".join(rows)))) == 16
  names = {path.stem for path in CONFIGS}
  for row in rows:
    _, _, file, config, status, *_ = (
      cell.strip() for cell in row.split("|")[1:]
    )
    linked = re.search(r"\(configs/(\w+)\.py\)", config)
    if "**works**" in status:
      assert "](multihead/" in file and linked and linked[1] in names
      assert (ROOT / "docs" / "systems" / f"{linked[1]}.md").is_file()
      assert (ROOT / "notebooks" / f"{linked[1]}.ipynb").is_file()
    else:
      assert status.startswith("planned") and config not in names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
  for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
    if not target.startswith("https://"):
      assert (page.parent / target).exists(), target


def test_documented_commands_exist():
  makefile = (ROOT / "Makefile").read_text("utf-8")
  targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
  extras = _setup()["extras_require"]
  scripts: dict[str, list[list[str]]] = {}
  seen = set()
  for page in PAGES:
    for words in _commands(page):
      where = f"{page.name}: {' '.join(words)}"
      seen.add(words[0])
      if words[0] == "make":
        goals = [w for w in words[1:] if "=" not in w]
        assert targets.issuperset(goals), where
      elif words[:2] == ["python", "-m"] and words[2].startswith(
        "experiments."
      ):
        scripts.setdefault(words[2], []).append(words[3:])
      elif words[:2] == ["pip", "install"]:
        named = re.findall(r"\[([\w,]+)\]", " ".join(words))
        assert not set(",".join(named).split(",")) - {"", *extras}, where
      elif words[0] == ".ci/run":
        assert (ROOT / words[0]).stat().st_mode & stat.S_IXUSR
      elif words[:3] == ["python", "-m", "pytest"]:
        _check_tests(words[3:], where)
      else:
        pytest.fail(f"a command that nothing here checks: {where}")
  assert {"make", "python", "pip"} <= seen
  assert {"experiments.train", "experiments.convert"} <= set(scripts)
  for script, calls in scripts.items():
    _parse(script, calls)


def _check_tests(arguments: list[str], where: str) -> None:
  """That a pytest command names files that are there and tests in them."""
  paths = [ROOT / argument for argument in arguments if "/" in argument]
  assert paths and all(path.exists() for path in paths), where
  if "-k" in arguments:
    files = [
      file
      for path in paths
      for file in (path.rglob("test_*.py") if path.is_dir() else [path])
    ]
    names = re.findall(
      r"^\s*(?:def|class) (\w+)",
      "\n".join(map(pathlib.Path.read_text, files)),
      re.M,
    )
    words = arguments[arguments.index("-k") + 1].split(" or ")
    found = [any(w.lower() in name.lower() for name in names) for w in words]
    assert all(found), where


def _parse(script: str, calls: list[list[str]]) -> None:
  """Gives documented flags to a script's own parser; runs nothing."""
  # Parsed flags cannot be parsed again, so that each call has a fork.
  code = """
import importlib, json, os, sys

script, calls = sys.argv[1], json.loads(sys.argv[2])
module = importlib.import_module(script)
from experiments import common

for call in calls:
  child = os.fork()
  if not child:
    sys.argv = [script, *call]  # where ml_collections looks
    common.parse_flags(sys.argv)
    if common.has_config() and hasattr(module, "read_config"):
      module.read_config(common.config_values())
    elif common.has_config():
      common.config()
    sys.stderr.flush()
    os._exit(0)
  if os.waitpid(child, 0)[1]:
    sys.exit(f"refused: {' '.join(call)}")
"""
  result = subprocess.run(
    [sys.executable, "-c", code, script, json.dumps(calls)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 0, f"{script}: {result.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_the_pages_runs(page, tmp_path):
  blocks = _blocks(page, "python")
  if not blocks:
    pytest.skip("no Python on this page")
  file = tmp_path / "page.py"
  file.write_text("\n".join(blocks), "utf-8")
  result = subprocess.run(
    [sys.executable, str(file)],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 0, result.stderr[-4000:]


def test_notebooks_hold_no_outputs():
  notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
  assert notebooks
  for path in notebooks:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] for cell in code), path.name


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
def test_make_refuses_an_old_python_in_one_line(tmp_path):
  old = tmp_path / "python"
  old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.9.1" || exit 1\n')
  old.chmod(0o755)
  result = subprocess.run(
    ["make", "test", f"PYTHON={old}", f"VENV={tmp_path}/venv"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 2
  first = result.stderr.splitlines()[0]
  assert "needs Python 3.11 or newer" in first and "Python 3.9.1" in first
  assert not (tmp_path / "venv").exists()


def test_ci_script_is_valid():
  script = ROOT / ".ci" / "run"
  assert script.stat().st_mode & stat.S_IXUSR
  subprocess.run(["bash", "-n", str(script)], check=True)
