"""`experiments.generate` from the outside."""

import numpy as np
import pytest

from multihead import checkpoints, generation
from multihead.data import tokenizers
from tests.experiments.scripts import assert_mistakes, make_run, run_scripts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  return workdir, *make_run(workdir)


def test_text_is_that_of_the_library(run, tmp_path):
  workdir, model, params = run
  prompt = "naïve ☃"
  (tmp_path / "prompt.txt").write_text(prompt, encoding="utf-8")
  special = checkpoints.SpecialTokens(bos=256, eos=(257,))
  checkpoints.save_pretrained(
    tmp_path / "hub", model, params, special_tokens=special
  )
  options = ["--max_new_tokens=20", "--temperature=0"]
  from_run, from_hub, drawn, other = run_scripts(
    tmp_path / "cases",
    (
      "generate",
      f"--workdir={workdir}",
      f"--prompt={prompt}",
      "--prefill_chunk=4",
      *options,
    ),
    (
      "generate",
      f"--checkpoint={tmp_path}/hub",
      f"--prompt_file={tmp_path}/prompt.txt",
      "--noecho",
      *options,
    ),
    *(
      ("generate", f"--workdir={workdir}", f"--seed={seed}", options[0])
      for seed in (1, 2)
    ),
  )
  tokenizer = tokenizers.ByteTokenizer()
  for before, (code, out, err), shown in (
    ([256], from_run, prompt),
    ([], from_hub, ""),
  ):
    ids = np.array([[*before, *tokenizer.encode(prompt)]])
    wanted = generation.generate(
      model, params, ids, max_new_tokens=20, eos_id=257
    )
    text = shown + tokenizer.decode(wanted[0, ids.shape[1] :])
    assert code == 0, err
    assert out == text + "\n"
    assert f"{ids.shape[1]} tokens read" in err
  assert drawn[0] == other[0] == 0
  assert drawn[1] != other[1]


def test_mistakes_get_one_line_and_exit_code_2(run, tmp_path):
  workdir = f"--workdir={run[0]}"
  (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
  (tmp_path / "long.txt").write_text("x" * 20_000)
  cases = {
    "--workdir is missing": [],
    "neither the workdir": ["--workdir=/nowhere"],
    "not both": [workdir, "--prompt=a", "--prompt_file=b"],
    "cannot be read": [workdir, "--prompt_file=/nowhere/x.txt"],
    "not UTF-8": [workdir, f"--prompt_file={tmp_path}/latin.txt"],
    "max_position_embeddings": [workdir, f"--prompt_file={tmp_path}/long.txt"],
    "--top_p=2.0": [workdir, "--top_p=2"],
    "temperature": [workdir, "--temperature=-1"],
    "--tensor=99": [workdir, "--tensor=99"],
    "Unknown command line flag 'promt'": [workdir, "--promt=a"],
  }
  assert_mistakes(
    tmp_path / "cases",
    {text: ("generate", *arguments) for text, arguments in cases.items()},
  )
