"""What generation compiles: reading a prompt, and a loop that extends it.

The loop runs on the device and feeds the model its own tokens. Shapes are
those that prompts of many lengths share, and numbers (how many tokens,
temperature, ..) are arguments, so a second prompt does not compile anything.
The functions are jitted here, once, with the model as a static argument: all
users of a model share its programs.
"""

import functools
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from multihead.cache import snapshots
from multihead.cache.static import Cache
from multihead.generation import sampling
from multihead.parallel.sharding import BATCH_AXES, constrain

# What a generation carries besides the cache:
#   logits [B, V]  scores of the token at `step`
#   token [B]      the token at `step`, once it has been chosen
#   tokens [B, S]  tokens chosen so far
#   done [B]       whether the row has seen an eos
#   step []        number of the token that is chosen next
Progress = dict[str, Array]


def _pin(progress: Progress) -> Progress:
  """Fixes where everything lives on the mesh, the same after every call."""
  spread = {"logits": (BATCH_AXES, "tensor")}
  return {
    name: constrain(x, *spread.get(name, (None,) * x.ndim))
    for name, x in progress.items()
  }


def _begin(cache: Cache, logits: Array) -> tuple[Cache, Progress]:
  """The progress of a generation that has not chosen a token yet."""
  batch, slots = snapshots.size(cache)
  progress = {
    "logits": logits,
    "token": jnp.zeros(batch, jnp.int32),
    "tokens": jnp.zeros((batch, slots), jnp.int32),
    "done": jnp.zeros(batch, bool),
    "step": jnp.zeros((), jnp.int32),
  }
  return cache, _pin(progress)


@functools.partial(jax.jit, static_argnames=("model", "slots", "dtype"))
def prefill(
  model: Any, params: Any, tokens: Array, mask: Any, slots: int, dtype: Any
) -> tuple[Cache, Progress]:
  """Reads a whole prompt into a new cache."""
  logits, cache = model.apply(
    {"params": params},
    constrain(tokens, BATCH_AXES, None),
    mask,
    cache=model.init_cache(tokens.shape[0], slots, dtype),
    prefill=True,
    last_only=True,
  )
  return _begin(cache, logits[:, 0])


@functools.partial(
  jax.jit, static_argnames=("model", "batch", "slots", "dtype")
)
def start(
  model: Any, prefix: Any, batch: int, slots: int, dtype: Any
) -> tuple[Cache, Progress]:
  """An empty cache, or a copy of a prefix for this batch and length."""
  if prefix is None:
    cache = model.init_cache(batch, slots, dtype)
    return _begin(cache, jnp.zeros((batch, model.vocab_size), jnp.float32))
  cache, logits = prefix
  init_cache = functools.partial(model.init_cache, dtype=dtype)
  cache = snapshots.resize(init_cache, cache, batch, slots)
  shape = (batch, *logits.shape[1:])
  return _begin(model.place_cache(cache), jnp.broadcast_to(logits, shape))


@functools.partial(
  jax.jit, static_argnames="model", donate_argnames=("cache", "progress")
)
def extend(
  model: Any,
  params: Any,
  cache: Cache,
  progress: Progress,
  tokens: Array,
  mask: Any,
) -> tuple[Cache, Progress]:
  """Appends tokens to a cache, in place."""
  logits, cache = model.apply(
    {"params": params},
    constrain(tokens, BATCH_AXES, None),
    mask,
    cache=cache,
    last_only=True,
  )
  return cache, _pin({**progress, "logits": logits[:, 0]})


@functools.partial(
  jax.jit, static_argnames=("model", "strategy"), donate_argnames="cache"
)
def decode(
  model: Any,
  strategy: sampling.Strategy,
  params: Any,
  cache: Cache,
  progress: Progress,
  settings: sampling.Settings,
  eos: Array,
  rng: Any,
  last: Array,
) -> tuple[Cache, Progress]:
  """Chooses the tokens up to number `last`, or until every row is done.

  The token at `progress["step"]` is chosen anew, with the same result if an
  earlier call has chosen it already; every further one costs one pass through
  the model. So generation may be cut into runs anywhere.

  Args:
    model: static.
    strategy: static, from `sampling.plan`.
    params: of the model.
    cache: updated in place.
    progress: of the last call.
    settings: from `sampling.plan`.
    eos: [E] ids that end a row.
    rng: a key, or None for the greedy strategy.
    last: number of the last token to choose, from 0.
  """

  def choose(progress: Progress) -> Progress:
    step, done = progress["step"], progress["done"]
    key = None if rng is None else jax.random.fold_in(rng, step)
    token = sampling.sample(progress["logits"], key, strategy, settings)
    token = jnp.where(done, progress["token"], token)
    tokens = lax.dynamic_update_slice_in_dim(
      progress["tokens"], token[:, None], step, axis=1
    )
    done |= (token[:, None] == eos).any(axis=1)
    return _pin(progress | {"token": token, "tokens": tokens, "done": done})

  def unfinished(carry: tuple[Cache, Progress]) -> Array:
    _, progress = carry
    return (progress["step"] < last) & ~progress["done"].all()

  def advance(carry: tuple[Cache, Progress]) -> tuple[Cache, Progress]:
    cache, progress = carry
    logits, cache = model.apply(
      {"params": params}, progress["token"][:, None], cache=cache
    )
    step = progress["step"] + 1
    return cache, choose(progress | {"logits": logits[:, 0], "step": step})

  cache, progress = lax.while_loop(
    unfinished, advance, (cache, choose(progress))
  )
  # What follows an eos is that eos.
  later = jnp.arange(progress["tokens"].shape[1]) > progress["step"]
  tokens = jnp.where(
    later & progress["done"][:, None],
    progress["token"][:, None],
    progress["tokens"],
  )
  return cache, _pin(progress | {"tokens": tokens})


@functools.partial(jax.jit, static_argnames=("model", "unroll"))
def _ready(model: Any, unroll: bool, params: Any) -> Any:
  """Parameters layer by layer, in the dtype that the model reads them in."""
  if unroll:
    model, params = model.unroll(params)
  leaves, tree = jax.tree.flatten(params)
  dtypes = _read_dtypes(model, params)
  return tree.unflatten(
    leaf.astype(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)
  )


def _read_dtypes(model: Any, params: Any) -> list[Any]:
  """For each parameter the narrower dtype that decoding reads, or its own.

  A loop that makes the conversion makes it again in each of its calls. Seen
  from a decoding step: a parameter qualifies if all that happens to it is one
  conversion.
  """

  def step(params: Any) -> Any:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model.apply({"params": params}, tokens, cache=model.init_cache(1, 1))

  jaxpr = jax.make_jaxpr(step)(jax.tree.map(jax.typeof, params)).jaxpr
  uses: dict[Any, set[Any]] = {variable: set() for variable in jaxpr.invars}
  for equation in jaxpr.eqns:
    converts = equation.primitive.name == "convert_element_type"
    for variable in equation.invars:
      if not isinstance(variable, jax.extend.core.Literal) and variable in uses:
        uses[variable].add(equation.params["new_dtype"] if converts else None)
  dtypes = []
  for variable, read in uses.items():
    own = variable.aval.dtype
    only = read.pop() if len(read) == 1 else None
    narrower = only is not None and only.itemsize < own.itemsize
    dtypes.append(only if narrower else own)
  return dtypes


def prepare(model: Any, params: Any, unroll: bool) -> tuple[Any, Any]:
  """A model and parameters made for decoding, computing the same.

  Args:
    model: a causal model.
    params: its parameters.
    unroll: take stacked layers apart, so that the loop updates the cache of
      each layer in place and slices no weights.

  Returns:
    The model and its parameters: the given ones, where nothing is to be done.
  """
  unroll = unroll and getattr(model, "scan_layers", False)
  wide = any(
    jnp.promote_types(leaf.dtype, model.dtype) != model.dtype
    for leaf in jax.tree.leaves(params)
  )
  if unroll or wide:
    params = _ready(model, unroll, params)
  return (model.clone(scan_layers=False) if unroll else model), params
