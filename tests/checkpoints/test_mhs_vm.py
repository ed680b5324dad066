"""The authors' weights: their names and layouts, and what they compute."""

import flax.traverse_util
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from multihead import models
from multihead.checkpoints import mhs_vm
from multihead.errors import UserError
from tests.layers import scan_reference as reference

C, S, M, R, LETTERS = 16, 4, 3, 1, "CXSZ"


def engine(prefix, width, rank):
  return {
    f"{prefix}x_proj_weight": (4, rank + 2 * M, width),
    f"{prefix}dt_projs_weight": (4, width, rank),
    f"{prefix}dt_projs_bias": (4, width),
    f"{prefix}A_logs": (4 * width, M),
    f"{prefix}Ds": (4 * width,),
  }


def norm(name, width):
  return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(prefix, width, heads):
  """Names and shapes of a block."""
  inner = width if heads else 2 * width
  mixer = f"{prefix}.self_attention."
  shapes = {
    **norm(f"{prefix}.ln_1", width),
    f"{mixer}in_proj.weight": (2 * inner, width),
    f"{mixer}conv2d.weight": (inner, 1, 3, 3),
    f"{mixer}conv2d.bias": (inner,),
    **norm(f"{mixer}out_norm", inner),
  }
  if not heads:
    shapes[f"{mixer}out_proj.weight"] = (width, inner)
    return shapes | engine(mixer, inner, -(-width // 16))
  sub = width // heads
  shapes |= {
    f"{mixer}mhs.x_ssproj_W": (heads * sub, width),
    f"{mixer}mhs.x_ssproj.weight": (heads * sub, width),
    **norm(f"{mixer}mhs.cat_norm", heads * sub),
    f"{mixer}mhs.y_proj.weight": (width, heads * sub),
  }
  for letter in LETTERS[:heads]:
    for name in ("mambaeng", "scanning.seq2seq_engine"):
      prefix = f"{mixer}mhs.scanhead_{letter}.{name}."
      shapes |= engine(prefix, sub, -(-sub // 16))
  return shapes


def state_dict(heads, seed=0):
  """A network of two stages, with a block in the first and the last."""
  rng = np.random.default_rng(seed)
  shapes = {
    "patch_embed.proj.weight": (C, 3, 4, 4),
    "patch_embed.proj.bias": (C,),
    **norm("patch_embed.norm", C),
    **block("layers.0.blocks.0", C, heads),
    **norm("layers.0.downsample.norm", 4 * C),
    "layers.0.downsample.reduction.weight": (2 * C, 4 * C),
    **block("layers.1.blocks.0", 2 * C, heads),
    **block("layers_up.0.blocks.0", 2 * C, heads),
    "layers_up.1.upsample.expand.weight": (4 * C, 2 * C),
    **norm("layers_up.1.upsample.norm", C),
    **block("layers_up.1.blocks.0", C, heads),
    "final_up.expand.weight": (4 * C, C),
    **norm("final_up.norm", C // 4),
    "final_conv.weight": (2, C // 4, 1, 1),
    "final_conv.bias": (2,),
  }
  tensors = {
    f"vmunet.{name}": rng.normal(size=shape).astype(np.float32) / 2
    for name, shape in shapes.items()
  }
  for name in tensors:
    other = name.replace("x_ssproj_W", "x_ssproj.weight")
    other = other.replace("scanning.seq2seq_engine", "mambaeng")
    tensors[name] = tensors[other]
  return tensors


def forward(tensors, x, heads):
  """The network on one image [height, width, 3], in the authors' layouts."""
  w = {n.removeprefix("vmunet."): v.astype(float) for n, v in tensors.items()}

  def layer_norm(x, name):
    p = {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}
    return reference.layer_norm(p, x)

  def linear(x, name):
    return x @ w[f"{name}.weight"].T

  def spread(x, p):
    rows, columns, channels = x.shape
    out = np.zeros((rows * p, columns * p, channels // p**2))
    for a in range(p):
      for b in range(p):
        size = channels // p**2
        first = (a * p + b) * size
        out[a::p, b::p] = x[..., first : first + size]
    return out

  def scans(x, prefix, route, order):
    """Four scans of x [height, width, S], as in the authors' engine."""
    width = x.shape[-1]
    A = -np.exp(w[f"{prefix}A_logs"]).reshape(4, width, M)
    D = w[f"{prefix}Ds"].reshape(4, width)
    ys = []
    for k, (number, backwards) in enumerate(order):
      path = reference.paths(route, *x.shape[:2])[number]
      rows, columns = np.array(path[::-1] if backwards else path).T
      u = x[rows, columns]
      steering = np.einsum("ld,cd->lc", u, w[f"{prefix}x_proj_weight"][k])
      rank = w[f"{prefix}dt_projs_weight"].shape[-1]
      low, B, C = np.split(steering, [rank, rank + M], axis=-1)
      delta = np.einsum("lr,dr->ld", low, w[f"{prefix}dt_projs_weight"][k])
      delta = np.log1p(np.exp(delta + w[f"{prefix}dt_projs_bias"][k]))
      h, y = np.zeros((width, M)), np.zeros_like(x)
      for t in range(len(u)):
        h = h * np.exp(delta[t][:, None] * A[k])
        h = h + (delta[t] * u[t])[:, None] * B[t]
        y[rows[t], columns[t]] = h @ C[t] + D[k] * u[t]
      ys.append(y)
    return np.stack(ys)

  def mix(x, prefix):
    if not heads:
      order = ((0, False), (1, False), (0, True), (1, True))
      return scans(x, prefix, "Z", order).sum(0)
    prefix = f"{prefix}mhs."
    order = ((0, False), (0, True), (1, False), (1, True))
    parts = np.split(linear(x, f"{prefix}x_ssproj"), heads, axis=-1)
    out = []
    for part, letter in zip(parts, LETTERS):
      ys = scans(part, f"{prefix}scanhead_{letter}.mambaeng.", letter, order)
      out.append(ys.sum(0) * reference.gate(ys, 0.25))
    y = layer_norm(np.concatenate(out, axis=-1), f"{prefix}cat_norm")
    return linear(y, f"{prefix}y_proj")

  def stage(f, name):
    prefix = f"{name}.blocks.0.self_attention."
    x, z = np.split(
      linear(layer_norm(f, f"{name}.blocks.0.ln_1"), f"{prefix}in_proj"), 2, -1
    )
    kernel = w[f"{prefix}conv2d.weight"][:, 0].transpose(1, 2, 0)
    p = {"kernel": kernel, "bias": w[f"{prefix}conv2d.bias"]}
    y = mix(reference.silu(reference.depthwise(p, x)), prefix)
    y = layer_norm(y, f"{prefix}out_norm") * reference.silu(z)
    return f + (y if heads else linear(y, f"{prefix}out_proj"))

  rows, columns = x.shape[0] // 4, x.shape[1] // 4
  patches = x.reshape(rows, 4, columns, 4, 3)
  x = np.einsum("iajbc,dcab->ijd", patches, w["patch_embed.proj.weight"])
  x = layer_norm(x + w["patch_embed.proj.bias"], "patch_embed.norm")
  x = stage(x, "layers.0")
  corners = x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]
  x = layer_norm(np.concatenate(corners, -1), "layers.0.downsample.norm")
  skip = x = linear(x, "layers.0.downsample.reduction")
  x = stage(stage(x, "layers.1"), "layers_up.0") + skip
  x = spread(linear(x, "layers_up.1.upsample.expand"), 2)
  x = stage(layer_norm(x, "layers_up.1.upsample.norm"), "layers_up.1")
  # The last expansion is to pixels, four times as many a side.
  x = layer_norm(spread(linear(x, "final_up.expand"), 4), "final_up.norm")
  x = np.einsum("hwc,kc->hwk", x, w["final_conv.weight"][..., 0, 0])
  return x + w["final_conv.bias"]


@pytest.mark.parametrize("heads", [4, 0])
def test_weights_compute_what_the_authors_modules_do(heads, tmp_path):
  tensors = state_dict(heads)
  save_file(tensors, tmp_path / "best.safetensors")
  model, params = mhs_vm.load(
    tmp_path / "best.safetensors", threshold=0.25, img_size=16
  )
  assert (model.heads, model.num_classes, model.state_size) == (heads, 2, M)
  assert model.depths == model.depths_decoder == (1, 1)
  x = np.random.default_rng(1).normal(size=(1, 16, 24, 3)).astype(np.float32)
  found = jax.jit(model.apply)({"params": params}, x)[0]
  want = forward(tensors, x[0].astype(float), heads)
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
  # And back, every name and bit.
  mhs_vm.save(tmp_path / "again.safetensors", model, params)
  again = load_file(tmp_path / "again.safetensors")
  assert again.keys() == tensors.keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(again[name], value, err_msg=name)


@pytest.mark.parametrize("variant, count", [
  ("mhs_vm_4_heads", 17_257_129),
  ("mhs_vm_3_heads_no_projection", 14_250_601),
  ("vm_unet", 27_427_561),
])  # fmt: skip
def test_published_sizes_round_trip(variant, count):
  from multihead.parallel import sharding

  model = models.create("mhs_vm", variant)
  shapes = flax.traverse_util.flatten_dict(
    sharding.abstract_params(model), sep="/"
  )
  params = {n: np.zeros(x.shape, np.int8) for n, x in shapes.items()}
  tensors = mhs_vm.to_tensors(
    model, flax.traverse_util.unflatten_dict(params, sep="/")
  )
  once = {
    name: value
    for name, value in tensors.items()
    if not name.endswith("x_ssproj_W") and "seq2seq_engine" not in name
  }
  assert sum(value.size for value in once.values()) == count
  fields = mhs_vm.model_fields(
    {name: value.shape for name, value in tensors.items()}, "x"
  )
  assert models.create("mhs_vm", **fields) == model


def test_what_a_profiler_and_a_wrapper_leave(tmp_path):
  tensors = state_dict(3)
  wrapped = {f"module.{name}": value for name, value in tensors.items()}
  wrapped["module.vmunet.total_ops"] = np.zeros(1, np.float32)
  save_file(wrapped, tmp_path / "x.safetensors")
  model, params = mhs_vm.load(tmp_path / "x.safetensors")
  assert model.heads == 3
  back = mhs_vm.to_tensors(model, jax.device_get(params))
  assert back.keys() == tensors.keys()


def test_halves_are_read_as_the_model_keeps_them(tmp_path):
  tensors = {n: x.astype(np.float16) for n, x in state_dict(3).items()}
  save_file(tensors, tmp_path / "x.safetensors")
  model, params = mhs_vm.load(tmp_path / "x.safetensors")
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
  back = mhs_vm.to_tensors(model, jax.device_get(params))
  for name, value in tensors.items():
    np.testing.assert_array_equal(back[name], value)


def test_files_that_cannot_be_used(tmp_path):
  (tmp_path / "best.pth").write_bytes(b"PK")
  with pytest.raises(UserError, match="best.pth: a pickle"):
    mhs_vm.load(tmp_path / "best.pth")
  file = tmp_path / "x.safetensors"
  save_file({"a": np.zeros(2, np.float32)}, file)
  with pytest.raises(UserError, match="no weights of MHS-VM"):
    mhs_vm.load(file)
  tensors = state_dict(4)
  head = "vmunet.layers.1.blocks.0.self_attention.mhs.scanhead_S.mambaeng.Ds"
  for change, text in (
    ({head: np.zeros(3, np.float32)}, "differ; they are one tensor"),
    ({"vmunet.final_conv.bias": np.zeros(3, np.float32)}, "final_conv.bias is"),
    ({"vmunet.pos_embed": np.zeros(3, np.float32)}, "1 unexpected"),
  ):
    save_file(tensors | change, file)
    with pytest.raises(UserError, match=text):
      mhs_vm.load(file)
  del tensors["vmunet.patch_embed.norm.weight"]
  save_file(tensors, file)
  with pytest.raises(UserError, match="1 missing: vmunet.patch_embed.norm"):
    mhs_vm.load(file)


def test_models_that_the_authors_do_not_have():
  for fields in (
    dict(heads=2), dict(scale_free=True), dict(threshold=None),
    dict(routes=("C",) * 4), dict(in_chans=5),
  ):  # fmt: skip
    with pytest.raises(UserError, match=next(iter(fields))):
      mhs_vm.to_tensors(models.create("mhs_vm", **fields), {})
