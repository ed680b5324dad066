"""Typed, strict access to the fields of a published config.json."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from multihead.errors import UserError, nearest

# Fields that change neither weights nor logits. dtype is among them: the
# tensors say how they are stored.
INFORMATIONAL = frozenset(
  "_attn_implementation_autoset _commit_hash _name_or_path "
  "add_cross_attention attn_implementation chunk_size_feed_forward "
  "cross_attention_hidden_size decoder_start_token_id dtype finetuning_task "
  "id2label is_decoder label2id mlp_expansion_factor name_or_path "
  "num_labels num_logits_to_keep output_attentions output_hidden_states "
  "prefix problem_type pruned_heads return_dict sep_token_id "
  "task_specific_params tf_legacy_loss tie_encoder_decoder "
  "tie_last_hidden_states tokenizer_class torch_dtype torchscript "
  "transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache "
  # Settings of generation that older files keep here.
  "bad_words_ids begin_suppress_tokens diversity_penalty do_sample "
  "early_stopping encoder_no_repeat_ngram_size "
  "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id "
  "length_penalty max_length min_length no_repeat_ngram_size "
  "num_beam_groups num_beams num_return_sequences output_scores "
  "remove_invalid_values repetition_penalty return_dict_in_generate "
  "suppress_tokens temperature top_k top_p typical_p".split()
)

# Published name of an activation -> ours, see `layers.mlp.ACTIVATIONS`.
ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "quick_gelu": "quick_gelu",
  "relu": "relu",
  "silu": "silu",
  "swish": "silu",
}


@dataclasses.dataclass(frozen=True)
class Reader:
  """Typed access to the fields of one config.json.

  Attributes:
    config: the parsed file.
    source: its path, for error texts.
  """

  config: Mapping[str, Any]
  source: str

  def error(self, text: str) -> UserError:
    return UserError(f"{self.source}: {text}")

  def refuse_unknown(self, known: Collection[str]) -> None:
    """Raises UserError for a field that nothing reads."""
    if unknown := sorted(self.config.keys() - set(known)):
      names = ", ".join(f"{n!r}{nearest(n, known)}" for n in unknown)
      raise self.error(
        f"unknown field {names}. A field that is not read could change the "
        "model silently; remove it if it says nothing about the model."
      )

  def check_fixed(self, fixed: Mapping[str, Any]) -> None:
    """Raises UserError where a field is not the one value implemented."""
    for name, allowed in fixed.items():
      value = self.config.get(name, allowed)
      if value is not None and value != allowed:
        raise self.error(
          f"{name} is {value!r}; the model implements {allowed!r} only."
        )

  def architecture(self, allowed: Collection[str], default: str) -> str:
    """The one entry of `architectures`."""
    found = self.config.get("architectures") or [default]
    if len(found) != 1 or found[0] not in allowed:
      raise self.error(
        f"architectures is {found!r}; what is loaded is one of "
        f"{', '.join(allowed)}."
      )
    return found[0]

  def num_labels(self) -> int:
    """Classes of a classifier: those of id2label, or num_labels, or 2."""
    labels = self.config.get("id2label")
    if isinstance(labels, Mapping) and labels:
      return len(labels)
    return self.integer("num_labels", 2)

  def activation(self, default: str = "gelu") -> str:
    """Our name of hidden_act."""
    value = self.config.get("hidden_act", default)
    ok = isinstance(value, str) and value in ACTIVATIONS
    self._typed("hidden_act", value, f"one of {', '.join(ACTIVATIONS)}", ok)
    return ACTIVATIONS[value]

  def _typed(self, name: str, value: Any, allowed: str, ok: bool) -> Any:
    if not ok:
      raise self.error(f"{name} is {value!r}; it must be {allowed}.")
    return value

  def integer(self, name: str, default: int | None) -> int:
    value = self.config.get(name, default)
    ok = type(value) is int and value > 0
    return self._typed(name, value, "a positive integer", ok)

  def boolean(self, name: str, default: bool) -> bool:
    value = self.config.get(name, default)
    return self._typed(name, value, "true or false", type(value) is bool)

  def number(self, name: str, value: Any) -> float:
    """A float, also in the spellings of infinity that JSON lacks."""
    given = value
    if isinstance(value, Mapping) and value.keys() == {"__float__"}:
      value = value["__float__"]
    if isinstance(value, str):
      try:
        value = float(value)
      except ValueError:
        value = None
    ok = type(value) in (int, float) and not math.isnan(value)
    return float(self._typed(name, value if ok else given, "a number", ok))

  def finite(self, name: str, default: float) -> float:
    value = self.number(name, self.config.get(name, default))
    return self._typed(name, value, "finite", math.isfinite(value))

  def fraction(self, name: str, default: float) -> float:
    """A rate of dropout."""
    value = self.number(name, self.config.get(name, default))
    return self._typed(name, value, "in [0, 1)", 0 <= value < 1)

  def numbers(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    value = self.config.get(name)
    value = default if value is None else value
    ok = isinstance(value, (list, tuple)) and len(value) == len(default)
    self._typed(name, value, f"a list of {len(default)} numbers", ok)
    return tuple(self.number(name, v) for v in value)

  def image_size(self, name: str, default: int) -> int | tuple[int, int]:
    """A side, or height and width; equal ones become one number."""
    value = self.config.get(name, default)
    sides = value if isinstance(value, (list, tuple)) else [value] * 2
    ok = len(sides) == 2 and all(type(s) is int and s > 0 for s in sides)
    self._typed(name, value, "a positive integer or two of them", ok)
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])

  def token_ids(self, name: str) -> None:
    """Checks a token id, a list of them, or null."""
    value = self.config.get(name)
    ids = value if isinstance(value, list) else [value]
    ok = all(v is None or type(v) is int for v in ids)
    self._typed(name, value, "an integer, a list of them or null", ok)


def published_activation(name: str) -> str:
  """The published name of one of our activations."""
  return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == name)
