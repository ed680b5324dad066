"""In-context regression: each sequence is a small data set and one question.

A task draws a function f, N context pairs (x_i, f(x_i)) and a query x_q; the
model reads them as tokens and shall answer f(x_q). Everything is a pure
function of a key, so that a training step draws its tasks on the device:

    family = InContextRegression(input_size=10, context_size=10)
    tasks = family.sample(jax.random.key(0), 512)
    loss = squared_loss(model.apply(params, tasks.tokens), tasks.y_query)

Families: arXiv 2212.07677, sections 3 to 5 and appendix A; the letters N
(context pairs), d (inputs) and o (outputs) are the paper's.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from multihead.errors import UserError, nearest

INPUTS = (
  *("uniform", "normal", "exponential", "laplace", "mixture"),
  *("anisotropic", "diabetes"),
)
FUNCTIONS = ("linear", "sine", "sine_independent", "measured")
LAYOUTS = ("concat", "classic", "classic_wide")


class Tasks(NamedTuple):
  """A batch of tasks; without the leading B, one.

  Attributes:
    tokens: [B, T, D], what a model reads; the query stands last.
    x: [B, N, d] inputs of the context.
    y: [B, N, o] what the context says of them: noise and distractors included.
    x_query: [B, d].
    y_query: [B, o], the answer, without noise.
    latent: [B, ...], what the function was made of: W [B, o, d] of linear
      tasks, amplitude and phase [B, 2] of sines, nothing [B, 0] of measured
      labels.
  """

  tokens: Float[Array, "*B T D"]
  x: Float[Array, "*B N d"]
  y: Float[Array, "*B N o"]
  x_query: Float[Array, "*B d"]
  y_query: Float[Array, "*B o"]
  latent: Float[Array, "..."]


def concat_tokens(
  x: Float[Array, "*B N d"],
  y: Float[Array, "*B N o"],
  x_query: Float[Array, "*B d"],
  initial: Float[Array, "o d"] | None = None,
) -> Float[Array, "*B T D"]:
  """Tokens (x_i, y_i), then (x_q, -W0 x_q): T = N + 1, D = d + o.

  Args:
    x: inputs of the context.
    y: their targets.
    x_query: the query.
    initial: W0, where gradient descent starts; None is zero.
  """
  first = jnp.zeros((*x_query.shape[:-1], y.shape[-1]), y.dtype)
  if initial is not None:
    first = -jnp.einsum("...d,od->...o", x_query, initial)
  context = jnp.concatenate([x, y], axis=-1)
  query = jnp.concatenate([x_query, first], axis=-1)[..., None, :]
  return jnp.concatenate([context, query], axis=-2)


def classic_tokens(
  x: Float[Array, "*B N d"],
  y: Float[Array, "*B N o"],
  x_query: Float[Array, "*B d"],
  *,
  wide: bool = False,
) -> Float[Array, "*B T D"]:
  """Tokens x_1, y_1, x_2, ..., y_N, x_q, one for each vector: T = 2N + 1.

  Targets stand in the last o channels of their tokens, zeros before them.

  Args:
    x: inputs of the context.
    y: their targets.
    x_query: the query.
    wide: inputs leave the last o channels empty (D = d + o); else they use all
      channels, as published (D = d).
  """
  d, o = x.shape[-1], y.shape[-1]
  width = d + o if wide else d
  pad = lambda a, left, right: jnp.pad(
    a, [(0, 0)] * (a.ndim - 1) + [(left, right)]
  )
  x, x_query = pad(x, 0, width - d), pad(x_query, 0, width - d)
  pairs = jnp.stack([x, pad(y, width - o, 0)], axis=-2)
  pairs = pairs.reshape(*x.shape[:-2], 2 * x.shape[-2], width)
  return jnp.concatenate([pairs, x_query[..., None, :]], axis=-2)


@dataclasses.dataclass(frozen=True)
class InContextRegression:
  """A family of tasks.

  Attributes:
    input_size: d.
    output_size: o.
    context_size: N.
    inputs: law of the inputs, coordinates independent: "uniform" in +-range/2,
      "normal", "exponential" or "laplace" of scale range; "mixture": one of
      these three, drawn for each task; "anisotropic": normal with covariance
      range^2 * `covariance`; "diabetes": N + 1 different patients of
      scikit-learn's table, each of the 10 columns with mean 0 and the standard
      deviation of the uniform law, range / sqrt(12).
    function: "linear", y = W x with W ~ weight_scale * N(0, 1); "sine",
      y = a sin(x + phase), with a in [.1, .5] and phase in [0, pi] made of one
      random number as published; "sine_independent", of two (weight_scale
      multiplies both); "measured", the disease progression that the diabetes
      table holds, standardised, times weight_scale.
    layout: "concat", "classic" or "classic_wide"; see the functions of those
      names.
    input_range: scale of the inputs.
    weight_scale: scale of the function.
    normalize: divide the inputs of a task, the query's too, by the Frobenius
      norm of its context (times range), as published for the mixture.
    noise: standard deviation of label noise in the context.
    distractors: context targets, drawn anew each task, that are replaced by
      N(0, 1).
    spectrum: eigenvalues of the anisotropic covariance.
    rotation_seed: of the random eigenvectors; None: the coordinate axes.
  """

  input_size: int = 10
  output_size: int = 1
  context_size: int = 10
  inputs: str = "uniform"
  function: str = "linear"
  layout: str = "concat"
  input_range: float = 1.0
  weight_scale: float = 1.0
  normalize: bool = False
  noise: float = 0.0
  distractors: int = 0
  spectrum: tuple[float, ...] = ()
  rotation_seed: int | None = 0

  def __post_init__(self) -> None:
    for name, allowed in (
      *(("inputs", INPUTS), ("function", FUNCTIONS), ("layout", LAYOUTS)),
    ):
      value = getattr(self, name)
      if value not in allowed:
        raise UserError(
          f"task.{name} is {value!r}{nearest(str(value), allowed)}; it must "
          f"be one of {', '.join(allowed)}"
        )
    for name in ("input_size", "output_size", "context_size"):
      if getattr(self, name) < 1:
        raise UserError(
          f"task.{name} is {getattr(self, name)}; it must be at least 1"
        )
    if not 0 <= self.distractors <= self.context_size:
      raise UserError(
        f"task.distractors is {self.distractors}; it must be between 0 and "
        f"context_size={self.context_size}"
      )
    if self.noise < 0:
      raise UserError(f"task.noise is {self.noise}; it must not be negative")
    if (self.inputs == "anisotropic") != bool(self.spectrum) or (
      self.spectrum and len(self.spectrum) != self.input_size
    ):
      raise UserError(
        f"task.spectrum has {len(self.spectrum)} eigenvalues; anisotropic "
        f"inputs need input_size={self.input_size}, other inputs none"
      )
    if self.function.startswith("sine") and (
      self.input_size != 1 or self.output_size != 1
    ):
      raise UserError(
        f"task.function={self.function!r} is of one input and one output; "
        f"given input_size={self.input_size}, output_size={self.output_size}"
      )
    if self.layout == "classic" and self.output_size > self.input_size:
      raise UserError(
        "task.layout='classic' writes the targets into tokens of input_size="
        f"{self.input_size} channels, too few for output_size="
        f"{self.output_size}; take 'classic_wide'"
      )
    if self.inputs == "diabetes" and self.input_size != 10:
      raise UserError(
        f"the diabetes table has 10 columns; task.input_size is "
        f"{self.input_size}"
      )
    if self.function == "measured" and (
      self.inputs != "diabetes" or self.output_size != 1
    ):
      raise UserError(
        "task.function='measured' is the one label of inputs='diabetes'"
      )

  @property
  def length(self) -> int:
    """T, tokens of a sequence."""
    pairs = 1 if self.layout == "concat" else 2
    return pairs * self.context_size + 1

  @property
  def token_size(self) -> int:
    """D, channels of a token."""
    if self.layout == "classic":
      return self.input_size
    return self.input_size + self.output_size

  @property
  def covariance(self) -> Float[np.ndarray, "d d"]:
    """Covariance of anisotropic inputs of range 1, float64."""
    axes = np.eye(self.input_size)
    if self.rotation_seed is not None:
      rng = np.random.default_rng(self.rotation_seed)
      axes, _ = np.linalg.qr(rng.normal(size=axes.shape))
    return axes @ np.diag(self.spectrum) @ axes.T

  def moments(self) -> tuple[float, float]:
    """Variance and fourth moment of one input coordinate.

    Raises:
      ValueError: the coordinates are not independent and of mean zero, so that
        closed forms of two moments do not hold.
    """
    r = self.input_range
    found = {
      "uniform": (r**2 / 12, r**4 / 80),
      "normal": (r**2, 3 * r**4),
      "laplace": (2 * r**2, 24 * r**4),
    }
    if self.inputs not in found or self.normalize:
      how = ", normalized" if self.normalize else ""
      raise ValueError(
        f"no closed form for inputs={self.inputs!r}{how}; it needs independent "
        f"coordinates of mean zero: {', '.join(found)}"
      )
    return found[self.inputs]

  def sample(
    self,
    key: jax.Array,
    count: int,
    *,
    input_range: Any = None,
    weight_scale: Any = None,
  ) -> Tasks:
    """Draws tasks; task i depends on the key and on i alone.

    Args:
      key: a key.
      count: B.
      input_range: in place of the family's, may be traced.
      weight_scale: likewise.
    """
    r = self.input_range if input_range is None else input_range
    scale = self.weight_scale if weight_scale is None else weight_scale
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
    return jax.vmap(lambda key: self._task(key, r, scale))(keys)

  def _task(self, key: jax.Array, r: Any, scale: Any) -> Tasks:
    key_x, key_w, key_noise = jax.random.split(key, 3)
    x, measured = self._inputs(key_x, r)
    if self.normalize:
      x = x * (r / jnp.linalg.norm(x[:-1]))
    y, latent = self._function(key_w, x, scale, measured)
    x, x_query, y, y_query = x[:-1], x[-1], y[:-1], y[-1]
    y = self._disturb(key_noise, y)
    if self.layout == "concat":
      tokens = concat_tokens(x, y, x_query)
    else:
      wide = self.layout == "classic_wide"
      tokens = classic_tokens(x, y, x_query, wide=wide)
    return Tasks(tokens, x, y, x_query, y_query, latent)

  def _inputs(self, key: jax.Array, r: Any) -> tuple[Array, Array | None]:
    """x [N + 1, d], the query last, and the measured labels of real rows."""
    shape = (self.context_size + 1, self.input_size)
    if self.inputs == "uniform":
      return r * jax.random.uniform(key, shape, minval=-0.5, maxval=0.5), None
    if self.inputs == "anisotropic":
      root = np.linalg.cholesky(self.covariance).astype(np.float32)
      return r * jax.random.normal(key, shape) @ root.T, None
    if self.inputs == "diabetes":
      table, labels = _diabetes()
      if shape[0] > len(table):
        raise UserError(
          f"task.context_size={self.context_size} needs {shape[0]} different "
          f"rows; the diabetes table has {len(table)}"
        )
      rows = jax.random.permutation(key, len(table))[: shape[0]]
      scale = r / np.sqrt(12).astype(np.float32)
      return scale * jnp.asarray(table)[rows], jnp.asarray(labels)[rows]
    laws = {
      "exponential": jax.random.exponential,
      "normal": jax.random.normal,
      "laplace": jax.random.laplace,
    }
    if self.inputs == "mixture":
      key, choice = jax.random.split(key)
      which = jax.random.randint(choice, (), 0, len(laws))
      drawn = jnp.stack([draw(key, shape) for draw in laws.values()])
      # A norm follows; or else the range is the scale.
      return (1.0 if self.normalize else r) * drawn[which], None
    return r * laws[self.inputs](key, shape), None

  def _function(
    self, key: jax.Array, x: Array, scale: Any, measured: Array | None
  ) -> tuple[Array, Array]:
    """y [N + 1, o] without noise, and what it was made of."""
    if self.function == "measured":
      return scale * measured[:, None], jnp.zeros((0,), x.dtype)
    if self.function == "linear":
      weights = scale * jax.random.normal(
        key, (self.output_size, self.input_size)
      )
      return jnp.einsum("nd,od->no", x, weights), weights
    first, second = jax.random.split(key)
    u = jax.random.uniform(first)
    # As published, one key gave both numbers: the family has one dimension.
    v = u if self.function == "sine" else jax.random.uniform(second)
    amplitude, phase = scale * (0.1 + 0.4 * u), scale * jnp.pi * v
    return amplitude * jnp.sin(x + phase), jnp.stack([amplitude, phase])

  def _disturb(self, key: jax.Array, y: Array) -> Array:
    if not (self.noise or self.distractors):
      return y
    noise_key, which_key, value_key = jax.random.split(key, 3)
    if self.noise:
      y = y + self.noise * jax.random.normal(noise_key, y.shape)
    if self.distractors:
      rank = jax.random.permutation(which_key, self.context_size)
      other = jax.random.normal(value_key, y.shape)
      y = jnp.where((rank < self.distractors)[:, None], other, y)
    return y


def squared_loss(
  predictions: Float[Array, "B o"], targets: Float[Array, "B o"]
) -> Float[Array, ""]:
  """Half the squared error, summed over outputs and averaged over tasks."""
  return 0.5 * jnp.mean(jnp.sum((predictions - targets) ** 2, axis=-1))


@functools.cache
def _diabetes() -> tuple[np.ndarray, np.ndarray]:
  """Standardised float32 inputs [442, 10] and labels [442]."""
  try:
    from sklearn import datasets
  except ImportError:
    raise UserError(
      "inputs='diabetes' is a table of scikit-learn, which is not installed: "
      "pip install 'multihead[tables]'"
    ) from None
  found = datasets.load_diabetes(scaled=False)
  standard = lambda a: ((a - a.mean(0)) / a.std(0)).astype(np.float32)
  return standard(found.data), standard(found.target)
