"""Small ViT and BERT models whose every stored value follows from a rule.

Tensor by tensor, from its name and shape alone: what makes the golden logits
and what tests them need to share no weights.
"""

import json
import math
import pathlib
import zlib

import numpy as np
from safetensors.numpy import save_file

_VIT = {
  "img_size": [24, 16],
  "patch_size": 8,
  "embed_dim": 12,
  "depth": 2,
  "num_heads": 3,
  "mlp_ratio": 2,
  "in_chans": 2,
}
_BERT = dict(
  vocab_size=40, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
  intermediate_size=20, max_position_embeddings=16,
)  # fmt: skip


def _timm(architecture: str, classes: int = 5, **arguments) -> dict:
  return {
    "architecture": architecture,
    "num_classes": classes,
    "model_args": {**_VIT, **arguments},
    "pretrained_cfg": {},
  }


# The config.json of each case.
CASES = {
  "vit_plain": _timm("vit_tiny_patch16_224"),
  "vit_distilled": _timm("deit_tiny_distilled_patch16_224"),
  "vit_deit3": _timm("deit3_small_patch16_224", init_values=0.5),
  "vit_registers": _timm("vit_medium_patch16_reg4_gap_256", init_values=0.5),
  "vit_clip": _timm("vit_base_patch32_clip_quickgelu_224"),
  "bert": {
    **_BERT,
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "num_labels": 3,
  },
  "roberta": {
    **_BERT,
    "model_type": "roberta",
    "architectures": ["RobertaModel"],
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu_new",
    "type_vocab_size": 1,
    "pad_token_id": 1,
  },
}


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The tensor of that name: near 1 for the weights of a norm, else near 0."""
  index = np.arange(math.prod(shape), dtype=np.float64)
  phase = zlib.crc32(name.encode()) % 1000
  wave = np.sin(0.37 * index + phase) + 0.3 * np.sin(0.013 * index * index)
  if len(shape) == 1:
    scale, norm = 0.3, "norm" in name.lower() and name.endswith("weight")
  else:
    scale, norm = 1.5 / math.sqrt(math.prod(shape[1:])), False
  if name.endswith(("embeddings.weight", "pos_embed", "token")):
    scale = 0.7
  return (scale * wave + norm).reshape(shape).astype(np.float32)


def images() -> np.ndarray:
  """Two images [2, height, width, channels] for the ViT cases."""
  shape = (2, *_VIT["img_size"], _VIT["in_chans"])
  index = np.arange(math.prod(shape), dtype=np.float64)
  waves = np.sin(0.1 * index) + 0.5 * np.cos(0.031 * index)
  return waves.reshape(shape).astype(np.float32)


def texts(padding: int) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and mask of a text of 9 and one of 5 tokens."""
  tokens = 2 + (np.arange(18).reshape(2, 9) * 7) % 38
  mask = np.arange(9) < np.array([[9], [5]])
  return np.where(mask, tokens, padding).astype(np.int32), mask


def write_directory(path: pathlib.Path, case: str, shapes: dict) -> None:
  """Writes config.json and the weights, given the names and shapes."""
  config = path / "config.json"
  config.write_text(json.dumps(CASES[case]), "utf-8")
  tensors = {name: value(name, shape) for name, shape in shapes.items()}
  save_file(tensors, path / "model.safetensors")
