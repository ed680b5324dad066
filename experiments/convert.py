r"""Converts weights between training runs and Hugging Face directories.

  python -m experiments.convert --workdir=RUN --output=DIRECTORY --check
  python -m experiments.convert --checkpoint=DIRECTORY --workdir=RUN \
    --config=configs/falcon_h1.py:0.5b --check

The first writes the weights of a run for `transformers` and others to load, or
for timm (--format=timm). The second makes a run that starts from the weights of
the directory; train it further with `experiments.train` and the same config and
workdir. --check loads the directory there and compares the logits.

Of an mhs_vm, --checkpoint and --output are a .safetensors file of the authors'
names; multihead/checkpoints/mhs_vm.py says how to make one of their pickles.
"""

import importlib
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from experiments import common
from multihead import checkpoints
from multihead.cache import snapshots
from multihead.checkpoints import mhs_vm
from multihead.errors import UserError
from multihead.train import run as run_lib
from multihead.train import state as state_lib
from multihead.train import writers
from multihead.train.checkpoints import Checkpoints

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "The Hugging Face directory (or file) to make a run of."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "The Hugging Face directory (or file) to write."
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16", "float16"],
  "Of the weights in --output; that of the run if unset.",
)
_FORMAT = flags.DEFINE_enum(
  "format",
  None,
  ["transformers", "timm"],
  "Of the directory in --output; if unset, the first that has the model.",
)
_CHECK = flags.DEFINE_bool(
  "check", False, "Compare the logits with those of transformers or timm."
)

# Ends of the names of fields that say how to train, not what is computed.
_TRAINING_ONLY = ("_rate", "dropout", "_dropout_prob")
# Of the largest logit; float32 on both sides, in different orders of summation.
_TOLERANCE = 1e-4


def main() -> int:
  """Converts, and checks the result if asked to."""
  logging.set_verbosity(logging.WARNING)
  if (_CHECKPOINT.value is None) == (_OUTPUT.value is None):
    raise UserError(
      "give --workdir and --output to write a Hugging Face directory, or "
      "--checkpoint, --workdir and --config to read one"
    )
  if _is_file(_CHECKPOINT.value or _OUTPUT.value) and _CHECK.value:
    raise UserError(
      "--check compares with transformers or timm, which have no mhs_vm; leave "
      "it out"
    )
  if _CHECKPOINT.value is None:
    directory, (model, params) = _OUTPUT.value, _write_directory()
  else:
    directory, (model, params) = _CHECKPOINT.value, _write_run()
  if not _CHECK.value:
    return 0
  return _check(directory, model, params)


def _is_file(path: str) -> bool:
  """Whether a path names a file of weights and no directory."""
  return pathlib.Path(path).suffix in (".safetensors", *mhs_vm.PICKLES)


def _write_directory() -> tuple:
  workdir, output = common.workdir(), pathlib.Path(_OUTPUT.value)
  if _is_file(output):
    return _write_file(workdir, output)
  if output.exists() and any(output.iterdir()):
    raise UserError(f"--output={output} is not empty; give a new directory")
  model, params, tokenizer = common.load_model(workdir)
  text = {}
  has_file = tokenizer is not None and tokenizer.name != "byte"
  if tokenizer is not None:
    text["special_tokens"] = checkpoints.SpecialTokens(
      bos=tokenizer.bos_id, eos=(tokenizer.eos_id,)
    )
  if has_file:
    text["tokenizer_files"] = os.path.dirname(tokenizer.name)
  checkpoints.save_pretrained(
    output, model, params, dtype=_DTYPE.value, format=_FORMAT.value, **text
  )
  common.say(f"wrote {output}")
  if tokenizer is not None and not has_file:
    common.say(
      f"it has no tokenizer: ids 0 to 255 are bytes, {tokenizer.bos_id} begins "
      f"a text and {tokenizer.eos_id} ends it"
    )
  return model, params


def _write_file(workdir: str, output: pathlib.Path) -> tuple:
  if output.suffix != ".safetensors":
    raise UserError(f"--output={output}: files are written as .safetensors")
  if output.exists() or not output.parent.is_dir():
    raise UserError(
      f"--output={output}: give a new file in a folder that exists"
    )
  for name in ("dtype", "format"):
    if flags.FLAGS[name].value is not None:
      raise UserError(f"--{name} is for directories; {output} is a file")
  model, params, _ = common.load_model(workdir)
  _only_mhs_vm(str(output), model, f"--workdir={workdir}")
  mhs_vm.save(output, model, params)
  common.say(f"wrote {output}")
  return model, params


def _write_run() -> tuple:
  workdir, config = common.workdir(), common.config()
  folder = os.path.join(workdir, "checkpoints")
  if os.path.exists(folder):
    raise UserError(f"{folder} exists; give the --workdir of a new run")
  run = run_lib.prepare(config)
  if _is_file(_CHECKPOINT.value):
    model, params = _read_file(run)
  else:
    model, params = checkpoints.from_pretrained(
      _CHECKPOINT.value, dtype="float32", mesh=run.mesh
    )
  _compare_models(model, run.task.model)
  if _is_file(_CHECKPOINT.value):
    params = jax.device_put(params, run.task.param_shardings(run.mesh))
  if not getattr(run.task.model, "scan_layers", True):
    model, params = model.unroll(params)
  state = state_lib.init_state(
    lambda rng, mesh: params,
    run.optimizer,
    run.shardings,
    seed=config.seed,
    mesh=run.mesh,
    ema=config.ema_decay > 0,
  )
  # Training takes a checkpoint of step 0 for none at all.
  state = state.replace(step=jax.device_put(jnp.int32(1), run.shardings.step))
  position = iter(run.task.train_iterator(*run.rows)).get_state()
  saved = Checkpoints(folder)
  saved.save(1, state, position, config.to_dict())
  saved.close()
  if writers.is_main_process():
    path = os.path.join(workdir, "config.json")
    writers.write_json(path, config.to_dict())
  common.say(f"wrote {folder}; experiments.train goes on from it")
  return model, params


def _only_mhs_vm(path: str, model, where: str) -> None:
  if not isinstance(model, mhs_vm.MHSVM):
    raise UserError(
      f"{path}: files are of mhs_vm; {where} has a {type(model).__name__}, "
      "which is kept in directories"
    )


def _read_file(run) -> tuple:
  wanted = run.task.model
  _only_mhs_vm(_CHECKPOINT.value, wanted, "--config")
  # What the weights do not tell is as the config says.
  untold = ("img_size", "threshold", "routes", "scale_free", "remat",
            "scan_implementation")  # fmt: skip
  return mhs_vm.load(
    _CHECKPOINT.value, **{name: getattr(wanted, name) for name in untold}
  )


def _compare_models(found, wanted) -> None:
  """Raises UserError where the two are not the same function."""
  differ = [
    f"{name} is {theirs} there and {ours} in the config"
    for name, theirs in snapshots.architecture(found).items()
    if name != "dtype"
    and not name.endswith(_TRAINING_ONLY)
    and theirs != (ours := snapshots.architecture(wanted).get(name))
  ]
  if differ:
    raise UserError(
      f"{_CHECKPOINT.value} is not the model of --config: {'; '.join(differ)}"
    )


def _check(directory: str | pathlib.Path, model, params) -> int:
  """Compares with transformers or timm; returns the exit code."""
  try:
    import torch
  except ImportError:
    raise UserError(
      "--check needs torch: pip install 'multihead[parity]'"
    ) from None
  # What is compared is the arithmetic, so both sides are in float32.
  model = model.clone(dtype=jnp.float32)
  if _DTYPE.value is not None:
    stored = jnp.dtype(_DTYPE.value)
    params = jax.tree.map(lambda x: x.astype(stored), params)
  params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  inputs, unit = _inputs(model)
  ours = np.asarray(jax.jit(model.apply)({"params": params}, inputs))
  net, name = _reference(pathlib.Path(directory), model)
  with torch.inference_mode():
    if unit == "images":
      inputs = inputs.transpose(0, 3, 1, 2)
    out = net.eval()(torch.from_numpy(inputs))
  theirs = getattr(out, "logits", out)
  if hasattr(theirs, "last_hidden_state"):
    theirs = theirs.last_hidden_state
    theirs = theirs[:, 0] if unit == "images" else theirs
  theirs = theirs.numpy()
  error = np.abs(ours - theirs).max() / np.abs(theirs).max()
  same = (ours.argmax(-1) == theirs.argmax(-1)).mean()
  common.say(
    f"{name}: largest difference of logits {error:.2e} of the largest logit; "
    f"the likeliest output is the same at {same:.2%} of {theirs[..., 0].size} "
    f"{unit}"
  )
  if error <= _TOLERANCE:
    return 0
  common.say(f"that is more than {_TOLERANCE:.0e}: the conversion is wrong")
  return 1


def _inputs(model) -> tuple[np.ndarray, str]:
  """What both sides read, and what an output belongs to."""
  rng = np.random.default_rng(0)
  if hasattr(model, "image_shape"):
    shape = (8, *model.image_shape, model.in_chans)
    return rng.normal(size=shape).astype(np.float32), "images"
  length = min(150, getattr(model, "max_length", model.max_position_embeddings))
  # Low ids may be special: a padding id counts no position in RoBERTa.
  low = min(5, model.vocab_size - 1)
  tokens = rng.integers(low, model.vocab_size, (2, length))
  causal = hasattr(model, "init_cache")
  texts = not causal and model.num_labels
  return tokens, "texts" if texts else "positions"


def _reference(directory: pathlib.Path, model) -> tuple:
  """The directory's model in the library that its format is of."""
  config = json.loads((directory / "config.json").read_text("utf-8"))
  library = "timm" if "architecture" in config else "transformers"
  try:
    package = importlib.import_module(library)
  except ImportError as error:
    raise UserError(
      f"--check needs {error.name}: pip install 'multihead[parity]'"
    ) from None
  name = f"{library} {package.__version__}"
  if library == "timm":
    return package.create_model(f"local-dir:{directory}", pretrained=True), name
  package.logging.set_verbosity_error()
  package.logging.disable_progress_bar()
  cls = getattr(package, config["architectures"][0])
  return cls.from_pretrained(directory, dtype="float32"), name


if __name__ == "__main__":
  common.run(main)
