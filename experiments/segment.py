r"""Segments the images of a folder with a trained model.

  python -m experiments.segment --workdir=RUN --images=FOLDER --output=FOLDER
  python -m experiments.segment --workdir=RUN --images=FOLDER --output=FOLDER \
    --tile=512 --overlap=128 --threshold=0.4

Images may have any size. A model trained on crops predicts them in overlapping
tiles; one trained on resized images gets them resized, unless --tile is given.
In --output appear masks/NAME.png (0 and 255, or class numbers) and
overlays/NAME.png, each as large as its image. Where --images holds the folders
images and masks (config.data.images and .masks of the run), in which the files
pair by name, the masks are compared, and metrics.json is written, also if the
run is interrupted. With --resume a run goes on in its --output: images that are
done there are not segmented again.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from experiments import common
from multihead.data import image_pairs, pair_transforms
from multihead.data import segmentation as data_lib
from multihead.errors import UserError
from multihead.metrics import segmentation as metrics
from multihead.tasks import segmentation_figures, tiling
from multihead.train import config as config_lib
from multihead.train import run as run_lib
from multihead.train import writers

_IMAGES = flags.DEFINE_string("images", None, "The folder of images.")
_OUTPUT = flags.DEFINE_string("output", None, "A new folder for the results.")
_RESUME = flags.DEFINE_bool(
  "resume", False, "Go on in --output, which an earlier run began."
)
_INSTANCES = flags.DEFINE_bool(
  "instances",
  None,
  "Whether the masks in --images number their objects; if unset as the run's.",
)
_TILE = flags.DEFINE_integer(
  "tile",
  None,
  "Side of the tiles in pixels; if unset that of the crops of the training.",
  lower_bound=1,
)
_OVERLAP = flags.DEFINE_integer(
  "overlap", None, "Of tiles, in pixels; a quarter of the tile if unset."
)
_THRESHOLD = flags.DEFINE_float(
  "threshold",
  None,
  "Probability from where on a pixel is foreground; that of the run if unset.",
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 4, "Tiles at a time.", lower_bound=1
)

# In --output: what its masks depend on.
_SETTINGS = "settings.json"
# Seconds between two lines where there is no terminal for a bar.
_SAY_EVERY = 10.0


def main() -> None:
  """Loads the run, segments every image, compares where there are masks."""
  # Which operation runs where would stand between the files.
  logging.set_verbosity(logging.WARNING)
  workdir = common.workdir()
  config = config_lib.read_json(os.path.join(workdir, "config.json"))
  if config.task != "segmentation":
    raise UserError(
      f"{workdir} is a run of task {config.task}; give one of segmentation"
    )
  data = config.data
  threshold = _threshold(data)
  output = _folder()
  source, files, has_masks = _find(data)
  model, params = run_lib.load_params(config, workdir)
  segment = _Segmenter(model, params, data, source)
  settings = dict(
    workdir=os.path.abspath(workdir),
    tile=segment.tile or 0,
    overlap=_OVERLAP.value,
    threshold=threshold,
  )
  _compare(output, settings)
  common.say(f"{len(files)} images; {segment.how}; threshold {threshold:g}")
  sums, done, progress = None, 0, _Progress(len(files))
  try:
    for i, file in enumerate(files):
      image, truth = source.read(i)
      taken = _done(output, file, data.num_classes)
      if taken is None:
        taken = segment(i, threshold, functools.partial(progress.show, i))
        # Not before there is something that depends on them.
        writers.write_json(str(output / _SETTINGS), settings)
        _write(output, file, image, taken, data.num_classes)
      if has_masks:
        found = _count(taken, truth, data.num_classes)
        sums = found if sums is None else metrics.merge(sums, found)
      done = i + 1
      progress.show(done)
  finally:
    progress.close()
    common.say(f"masks and overlays of {done} images: {output}")
    if sums is not None:
      names = [c.replace(" ", "_") for c in source.classes]
      found = metrics.compute(sums, names)
      for name, value in found.items():
        common.say(f"{name}: {value:.4f}")
      path = os.path.join(output, "metrics.json")
      writers.write_json(path, found | {"images": done} | settings)
      common.say(f"written to {path}")


def _threshold(data: Any) -> float:
  if _THRESHOLD.value is None:
    return data.threshold
  if data.num_classes > 1:
    raise UserError(
      f"--threshold is for one class; this run has {data.num_classes}, and the "
      "likeliest is taken"
    )
  if not 0 < _THRESHOLD.value < 1:
    raise UserError(f"--threshold={_THRESHOLD.value} must lie between 0 and 1")
  return _THRESHOLD.value


def _folder() -> pathlib.Path:
  if not _OUTPUT.value:
    raise UserError("--output is missing: a new folder for the results")
  output = pathlib.Path(_OUTPUT.value)
  common.make_folder("output", output)
  if any(output.iterdir()) and not _RESUME.value:
    raise UserError(
      f"--output={output} is not empty; give a new folder, or --resume if an "
      "earlier run began there"
    )
  return output


def _compare(output: pathlib.Path, settings: dict[str, Any]) -> None:
  """Refuses to go on with what was made otherwise."""
  path = output / _SETTINGS
  if path.exists():
    noted = json.loads(path.read_text("utf-8"))
    for name, value in settings.items():
      if noted.get(name) != value:
        raise UserError(
          f"--resume: {output} was begun with {name}={noted.get(name)}, and "
          f"this run has {value}; give a new folder"
        )
  elif any(output.iterdir()):
    raise UserError(f"--resume: no {path}; --output={output} is of no such run")


def _done(
  output: pathlib.Path, file: pathlib.PurePath, classes: int
) -> np.ndarray | None:
  """The mask that an earlier run wrote: its overlay is written last."""
  if not (output / "overlays" / file).exists():
    return None
  from PIL import Image

  mask = np.asarray(Image.open(output / "masks" / file))
  return mask // 255 if classes == 1 else mask


def _find(
  data: Any,
) -> tuple[image_pairs.PairSet, list[pathlib.PurePath], bool]:
  """The images, their paths in the results, and whether they have masks."""
  if not _IMAGES.value:
    raise UserError("--images is missing: the folder of images")
  root = pathlib.Path(_IMAGES.value)
  if not root.is_dir():
    raise UserError(f"--images={root}: no such folder")
  if (root / "train").is_dir():
    raise UserError(
      f"--images={root} holds the parts of a split; give one of them, such as "
      f"{root / 'train'}"
    )
  has_masks = (root / data.images).is_dir() and (root / data.masks).is_dir()
  if has_masks:
    settings = dataclasses.replace(data.pairs(), path=str(root.resolve()))
    if _INSTANCES.value is not None:
      settings = dataclasses.replace(settings, instances=_INSTANCES.value)
    source = data_lib.load_pairs(settings)
    names = [pathlib.PurePath(n).relative_to(data.images) for n in source.names]
  else:
    source, names = _without_masks(root, data)
  files = [name.with_suffix(".png") for name in names]
  if len(set(files)) < len(files):
    twice = next(file for file in files if files.count(file) > 1)
    raise UserError(
      f"--images={root}: two images are called {twice.with_suffix('')}, and so "
      "would be their masks; rename one"
    )
  # The overlay needs the image again, which is decoded once.
  read = functools.lru_cache(maxsize=1)(source.read)
  return dataclasses.replace(source, read=read), files, has_masks


def _without_masks(
  root: pathlib.Path, data: Any
) -> tuple[image_pairs.PairSet, list[pathlib.PurePath]]:
  if (root / data.images).is_dir():
    root = root / data.images
  elif (root / data.masks).is_dir():
    raise UserError(
      f"--images={root} holds {data.masks} and no {data.images}; give the "
      "folder of images alone, or put them into one of that name"
    )
  files = image_pairs.list_images(root)
  if not files:
    raise UserError(
      f"--images={root}: no images; files that end in "
      f"{' '.join(sorted(image_pairs.EXTENSIONS))} are read"
    )

  def read(i: int) -> tuple[np.ndarray, np.ndarray]:
    image = image_pairs.read_image(files[i])
    return image, np.zeros(image.shape[:2], np.uint8)

  source = image_pairs.PairSet(
    read=read,
    shape=lambda i: read(i)[1].shape,
    names=[str(file) for file in files],
    classes=image_pairs.class_names((), data.num_classes),
    validation=None,
    fingerprint="",
    title=str(root),
  )
  return source, [file.relative_to(root) for file in files]


class _Segmenter:
  """The class of every pixel of an image.

  Attributes:
    tile: side of the tiles; None: images are resized as a whole.
    how: that in words.
  """

  def __init__(
    self, model: Any, params: Any, data: Any, source: image_pairs.PairSet
  ):
    self._model, self._data, self._source = model, data, source
    settings = data.pairs()
    self.tile = _TILE.value
    if self.tile is None and data_lib.cuts_crops(settings):
      self.tile = data.size
    if self.tile is None:
      if _OVERLAP.value is not None:
        raise UserError(
          "--overlap without --tile: this model was trained on whole images "
          f"of {data.size} x {data.size} pixels and gets them so; give --tile "
          "to cut them"
        )
      self.how = f"resized to {data.size} x {data.size} pixels and back"
      every = np.arange(len(source.names))
      settings = dataclasses.replace(settings, fit="resize", cache_mb=0)
      self._pairs = data_lib.Pairs(
        source, data_lib.Split(every, every), settings, model.in_chans
      )
    else:
      self.how = f"in tiles of {self.tile} x {self.tile} pixels"

    def probabilities(params: Any, images: jax.Array) -> jax.Array:
      logits = model.apply({"params": params}, images)
      one = logits.shape[-1] == 1
      return jax.nn.sigmoid(logits) if one else jax.nn.softmax(logits)

    compiled = jax.jit(probabilities)
    self._predict = lambda images: np.asarray(compiled(params, images))

  def __call__(
    self, i: int, threshold: float, progress: Callable[[int, int], None]
  ) -> np.ndarray:
    """[H, W] of image i."""
    image, _ = self._source.read(i)
    finish = functools.partial(_classes, threshold=threshold)
    if self.tile is None:
      resized, _ = self._pairs.sample("validation", i)
      scores = self._predict(resized[None])[0]
      return finish(pair_transforms.resize_image(scores, image.shape[:2]))
    shift, factor = pair_transforms.scaling(
      image, self._data.normalise, self._source.names[i]
    )

    def predict(tiles: np.ndarray) -> np.ndarray:
      prepared = [
        pair_transforms.to_channels(
          pair_transforms.rescaled(tile, shift, factor), self._model.in_chans
        )
        for tile in tiles
      ]
      return self._predict(np.stack(prepared))

    return tiling.predict_tiled(
      predict,
      image,
      tile=self.tile,
      overlap=_OVERLAP.value,
      multiple=self._model.stride,
      batch_size=_BATCH_SIZE.value,
      finish=finish,
      progress=progress,
    )


def _classes(scores: np.ndarray, threshold: float) -> np.ndarray:
  if scores.shape[-1] == 1:
    return (scores[..., 0] >= threshold).astype(np.uint8)
  return scores.argmax(-1).astype(np.uint8)


def _count(taken: np.ndarray, truth: np.ndarray, classes: int) -> metrics.Sums:
  """Counted here: a compiled program would be one for every size of image."""
  count = max(classes, 2)
  index = count * truth.astype(np.int64) + taken
  table = np.bincount(index.ravel(), minlength=count**2)
  sums = metrics.of_tables(table.reshape(1, count, count), np.ones(1))
  # Photographs add up to more pixels than 32 bits count.
  return jax.tree.map(lambda x: np.asarray(x, np.float64), sums)


def _write(
  output: pathlib.Path,
  file: pathlib.PurePath,
  image: np.ndarray,
  mask: np.ndarray,
  classes: int,
) -> None:
  from PIL import Image  # a dependency of matplotlib

  picture = Image.fromarray(mask * np.uint8(255) if classes == 1 else mask)
  if classes > 1:
    colours = np.resize(segmentation_figures.COLOURS, (255, 3))
    picture.putpalette([0, 0, 0, *colours.ravel().tolist()])
  overlay = Image.fromarray(segmentation_figures.overlay(image, mask))
  for name, written in (("masks", picture), ("overlays", overlay)):
    path = output / name / file
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole, or not there: a run may be killed.
    part = path.with_suffix(".part")
    written.save(part, format="PNG")
    os.replace(part, path)


class _Progress:
  """A bar on a terminal, now and then a line in a log."""

  def __init__(self, total: int):
    self._total, self._bar = total, None
    self._begun = self._said = time.perf_counter()
    if sys.stderr.isatty():
      from tqdm import tqdm

      self._bar = tqdm(total=total, unit="image", dynamic_ncols=True)

  def show(self, images: int, tiles: int = 0, of_tiles: int = 0) -> None:
    """So many images are done, and so many tiles of the next one."""
    inside = f"tile {tiles}/{of_tiles}" if of_tiles > 1 else ""
    if self._bar is not None:
      self._bar.set_postfix_str(inside, refresh=False)
      self._bar.update(images - self._bar.n)
      self._bar.refresh()
      return
    now = time.perf_counter()
    if now - self._said > _SAY_EVERY or images == self._total:
      self._said = now
      print(
        f"{images}/{self._total} images {inside} {now - self._begun:.0f} s",
        file=sys.stderr,
        flush=True,
      )

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()


if __name__ == "__main__":
  common.run(main)
