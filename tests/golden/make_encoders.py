"""Writes encoders.npz: outputs of the models of encoder_cases.

Run `python tests/golden/make_encoders.py` where torch, timm and transformers
are installed. For each case the file has the logits (hidden states where there
is no classifier), and the name and shape of every stored tensor, as JSON.
"""

import json
import pathlib

import encoder_cases as cases
import numpy as np
import timm
import torch
import transformers


def model_of(case: str) -> torch.nn.Module:
  """The model of a case, in float64, with its weights."""
  config = dict(cases.CASES[case])
  if "architecture" in config:
    net = timm.create_model(
      config["architecture"],
      num_classes=config["num_classes"],
      **config["model_args"],
    )
  else:
    (cls,) = config.pop("architectures")
    kind = "Bert" if config.pop("model_type") == "bert" else "Roberta"
    settings = getattr(transformers, f"{kind}Config")(**config)
    net = getattr(transformers, cls)(settings)
  state = {
    name: torch.from_numpy(cases.value(name, tuple(tensor.shape)))
    for name, tensor in net.state_dict().items()
  }
  net.load_state_dict(state)
  return net.double().eval()


@torch.no_grad()
def output_of(case: str, net: torch.nn.Module) -> np.ndarray:
  """Logits or last hidden states."""
  if "architecture" in cases.CASES[case]:
    x = torch.from_numpy(cases.images().transpose(0, 3, 1, 2)).double()
    return net(x).numpy()
  tokens, mask = cases.texts(cases.CASES[case].get("pad_token_id", 0))
  out = net(
    input_ids=torch.from_numpy(tokens).long(),
    attention_mask=torch.from_numpy(mask).long(),
  )
  out = out.logits if "logits" in out else out.last_hidden_state
  return out.numpy()


def main() -> None:
  """Computes every case and writes the file."""
  arrays = {}
  for case in cases.CASES:
    net = model_of(case)
    shapes = {n: list(t.shape) for n, t in net.state_dict().items()}
    arrays[case] = output_of(case, net).astype(np.float32)
    arrays[f"{case}_shapes"] = np.array(json.dumps(shapes))
    print(case, arrays[case].shape, np.abs(arrays[case]).max())
  path = pathlib.Path(__file__).parent / "encoders.npz"
  np.savez_compressed(path, **arrays)


if __name__ == "__main__":
  main()
