"""Falcon-H1 beside a live `transformers.FalconH1ForCausalLM` in float32."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from multihead import checkpoints
from multihead.checkpoints import falcon_h1, hub_format

torch = pytest.importorskip(
  "torch", reason="torch is not installed: pip install 'multihead[parity]'"
)
transformers = pytest.importorskip(
  "transformers",
  reason="transformers is not installed: pip install 'multihead[parity]'",
)
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "golden"))
import falcon_h1_cases as cases  # noqa: E402
import make_falcon_h1 as theirs  # noqa: E402

pytestmark = pytest.mark.parity

TOLERANCE = 2e-5  # of the largest logit
# transformers clips the step in its chunked scan, not in its decoding.
DECODABLE = [case for case in cases.CASES if case != "time_step_limit"]


@pytest.fixture(scope="module", autouse=True)
def two_threads():
  before = torch.get_num_threads()
  torch.set_num_threads(2)
  yield
  torch.set_num_threads(before)


def load(path):
  """transformers' model of a directory, in float32."""
  model = transformers.FalconH1ForCausalLM.from_pretrained(
    path, dtype=torch.float32
  )
  return model.eval()


def check(record, ours, expected, name, tolerance=TOLERANCE):
  error = np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max()
  record(name, float(error))
  print(f"{name}: max |difference| / max |logit| = {error:.1e}")
  assert error <= tolerance


@pytest.mark.parametrize("case", cases.CASES)
def test_import(case, tmp_path, record_property):
  """Their directory, loaded by us: prefill, padding, cache."""
  reference = theirs.model_of(case)
  reference.save_pretrained(tmp_path)
  model, params = checkpoints.from_pretrained(tmp_path)
  apply = jax.jit(
    lambda ids, mask=None, cache=None: model.apply(
      {"params": params}, ids, mask, cache=cache
    )
  )
  ids = cases.tokens(case)
  prefill = theirs.logits_of(reference, ids)
  check(record_property, apply(ids), prefill, f"{case} prefill")

  batch, mask = cases.padded_batch(case)
  expected = theirs.padded_logits_of(reference, batch, mask)
  name = f"{case} left padding"
  ours = np.asarray(apply(batch, mask))
  check(record_property, ours[mask], expected[mask], name)

  expected = prefill
  if case in DECODABLE:
    expected = theirs.decoded_logits_of(reference, ids, prefix=7)
  logits, cache = apply(ids[:, :7], None, model.init_cache(2, 48))
  parts = [logits]
  for i in range(7, ids.shape[1]):
    logits, cache = apply(ids[:, i : i + 1], None, cache)
    parts.append(logits)
  ours = np.concatenate(parts, axis=1)
  check(record_property, ours, expected, f"{case} decoding")


@pytest.mark.parametrize("case", cases.CASES)
def test_export(case, tmp_path, record_property):
  """A directory of ours, loaded by transformers: same logits, same bits."""
  stored = cases.write_directory(tmp_path / "source", case)
  model, params = checkpoints.from_pretrained(tmp_path / "source")
  tokens = checkpoints.read_special_tokens(tmp_path / "source")
  saved = tmp_path / "saved"
  size = 30_000 if case == "biases_g2" else 5 * 10**9  # many files, or one
  checkpoints.save_pretrained(
    saved, model, params, max_shard_size=size, special_tokens=tokens
  )
  assert (len(list(saved.glob("*.safetensors"))) > 1) == (case == "biases_g2")
  reference = load(saved)
  state = reference.state_dict()
  for name, value in stored.items():
    np.testing.assert_array_equal(state[name].numpy(), value, err_msg=name)
  ids = cases.tokens(case)
  ours = jax.jit(model.apply)({"params": params}, ids)
  expected = theirs.logits_of(reference, ids)
  check(record_property, ours, expected, f"{case} export")
  if case != "tied_expand_g2":  # there d_ssm is spelled out by us
    wanted = theirs.model_of(case).config.to_dict()
    found = reference.config.to_dict()
    for key in ("transformers_version", "_name_or_path", "dtype"):
      wanted.pop(key, None), found.pop(key, None)
    ours_only = {"rope_theta", "attn_layer_indices", "mamba_use_mlp"}
    assert {k: v for k, v in found.items() if k not in ours_only} == {
      k: v for k, v in wanted.items() if k not in ours_only
    }


def test_bfloat16_checkpoint(tmp_path, record_property):
  """Stored in bfloat16, loaded as float32 by both: the same float32 model."""
  case = "norm_after_gate_g2"
  reference = theirs.model_of(case).to(torch.bfloat16)
  reference.save_pretrained(tmp_path)
  model, params = checkpoints.from_pretrained(tmp_path)
  assert {x.dtype for x in jax.tree.leaves(params)} == {
    np.dtype(ml_dtypes.bfloat16)
  }
  ids = cases.tokens(case)
  exact = theirs.logits_of(load(tmp_path), ids)
  float_model, float_params = checkpoints.from_pretrained(tmp_path, "float32")
  ours = jax.jit(float_model.apply)({"params": float_params}, ids)
  check(record_property, ours, exact, "bfloat16 read as float32")

  # Computed in bfloat16, ours is about as far from float32 as theirs.
  with torch.no_grad():
    half = reference(torch.from_numpy(ids).long()).logits.float().numpy()
  ours = np.asarray(jax.jit(model.apply)({"params": params}, ids))
  assert ours.dtype == np.float32
  scale = np.abs(exact).max()
  error, their_error = (
    np.sqrt(np.mean((x - exact) ** 2)) / scale for x in (ours, half)
  )
  record_property("bfloat16 rms error, ours and theirs", (error, their_error))
  print(f"bfloat16 rms error: ours {error:.1e}, theirs {their_error:.1e}")
  assert error <= 1.5 * their_error


@pytest.mark.parametrize("case", ["biases_g2", "tied_expand_g2"])
def test_gradients(case, tmp_path, record_property):
  """d loss / d parameter for every parameter, beside torch's autograd."""
  reference = theirs.model_of(case).train()
  cases.write_directory(tmp_path, case)
  model, params = checkpoints.from_pretrained(tmp_path)
  ids = cases.tokens(case)

  def loss_fn(params):
    logits = model.apply({"params": params}, ids)[:, :-1]
    chosen = jnp.take_along_axis(
      jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1
    )
    return -chosen.mean()

  loss, gradients = jax.jit(jax.value_and_grad(loss_fn))(params)
  logits = reference(torch.from_numpy(ids).long()).logits[:, :-1]
  expected = torch.nn.functional.cross_entropy(
    logits.reshape(-1, cases.VOCAB),
    torch.from_numpy(ids[:, 1:]).long().reshape(-1),
  )
  expected.backward()
  assert abs(float(loss) - float(expected.detach())) < 1e-6
  ours = {
    tensor.name: tensor.make()
    for tensor in hub_format.tensors_to_write(
      model, gradients, falcon_h1.key_map(model)
    )
  }
  worst = {}
  for name, parameter in reference.named_parameters():
    gradient = parameter.grad.numpy()
    error = np.abs(ours[name] - gradient).max() / np.abs(gradient).max()
    worst[name] = float(error)
  assert worst.keys() == ours.keys()
  name = max(worst, key=worst.get)
  record_property("worst gradient", (name, worst[name]))
  print(f"{case}: worst gradient {name} {worst[name]:.1e}")
  assert worst[name] < 1e-4
