"""The parallel branch beside peft's LoRA, live, weights exchanged by files."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from multihead import adapters, checkpoints
from multihead.adapters import Hydra
from multihead.checkpoints.module_names import module_names

torch = pytest.importorskip(
  "torch", reason="torch is not installed: pip install 'multihead[parity]'"
)
peft = pytest.importorskip(
  "peft", reason="peft is not installed: pip install 'multihead[parity]'"
)
transformers = pytest.importorskip(
  "transformers",
  reason="transformers is not installed: pip install 'multihead[parity]'",
)

pytestmark = pytest.mark.parity
TOLERANCE = 1e-6  # of the largest output


class Ours(nn.Module):
  """The torch model below in linen."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(20, name="up")(x)
    return nn.Dense(7, name="down")(nn.tanh(x))


class Theirs(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.up = torch.nn.Linear(11, 20)
    self.down = torch.nn.Linear(20, 7)

  def forward(self, x):
    return self.down(torch.tanh(self.up(x)))


def converted(net):
  return {
    name: {
      "kernel": layer.weight.detach().numpy().T.copy(),
      "bias": layer.bias.detach().numpy().copy(),
    }
    for name, layer in (("up", net.up), ("down", net.down))
  }


def randomise(model):
  torch.manual_seed(1)
  with torch.no_grad():
    for name, value in model.named_parameters():
      if "lora_" in name:
        value.normal_(0, 0.3)


def close(found, expected, tolerance=TOLERANCE):
  expected = expected.detach().numpy()
  error = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
  print(f"max |difference| / max |output| = {error:.1e}")
  assert error <= tolerance


CONFIGS = {
  "alpha over r": dict(r=3, lora_alpha=5),
  "rank-stabilised": dict(r=4, lora_alpha=3, use_rslora=True),
  "bias of B": dict(r=2, lora_alpha=2, lora_bias=True),
  "ranks by module": dict(
    r=4, lora_alpha=8, rank_pattern={"down": 2}, alpha_pattern={"down": 3}
  ),
}


@pytest.fixture
def inputs():
  return np.random.default_rng(0).standard_normal((5, 11)).astype(np.float32)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_theirs_to_ours(config, inputs, tmp_path):
  torch.manual_seed(0)
  net = Theirs()
  params = converted(net)
  lora = peft.get_peft_model(
    net, peft.LoraConfig(target_modules=["up", "down"], **config)
  )
  randomise(lora)
  expected = lora(torch.from_numpy(inputs))
  lora.save_pretrained(tmp_path)
  adapter, ours = adapters.load_peft(tmp_path, params)
  found = adapter.apply(Ours(), params, ours, inputs)
  close(found, expected)
  merged = adapter.merge(params, ours)
  close(Ours().apply({"params": merged}, inputs), expected)
  whole = lora.merge_and_unload()
  for name, leaves in converted(whole).items():
    for leaf, value in leaves.items():
      np.testing.assert_allclose(merged[name][leaf], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stabilised", [False, True])
def test_ours_to_theirs(stabilised, inputs, tmp_path):
  torch.manual_seed(0)
  net = Theirs()
  params = converted(net)
  adapter = adapters.lora(
    ["up", "down"], r=3, alpha=7.0, rank_stabilised=stabilised
  )
  ours = adapter.init(jax.random.key(0), params)
  rng = np.random.default_rng(2)
  ours = jax.tree.map(
    lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), ours
  )
  adapters.save_peft(tmp_path, adapter, ours)
  lora = peft.PeftModel.from_pretrained(net, str(tmp_path))
  expected = lora(torch.from_numpy(inputs))
  close(adapter.apply(Ours(), params, ours, inputs), expected)
  assert (
    np.abs(
      Ours().apply({"params": params}, inputs) - expected.detach().numpy()
    ).max()
    > 0.1
  )


def test_whole_hydra_to_theirs(inputs, tmp_path):
  """Both branches and all biases, as the LoRA of the summed rank."""
  torch.manual_seed(0)
  net = Theirs()
  params = converted(net)
  adapter = Hydra(["up", "down"], 2, 3, scale=0.8, bias=True)
  ours = adapter.init(jax.random.key(0), params)
  rng = np.random.default_rng(2)
  ours = jax.tree.map(
    lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), ours
  )
  adapters.save_peft(tmp_path, *adapter.to_lora(params, ours))
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert config["r"] == 5 and config["lora_bias"]
  lora = peft.PeftModel.from_pretrained(net, str(tmp_path))
  expected = lora(torch.from_numpy(inputs))
  close(adapter.apply(Ours(), params, ours, inputs), expected, 1e-5)


def test_sequential_branch_alone(inputs):
  """A LoRA on an identity behind the frozen map reads its output."""
  torch.manual_seed(0)
  net = Theirs()
  params = converted(net)

  class Behind(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.net = net
      self.after = torch.nn.Linear(7, 7, bias=False)
      torch.nn.init.eye_(self.after.weight)

    def forward(self, x):
      return self.after(self.net(x))

  lora = peft.get_peft_model(
    Behind(), peft.LoraConfig(target_modules=["after"], r=2, lora_alpha=3)
  )
  randomise(lora)
  state = {k: v.numpy() for k, v in lora.state_dict().items()}
  prefix = "base_model.model.after.lora_"
  ours = {
    "down": {
      "seq": {
        "down": {"kernel": state[f"{prefix}A.default.weight"].T},
        "up": {"kernel": state[f"{prefix}B.default.weight"].T},
      }
    }
  }
  adapter = Hydra(["down"], r_seq=2, scale=1.5)
  found = adapter.apply(Ours(), params, ours, inputs)
  close(found, lora(torch.from_numpy(inputs)))


def test_falcon_h1(tmp_path):
  """An adapter on a transformers model, both ways, layers stacked here."""
  torch.manual_seed(0)
  config = transformers.FalconH1Config(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, mamba_n_heads=4,
    mamba_d_head=8, mamba_d_ssm=32, mamba_d_state=8, mamba_n_groups=1,
    mamba_chunk_size=8, max_position_embeddings=64,
  )  # fmt: skip
  net = transformers.FalconH1ForCausalLM(config).eval()
  net.save_pretrained(tmp_path / "base")
  model, params = checkpoints.from_pretrained(tmp_path / "base")
  names = module_names(model)
  maps = adapters.linear_maps(model)
  targets = ["q_proj", "o_proj", "down_proj"]
  lora = peft.get_peft_model(
    net, peft.LoraConfig(target_modules=targets, r=2, lora_alpha=4)
  )
  randomise(lora)
  lora.save_pretrained(tmp_path / "lora")
  ids = np.random.default_rng(0).integers(1, 61, (2, 9))
  expected = lora(input_ids=torch.from_numpy(ids)).logits
  adapter, ours = adapters.load_peft(
    tmp_path / "lora", params, names=names, maps=maps
  )
  close(adapter.apply(model, params, ours, ids), expected, 2e-5)
  adapters.save_peft(tmp_path / "again", adapter, ours, names=names)
  base = transformers.FalconH1ForCausalLM.from_pretrained(tmp_path / "base")
  again = peft.PeftModel.from_pretrained(base, str(tmp_path / "again")).eval()
  logits = again(input_ids=torch.from_numpy(ids)).logits
  torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)

  # The same file for the model with its layers one by one.
  single, split = model.unroll(params)
  adapter, ours = adapters.load_peft(
    tmp_path / "lora",
    split,
    names=module_names(single),
    maps=adapters.linear_maps(single),
  )
  close(adapter.apply(single, split, ours, ids), expected, 2e-5)
