"""Images whose masks are exact because they are drawn: lesions and mazes.

A pair is a function of the seed and its number, so nothing is stored.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, UInt8

from multihead.data.image_pairs import PairSet, installed, read_image
from multihead.errors import UserError

# Textures that lesions are made of; each serves one side of the split.
_TEXTURES = 50
# Photographs inside scikit-image, in colour or grey, each at least 300 pixels
# wide; every third is for validation.
PHOTOS = (
  "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png",
  "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
  "retina.jpg", "rocket.jpg",
)  # fmt: skip
_HARMONICS = 5


def _rng(*key: int) -> np.random.Generator:
  return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@dataclasses.dataclass(frozen=True)
class Blob:
  """A star-shaped region: r(t) = radius (1 + sum_k a_k cos(k t + phase_k)).

  Attributes:
    row, column: its centre in pixels; the centre of the first pixel is 0.5.
    radius: mean radius in pixels.
    amplitudes: a_k, k = 1 .. 5; their sum is below 0.6.
    phases: in radians.
  """

  row: float
  column: float
  radius: float
  amplitudes: np.ndarray
  phases: np.ndarray

  @property
  def area(self) -> float:
    """In pixels: pi radius^2 (1 + sum_k a_k^2 / 2)."""
    return np.pi * self.radius**2 * (1 + (self.amplitudes**2).sum() / 2)

  def depth(self, size: int) -> Float[np.ndarray, "S S"]:
    """How far inside the border each pixel's centre lies, along its radius."""
    at = np.arange(size) + 0.5
    rows, columns = at[:, None] - self.row, at[None] - self.column
    angle = np.arctan2(rows, columns)[..., None]
    k = np.arange(1, _HARMONICS + 1)
    wave = (self.amplitudes * np.cos(k * angle + self.phases)).sum(axis=-1)
    return self.radius * (1 + wave) - np.hypot(rows, columns)


def draw_blob(size: int, rng: np.random.Generator) -> Blob:
  """A blob of 2 to 38 % of a square image, most of it inside."""
  k = np.arange(1, _HARMONICS + 1)
  radius = size * rng.uniform(0.1, 0.3)
  row, column = rng.uniform(0.3 * size, 0.7 * size, 2)
  return Blob(
    row,
    column,
    radius,
    rng.uniform(0, 0.25, _HARMONICS) / k,
    rng.uniform(0, 2 * np.pi, _HARMONICS),
  )


def lesions(
  size: int, count: int, *, fraction: float, seed: int, photos: bool = False
) -> PairSet:
  """Blobs of one texture on another, with hairs, shading and noise.

  Skin lesions in kind: a darker blob with a border of one pixel on a lighter
  ground. A texture is either coloured noise (power falling as 1 / f^b) of its
  own two colours and exponents, or part of a photograph inside scikit-image;
  no texture serves both sides of the split.

  Args:
    size: side of the square images.
    count: pairs.
    fraction: of the textures for validation; the pairs divide evenly over 50
      textures, or over the photographs.
    seed: of everything.
    photos: textures are parts of `PHOTOS`.

  Raises:
    UserError: too few pairs for both sides, or no scikit-image.
  """
  kinds = len(PHOTOS) if photos else min(_TEXTURES, count)
  held = round(fraction * kinds)
  if not 0 < held < kinds or count < kinds:
    raise UserError(
      f"config.data.examples={count} with validation_fraction={fraction}: "
      f"lesions of {kinds} textures need at least {max(kinds, 2)} examples and "
      "a fraction that leaves a texture for each side"
    )
  order = sorted(
    range(kinds),
    key=lambda t: hashlib.blake2b(f"{seed}\0{t}".encode()).digest(),
  )
  validation = np.isin(np.arange(count) % kinds, order[:held])
  cut = _noise_patches(seed)
  if photos:
    sides = [np.array(order[:held]), np.array(order[held:])]
    cut = _photo_patches(sides)

  def read(i: int) -> tuple[np.ndarray, np.ndarray]:
    rng = _rng(seed, i, 0)
    ground, patch = cut(i % kinds, size, rng)
    return draw_lesion(ground, patch, rng)

  noise = "photographs of scikit-image" if photos else "coloured noise"
  return PairSet(
    read=read,
    shape=lambda i: (size, size),
    names=[f"lesion-{i:05d}" for i in range(count)],
    classes=("background", "lesion"),
    validation=validation,
    fingerprint=f"lesions {photos} {size} {count} {fraction} {seed}",
    title=f"drawn lesions of {noise}",
  )


def draw_lesion(
  ground: Float[np.ndarray, "S S 3"],
  patch: Float[np.ndarray, "S S 3"],
  rng: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "S S 3"], UInt8[np.ndarray, "S S"]]:
  """An image of a blob of `patch` on `ground`, and its exact mask.

  The mask holds the pixels whose centres lie inside the blob; hairs, shading
  and noise do not change it.
  """
  size = len(ground)
  depth = draw_blob(size, rng).depth(size)
  edge = np.clip(depth + 0.5, 0, 1)[..., None]
  image = edge * patch + (1 - edge) * ground
  at = np.arange(size) + 0.5
  for _ in range(rng.integers(6)):  # hairs: dark arcs through the image
    radius = size * rng.uniform(0.5, 2)
    towards = rng.uniform(0, 2 * np.pi)
    through = rng.uniform(0, size, 2)
    row, column = through + radius * np.array(
      [np.sin(towards), np.cos(towards)]
    )
    distance = abs(np.hypot(at[:, None] - row, at[None] - column) - radius)
    width = size / 128 * rng.uniform(0.5, 1)
    hair = np.clip(width + 0.5 - distance, 0, 1) * rng.uniform(0.5, 0.9)
    image *= (1 - hair)[..., None]
  rim = np.hypot(at[:, None] / size - 0.5, at[None] / size - 0.5) / np.sqrt(0.5)
  image *= (1 - rng.uniform(0, 0.4) * rim**2)[..., None]
  image += rng.normal(0, 4, image.shape)
  mask = (depth > 0).astype(np.uint8)
  return np.clip(np.round(image), 0, 255).astype(np.uint8), mask


_Cut = Callable[[int, int, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def _noise_patches(seed: int) -> _Cut:
  """Ground and lesion of texture t, anew for every pair."""

  def cut(
    texture: int, size: int, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    look = _rng(seed, texture, 1)
    skin = np.array([215, 165, 140]) + look.uniform(-30, 30, 3)
    # Some lesions are hard to see.
    pigment = skin * look.uniform(0.45, 0.85) + look.uniform(-12, 12, 3)
    return tuple(
      colour + _coloured_noise(size, *look.uniform([0.6, 6], [1.6, 22]), rng)
      for colour in (skin, pigment)
    )

  return cut


def _coloured_noise(
  size: int, exponent: float, deviation: float, rng: np.random.Generator
) -> Float[np.ndarray, "S S 1"]:
  """Noise whose amplitude falls as 1 / f^exponent, of that deviation."""
  frequency = np.hypot(
    np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
  )
  frequency[0, 0] = np.inf
  white = np.fft.rfft2(rng.normal(size=(size, size)))
  noise = np.fft.irfft2(white / frequency**exponent, s=(size, size))
  return (noise * (deviation / noise.std()))[..., None]


def _photo_patches(sides: list[np.ndarray]) -> _Cut:
  """Parts of photograph t as the ground and of another of its side in it."""

  @functools.cache
  def photo(kind: int) -> np.ndarray:
    file = installed("skimage", f"data/{PHOTOS[kind]}", "scikit-image")
    pixels = read_image(file).astype(np.float64)
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels

  photo(0)  # says at once if it is not installed

  def part(kind: int, size: int, rng: np.random.Generator) -> np.ndarray:
    whole = photo(kind)
    # Mirrored where the image asked for is larger than the photograph.
    edge = [(0, max(0, size - n)) for n in whole.shape[:2]]
    if any(after for _, after in edge):
      whole = np.pad(whole, (*edge, (0, 0)), "symmetric")
    top, left = (int(rng.integers(n - size + 1)) for n in whole.shape[:2])
    return whole[top : top + size, left : left + size]

  def cut(
    kind: int, size: int, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    (side,) = (s for s in sides if kind in s)
    others = side[side != kind] if len(side) > 1 else side
    found = [part(kind, size, rng), part(int(rng.choice(others)), size, rng)]
    found.sort(key=lambda p: -p.mean())
    ground, patch = found
    # The lesion is the darker, by a tenth of the range at the least.
    excess = patch.mean() - (ground.mean() - 25)
    return ground, patch - max(excess, 0)

  return cut


def mazes(size: int, count: int, *, scale: int = 2, seed: int) -> PairSet:
  """Mazes with a marker; the mask is all that can be reached from it.

  Args:
    size: side of the square images.
    count: pairs.
    scale: pixels per side of a place of the maze.
    seed: of everything.

  Raises:
    UserError: no room for a maze of 2 x 2 cells.
  """
  if scale < 1 or size // scale < 5:
    raise UserError(
      f"maze: an image of {size} pixels with {scale} to a place holds no maze; "
      "config.data.size must be at least 5 places"
    )

  def read(i: int) -> tuple[np.ndarray, np.ndarray]:
    rng = _rng(seed, i, 2)
    cells = (size // scale - 1) // 2
    place, marker = draw_maze(cells, rng)
    inside = reachable(place, marker)
    colours = np.where(place[..., None], [200, 200, 200], [40, 40, 40])
    colours[marker] = [230, 40, 40]
    image, mask = (
      np.repeat(np.repeat(array, scale, axis=0), scale, axis=1)
      for array in (colours, inside)
    )
    # Walls fill what is left over at the right and at the bottom.
    rest = [(0, size - len(mask))] * 2
    image = np.pad(image, (*rest, (0, 0)), constant_values=40)
    return image.astype(np.uint8), np.pad(mask, rest).astype(np.uint8)

  return PairSet(
    read=read,
    shape=lambda i: (size, size),
    names=[f"maze-{i:05d}" for i in range(count)],
    classes=("background", "reachable"),
    validation=None,
    fingerprint=f"mazes {size} {count} {scale} {seed}",
    title=f"drawn mazes, {scale} pixels to a place",
  )


def draw_maze(
  cells: int, rng: np.random.Generator
) -> tuple[Bool[np.ndarray, "P P"], tuple[int, int]]:
  """A maze in about four parts without way from one to another.

  Args:
    cells: along a side; P is 2 cells + 1.
    rng: of its passages.

  Returns:
    Which places are open (cells are at odd places, passages between them), and
    the place of the marker, a cell.
  """
  walls = [
    (r, c, down)
    for r in range(cells)
    for c in range(cells)
    for down in (0, 1)
    if (r if down else c) + 1 < cells
  ]
  parent = {(r, c): (r, c) for r in range(cells) for c in range(cells)}

  def root(cell: tuple[int, int]) -> tuple[int, int]:
    while parent[cell] != cell:
      parent[cell] = cell = parent[parent[cell]]
    return cell

  # A random spanning tree, so that between two cells there is one way.
  place = np.zeros((2 * cells + 1, 2 * cells + 1), bool)
  place[1::2, 1::2] = True
  passages = []
  for i in rng.permutation(len(walls)):
    r, c, down = walls[i]
    one, other = root((r, c)), root((r + down, c + 1 - down))
    if one != other:
      parent[one] = other
      passages.append((2 * r + 1 + down, 2 * c + 2 - down))
  closed = min(3, len(passages) - 1)
  for i, passage in enumerate(rng.permutation(passages)):
    place[tuple(passage)] = i >= closed
  row, column = rng.integers(cells, size=2)
  return place, (2 * int(row) + 1, 2 * int(column) + 1)


def reachable(
  place: Bool[np.ndarray, "P Q"], start: tuple[int, int]
) -> Bool[np.ndarray, "P Q"]:
  """The open places that steps up, down, left and right lead to from start."""
  inside = np.zeros_like(place)
  inside[start] = True
  edge = [start]
  while edge:
    row, column = edge.pop()
    for r, c in (
      *((row + 1, column), (row - 1, column)),
      *((row, column + 1), (row, column - 1)),
    ):
      within = 0 <= r < place.shape[0] and 0 <= c < place.shape[1]
      if within and place[r, c] and not inside[r, c]:
        inside[r, c] = True
        edge.append((r, c))
  return inside
