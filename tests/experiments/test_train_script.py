"""The scripts from the outside: exit codes, one line for a mistake, results."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from configs import common as common_config
from configs import falcon_h1
from multihead import checkpoints, tasks
from multihead.parallel import sharding
from multihead.train import config as config_lib

ROOT = pathlib.Path(__file__).parents[2]
TINY = "--config=configs/falcon_h1.py:tiny"
SMALLER = [
  "--config.total_steps=6",
  "--config.log_every_steps=2",
  "--config.checkpoint.every_steps=4",
  "--config.eval.sample_tokens=8",
]

# Runs many command lines, each in a fork of a process that has imported the
# scripts once: importing takes far longer than finding a mistake.
_RUNNER = textwrap.dedent("""
  import importlib, json, os, sys
  from experiments import common, evaluate, train
  for i, (script, arguments) in enumerate(json.load(sys.stdin)):
    pid = os.fork()
    if not pid:
      for stream, name in ((1, "out"), (2, "err")):
        file = os.open(f"{sys.argv[1]}/{i}.{name}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, stream)
      sys.argv = [script, *arguments]
      module = {"train": train, "evaluate": evaluate}[script]
      try:
        common.run(module.main)
      except SystemExit as error:
        sys.stdout.flush()
        os._exit(error.code or 0)
      except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(77)
    _, status = os.waitpid(pid, 0)
    with open(f"{sys.argv[1]}/{i}.code", "w") as file:
      file.write(str(os.waitstatus_to_exitcode(status)))
""")


def run_scripts(folder, *cases):
  """Exit code, stdout and stderr of each (script, arguments)."""
  folder = pathlib.Path(folder)
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  # Compiling costs these tiny models more than running.
  environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
  environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
  environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  (folder / "cases").mkdir(exist_ok=True)
  subprocess.run(
    [sys.executable, "-c", _RUNNER, str(folder / "cases")],
    input=json.dumps(cases).encode(),
    cwd=ROOT,
    env=environment,
    timeout=300,
    check=True,
  )
  read = lambda i, name: (folder / "cases" / f"{i}.{name}").read_text()
  return [
    (int(read(i, "code")), read(i, "out"), read(i, "err"))
    for i in range(len(cases))
  ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """A small text of one's own."""
  folder = tmp_path_factory.mktemp("corpus")
  rng = np.random.default_rng(0)
  words = "the a state head layer of and with in runs scans reads".split()
  for i in range(8):
    lines = [" ".join(rng.choice(words, 9)) + "." for _ in range(40)]
    (folder / f"{i}.txt").write_text("\n".join(lines))
  return str(folder)


def test_mistakes_get_one_line_and_exit_code_2(tmp_path, corpus):
  work = f"--workdir={tmp_path}/run"
  small = [TINY, work, f"--config.data.path={corpus}"]
  (tmp_path / "latin.txt").write_bytes("naïve text ".encode("latin-1") * 99)
  (tmp_path / "empty").mkdir()
  cases = {
    "did you mean 'optimizer.lr'": [*small, "--config.optimizer.l=1"],
    "the variants are tiny, demo": ["--config=configs/falcon_h1.py:tny", work],
    "(did you mean 'configs/falcon_h1.py'?)": ["--config=configs/falcon.py"],
    "--config is missing": [work],
    "--workdir is missing": [TINY],
    "needs --config=FILE.py:VARIANT": ["--config.total_steps=3", work],
    "invalid literal for int": [*small, "--config.batch_size=many"],
    "Unknown command line flag 'wrkdir'": [TINY, "--wrkdir=x"],
    "unexpected argument 'now'": [*small, "now"],
    "falcon_h1 has no variant '0.5'": [*small, "--config.model.variant=0.5"],
    "needs 3": [*small, "--config.mesh.fsdp=3"],
    "it must be one of adamw": [*small, "--config.optimizer.name=adam"],
    "no such file or folder": [*small[:2], "--config.data.path=/nowhere"],
    "not UTF-8": [*small[:2], f"--config.data.path={tmp_path}/latin.txt"],
    f"{tmp_path}/empty": [*small[:2], f"--config.data.path={tmp_path}/empty"],
    "longer than the 16384 positions": [
      *small,
      "--config.sequence_length=16385",
    ],
    "coordinator_address, num_processes and process_id go": [
      *small,
      "--num_processes=2",
    ],
  }
  cases = {message: ("train", given) for message, given in cases.items()}
  cases["no config at"] = ("evaluate", [f"--workdir={tmp_path}/none"])
  cases["--workdir is missing: "] = ("evaluate", [])
  results = run_scripts(tmp_path, *cases.values())
  for message, (code, _, err) in zip(cases, results, strict=True):
    assert code == 2, (message, err)
    lines = err.strip().split("\n")
    # What the libraries log comes before; the error is the last line.
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert message in lines[-1]
    assert "Traceback" not in err


def test_train_goes_on_and_evaluate_reads_it(tmp_path, corpus):
  workdir = tmp_path / "run"
  train = [
    *(TINY, f"--workdir={workdir}", f"--config.data.path={corpus}"),
    *(*SMALLER, "--seed=3"),
  ]
  longer = [*train, "--config.total_steps=8"]
  wider = [*longer, "--config.model.hidden_size=16"]
  first, again, more, evaluated, other = run_scripts(
    tmp_path,
    ("train", train),
    ("train", train),
    ("train", longer),
    ("evaluate", [f"--workdir={workdir}", "--batch_size=3"]),
    ("train", wider),
  )
  for code, _, err in (first, again, more, evaluated):
    assert code == 0, err
  code, out, _ = first
  config = falcon_h1.get_config("tiny")
  shown = json.loads(out[: out.index("\n}\n") + 2])
  assert shown["seed"] == 3
  assert shown["model"]["hidden_size"] == config.model.hidden_size
  for text in (
    *("devices: 1 x ", "mesh: data=1, ", " parameters", "| **this model**"),
    *("| gzip", "| markov 5", "A sample of the model:", "report.md"),
  ):
    assert text in out
  assert "| validation" not in out
  assert "all 6 steps were made and reported already" in again[2]
  assert "continuing from step 6" in more[2]
  metrics = json.loads((workdir / "metrics.json").read_text())
  assert metrics["steps"] == 8
  assert metrics["step_compilations"] == 1
  found = json.loads((workdir / "evaluation.json").read_text())
  for name in ("validation_bits_per_byte", "gzip_bits_per_byte", "parameters"):
    assert found[name] == pytest.approx(metrics[name], rel=1e-5)
  assert "| markov 2" in evaluated[1]
  code, _, err = other
  assert code == 2
  assert "it is of another model or optimizer" in err
  assert "params/" in err.strip().split("\n")[-1]


def test_evaluate_reads_a_hub_directory(tmp_path, corpus):
  config = config_lib.read_config(falcon_h1.get_config("tiny"))
  model = config_lib.build_model(config)
  params = sharding.init_params(model, jax.random.key(0))
  # Not the logits of an untrained model, which are all alike.
  params["lm_head"]["kernel"] *= 20.0
  hub = str(tmp_path / "hub")
  checkpoints.save_pretrained(hub, model, params)
  output = str(tmp_path / "result.json")
  given = [f"--checkpoint={hub}", f"--output={output}", TINY]
  given.append(f"--config.data.path={corpus}")
  ((code, out, err),) = run_scripts(tmp_path, ("evaluate", given))
  assert code == 0, err
  assert "| markov 1" in out
  task = tasks.create(
    "language_modelling",
    model,
    tasks.LanguageModelling.data_config(path=corpus),
    sequence_length=config.sequence_length,
    batch_size=config.batch_size,
  )
  compute = jax.jit(task.eval_fn)
  sums = [compute(params, batch) for batch in task.eval_iterator()]
  total = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), 0), *sums)
  found = json.loads(pathlib.Path(output).read_text())
  want = task.summarise(total)
  for name, value in want.items():
    assert found[f"validation_{name}"] == pytest.approx(value, rel=1e-5)


class ConfigsTest(parameterized.TestCase):
  @parameterized.parameters(
    *("tiny", "demo", "small", "tiny-90m", "0.5b", "1.5b", "1.5b-deep"),
    *("3b", "7b", "34b"),
  )
  def test_every_variant_is_read_and_makes_a_model(self, variant):
    config = config_lib.read_config(falcon_h1.get_config(variant))
    model = config_lib.build_model(config)
    assert model.vocab_size >= 258
    abstract = sharding.abstract_params(model)
    assert abstract["embed"]["embedding"].shape[0] == model.vocab_size
    axes = config.mesh
    for size in (
      *(model.num_key_value_heads, model.mamba_n_heads, model.vocab_size),
    ):
      assert size % axes.tensor == 0
    assert config.batch_size % axes.fsdp == 0

  def test_unknown_variant(self):
    with pytest.raises(ValueError, match="did you mean '0.5b'"):
      falcon_h1.get_config("0.5")

  def test_files_are_short(self):
    for file in (ROOT / "configs").glob("[!_]*.py"):
      if file.name == "common.py":  # what the others share
        continue
      assert len(file.read_text().split("\n")) <= 120, file

  def test_fields_left_open_keep_the_model(self):
    config = falcon_h1.get_config("0.5b")
    read = config_lib.read_config(config)
    assert read.model.overrides == {}
    config.model.num_hidden_layers = 4
    assert (
      config_lib.build_model(config_lib.read_config(config)).num_hidden_layers
      == 4
    )

  def test_common_sections_are_locked_against_slips(self):
    config = common_config.training()
    config.lock()
    with pytest.raises(AttributeError):
      config.optimizer.learning_rate = 1.0
