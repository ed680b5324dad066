r"""Continues a prompt; the text appears as it is made.

  python -m experiments.generate --workdir=/tmp/falcon_h1 --prompt="The class"
  python -m experiments.generate --checkpoint=Falcon-H1-0.5B-Instruct \
    --prompt_file=question.txt --dtype=bfloat16 --temperature=0.1

The model is that of a training run (--workdir) or of a Hugging Face directory
(--checkpoint). The text goes to stdout, everything else to stderr.
"""

import pathlib
import sys
import time

import jax
import numpy as np
from absl import flags, logging

from experiments import common
from multihead import checkpoints, generation, parallel
from multihead.errors import UserError

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A Hugging Face directory, in place of --workdir."
)
_PROMPT = flags.DEFINE_string("prompt", None, "The text to continue.")
_PROMPT_FILE = flags.DEFINE_string(
  "prompt_file", None, "A file with the text to continue; - reads stdin."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 256, "Tokens to make at most.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature",
  0.8,
  "0 takes the likeliest token each time; more is more varied.",
  lower_bound=0,
)
_TOP_K = flags.DEFINE_integer(
  "top_k", None, "Draw among the k likeliest tokens.", lower_bound=1
)
_TOP_P = flags.DEFINE_float(
  "top_p", None, "Draw among the likeliest tokens that hold this probability."
)
_PREFILL_CHUNK = flags.DEFINE_integer(
  "prefill_chunk",
  None,
  "Read a long prompt in pieces of so many tokens, to save memory.",
  lower_bound=1,
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16"],
  "Of the computation; by default that of the training or the checkpoint.",
)
_TENSOR = flags.DEFINE_integer(
  "tensor", 1, "Devices that share the heads of the model.", lower_bound=1
)
_ECHO = flags.DEFINE_bool("echo", True, "Print the prompt before the text.")


def main() -> None:
  """Loads the model, reads the prompt, prints what follows it."""
  # Which operation runs where would stand in the middle of the text.
  logging.set_verbosity(logging.WARNING)
  if _TOP_P.value is not None and not 0 < _TOP_P.value <= 1:
    raise UserError(f"--top_p={_TOP_P.value} must be above 0 and at most 1")
  prompt = _prompt()
  mesh = _mesh()
  path = _CHECKPOINT.value or common.workdir()
  model, params, tokenizer = common.load_model(path, mesh, _DTYPE.value)
  if not hasattr(model, "init_cache"):
    raise UserError(
      f"{path} holds a {type(model).__name__}, which makes no text; "
      "experiments.evaluate scores it"
    )
  ids = list(tokenizer.encode(prompt))
  eos = tokenizer.eos_id
  if _CHECKPOINT.value is None:
    # As in training: a document begins with bos.
    ids.insert(0, tokenizer.bos_id)
  else:
    special = checkpoints.read_special_tokens(path)
    eos = special.eos or eos
    if not ids:
      ids = [tokenizer.bos_id if special.bos is None else special.bos]
  if _ECHO.value:
    print(prompt, end="", flush=True)
  stream = generation.TextStream(tokenizer.decode)
  times = [time.perf_counter()]
  counts = [0]

  def show(new: np.ndarray) -> None:
    times.append(time.perf_counter())
    counts.append(new.shape[1])
    print(stream.add(new[0]), end="", flush=True)

  generation.generate(
    model,
    params,
    np.asarray([ids], np.int32),
    max_new_tokens=_MAX_NEW_TOKENS.value,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    eos_id=eos,
    rng=jax.random.key(common.seed()),
    prefill_chunk=_PREFILL_CHUNK.value,
    callback=show,
  )
  print(stream.finish(), flush=True)
  line = f"{len(ids)} tokens read, {sum(counts)} made; the first after "
  line += f"{times[1] - times[0]:.1f} s (with compilation)"
  if len(times) > 2:
    rate = sum(counts[2:]) / (times[-1] - times[1])
    line += f", then {rate:.1f} a second"
  print(line, file=sys.stderr)


def _prompt() -> str:
  if _PROMPT.value is not None and _PROMPT_FILE.value is not None:
    raise UserError("give --prompt or --prompt_file, not both")
  if _PROMPT_FILE.value is None:
    return _PROMPT.value or ""
  try:
    if _PROMPT_FILE.value == "-":
      return sys.stdin.buffer.read().decode("utf-8")
    return pathlib.Path(_PROMPT_FILE.value).read_text(encoding="utf-8")
  except OSError as error:
    raise UserError(
      f"--prompt_file={_PROMPT_FILE.value} cannot be read: {error.strerror}"
    ) from None
  except UnicodeDecodeError as error:
    raise UserError(
      f"--prompt_file={_PROMPT_FILE.value} is not UTF-8: {error}"
    ) from None


def _mesh() -> jax.sharding.Mesh | None:
  tensor = _TENSOR.value
  if tensor == 1:
    return None
  if tensor > jax.device_count():
    raise UserError(
      f"--tensor={tensor} needs as many devices; there are {jax.device_count()}"
    )
  return parallel.make_mesh(
    data=1, tensor=tensor, devices=jax.devices()[:tensor]
  )


if __name__ == "__main__":
  common.run(main)
