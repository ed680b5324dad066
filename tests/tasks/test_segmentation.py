"""The segmentation task: losses, sums, baselines, what it leaves behind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from multihead import models, tasks
from multihead.errors import UserError
from multihead.metrics import segmentation as metrics
from multihead.tasks import adaptation, otsu, segmentation, segmentation_figures
from multihead.train import config as config_lib
from multihead.train import run as run_lib

MODEL = dict(
  img_size=16, embed_dim=16, depths=(2,), depths_decoder=(0,), patch_size=4,
  state_size=2, heads=2, threshold=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Twelve dark discs on a bright, noisy ground, four for validation."""
  root = tmp_path_factory.mktemp("discs")
  rng = np.random.default_rng(0)
  rows, columns = np.mgrid[:16, :16]
  for i in range(12):
    part = root / ("val" if i < 4 else "train")
    y, x = rng.integers(5, 11, 2)
    mask = (rows - y) ** 2 + (columns - x) ** 2 < 16
    image = rng.integers(160, 200, (16, 16, 3)) - 120 * mask[..., None]
    for name, array in (("images", image), ("masks", mask * 255)):
      (part / name).mkdir(parents=True, exist_ok=True)
      picture = Image.fromarray(array.astype(np.uint8))
      picture.save(part / name / f"{i:02}.png")
  return str(root)


def make(path, fields=(), batch_size=3, **data):
  settings = dict(path=path, size=16, augment="none") | data
  return tasks.create(
    "segmentation",
    models.create("mhs_vm", **{**MODEL, **dict(fields)}),
    segmentation.SegmentationData(**settings),
    sequence_length=256,
    batch_size=batch_size,
  )


@pytest.fixture(scope="module")
def task(folder):
  return make(folder)


@pytest.fixture(scope="module")
def apply(task):
  return jax.jit(lambda params, x: task.model.apply({"params": params}, x))


@pytest.fixture(scope="module")
def params(task, apply):
  """Parameters that take half of the pixels for foreground."""
  params = jax.tree.map(lambda x: 3 * x, task.init_params(jax.random.key(0)))
  logits = apply(params, next(task.eval_iterator())["images"])
  params["head"]["bias"] -= jnp.median(logits)
  return params


def test_mask_losses_by_their_formula():
  rng = np.random.default_rng(0)
  logits = 3 * rng.normal(size=(4, 5, 6))
  targets = rng.random((4, 5, 6))  # soft
  p = 1 / (1 + np.exp(-logits))
  want_pixel = -(targets * np.log(p) + (1 - targets) * np.log(1 - p))
  want_dice = [
    1 - (2 * (p[i] * t).sum() + 1) / (p[i].sum() + t.sum() + 1)
    for i, t in enumerate(targets)
  ]
  pixel, dice = segmentation.mask_losses(
    jnp.asarray(logits, jnp.float32), jnp.asarray(targets, jnp.float32)
  )
  np.testing.assert_allclose(pixel, want_pixel.mean((1, 2)), rtol=1e-5)
  np.testing.assert_allclose(dice, want_dice, rtol=1e-5)


def test_mask_losses_of_sure_logits_are_finite():
  logits = jnp.array([[[200.0, -200.0]], [[200.0, -200.0]]])
  targets = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
  both = lambda x: sum(jnp.sum(y) for y in segmentation.mask_losses(x, targets))
  pixel, dice = segmentation.mask_losses(logits, targets)
  np.testing.assert_allclose(pixel, [0, 200])
  np.testing.assert_allclose(dice, [0, 1 - 1 / 3], atol=1e-6)
  assert np.isfinite(jax.grad(both)(logits)).all()


def test_class_losses_by_their_formula():
  rng = np.random.default_rng(1)
  logits = 2 * rng.normal(size=(3, 4, 5, 3))
  labels = rng.integers(0, 2, (3, 4, 5))  # class 2 does not occur
  e = np.exp(logits)
  p = e / e.sum(-1, keepdims=True)
  t = np.eye(3)[labels]
  for weights in ([1, 1, 1], [1, 0, 1]):
    kept = np.flatnonzero(weights)
    q, u = p[kept], t[kept]
    want_pixel = -(u * np.log(q)).sum(-1).mean()
    want_dice = np.mean([
      1
      - (2 * (q[..., c] * u[..., c]).sum() + 1e-5)
      / ((q[..., c] ** 2).sum() + (u[..., c] ** 2).sum() + 1e-5)
      for c in range(3)
    ])  # fmt: skip
    pixel, dice = segmentation.class_losses(
      *(jnp.asarray(x, jnp.float32) for x in (logits, t, weights))
    )
    assert float(pixel) == pytest.approx(want_pixel, rel=1e-5)
    assert float(dice) == pytest.approx(want_dice, rel=1e-5)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_otsu_maximises_the_variance_between_the_classes(bits):
  rng = np.random.default_rng(bits)
  grey = np.concatenate([rng.normal(60, 15, 700), rng.normal(170, 25, 300)])
  grey = np.clip(grey, 0, 255).astype(np.uint8)
  if bits == 16:
    grey = grey.astype(np.uint16) * 200
  if bits == 32:
    grey = (grey / 100 - 1).astype(np.float32)
  at = otsu.threshold(grey)

  def between(level):
    low, high = grey[grey <= level], grey[grey > level]
    return len(low) * len(high) * (low.mean() - high.mean()) ** 2.0

  best = max(between(level) for level in np.unique(grey)[:-1])
  assert between(at) == pytest.approx(best, rel=1e-9 if bits == 8 else 5e-3)


def test_otsu_is_that_of_scikit_image():
  filters = pytest.importorskip(
    "skimage.filters", reason="pip install 'multihead[vision]'"
  )
  rng = np.random.default_rng(0)
  for scale in (1, 3):
    grey = rng.normal(0, 1, (40, 50)) + 2 * scale * (rng.random((40, 50)) < 0.3)
    for array in (grey.astype(np.float32), (9 * grey + 90).astype(np.uint8)):
      want = filters.threshold_otsu(array)
      assert otsu.threshold(array) == pytest.approx(want, abs=1e-5)
  assert otsu.threshold(np.full((3, 3), 7)) == 7


def test_baselines(task):
  """The discs are dark, so the polarity must be found; nothing else is hard."""
  found = task.baselines()
  assert 0.95 < found["otsu_iou"] < found["otsu_dsc"] <= 1
  masks = np.concatenate([b["masks"] for b in task.eval_iterator()])[:4]
  assert found["all_foreground_iou"] == pytest.approx(masks.mean())
  assert "otsu_of_whole_images_iou" not in found
  assert otsu.score(task._grey("validation"), bright=True)[0] < 0.05


def test_thresholds_of_crops_and_of_their_images(folder):
  found = make(folder, {"img_size": 8}, size=8, fit="crop").baselines()
  # Of a crop without a disc Otsu finds two classes in noise.
  assert found["otsu_of_whole_images_iou"] == 1
  assert found["otsu_iou"] < 1


def test_a_batch_and_what_it_gives(task, apply, params):
  batch = next(iter(task.eval_iterator()))
  like = jax.tree.map(lambda x: (x.shape, x.dtype), task.init_batch())
  assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == like
  logits = apply(params, batch["images"])
  pixel, dice = segmentation.mask_losses(logits[..., 0], batch["masks"])
  loss_fn = jax.jit(task.loss_fn, static_argnums=3)
  loss, found = loss_fn(params, batch, jax.random.key(0), False)
  assert float(loss) == pytest.approx(float(np.mean(pixel + dice)), rel=1e-5)
  assert float(found["weight"]) == 3
  # A row without weight does not count.
  batch["weights"] = np.array([1, 0, 1], np.float32)
  loss, _ = loss_fn(params, batch, jax.random.key(0), False)
  want = np.mean((pixel + dice)[np.array([0, 2])])
  assert float(loss) == pytest.approx(float(want), rel=1e-5)
  # Stochastic depth is on in training alone.
  train = lambda i: loss_fn(params, batch, jax.random.key(i), True)[0]
  assert len({float(train(i)) for i in range(6)}) > 1


def test_weights_of_the_loss(folder, task, apply, params):
  batch = next(iter(task.eval_iterator()))
  logits = apply(params, batch["images"])
  _, parts = task._losses(logits, batch)
  data = dataclasses.replace(task.data, pixel_weight=0.25, dice_weight=2.0)
  loss, _ = dataclasses.replace(task, data=data)._losses(logits, batch)
  want = 0.25 * parts["pixel_loss"] + 2 * parts["dice_loss"]
  assert float(loss) == pytest.approx(float(want))
  # They are no part of what a position in the data depends on.
  made = make(folder, pixel_weight=0.25)
  assert made.pairs.fingerprint == task.pairs.fingerprint


def test_every_validation_image_is_scored_once(task, apply, params):
  evaluate = jax.jit(task.eval_fn)
  sums = [evaluate(params, batch) for batch in task.eval_iterator()]
  assert len(sums) == 2  # 3 + 1 and two rows that fill up
  total = jax.tree.map(lambda *x: np.sum(x, axis=0), *sums)
  assert total["overlap"].images == 4
  assert total["overlap"].confusion.sum() == 4 * 16 * 16
  found = task.summarise(total)
  assert 0 < found["iou"] < 1 and 0 < found["open_gates"] <= 1
  losses = []
  for batch in task.eval_iterator():
    rows = batch["weights"] > 0
    logits = apply(params, batch["images"])
    pair = segmentation.mask_losses(logits[..., 0], batch["masks"])
    losses += list(np.sum(pair, axis=0)[rows])
  assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_final_metrics_are_means_over_cases(task, apply, params):
  scores = []
  for batch in task.eval_iterator():
    logits = apply(params, batch["images"])
    for row in np.flatnonzero(batch["weights"]):
      taken = np.asarray(logits[row, ..., 0] >= 0).astype(int)
      scores += [metrics.case_scores(taken, batch["masks"][row], 1)[0]]
  assert len(scores) == 4
  found = task.final_metrics(params)
  assert list(found.values()) == pytest.approx(list(np.mean(scores, axis=0)))
  assert list(found) == ["case_dsc", "case_hd95"]


def test_slices_become_volumes_of_their_own_size(tmp_path, params):
  h5py = pytest.importorskip("h5py", reason="pip install 'multihead[vision]'")
  rng = np.random.default_rng(0)
  image = rng.random((5, 24, 20)).astype(np.float32)
  label = np.zeros((5, 24, 20), np.float32)
  label[1:4, 4:20, 4:16] = 1
  np.savez(tmp_path / "case1_slice000.npz", image=image[0], label=label[2])
  for name in ("case2", "case3"):
    with h5py.File(tmp_path / f"{name}.npy.h5", "w") as file:
      file["image"], file["label"] = image, label
  task = make(
    str(tmp_path), dict(num_classes=3), num_classes=3, augment="synapse",
    classes="none,liver,left kidney", batch_size=4,
  )  # fmt: skip
  init = task.init_params(jax.random.key(0))
  seen = list(task._predictions(init))
  assert [case for case, *_ in seen] == ["case2"] * 5 + ["case3"] * 5
  assert all(taken.shape == truth.shape == (24, 20) for _, taken, truth in seen)
  np.testing.assert_array_equal(np.stack([t for *_, t in seen[5:]]), label)
  found = task.final_metrics(init)
  taken = np.stack([taken for _, taken, _ in seen[:5]])
  want = metrics.case_scores(taken, label.astype(int), 3)
  # Both cases are the same volume.
  assert found["case_hd95_liver"] == pytest.approx(want[0, 1])
  assert found["case_dsc_left_kidney"] == pytest.approx(want[1, 0])
  assert found["case_dsc"] == pytest.approx(want[:, 0].mean())
  sums = jax.jit(task.eval_fn)(init, next(task.eval_iterator()))
  summary = task.summarise(jax.device_get(sums))
  assert {"iou_liver", "dsc_left_kidney"} <= summary.keys()
  assert task.baselines() == {}


def test_figures(task, params, tmp_path):
  figures = task.draw(params, str(tmp_path))
  assert set(figures.values()) == {"predictions.png", "gates.png"}
  for name in figures.values():
    with Image.open(tmp_path / name) as picture:
      assert min(picture.size) > 150


def test_what_is_done_at_the_end_is_done_with_merged_parameters(
  task, params, tmp_path
):
  frozen, start = adaptation.divide(params, "head")
  adapted = adaptation.Adaptation(task, None, frozen, start, "")
  trained = {"adapter": {}, "trained": start}
  assert adapted.final_metrics(trained) == task.final_metrics(params)
  assert adapted.draw(trained, str(tmp_path)) and adapted.higher_is_better


def test_a_mesh_of_eight_gives_the_same_numbers(folder, params, tmp_path):
  found = []
  for devices, mesh in ((1, {}), (8, dict(data=2, fsdp=2, tensor=2))):
    config = config_lib.read_config(
      {
        "task": "segmentation",
        "model": {"name": "mhs_vm", **MODEL},
        "data": dict(path=folder, size=16, augment="none"),
        "mesh": mesh,
        "batch_size": 4,
      }
    )
    run = run_lib.prepare(config, devices=jax.devices()[:devices])
    placed = jax.device_put(params, run.task.param_shardings(run.mesh))
    found.append(
      run_lib.evaluate(run, placed) | run_lib.final_metrics(run, placed)
    )
    with jax.set_mesh(run.mesh):
      assert run.task.draw(placed, str(tmp_path))
  assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_an_overlay_tints_and_outlines_the_mask():
  image = np.full((6, 6, 1), 100, np.uint8)
  mask = np.zeros((6, 6), int)
  mask[1:5, 1:5] = 1
  found = segmentation_figures.overlay(image, mask)
  colour = segmentation_figures.COLOURS[0]
  assert (found[0] == 100).all()
  assert (found[1, 1:5] == colour).all()
  inside = found[2, 2].astype(int)
  np.testing.assert_allclose(inside, 60 + 0.4 * colour, atol=1)
  # Floats are stretched; constant ones are black.
  assert segmentation_figures.to_rgb(np.zeros((2, 2, 3))).max() == 0
  assert segmentation_figures.to_rgb(np.eye(2)[..., None] - 5).max() == 255


@pytest.mark.parametrize("fields, data, text", [
  (dict(num_classes=2), {}, "config.model.num_classes"),
  ({}, dict(size=18), "config.data.size=18 must be a multiple of 4"),
  ({}, dict(dice_weight=-1.0), "dice_weight=-1.0"),
  ({}, dict(dice_weight=0.0, pixel_weight=0.0), "no loss"),
  ({}, dict(threshold=1.0), "threshold=1.0"),
  ({}, dict(path="/nowhere"), "no such folder"),
])  # fmt: skip
def test_settings_that_cannot_be_used(fields, data, text, folder):
  with pytest.raises(UserError, match=text):
    make(**{"path": folder, "fields": fields, **data})


def test_a_model_of_another_kind(folder):
  model = models.create(
    "vit", img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2,
    mlp_dim=8,
  )  # fmt: skip
  with pytest.raises(UserError, match="ViT makes no masks"):
    tasks.create(
      "segmentation", model, segmentation.SegmentationData(path=folder),
      sequence_length=8, batch_size=2,
    )  # fmt: skip


def test_config_sections_are_read_strictly():
  values = {
    "task": "segmentation",
    "model": {"name": "mhs_vm"},
    "data": {"dice_wieght": 1.0},
  }
  with pytest.raises(UserError, match="dice_weight"):
    config_lib.read_config(values)
  values["data"] = {"dice_weight": 2, "size": 64}
  config = config_lib.read_config(values)
  assert config.data == segmentation.SegmentationData(dice_weight=2.0, size=64)
  assert config_lib.read_config(config.to_dict()) == config
