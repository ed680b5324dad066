"""Runs command lines of the scripts, and makes a run without training one."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax

from experiments import common
from multihead.train import config as config_lib
from multihead.train import run as run_lib
from multihead.train import state as state_lib
from multihead.train.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
TINY = "configs/falcon_h1.py:tiny"

# Each command line is run in a fork of a process that has imported the scripts
# once: importing takes far longer than finding a mistake.
_RUNNER = textwrap.dedent("""
  import importlib, json, os, sys, traceback
  folder, hidden = sys.argv[1], json.loads(sys.argv[2])
  for name in hidden:
    sys.modules[name] = None  # as if it were not installed
  cases = json.load(sys.stdin)
  modules = {
    name: importlib.import_module(f"experiments.{name}") for name, _ in cases
  }
  for i, (script, arguments) in enumerate(cases):
    pid = os.fork()
    if not pid:
      for stream, name in ((1, "out"), (2, "err")):
        file = os.open(f"{folder}/{i}.{name}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, stream)
      sys.argv = [script, *arguments]
      code = 0
      try:
        modules[script].common.run(modules[script].main)
      except SystemExit as error:
        code = error.code or 0
      except BaseException:
        traceback.print_exc()
        code = 77
      sys.stdout.flush()
      os._exit(code)
    _, status = os.waitpid(pid, 0)
    with open(f"{folder}/{i}.code", "w") as file:
      file.write(str(os.waitstatus_to_exitcode(status)))
""")


def run_scripts(folder, *cases, hidden=()):
  """Exit code, stdout and stderr of each (script, *arguments).

  Args:
    folder: for files of the runner; not used before.
    *cases: the script's name and its arguments.
    hidden: packages that shall seem not installed.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True)
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  # Compiling costs these tiny models more than running.
  environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
  subprocess.run(
    [sys.executable, "-c", _RUNNER, str(folder), json.dumps(hidden)],
    input=json.dumps([(script, rest) for script, *rest in cases]).encode(),
    cwd=ROOT,
    env=environment,
    timeout=300,
    check=True,
  )
  read = lambda i, name: (folder / f"{i}.{name}").read_text()
  return [
    (int(read(i, "code")), read(i, "out"), read(i, "err"))
    for i in range(len(cases))
  ]


def assert_mistakes(folder, cases):
  """Each command line ends in one line with its text, and exit code 2."""
  found = run_scripts(folder, *cases.values())
  for (text, arguments), (code, _, errors) in zip(
    cases.items(), found, strict=True
  ):
    lines = [line for line in errors.splitlines() if "error" in line.lower()]
    assert code == 2, (arguments, code, errors)
    assert len(lines) == 1, (arguments, errors)
    assert text in lines[0], (arguments, lines)


@functools.cache
def tiny_config(spec=TINY):
  """The smallest training config."""
  os.chdir(ROOT)
  return config_lib.read_config(common.load_config_file(spec))


def make_run(workdir, spec=TINY):
  """Leaves in workdir what an interrupted training leaves; returns params."""
  config = tiny_config(spec)
  run = run_lib.prepare(config, devices=jax.devices()[:1])
  state = state_lib.init_state(
    run.task.init_params,
    run.optimizer,
    run.shardings,
    seed=0,
    mesh=run.mesh,
  )
  # Logits that lie apart, so that greedy text is the same in any order of sums.
  params = jax.tree.map(lambda leaf: leaf * 3, state.params)
  saved = Checkpoints(os.path.join(workdir, "checkpoints"))
  saved.save(3, state.replace(params=params), {}, config.to_dict())
  saved.close()
  path = pathlib.Path(workdir) / "config.json"
  path.write_text(json.dumps(config.to_dict()))
  return run.task.model, params
