"""Pictures of segmentation: masks over images, and open gates."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Num, UInt8

# Of class 1, 2, ...; the palette of colour-blind readers by Okabe and Ito.
COLOURS = np.array(
  [
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66),
    (0, 114, 178), (213, 94, 0), (204, 121, 167), (255, 255, 255),
  ],
  np.uint8,
)  # fmt: skip
_OPACITY = 0.4


def to_rgb(image: Num[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W 3"]:
  """An image of any numbers for the eye: its range becomes black to white.

  8-bit images stay as they are. Of more than three channels the first is shown.
  """
  if image.shape[-1] not in (1, 3):
    image = image[..., :1]
  if image.dtype != np.uint8:
    image = image.astype(np.float32)
    low, high = image.min(), image.max()
    image = (255 / max(high - low, 1e-12) * (image - low)).astype(np.uint8)
  return np.broadcast_to(image, (*image.shape[:2], 3))


def overlay(
  image: Num[np.ndarray, "H W C"], mask: Int[np.ndarray, "H W"]
) -> UInt8[np.ndarray, "H W 3"]:
  """An image with the classes of a mask tinted and outlined."""
  rgb = to_rgb(image)
  colours = COLOURS[(mask.astype(int) - 1) % len(COLOURS)]
  padded = np.pad(mask, 1, mode="edge")
  edge = np.zeros(mask.shape, bool)
  for rows, columns in (
    (slice(None, -2), slice(1, -1)),
    (slice(2, None), slice(1, -1)),
    (slice(1, -1), slice(None, -2)),
    (slice(1, -1), slice(2, None)),
  ):
    edge |= padded[rows, columns] != mask
  opacity = np.where(edge, 1.0, _OPACITY) * (mask > 0)
  # Row by row: a large image in float32 may not fit.
  out = np.empty(rgb.shape, np.uint8)
  for row, share in enumerate(opacity[..., None].astype(np.float32)):
    out[row] = (1 - share) * rgb[row] + share * colours[row]
  return out


def panels(
  path: str,
  images: Num[np.ndarray, "B H W C"],
  truths: Int[np.ndarray, "B H W"],
  predictions: Int[np.ndarray, "B H W"],
  names: Sequence[str],
  classes: Sequence[str],
) -> None:
  """Draws a row for each image: it, its true mask, the predicted one.

  Args:
    path: of the PNG file.
    images: any numbers.
    truths: class numbers.
    predictions: likewise.
    names: of the images.
    classes: their names, the background first.
  """
  # Not pyplot: its backend is the caller's, in a notebook say.
  from matplotlib.figure import Figure
  from matplotlib.patches import Patch

  rows = len(images)
  figure = Figure(figsize=(8.4, 2.9 * rows + 0.6), dpi=100)
  grid = figure.subplots(rows, 3, squeeze=False)
  for axes, image, truth, taken, name in zip(
    grid, images, truths, predictions, names, strict=True
  ):
    pictures = to_rgb(image), overlay(image, truth), overlay(image, taken)
    both = np.count_nonzero((truth > 0) & (taken > 0))
    either = np.count_nonzero((truth > 0) | (taken > 0))
    score = f"IoU {both / either:.2f}" if either else "both empty"
    titles = name, "truth", f"prediction ({score})"
    for panel, picture, title in zip(axes, pictures, titles, strict=True):
      panel.imshow(picture, interpolation="nearest")
      panel.set_title(title, fontsize=8)
      panel.set_axis_off()
  figure.legend(
    handles=[
      Patch(color=COLOURS[i % len(COLOURS)] / 255, label=label)
      for i, label in enumerate(classes[1:])
    ],
    loc="lower center",
    ncols=4,
    fontsize=8,
  )
  figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
  figure.savefig(path)


def gates(
  path: str,
  opened: Mapping[str, Float[np.ndarray, " heads"]],
  heads: Sequence[str],
) -> None:
  """Draws which fraction of the gates is open, by block and head.

  Args:
    path: of the PNG file.
    opened: fractions of each block.
    heads: their names.
  """
  from matplotlib.figure import Figure

  blocks = sorted(opened, key=lambda name: (name[:1] != "e", name))
  values = np.stack([opened[name] for name in blocks])
  figure = Figure(figsize=(2.5 + 0.7 * len(heads), 1 + 0.3 * len(blocks)))
  axes = figure.subplots()
  picture = axes.imshow(values, vmin=0, vmax=1, aspect="auto")
  axes.set_xticks(range(len(heads)), heads)
  axes.set_yticks(range(len(blocks)), blocks, fontsize=7)
  axes.set_xlabel("route of the head")
  for row, column in np.ndindex(values.shape):
    value = values[row, column]
    axes.text(
      column, row, f"{value:.2f}", ha="center", va="center", fontsize=7,
      color="black" if value > 0.5 else "white",
    )  # fmt: skip
  figure.colorbar(picture, label="open gates")
  figure.tight_layout()
  figure.savefig(path, dpi=100)
