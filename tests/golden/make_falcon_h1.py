"""Writes falcon_h1_*.npz: logits of small models by `transformers`.

Run `python tests/golden/make_falcon_h1.py` where torch and transformers are
installed. Each file has `logits` [2, T, V] of the whole prefill of
`falcon_h1_cases.tokens`, and `padded_logits` [3, 18, V] of the rows of
`padded_batch`, each row run alone without its padding (transformers leaks
padding into the state when the projection of the mixer has a bias), zeros at
padding. Before writing, the script compares them with the float64 model of
`falcon_h1_cases` and with transformers' own cached decoding.
"""

import pathlib
import sys

import falcon_h1_cases as cases
import numpy as np
import torch
import transformers


def model_of(case: str) -> transformers.FalconH1ForCausalLM:
  """The model of a case in float32, with the case's weights."""
  config = transformers.FalconH1Config(**cases.config(case))
  model = transformers.FalconH1ForCausalLM(config).eval()
  stored = {
    name: torch.from_numpy(value)
    for name, value in cases.weights(cases.config(case)).items()
  }
  result = model.load_state_dict(stored, strict=False)
  tied = ["lm_head.weight"] if config.tie_word_embeddings else []
  if result.unexpected_keys or result.missing_keys != tied:
    raise ValueError(f"{case}: tensors do not fit: {result}")
  model.tie_weights()
  return model


@torch.no_grad()
def logits_of(model, ids: np.ndarray) -> np.ndarray:
  """Logits [B, T, V] of a whole prefill."""
  return model(torch.from_numpy(ids).long()).logits.numpy()


@torch.no_grad()
def decoded_logits_of(model, ids: np.ndarray, prefix: int = 1) -> np.ndarray:
  """Logits [B, T, V] with a cache: a prefix, then token by token."""
  ids = torch.from_numpy(ids).long()
  parts = [ids[:, :prefix], *ids[:, prefix:].split(1, dim=1)]
  cache, out = None, []
  for part in parts:
    result = model(part, past_key_values=cache, use_cache=True)
    cache = result.past_key_values
    out.append(result.logits.numpy())
  return np.concatenate(out, axis=1)


def padded_logits_of(model, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Logits of every row run alone without its padding; zeros at padding."""
  out = np.zeros((*ids.shape, cases.VOCAB), np.float32)
  for row, keep, into in zip(ids, mask, out, strict=True):
    into[keep] = logits_of(model, row[keep][None])[0]
  return out


def main() -> None:
  torch.set_num_threads(2)
  folder = pathlib.Path(__file__).parent
  for case in cases.CASES:
    c = cases.config(case)
    model, ids = model_of(case), cases.tokens(case)
    logits = logits_of(model, ids)
    weights = cases.weights(c)
    exact = np.stack([cases.reference_logits(c, weights, row) for row in ids])
    scale = np.abs(exact).max()
    decoded = decoded_logits_of(model, ids)
    print(
      f"{case:20} max |logit| {scale:6.2f}  from float64: prefill "
      f"{np.abs(logits - exact).max() / scale:.1e}  decoding "
      f"{np.abs(decoded - exact).max() / scale:.1e}"
    )
    if np.abs(logits - exact).max() > 1e-5 * scale:
      sys.exit(f"{case}: transformers and the float64 model disagree")
    padded = padded_logits_of(model, *cases.padded_batch(case))
    np.savez(
      folder / f"falcon_h1_{case}.npz", logits=logits, padded_logits=padded
    )


if __name__ == "__main__":
  main()
