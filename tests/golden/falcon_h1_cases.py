"""Small random Falcon-H1 models for parity: configs, weights and tokens.

Shared by the script that asks `transformers` for their logits, by the tests
that compare ours with what it stored, and by the live parity tests. Weights
come from a generator seeded by the tensor's name, so only logits are stored.
Also a float64 NumPy model, written from the equations alone: it says which
side is wrong when two disagree.
"""

import json
import math
import pathlib
import zlib

import numpy as np

VOCAB = 61
# Every multiplier differs from 1 and from every other one.
MULTIPLIERS = {
  "embedding_multiplier": 1.7,
  "lm_head_multiplier": 0.6,
  "key_multiplier": 0.75,
  "attention_in_multiplier": 1.3,
  "attention_out_multiplier": 0.85,
  "ssm_in_multiplier": 1.25,
  "ssm_out_multiplier": 0.55,
  "mlp_multipliers": [0.9, 1.15],
  "ssm_multipliers": [1.4, 0.8, 1.1, 0.7, 0.65],
}
_BASE = {
  "model_type": "falcon_h1",
  "architectures": ["FalconH1ForCausalLM"],
  "vocab_size": VOCAB,
  "hidden_size": 40,
  "intermediate_size": 56,
  "num_hidden_layers": 2,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 8,  # 6 * 8 != 40
  "mamba_d_ssm": 64,
  "mamba_n_heads": 8,
  "mamba_d_head": 8,
  "mamba_n_groups": 1,
  "mamba_d_state": 12,
  "mamba_d_conv": 4,
  "mamba_expand": 2,
  "mamba_chunk_size": 16,
  "mamba_rms_norm": False,
  "mamba_norm_before_gate": False,
  "mamba_conv_bias": True,
  "mamba_proj_bias": False,
  "projectors_bias": False,
  "attention_bias": False,
  "mlp_bias": False,
  "rms_norm_eps": 1e-5,
  "rope_theta": 1e11,
  "rope_scaling": None,
  "max_position_embeddings": 512,
  "tie_word_embeddings": False,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": 0,
  **MULTIPLIERS,
}

# Name -> (what differs, number of tokens). 37 and 45 are not multiples of 16.
_CASES = {
  "plain": ({}, 37),
  "norm_after_gate_g2": ({"mamba_n_groups": 2, "mamba_rms_norm": True}, 45),
  "norm_before_gate_g2": (
    {
      "mamba_n_groups": 2,
      "mamba_rms_norm": True,
      "mamba_norm_before_gate": True,
    },
    37,
  ),
  "norm_before_gate_g1": (
    {"mamba_rms_norm": True, "mamba_norm_before_gate": True},
    32,
  ),
  "tied_expand_g2": (
    {
      "tie_word_embeddings": True,
      "mamba_d_ssm": None,  # 2 * 40 = 8 * 10
      "mamba_d_head": "auto",
      "mamba_n_groups": 2,
      "rope_theta": 1e4,
      "num_hidden_layers": 3,
    },
    37,
  ),
  "biases_g2": (
    {
      "mamba_n_groups": 2,
      "mamba_rms_norm": True,
      "mamba_proj_bias": True,
      "projectors_bias": True,
      "attention_bias": True,
      "mlp_bias": True,
      "num_key_value_heads": 6,
    },
    45,
  ),
  "no_conv_bias_narrow": (
    {
      "mamba_conv_bias": False,
      "mamba_proj_bias": True,
      "mamba_d_conv": 2,
      "num_key_value_heads": 1,
      "mamba_n_groups": 4,
    },
    19,
  ),
  # transformers clips the step in its chunked scan and not in its decoding;
  # the whole prefill is the oracle.
  "time_step_limit": ({"time_step_limit": [0.25, 0.9]}, 37),
}
CASES = tuple(_CASES)
# Left padding of the second and third row of the batch below.
PADDING = (0, 5, 17)


def config(case: str) -> dict:
  """The content of config.json."""
  return {**_BASE, **_CASES[case][0]}


def tokens(case: str) -> np.ndarray:
  """Token ids [2, T], none of them the padding id."""
  rng = np.random.default_rng(zlib.crc32(f"tokens of {case}".encode()))
  return rng.integers(1, VOCAB, (2, _CASES[case][1])).astype(np.int32)


def padded_batch(case: str) -> tuple[np.ndarray, np.ndarray]:
  """Tokens [3, 18] with garbage at the left, and the mask of real ones."""
  rng = np.random.default_rng(zlib.crc32(f"batch of {case}".encode()))
  ids = rng.integers(1, VOCAB, (len(PADDING), 18)).astype(np.int32)
  mask = np.arange(18) >= np.array(PADDING)[:, None]
  return ids, mask


def dimensions(c: dict) -> dict[str, int]:
  """Sizes that follow from the config."""
  width = c["mamba_d_ssm"] or c["mamba_expand"] * c["hidden_size"]
  return {
    "d_ssm": width,
    "conv": width + 2 * c["mamba_n_groups"] * c["mamba_d_state"],
    "queries": c["num_attention_heads"] * c["head_dim"],
    "keys": c["num_key_value_heads"] * c["head_dim"],
  }


def shapes(c: dict) -> dict[str, tuple[int, ...]]:
  """Name and shape of every stored tensor."""
  n, d, f = dimensions(c), c["hidden_size"], c["intermediate_size"]
  heads, conv, width = c["mamba_n_heads"], n["conv"], n["d_ssm"]
  linear = {
    "self_attn.q_proj": (n["queries"], d, c["attention_bias"]),
    "self_attn.k_proj": (n["keys"], d, c["attention_bias"]),
    "self_attn.v_proj": (n["keys"], d, c["attention_bias"]),
    "self_attn.o_proj": (d, n["queries"], c["attention_bias"]),
    "mamba.in_proj": (width + conv + heads, d, c["mamba_proj_bias"]),
    "mamba.out_proj": (d, width, c["projectors_bias"]),
    "feed_forward.gate_proj": (f, d, c["mlp_bias"]),
    "feed_forward.up_proj": (f, d, c["mlp_bias"]),
    "feed_forward.down_proj": (d, f, c["mlp_bias"]),
  }
  layer: dict[str, tuple[int, ...]] = {
    "input_layernorm.weight": (d,),
    "pre_ff_layernorm.weight": (d,),
    "mamba.conv1d.weight": (conv, 1, c["mamba_d_conv"]),
    "mamba.A_log": (heads,),
    "mamba.D": (heads,),
    "mamba.dt_bias": (heads,),
  }
  if c["mamba_conv_bias"]:
    layer["mamba.conv1d.bias"] = (conv,)
  if c["mamba_rms_norm"]:
    layer["mamba.norm.weight"] = (width,)
  for name, (outputs, inputs, bias) in linear.items():
    layer[f"{name}.weight"] = (outputs, inputs)
    if bias:
      layer[f"{name}.bias"] = (outputs,)
  out = {
    "model.embed_tokens.weight": (c["vocab_size"], d),
    "model.final_layernorm.weight": (d,),
  }
  for i in range(c["num_hidden_layers"]):
    out |= {f"model.layers.{i}.{name}": s for name, s in layer.items()}
  if not c["tie_word_embeddings"]:
    out["lm_head.weight"] = (c["vocab_size"], d)
  return out


def weights(c: dict) -> dict[str, np.ndarray]:
  """All stored tensors, float32, each far from what initialisation gives."""
  return {name: _weight(name, shape) for name, shape in shapes(c).items()}


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  value = rng.standard_normal(shape)
  if "norm" in name:
    value = 1 + 0.3 * value
  elif name.endswith("A_log"):
    value = rng.uniform(-1.5, 2.0, shape)
  elif name.endswith(".D"):
    value = 0.8 + 0.5 * value
  elif name.endswith("dt_bias"):
    value = -1 + value
  elif name.endswith("conv1d.weight"):
    value = 0.5 * value
  elif name.endswith("bias"):
    value = 0.4 * value
  else:
    value = value / math.sqrt(shape[-1])
  return value.astype(np.float32)


def write_directory(
  path: pathlib.Path, case: str, dtype: np.dtype = np.float32
) -> dict[str, np.ndarray]:
  """Writes the case as a checkpoint directory; returns what it stored."""
  from safetensors.numpy import save_file

  c = config(case)
  stored = {name: w.astype(dtype) for name, w in weights(c).items()}
  path.mkdir(parents=True, exist_ok=True)
  (path / "config.json").write_text(json.dumps(c))
  save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
  return stored


def _silu(x: np.ndarray) -> np.ndarray:
  return x / (1 + np.exp(-x))


def _rms(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
  return scale * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)


def reference_logits(
  c: dict, stored: dict[str, np.ndarray], ids: np.ndarray
) -> np.ndarray:
  """Logits [T, V] of one sequence in float64, by the plain recurrence."""
  w = {name: value.astype(np.float64) for name, value in stored.items()}
  eps = c["rms_norm_eps"]

  def linear(x: np.ndarray, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

  x = w["model.embed_tokens.weight"][ids] * c["embedding_multiplier"]
  for i in range(c["num_hidden_layers"]):
    p = f"model.layers.{i}."
    u = _rms(x, w[p + "input_layernorm.weight"], eps)
    a = _attention(c, u * c["attention_in_multiplier"], linear, p)
    m = _mamba(c, u, linear, w, p)
    x = x + c["attention_out_multiplier"] * a + c["ssm_out_multiplier"] * m
    u = _rms(x, w[p + "pre_ff_layernorm.weight"], eps)
    gate, down = c["mlp_multipliers"]
    inner = _silu(gate * linear(u, p + "feed_forward.gate_proj"))
    inner = inner * linear(u, p + "feed_forward.up_proj")
    x = x + down * linear(inner, p + "feed_forward.down_proj")
  x = _rms(x, w["model.final_layernorm.weight"], eps)
  head = "model.embed_tokens" if c["tie_word_embeddings"] else "lm_head"
  return linear(x, head) * c["lm_head_multiplier"]


def _attention(c: dict, u: np.ndarray, linear, p: str) -> np.ndarray:
  t, h = len(u), c["head_dim"]
  frequency = c["rope_theta"] ** (-2 * np.arange(h // 2) / h)
  turn = np.exp(1j * np.arange(t)[:, None] * frequency)[:, None]

  def heads(name: str) -> np.ndarray:
    return linear(u, f"{p}self_attn.{name}_proj").reshape(t, -1, h)

  def rotate(v: np.ndarray) -> np.ndarray:
    v = (v[..., : h // 2] + 1j * v[..., h // 2 :]) * turn
    return np.concatenate([v.real, v.imag], -1)

  q, k, v = rotate(heads("q")), rotate(heads("k")), heads("v")
  k = k * c["key_multiplier"]
  out = np.zeros_like(q)
  for n in range(q.shape[1]):
    j = n // (q.shape[1] // k.shape[1])
    score = q[:, n] @ k[:, j].T / math.sqrt(h)
    score[np.triu_indices(t, 1)] = -np.inf
    score = np.exp(score - score.max(-1, keepdims=True))
    out[:, n] = score / score.sum(-1, keepdims=True) @ v[:, j]
  return linear(out.reshape(t, -1), f"{p}self_attn.o_proj")


def _mamba(c: dict, u: np.ndarray, linear, w: dict, p: str) -> np.ndarray:
  t, p = len(u), p + "mamba."
  heads, groups = c["mamba_n_heads"], c["mamba_n_groups"]
  state = c["mamba_d_state"]
  width = dimensions(c)["d_ssm"]
  bounds = np.cumsum([width, width, groups * state, groups * state])
  z = np.split(linear(u * c["ssm_in_multiplier"], p + "in_proj"), bounds, -1)
  z = [m * part for m, part in zip(c["ssm_multipliers"], z, strict=True)]
  gate, dt = z[0], z[4]
  mixed = np.concatenate(z[1:4], -1)
  kernel = w[p + "conv1d.weight"][:, 0]
  taps = kernel.shape[1]
  past = np.concatenate([np.zeros((taps - 1, mixed.shape[1])), mixed])
  mixed = sum(past[i : i + t] * kernel[:, i] for i in range(taps))
  mixed = _silu(mixed + w.get(p + "conv1d.bias", 0.0))
  x, b, k = np.split(mixed, bounds[1:3] - width, -1)
  x = x.reshape(t, heads, -1)
  b, k = b.reshape(t, groups, state), k.reshape(t, groups, state)
  dt = np.log1p(np.exp(dt + w[p + "dt_bias"]))
  dt = np.clip(dt, *c.get("time_step_limit", (0, np.inf)))
  decay = np.exp(-dt * np.exp(w[p + "A_log"]))
  y = np.zeros_like(x)
  for n in range(heads):
    g, s = n // (heads // groups), np.zeros((x.shape[2], state))
    for i in range(t):
      s = decay[i, n] * s + dt[i, n] * np.outer(x[i, n], b[i, g])
      y[i, n] = s @ k[i, g] + w[p + "D"][n] * x[i, n]
  y = y.reshape(t, width)
  if c["mamba_rms_norm"]:
    before = c["mamba_norm_before_gate"]
    y = y if before else y * _silu(gate)
    scale = w[p + "norm.weight"].reshape(groups, -1)
    y = _rms(y.reshape(t, groups, -1), scale, c["rms_norm_eps"])
    y = y.reshape(t, width)
    y = y * _silu(gate) if before else y
  else:
    y = y * _silu(gate)
  return linear(y, p + "out_proj")
