"""Generation with any causal model that has a decode cache."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from multihead.cache import snapshots
from multihead.cache.static import Cache
from multihead.errors import UserError
from multihead.generation import programs, sampling
from multihead.generation.programs import Progress
from multihead.parallel import sharding

Callback = Callable[[Int[np.ndarray, "B n"]], None]


def bucket(length: int) -> int:
  """The length that prompts (and caches) of this length are padded to.

  A multiple of 64; beyond 1024 one of sixteen steps from each power of two to
  the next, so at most an eighth is padding and few programs are compiled.
  """
  step = max(64, (1 << (max(length, 1) - 1).bit_length()) // 16)
  return -(-length // step) * step


@dataclasses.dataclass(frozen=True)
class Prefix:
  """What a model keeps of some text: continue from it as often as you like.

  Attributes:
    cache: for `model.apply`, of B rows.
    logits: [B, V] float32, the scores of the token that comes next.
    used: slots of the cache that are taken.
  """

  cache: Cache
  logits: Float[Array, "B V"]
  used: int


class Generator:
  """A model and its parameters, ready to continue any number of texts.

  Stacked layers are taken apart once, here, and weights that the model reads
  in a narrower dtype converted; both copy parameters. The loop then updates
  each layer's cache in place and slices and converts no weights. Programs are
  compiled when first needed, and shared by all generators of one model.

  Under `jax.set_mesh`, or with parameters that live on a mesh, the batch is
  split over its data and fsdp axes and the heads over its tensor axis.
  """

  def __init__(
    self,
    model: Any,
    params: Any,
    *,
    cache_dtype: Any = None,
    unroll: bool = True,
  ):
    """Takes the layers apart.

    Args:
      model: a causal model with `init_cache` and `place_cache`, see
        `models.falcon_h1`.
      params: its parameters.
      cache_dtype: of keys and values; the model's dtype by default.
      unroll: False keeps stacked layers as they are: no second copy of the
        parameters, a slower loop, and a faster compilation.
    """
    self._mesh = _mesh_of(params)
    with self._on_mesh():
      self.model, self.params = programs.prepare(model, params, unroll)
    self._dtype = None if cache_dtype is None else jnp.dtype(cache_dtype)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    *,
    mask: Bool[Array, "B T"] | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | Sequence[int] | None = None,
    rng: Array | None = None,
    prefill_chunk: int | None = None,
    prefix: Prefix | None = None,
    callback: Callback | None = None,
    callback_every: int = 1,
  ) -> Int[np.ndarray, "B T_new"]:
    """Continues the texts; see `generate`."""
    tokens, mask = self._check(tokens, mask, prefix)
    if max_new_tokens < 0:
      raise ValueError(f"max_new_tokens={max_new_tokens} must not be negative")
    if callback_every < 1:
      raise ValueError(f"callback_every={callback_every} must be at least 1")
    strategy, settings = sampling.plan(
      self.model.vocab_size, temperature, top_k, top_p
    )
    if strategy.greedy:
      rng = None
    elif rng is None:
      raise ValueError(
        f"temperature={temperature} draws tokens at random: give rng, for "
        "example rng=jax.random.key(0), or temperature=0"
      )
    if max_new_tokens == 0:
      return tokens
    eos = np.asarray([-1] if eos_id is None else eos_id, np.int32).reshape(-1)
    with self._on_mesh():
      cache, progress, _ = self._read(
        tokens, mask, max_new_tokens, prefill_chunk, prefix
      )
      run = functools.partial(
        programs.decode,
        self.model,
        strategy,
        self.params,
        settings=settings,
        eos=eos,
        rng=rng,
      )
      last = max_new_tokens - 1
      if callback is None:
        _, progress = run(cache=cache, progress=progress, last=np.int32(last))
      else:
        progress = _stream(run, cache, progress, last, callback, callback_every)
      new = np.asarray(progress["tokens"])[:, :max_new_tokens]
    return np.concatenate([tokens, new], axis=1)

  def prefill(
    self,
    tokens: Int[Array, "B T"],
    *,
    mask: Bool[Array, "B T"] | None = None,
    prefill_chunk: int | None = None,
    prefix: Prefix | None = None,
  ) -> Prefix:
    """Reads a text that several continuations will share.

    Args:
      tokens: the text.
      mask: True for real tokens; padding is on the left.
      prefill_chunk: as in `generate`.
      prefix: what the text itself continues; it stays as it is.

    Returns:
      The prefix, for `generate(prefix=...)`, `prefill` and `save`.

    Raises:
      UserError: the text is longer than the model's maximum.
      ValueError: as in `generate`.
    """
    tokens, mask = self._check(tokens, mask, prefix)
    with self._on_mesh():
      cache, progress, used = self._read(tokens, mask, 0, prefill_chunk, prefix)
    return Prefix(cache, progress["logits"], used)

  def save(self, path: Any, prefix: Prefix) -> None:
    """Writes a prefix as a directory, the slots in use alone.

    Raises:
      UserError: the path exists.
    """
    rows, _ = snapshots.size(prefix.cache)
    with self._on_mesh():
      cache, _ = programs.start(
        self.model,
        (prefix.cache, prefix.logits),
        rows,
        max(prefix.used, 1),
        self._dtype,
      )
    snapshots.save(path, cache, prefix.logits, self._identity())

  def load(self, path: Any) -> Prefix:
    """Reads a prefix that `save` wrote with the same model and parameters.

    Raises:
      UserError: no snapshot, a torn one, or one of another model or of other
        parameters.
    """
    cache, logits = snapshots.load(
      path,
      functools.partial(self.model.init_cache, dtype=self._dtype),
      self.model.vocab_size,
      self._identity(),
      None if self._mesh is None else sharding.replicated(self._mesh),
    )
    return Prefix(cache, logits, snapshots.size(cache)[1])

  def _identity(self) -> dict[str, Any]:
    """What a snapshot of this generator depends on, by name."""
    with self._on_mesh():
      samples = np.asarray(_sample_values(self.params))
    digest = hashlib.sha256(samples.tobytes()).hexdigest()[:16]
    return {
      **snapshots.architecture(self.model),
      "cache_dtype": str(self._dtype),
      "parameters": digest,
    }

  def _on_mesh(self) -> contextlib.AbstractContextManager:
    """Puts the parameters' mesh in force, unless one is already."""
    if self._mesh is None or not jax.sharding.get_abstract_mesh().empty:
      return contextlib.nullcontext()
    return jax.set_mesh(self._mesh)

  def _check(
    self, tokens: Any, mask: Any, prefix: Prefix | None
  ) -> tuple[np.ndarray, np.ndarray | None]:
    """Prompt and mask as numpy arrays; a mask that hides nothing is None."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
      raise ValueError(
        f"tokens must be integers [B, T], got {tokens.dtype} of shape "
        f"{tokens.shape}"
      )
    if tokens.shape[1] == 0 and prefix is None:
      raise ValueError(
        "tokens [B, 0] without a prefix: give at least one token"
      )
    vocab = self.model.vocab_size
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
      raise UserError(
        f"tokens range from {tokens.min()} to {tokens.max()}; the model's "
        f"vocabulary is 0 to {vocab - 1}"
      )
    if mask is not None:
      mask = np.asarray(mask).astype(bool)
      if mask.shape != tokens.shape:
        raise ValueError(
          f"mask has shape {mask.shape}, tokens {tokens.shape}; they must be "
          "equal"
        )
      if not (mask[:, -1:].all() and (mask[:, 1:] >= mask[:, :-1]).all()):
        raise ValueError(
          "mask must be False (padding) on the left and True on the right in "
          "every row; pad prompts on the left"
        )
      mask = None if mask.all() else mask
    return tokens.astype(np.int32), mask

  def _read(
    self,
    tokens: np.ndarray,
    mask: np.ndarray | None,
    room: int,
    chunk: int | None,
    prefix: Prefix | None,
  ) -> tuple[Cache, Progress, int]:
    """A cache of the prompt with room for new tokens, and the slots used."""
    if chunk is not None and chunk < 1:
      raise ValueError(f"prefill_chunk={chunk} must be at least 1")
    batch, length = tokens.shape
    before = 0 if prefix is None else prefix.used
    longest = self.model.max_position_embeddings
    left = longest - before - room
    if length > left:
      held = f"{before} of the prefix, " if before else ""
      raise UserError(
        f"{held}{length} of the prompt and {room} new tokens are more than "
        f"the model's max_position_embeddings={longest}; shorten the prompt "
        "or max_new_tokens"
      )
    padded = bucket(length) if chunk is None else -(-length // chunk) * chunk
    padded = min(padded, left)
    slots = min(bucket(before + padded + room), longest)
    if prefix is not None:
      slots = max(slots, snapshots.size(prefix.cache)[1])
    tokens, mask = _pad_left(tokens, mask, padded)
    if prefix is None and (chunk is None or chunk >= padded):
      cache, progress = programs.prefill(
        self.model, self.params, tokens, mask, slots=slots, dtype=self._dtype
      )
      return cache, progress, padded
    cache, progress = programs.start(
      self.model,
      None if prefix is None else (prefix.cache, prefix.logits),
      batch=batch,
      slots=slots,
      dtype=self._dtype,
    )
    # An odd piece can only be the first one: the others have one shape.
    end = 0
    while end < padded:
      begin = end
      end += padded if chunk is None else (padded - end - 1) % chunk + 1
      piece = slice(begin, end)
      cache, progress = programs.extend(
        self.model,
        self.params,
        cache,
        progress,
        tokens[:, piece],
        None if mask is None else mask[:, piece],
      )
    return cache, progress, before + padded


def _stream(
  run: Callable[..., tuple[Cache, Progress]],
  cache: Cache,
  progress: Progress,
  last: int,
  callback: Callback,
  every: int,
) -> Progress:
  """Decodes in short runs and hands their tokens over.

  Each run is launched before the tokens of the run before are waited for, so
  the device does not idle while the callback works.
  """
  shown = 0

  def show(progress: Progress, until: int) -> bool:
    nonlocal shown
    done = np.asarray(progress["done"]).all()
    step = int(progress["step"]) if done else until
    new = np.asarray(progress["tokens"])[:, shown : step + 1]
    shown = step + 1
    if new.shape[1]:
      callback(new)
    return bool(done)

  until, previous = 0, None
  while True:
    cache, progress = run(cache=cache, progress=progress, last=np.int32(until))
    if previous is not None and show(*previous):
      return progress
    previous = progress, until
    if until == last:
      show(*previous)
      return progress
    until = min(until + every, last)


def _pad_left(
  tokens: np.ndarray, mask: np.ndarray | None, length: int
) -> tuple[np.ndarray, np.ndarray | None]:
  extra = length - tokens.shape[1]
  if extra == 0:
    return tokens, mask
  mask = np.ones(tokens.shape, bool) if mask is None else mask
  widths = ((0, 0), (extra, 0))
  return np.pad(tokens, widths), np.pad(mask, widths)


def _mesh_of(params: Any) -> jax.sharding.Mesh | None:
  for leaf in jax.tree.leaves(params):
    place = getattr(leaf, "sharding", None)
    if isinstance(place, jax.sharding.NamedSharding):
      return place.mesh
  return None


@jax.jit
def _sample_values(params: Any) -> Array:
  """A few values of every parameter, to tell sets of parameters apart."""

  def few(leaf: Array) -> Array:
    strides = tuple(slice(None, None, max(1, n // 3)) for n in leaf.shape)
    return leaf[strides].astype(jnp.float32).reshape(-1)

  return jnp.concatenate([few(leaf) for leaf in jax.tree.leaves(params)])


def generate(
  model: Any,
  params: Any,
  tokens: Int[Array, "B T"],
  *,
  mask: Bool[Array, "B T"] | None = None,
  max_new_tokens: int,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  eos_id: int | Sequence[int] | None = None,
  rng: Array | None = None,
  prefill_chunk: int | None = None,
  prefix: Prefix | None = None,
  callback: Callback | None = None,
  callback_every: int = 1,
) -> Int[np.ndarray, "B T_new"]:
  """Continues texts, token by token.

  The prompt is padded on the left to `bucket(T)` and the cache has
  `bucket(bucket(T) + max_new_tokens)` slots (less where the model's maximum is
  near), so two programs are compiled for all prompts that share these. Use a
  `Generator` for repeated calls: stacked layers are taken apart here each time,
  which copies the parameters.

  Args:
    model: a causal model with a decode cache, see `models.falcon_h1`.
    params: its parameters.
    tokens: the prompts. T may be 0 with a prefix.
    mask: True for real tokens; shorter prompts are padded on the left.
    max_new_tokens: how many tokens to append to each row.
    temperature: 0 takes the most likely token each time; otherwise logits are
      divided by it and tokens drawn.
    top_k: draw among the k most likely tokens.
    top_p: then among the fewest that hold this much of the probability.
    eos_id: one id or several. A row that has produced one is over: the rest of
      it is that id.
    rng: a key, needed where tokens are drawn. A row's draws depend on the
      batch it is in.
    prefill_chunk: read the prompt in pieces of so many tokens, which bounds the
      memory of activations; the prompt is padded to a multiple of it.
    prefix: what the prompts continue, from `Generator.prefill` or `.load`; of B
      rows, or of one row that all share. It stays as it is.
    callback: called with the new tokens [B, n] as they come; after the last row
      is over it is called no more.
    callback_every: tokens between two calls.

  Returns:
    [B, T + max_new_tokens] int32: prompts (without the prefix) and new tokens.

  Raises:
    UserError: prefix, prompt and new tokens exceed max_position_embeddings.
    ValueError: shapes, ids or settings that are not allowed, padding that is
      not on the left, or no rng where one is needed.
  """
  return Generator(model, params)(
    tokens,
    mask=mask,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    eos_id=eos_id,
    rng=rng,
    prefill_chunk=prefill_chunk,
    prefix=prefix,
    callback=callback,
    callback_every=callback_every,
  )
