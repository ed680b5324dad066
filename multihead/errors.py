"""The exception that command-line scripts turn into one line and exit 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """A mistake in what the user gave: a flag, a config, a file, a checkpoint.

  The message is one line that says what was given, what is allowed and what to
  do. Scripts print it without a traceback and exit with code 2.
  """


def nearest(name: str, allowed: Iterable[str]) -> str:
  """Returns ' (did you mean X?)' for the closest allowed name, or ''."""
  match = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
  return f" (did you mean {match[0]!r}?)" if match else ""
