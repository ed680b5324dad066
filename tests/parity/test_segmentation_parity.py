"""Segmentation metrics beside the scorers that published results come from."""

import jax
import numpy as np
import pytest
from PIL import Image

from multihead.metrics import segmentation

pytestmark = pytest.mark.parity
update = jax.jit(segmentation.update, static_argnums=3)


def masks(count, seed):
  """Pairs of blots that overlap more or less, the first four with none."""
  rng = np.random.default_rng(seed)
  rows, columns = np.mgrid[:40, :33]

  def blot():
    y, x, r = rng.uniform([8, 8, 3], [32, 25, 12])
    shape = (rows - y) ** 2 + 1.5 * (columns - x) ** 2 < r**2
    return shape ^ (rng.random(shape.shape) < 0.02)

  truth = np.array([blot() for _ in range(count)])
  taken = np.array(
    [
      blot() if i % 3 == 2 else t ^ (rng.random(t.shape) < 0.1 * (i % 3))
      for i, t in enumerate(truth)
    ]
  )
  truth[:2], taken[1:3], truth[3], taken[3] = 0, 0, 1, 1
  return truth, taken


def test_isic_challenge_scoring(tmp_path):
  scoring = pytest.importorskip(
    # Not in an extra: it asks for a package that needs a C compiler.
    "isic_challenge_scoring",
    reason="pip install isic-challenge-scoring==5.6.0",
  )
  truth, taken = masks(24, 0)
  folders = tmp_path / "truth", tmp_path / "taken"
  for folder, images in zip(folders, (truth, taken)):
    folder.mkdir()
    for i, image in enumerate(images):
      Image.fromarray(image * np.uint8(255)).save(
        folder / f"ISIC_{i:07}_segmentation.png"
      )
  want = scoring.SegmentationScore.from_dir(*folders).macro_average
  ones = np.ones(24, np.float32)
  sums = update(taken.astype(int), truth.astype(int), ones, 1)
  found = segmentation.compute(sums)
  assert 0.1 < want["jaccard"] < 0.9
  for name in ("jaccard", "threshold_jaccard", "dice"):
    assert found[f"image_{name}"] == pytest.approx(want[name], abs=1e-6), name


@pytest.mark.parametrize("spacing", [1.0, (3.0, 0.7, 1.2)])
def test_medpy_of_a_volume(spacing):
  binary = pytest.importorskip(
    "medpy.metric.binary", reason="pip install 'multihead[parity]'"
  )
  truth, taken = (x[4:] for x in masks(16, 1))
  found = segmentation.case_scores(
    taken.astype(int), truth.astype(int), 1, spacing
  )
  want = binary.dc(taken, truth), binary.hd95(taken, truth, spacing)
  np.testing.assert_allclose(found, [want], atol=1e-9)


def test_medpy_of_slices():
  binary = pytest.importorskip(
    "medpy.metric.binary", reason="pip install 'multihead[parity]'"
  )
  for truth, taken in zip(*masks(24, 2)):
    if truth.any() or taken.any():  # else medpy divides 0 by 0
      assert segmentation.dice(taken, truth) == pytest.approx(
        binary.dc(taken, truth), abs=1e-12
      )
    if truth.any() and taken.any():
      assert segmentation.hd95(taken, truth) == pytest.approx(
        binary.hd95(taken, truth), abs=1e-9
      )
    else:  # a case that medpy refuses too
      with pytest.raises(RuntimeError):
        binary.hd95(taken, truth)
      with pytest.raises(ValueError, match="empty"):
        segmentation.hd95(taken, truth)
