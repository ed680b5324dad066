"""What the scripts share: flags, errors in one line, loading a model."""

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from multihead import checkpoints
from multihead.data import tokenizers
from multihead.errors import UserError, nearest
from multihead.parallel import initialize_distributed
from multihead.train import NonFiniteError
from multihead.train import config as config_lib
from multihead.train import run as run_lib
from multihead.train.config import TrainConfig

FAILURE, USER_ERROR, INTERRUPTED = 1, 2, 130

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "A config file and its variant, e.g. configs/falcon_h1.py:demo. "
  "--config.KEY=VALUE, after it, changes a key.",
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run: checkpoints, metrics, report."
)
_SEED = flags.DEFINE_integer(
  "seed", None, "Seed of this run, in place of the config's.", lower_bound=0
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator_address",
  None,
  "host:port of process 0, for several processes started by hand; SLURM and "
  "TPU pods need none of these three flags.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes the job has.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "The number of this process, from 0.", lower_bound=0
)

# Packages whose INFO lines say nothing to the user of a script.
_QUIET = (f"{os.sep}orbax{os.sep}", f"{os.sep}jax{os.sep}")
# Which implementations run belongs into a log, not between a person's lines.
_QUIET_ON_TERMINAL = (os.path.join("ops", "dispatch.py"),)


def run(main: Callable[[], int | None]) -> None:
  """Runs a script: parses flags, joins processes, calls main, exits.

  A mistake of the user (UserError, an unknown flag or config key) ends in one
  line on stderr and exit code 2; training that diverged in one line and 1.

  Args:
    main: takes nothing; returns the exit code, None for 0.
  """
  try:
    app.run(lambda _: _start(main), flags_parser=parse_flags)
  except (UserError, flags.Error) as error:
    _die(str(error), USER_ERROR)
  except NonFiniteError as error:
    _die(str(error), FAILURE)
  except KeyboardInterrupt:
    _die("interrupted", INTERRUPTED)


def _start(main: Callable[[], int | None]) -> int | None:
  quiet = _QUIET + (_QUIET_ON_TERMINAL if sys.stderr.isatty() else ())
  logging.get_absl_handler().addFilter(
    lambda record: (
      record.levelno > logging.converter.STANDARD_INFO
      or not any(part in record.pathname for part in quiet)
    )
  )
  initialize_distributed(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  )
  return main()


def _die(message: str, code: int) -> None:
  # One line, whatever the libraries below have put into the message.
  line = " ".join(message.split())
  print(f"error: {line}", file=sys.stderr, flush=True)
  sys.exit(code)


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses the command line, with errors that name what to do.

  Raises:
    UserError: a flag, config file, variant or config key that does not exist,
      or a value of the wrong type.
  """
  _check_config_keys(argv)
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    raise UserError(f"{error}; --help lists the flags") from None
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(f"the config cannot be read: {error}") from None
  if len(rest) > 1:
    raise UserError(
      f"unexpected argument {rest[1]!r}; flags are written --name=value"
    )
  return rest


def _check_config_keys(argv: Sequence[str]) -> None:
  """Looks at --config and --config.KEY before ml_collections does.

  Its own errors for an unknown key or variant are a traceback.
  """
  given = [_config_argument(argv, i) for i in range(len(argv))]
  files = [value for value in given if value is not None]
  keys = [
    match.group(1)
    for argument in argv
    if (match := re.match(r"--?(?:no)?config\.([^=]+)", argument))
  ]
  if not files:
    if keys:
      raise UserError(
        f"--config.{keys[0]} needs --config=FILE.py:VARIANT before it"
      )
    return
  config = load_config_file(files[-1])
  allowed = list(config_keys(config))
  for key in keys:
    if key not in allowed:
      raise UserError(config_lib.unknown_key(key, allowed))


def _config_argument(argv: Sequence[str], index: int) -> str | None:
  name, equals, value = argv[index].partition("=")
  if name not in ("--config", "-config"):
    return None
  if equals:
    return value
  if index + 1 == len(argv):
    raise UserError("--config needs a value, e.g. configs/falcon_h1.py:demo")
  return argv[index + 1]


def load_config_file(spec: str) -> ConfigDict:
  """Runs get_config of `FILE.py` or `FILE.py:VARIANT`.

  Raises:
    UserError: no such file, no such variant, or not a config file.
  """
  path, colon, variant = spec.partition(":")
  if not os.path.isfile(path):
    folder = os.path.dirname(path) or "."
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = {os.path.join(os.path.dirname(path), n): n for n in names}
    files = [name for name in found if name.endswith(".py")]
    raise UserError(
      f"no config file {path!r}{nearest(path, files)}; scripts are run from "
      "the root of the repository"
    )
  module_spec = importlib.util.spec_from_file_location("config_file", path)
  if module_spec is None or module_spec.loader is None:
    raise UserError(f"{path!r} is not a Python file; configs end in .py")
  module = importlib.util.module_from_spec(module_spec)
  try:
    module_spec.loader.exec_module(module)
  except Exception as error:
    raise UserError(
      f"{path} cannot be run: {type(error).__name__}: {error}"
    ) from error
  if not hasattr(module, "get_config"):
    raise UserError(f"{path} has no get_config(variant)")
  try:
    return module.get_config(*([variant] if colon else []))
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(f"{path}: {error}") from error


def config_keys(config: ConfigDict, prefix: str = "") -> Sequence[str]:
  """All keys of a config, dotted; sections themselves are not among them."""
  keys = []
  for key in config:
    value = config[key]
    if isinstance(value, ConfigDict):
      keys += config_keys(value, f"{prefix}{key}.")
    else:
      keys.append(f"{prefix}{key}")
  return keys


def config() -> TrainConfig:
  """The config of the flags --config, --config.KEY and --seed.

  Raises:
    UserError: no --config, or a config that cannot be read.
  """
  return config_lib.read_config(config_values())


def config_values() -> ConfigDict:
  """The same as the file gives it, for a script whose configs are its own.

  Raises:
    UserError: no --config.
  """
  if _CONFIG.value is None:
    raise UserError(
      "--config is missing; e.g. --config=configs/falcon_h1.py:demo"
    )
  values = _CONFIG.value.copy_and_resolve_references()
  if _SEED.value is not None:
    values.seed = _SEED.value
  return values


def has_config() -> bool:
  """Whether --config was given."""
  return _CONFIG.value is not None


def seed(default: int = 0) -> int:
  """The value of --seed."""
  return default if _SEED.value is None else _SEED.value


def workdir() -> str:
  """The value of --workdir.

  Raises:
    UserError: it is missing.
  """
  if not _WORKDIR.value:
    raise UserError("--workdir is missing: the folder of the run")
  return _WORKDIR.value


def make_folder(flag: str, path: str | os.PathLike) -> None:
  """Makes the folder that a flag names, unless it is there.

  Raises:
    UserError: it cannot be made.
  """
  try:
    os.makedirs(path, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"--{flag}={path} cannot be made: {error.strerror}"
    ) from None


def say(text: str) -> None:
  """Prints a line of the script's result, on process 0."""
  if jax.process_index() == 0:
    print(text, flush=True)


def load_model(path: str, mesh: Any = None, dtype: Any = None) -> Any:
  """Loads a model for use: from a training workdir or a hub directory.

  Args:
    path: the workdir of `experiments.train`, or a Hugging Face directory.
    mesh: where the parameters shall live; None: one device.
    dtype: of the computation; None keeps the one it was made with.

  Returns:
    (model, params, tokenizer); the averaged parameters, where a run kept them.
    tokenizer is None for a model that reads no text.

  Raises:
    UserError: nothing there, or it cannot be read.
  """
  if not os.path.isfile(os.path.join(path, "config.json")):
    raise UserError(
      f"{path!r} is neither the workdir of a training run nor a Hugging Face "
      "directory: there is no config.json in it"
    )
  if not os.path.isdir(os.path.join(path, "checkpoints")):
    model, params = checkpoints.from_pretrained(
      path, mesh=mesh, compute_dtype=dtype
    )
    if not hasattr(model, "vocab_size"):
      return model, params, None
    file = os.path.join(path, "tokenizer.json")
    name = file if os.path.isfile(file) else "byte"
    return model, params, tokenizers.load(name)
  found = config_lib.read_json(os.path.join(path, "config.json"))
  model, params = run_lib.load_params(found, path, mesh=mesh)
  if dtype is not None:
    model = model.clone(dtype=jnp.dtype(dtype))
  if not hasattr(found.data, "tokenizer"):
    return model, params, None
  settings = {n: getattr(found.data, n, None) for n in ("bos", "eos")}
  spec = str(checkpoints.locate(found.data.tokenizer))
  return model, params, tokenizers.load(spec, **settings)
