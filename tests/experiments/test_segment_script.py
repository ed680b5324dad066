"""Segmentation from the outside: train, segment a folder, mistakes."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from experiments import segment as segment_script
from multihead.data import pair_transforms
from multihead.metrics import segmentation as metrics
from multihead.train import config as config_lib
from multihead.train import run as run_lib
from tests.experiments.scripts import assert_mistakes, make_run, run_scripts

SIZES = ((9, 50), (37, 21), (16, 16))
CONFIG = """
from configs import common

def get_config(variant="resize"):
  config = common.training()
  config.task = "segmentation"
  config.model = common.model(
    "mhs_vm", img_size=int, embed_dim=int, depths=tuple, depths_decoder=tuple,
    state_size=int, heads=int, num_classes=int,
  )
  config.model.update(
    img_size=16, embed_dim=16, depths=(1,), depths_decoder=(0,), state_size=2,
    heads=2,
  )
  classes = 3 if variant == "classes" else 1
  config.model.num_classes = classes
  config.data = dict(
    path={path!r}, size=16, num_classes=classes, augment="none",
    fit="crop" if variant == "crop" else "resize",
  )
  config.update(total_steps=2, batch_size=2)
  return config
"""


def disc(height, width, value=255):
  """An image and its mask."""
  rng = np.random.default_rng(height)
  rows, columns = np.mgrid[:height, :width]
  inside = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < 30
  image = rng.integers(0, 60, (height, width, 3)) + 150 * inside[..., None]
  return image.astype(np.uint8), (value * inside).astype(np.uint8)


def write(folder, sizes, value=255):
  for i, size in enumerate(sizes):
    for name, array in zip(("images", "masks"), disc(*size, value)):
      (folder / name).mkdir(parents=True, exist_ok=True)
      Image.fromarray(array).save(folder / name / f"case{i}.png")
  return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A configuration, its data, images of odd sizes, and runs of it."""
  root = tmp_path_factory.mktemp("segment")
  data = write(root / "data", [(16, 16)] * 5)
  (root / "config.py").write_text(CONFIG.format(path=str(data)))
  write(root / "new", SIZES)
  for variant in ("resize", "crop"):
    (root / variant).mkdir()
    make_run(root / variant, f"{root}/config.py:{variant}")
  return root


def segment(place, run, images, output, *more):
  paths = dict(workdir=place / run, images=place / images, output=output)
  return ("segment", *(f"--{k}={v}" for k, v in paths.items()), *more)


def read(folder, name):
  return np.asarray(Image.open(folder / f"{name}.png"))


def test_train_evaluate_and_segment_classes(place, tmp_path):
  data = write(tmp_path / "data", [(16, 16)] * 5, value=2)
  flags = (
    f"--config={place}/config.py:classes",
    f"--workdir={tmp_path}/run",
    f"--config.data.path={data}",
  )
  ((code, out, errors),) = run_scripts(tmp_path / "cases", ("train", *flags))
  assert code == 0, errors
  report = (tmp_path / "run/report.md").read_text()
  for name in ("predictions.png", "gates.png"):
    assert f"({name})" in report and (tmp_path / "run" / name).is_file()
  found = json.loads((tmp_path / "run/metrics.json").read_text())
  assert {"validation_iou", "validation_dsc", "validation_case_hd95"} <= {
    *found
  }
  arguments = segment(place, tmp_path / "run", data, tmp_path / "out")
  scored, (code, out, errors) = (
    run_scripts(tmp_path / name, case)[0]
    for name, case in (("1", ("evaluate", flags[1])), ("2", arguments))
  )
  assert scored[0] == 0 and "case_hd95_class_2" in scored[1], scored[2]
  assert code == 0, errors
  mask = Image.open(tmp_path / "out/masks/case0.png")
  assert mask.mode == "P" and np.asarray(mask).max() <= 2
  assert "iou_class_2" in out


@pytest.mark.parametrize("run, more", [
  ("resize", ()),
  ("crop", ("--threshold=0.7", "--overlap=4")),
  ("resize", ("--tile=32",)),
])  # fmt: skip
def test_a_folder_with_masks(place, tmp_path, run, more):
  out = tmp_path / "out"
  ((code, text, errors),) = run_scripts(
    tmp_path / "cases", segment(place, run, "new", out, *more)
  )
  assert code == 0, errors
  assert ("in tiles" in text) == (run == "crop" or bool(more))
  assert "3/3 images" in errors
  sums = None
  for i, size in enumerate(SIZES):
    taken = read(out / "masks", f"case{i}")
    assert taken.shape == size and set(np.unique(taken)) <= {0, 255}
    assert read(out / "overlays", f"case{i}").shape == (*size, 3)
    truth = read(place / "new/masks", f"case{i}")
    pair = (x[None].astype(int) // 255 for x in (taken, truth))
    found = metrics.update(*pair, np.ones(1), 1)
    sums = found if sums is None else metrics.merge(sums, found)
  # The image that is as large as the model's: one tile, or not resized.
  if "--tile=32" not in more:
    config = config_lib.read_json(str(place / run / "config.json"))
    model, params = run_lib.load_params(config, str(place / run))
    image = pair_transforms.normalise(
      read(place / "new/images", "case2"), "standard"
    )
    logits = model.apply({"params": params}, image[None])[0, ..., 0]
    np.testing.assert_array_equal(
      read(out / "masks", "case2") > 0,
      jax.nn.sigmoid(logits) >= (0.7 if run == "crop" else 0.5),
    )
  want = metrics.compute(sums)
  assert 0 < want["iou"] < 1
  written = json.loads((out / "metrics.json").read_text())
  assert written["images"] == 3
  assert {k: written[k] for k in want} == pytest.approx(want)
  assert f"iou: {want['iou']:.4f}" in text


def test_a_run_goes_on_where_it_was_interrupted(place, tmp_path):
  """An unreadable image ends it; what was done and its scores are kept."""
  write(tmp_path / "in", [(16, 16)] * 10)
  # Not one of the eight that are looked at before all.
  file = tmp_path / "in/images/case4.png"
  good = file.read_bytes()
  # Its header is whole: what is wrong is found when it is decoded.
  file.write_bytes(good[: len(good) // 2])
  out = tmp_path / "out"
  run = lambda name, *more: run_scripts(
    tmp_path / name, segment(place, "crop", tmp_path / "in", out, *more)
  )[0]
  code, _, errors = run("1")
  assert code == 2 and "case4.png" in errors
  assert json.loads((out / "metrics.json").read_text())["images"] == 4
  assert read(out / "masks", "case1").shape == (16, 16)
  file.write_bytes(good)
  code, _, errors = run("2")
  assert code == 2 and "--resume" in errors
  code, _, errors = run("3", "--resume", "--threshold=0.6")
  assert code == 2 and "begun with threshold=0.5" in errors
  # A mask that is changed by hand shows that it is not made again.
  mask = 255 - read(out / "masks", "case0")
  Image.fromarray(mask).save(out / "masks/case0.png")
  code, text, errors = run("4", "--resume")
  assert code == 0, errors
  np.testing.assert_array_equal(read(out / "masks", "case0"), mask)
  assert read(out / "masks", "case4").shape == (16, 16)
  assert json.loads((out / "metrics.json").read_text())["images"] == 10
  assert not list(out.rglob("*.part"))


def test_counts_of_many_pixels_do_not_overflow():
  many = metrics.Sums(np.full((2, 2), 1.5e9), *np.zeros((3, 2)), np.float64(1))
  ones = np.ones((2, 2), np.uint8)
  once = segment_script._count(ones, ones, 1)
  sums = metrics.merge(metrics.merge(many, many), once)
  assert sums.confusion[0, 0] == 3e9 and sums.confusion[1, 1] == 3e9 + 4


def test_images_alone(place, tmp_path):
  shutil.copytree(place / "new/images", tmp_path / "in/deep")
  out = tmp_path / "out"
  ((code, text, errors),) = run_scripts(
    tmp_path / "cases", segment(place, "crop", tmp_path / "in", out)
  )
  assert code == 0, errors
  assert "iou" not in text and not (out / "metrics.json").exists()
  assert read(out / "masks/deep", "case1").shape == (37, 21)


def test_mistakes_get_one_line_and_exit_code_2(place, tmp_path):
  (tmp_path / "empty").mkdir()
  write(tmp_path / "torn", [(16, 16)])
  shutil.rmtree(tmp_path / "torn/masks")
  file = tmp_path / "torn/images/case0.png"
  file.write_bytes(file.read_bytes()[:200])
  write(tmp_path / "alone", [(16, 16), (16, 16)])
  (tmp_path / "alone/masks/case1.png").unlink()
  for ending in ("png", "jpg"):
    (tmp_path / "twice").mkdir(exist_ok=True)
    Image.fromarray(disc(16, 16)[0]).save(tmp_path / f"twice/a.{ending}")
  (tmp_path / "foreign").mkdir()
  (tmp_path / "foreign/config.json").write_text("{}")
  (tmp_path / "full/x").mkdir(parents=True)
  (tmp_path / "bare/masks").mkdir(parents=True)
  shutil.copy(place / "new/images/case0.png", tmp_path / "bare")
  new = tmp_path / "out"
  case = lambda images, *more, run="crop", output=new: segment(
    place, run, images, output, *more
  )
  assert_mistakes(
    tmp_path / "cases",
    {
      "no images; files that end in": case(tmp_path / "empty"),
      "no such folder": case("nowhere"),
      "not an image that can be read": case(tmp_path / "torn"),
      "1 without a mask (case1)": case(tmp_path / "alone"),
      "two images are called a": case(tmp_path / "twice"),
      "a run of task language_modelling": case("new", run=tmp_path / "foreign"),
      "no config at": case("new", run=tmp_path / "empty"),
      "is not empty": case("new", output=tmp_path / "full"),
      "is of no such run": case("new", "--resume", output=tmp_path / "full"),
      "cannot be made": case("new", output=tmp_path / "foreign/config.json"),
      "holds masks and no images": case(tmp_path / "bare"),
      "tile=18 must be a multiple of 4": case("new", "--tile=18"),
      "overlap=9 must lie between": case("new", "--overlap=9"),
      "--overlap without --tile": case("new", "--overlap=4", run="resize"),
      "--threshold=1.5": case("new", "--threshold=1.5"),
      "--images is missing": ("segment", f"--workdir={place}/crop",
                              f"--output={new}"),
    },
  )  # fmt: skip


def test_weights_of_the_authors_go_out_and_in(place, tmp_path):
  config = (place / "config.py").read_text()
  config = config.replace("heads=2", "heads=3, threshold=0.25")
  config = config.replace("depths_decoder=(0,)", "depths_decoder=(1,)")
  config = config.replace("heads=int,", "heads=int, threshold=float,")
  (tmp_path / "config.py").write_text(config)
  (tmp_path / "run").mkdir()
  _, params = make_run(tmp_path / "run", f"{tmp_path}/config.py:resize")
  file = f"{tmp_path}/x.safetensors"
  back = (f"--checkpoint={file}", f"--config={tmp_path}/config.py:resize")
  found = run_scripts(
    tmp_path / "cases",
    ("convert", f"--workdir={tmp_path}/run", f"--output={file}"),
    ("convert", f"--workdir={tmp_path}/new", *back),
  )
  for code, _, errors in found:
    assert code == 0, errors
  path = str(tmp_path / "new")
  saved = config_lib.read_json(f"{path}/config.json")
  _, again = run_lib.load_params(saved, path)
  chex.assert_trees_all_equal(again, params)
  assert_mistakes(
    tmp_path / "mistakes",
    {
      "heads is 3 there and 2 in the config": (
        "convert", f"--workdir={tmp_path}/other", back[0],
        f"--config={place}/config.py:resize",
      ),
      "a pickle": (
        "convert", f"--workdir={tmp_path}/other", back[1],
        f"--checkpoint={tmp_path}/best.pth",
      ),
      "files are written as .safetensors": (
        "convert", f"--workdir={tmp_path}/run", f"--output={tmp_path}/x.pth",
      ),
      "which have no mhs_vm": (
        "convert", f"--workdir={tmp_path}/other", *back, "--check"
      ),
    },
  )  # fmt: skip
