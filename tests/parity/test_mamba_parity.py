"""layers.Mamba beside the mixers of transformers and of mambapy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multihead import layers

torch = pytest.importorskip(
  "torch", reason="torch is not installed: pip install 'multihead[parity]'"
)

pytestmark = pytest.mark.parity

D, M, W = 24, 5, 3


def transformers_mixer():
  mamba = pytest.importorskip(
    "transformers.models.mamba.modeling_mamba",
    reason="transformers is not installed: pip install 'multihead[parity]'",
  )
  config = mamba.MambaConfig(
    hidden_size=D,
    state_size=M,
    expand=2,
    conv_kernel=W,
    num_hidden_layers=1,
    use_bias=True,
  )
  return mamba.MambaMixer(config, 0)


def mambapy_mixer():
  mamba = pytest.importorskip(
    "mambapy.mamba",
    reason="mambapy is not installed: pip install 'multihead[parity]'",
  )
  config = mamba.MambaConfig(
    d_model=D, n_layers=1, d_state=M, expand_factor=2, d_conv=W, bias=True
  )
  return mamba.MambaBlock(config)


def convert(state):
  """Their tensors, or their gradients, under our names."""
  state = {name: value.detach().numpy() for name, value in state.items()}
  channels = len(state["D"])
  linear = lambda w, b: {"kernel": w.T, "bias": b}
  weight, bias = state["in_proj.weight"], state["in_proj.bias"]
  x, z = (slice(0, channels), slice(channels, None))
  return {
    "x": linear(weight[x], bias[x]),
    "z": linear(weight[z], bias[z]),
    "conv": linear(state["conv1d.weight"][:, 0], state["conv1d.bias"]),
    "steering": {"kernel": state["x_proj.weight"].T},
    "dt": {"kernel": state["dt_proj.weight"].T},
    "dt_bias": state["dt_proj.bias"],
    "A_log": state["A_log"],
    "D": state["D"],
    "out": linear(state["out_proj.weight"], state["out_proj.bias"]),
  }


@pytest.mark.parametrize("make", (transformers_mixer, mambapy_mixer))
@pytest.mark.parametrize("length", (1, 130))
def test_values_and_gradients(make, length, record_property):
  torch.manual_seed(0)
  theirs = make()
  with torch.no_grad():
    for value in theirs.parameters():
      value.add_(0.1 * torch.randn_like(value))
  u = torch.randn(2, length, D, requires_grad=True)
  weight = torch.randn(2, length, D)
  out = theirs(u)
  (out * weight).sum().backward()
  ours = layers.Mamba(channels=2 * D, state_size=M, conv_width=W, use_bias=True)

  @jax.jit
  def run(params, u, weight):
    def loss(params, u):
      y, _ = ours.apply({"params": params}, u)
      return jnp.sum(y * weight), y

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, u)

  params = convert(dict(theirs.named_parameters()))
  arrays = (v.detach().numpy() for v in (u, weight))
  (_, y), (d_params, d_u) = run(params, *arrays)
  grads = {name: v.grad for name, v in theirs.named_parameters()}
  want = {"y": out.detach().numpy(), "u": u.grad.numpy()} | convert(grads)
  got = {"y": y, "u": d_u} | d_params
  worst = 0.0
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got)
  ):
    # With one token nothing has decayed: A has a gradient of zero.
    error = np.abs(a - b).max() / (np.abs(a).max() or 1)
    assert error < 2e-5, (jax.tree_util.keystr(path), error)
    worst = max(worst, error)
  record_property("worst", float(worst))
  print(f"worst |difference| / max |value| = {worst:.1e}")
