"""Falcon-H1: attention heads and state-space heads in parallel in every layer.

"Falcon-H1: A Family of Hybrid-Head Language Models Redefining Efficiency and
Performance", arXiv 2507.22448. Field names are those of the published
config.json files.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from multihead.cache import static
from multihead.errors import UserError
from multihead.layers import (
  Embedding,
  GatedMLP,
  Linear,
  Mamba2,
  RMSNorm,
  SelfAttention,
  stacking,
)
from multihead.parallel.sharding import BATCH_AXES, constrain


@dataclasses.dataclass(frozen=True)
class Multipliers:
  """Fixed factors in the forward pass that make one recipe fit every width.

  Attributes:
    embedding: on the token embeddings.
    lm_head: on the logits.
    key: on the attention keys.
    attention_in, attention_out: around the attention mixer.
    ssm_in, ssm_out: around the state-space mixer.
    mlp_gate: on the gate of the MLP, before silu.
    mlp_down: on the output of the MLP.
    ssm: on the sections gate, x, B, C and dt of the mixer's projection.
  """

  embedding: float = 1.0
  lm_head: float = 1.0
  key: float = 1.0
  attention_in: float = 1.0
  attention_out: float = 1.0
  ssm_in: float = 1.0
  ssm_out: float = 1.0
  mlp_gate: float = 1.0
  mlp_down: float = 1.0
  ssm: tuple[float, float, float, float, float] = (1.0,) * 5


def multipliers_for_shape(
  *,
  hidden_size: int,
  attention_width: int,
  head_dim: int,
  ssm_width: int,
  intermediate_size: int,
  base_hidden_size: int = 1280,
  base_attention_width: int = 768,
  base_ssm_width: int = 1536,
  base_intermediate_size: int = 3072,
) -> Multipliers:
  """The multipliers of a shape, by the closed forms behind the released ones.

  The forms were derived from the released values: they reproduce 0.5B, 3B, 7B
  and 34B to every printed digit, with the 1.5B-Deep model as base. Its own
  factors are embedding 2^2.5, lm_head 2^-5, key 2^-2.5 (at head dimension
  128), attention_out 2^-1, ssm_out sqrt(2)/6, mlp (2^-0.5, 5/16). With the
  base arguments set to a small model of one's own, they carry its learning
  rate over to other widths (the paper's use of muP).

  Args:
    hidden_size: model width d.
    attention_width: query heads times head dimension.
    head_dim: of the attention heads.
    ssm_width: state-space heads times their dimension.
    intermediate_size: feed-forward width.
    base_hidden_size: width of the base shape, and so on.
    base_attention_width: see above.
    base_ssm_width: see above.
    base_intermediate_size: see above.

  Returns:
    The multipliers.
  """
  d = base_hidden_size / hidden_size
  return Multipliers(
    embedding=2**2.5,
    lm_head=d / 32,
    key=2 / math.sqrt(head_dim) * d**2,
    attention_in=1.0,
    attention_out=0.5 * d * base_attention_width / attention_width,
    ssm_in=d,
    ssm_out=math.sqrt(2) / 6 * base_ssm_width / ssm_width,
    mlp_gate=d / math.sqrt(2),
    mlp_down=0.3125 * d * base_intermediate_size / intermediate_size,
    ssm=(2**-1.5, 2**-2, 2**-2.5, 2**-1, 2**-1.5),
  )


def _variant(
  *,
  layers: int,
  hidden: int,
  mlp: int,
  heads: tuple[int, int, int],
  ssm: tuple[int, int, int, int],
  vocab: int,
  positions: int,
  rms_norm: bool = True,
  tied: bool = False,
  chunk: int = 128,
  multipliers: Multipliers | None = None,
) -> dict[str, Any]:
  """One column of the paper's table of shapes (section 3, table 5)."""
  queries, keys, head_dim = heads
  ssm_heads, ssm_dim, state, groups = ssm
  return dict(
    num_hidden_layers=layers,
    hidden_size=hidden,
    intermediate_size=mlp,
    num_attention_heads=queries,
    num_key_value_heads=keys,
    head_dim=head_dim,
    mamba_n_heads=ssm_heads,
    mamba_d_head=ssm_dim,
    mamba_d_state=state,
    mamba_n_groups=groups,
    mamba_chunk_size=chunk,
    mamba_rms_norm=rms_norm,
    vocab_size=vocab,
    max_position_embeddings=positions,
    tie_word_embeddings=tied,
    multipliers=multipliers
    or multipliers_for_shape(
      hidden_size=hidden,
      attention_width=queries * head_dim,
      head_dim=head_dim,
      ssm_width=ssm_heads * ssm_dim,
      intermediate_size=mlp,
    ),
  )


# heads: (query, key, dimension); ssm: (heads, dimension, state, groups).
VARIANTS: dict[str, dict[str, Any]] = {
  "tiny-90m": _variant(
    layers=24, hidden=512, mlp=768, heads=(8, 2, 64), ssm=(24, 32, 64, 1),
    vocab=32768, positions=262144, rms_norm=False, tied=True,
    multipliers=Multipliers(embedding=0.0344, lm_head=0.078125),
  ),
  "0.5b": _variant(
    layers=36, hidden=1024, mlp=2048, heads=(8, 2, 64), ssm=(24, 64, 128, 1),
    vocab=32784, positions=16384, rms_norm=False,
  ),
  "1.5b": _variant(
    layers=24, hidden=2048, mlp=4608, heads=(8, 2, 128), ssm=(48, 64, 256, 1),
    vocab=65537, positions=131072,
  ),
  "1.5b-deep": _variant(
    layers=66, hidden=1280, mlp=3072, heads=(6, 2, 128), ssm=(24, 64, 256, 1),
    vocab=65536, positions=131072,
  ),
  "3b": _variant(
    layers=32, hidden=2560, mlp=6144, heads=(10, 2, 128), ssm=(32, 128, 256, 1),
    vocab=65536, positions=131072,
  ),
  "7b": _variant(
    layers=44, hidden=3072, mlp=12288, heads=(12, 2, 128),
    ssm=(24, 128, 256, 1), vocab=130048, positions=262144, chunk=256,
  ),
  "34b": _variant(
    layers=72, hidden=5120, mlp=21504, heads=(20, 4, 128),
    ssm=(32, 128, 256, 2), vocab=261120, positions=262144,
  ),
}  # fmt: skip


# How a mesh splits what a layer keeps between calls.
_CACHE_AXES = {
  "k": (BATCH_AXES, None, "tensor"),
  "v": (BATCH_AXES, None, "tensor"),
  "conv_x": (BATCH_AXES, None, "tensor", None),
  "conv_bc": (BATCH_AXES, None, None, "tensor", None),
  "ssm": (BATCH_AXES, "tensor", None, None),
}


@dataclasses.dataclass
class _Context:
  """What every layer needs besides its input; a pytree of arrays."""

  positions: Array
  mask: Array | None
  segment_ids: Array | None
  index: Array | None
  valid: Array | None


jax.tree_util.register_dataclass(_Context)


class _Layer(nn.Module):
  """Both mixers read the same normalised input; one residual takes their sum.

  Paper, section 2: the SA_M block (state space and attention in parallel,
  then the MLP).
  """

  norm: Any
  attention: Any
  mamba: Any
  mlp: Any
  multipliers: Multipliers
  prefill: bool

  @nn.compact
  def __call__(
    self, x: Array, context: _Context, cache: dict[str, Array] | None
  ) -> tuple[Array, dict[str, Array] | None]:
    m = self.multipliers
    u = self.norm(name="input_norm")(x)
    keep = ("k", "v")
    attention, kv = self.attention(name="attention")(
      u * m.attention_in,
      context.positions,
      mask=context.mask,
      segment_ids=context.segment_ids,
      cache=cache and {name: cache[name] for name in keep},
      index=context.index,
      valid=context.valid,
      prefill=self.prefill,
    )
    mamba, states = self.mamba(name="mamba")(
      u,
      mask=context.mask,
      segment_ids=context.segment_ids,
      cache=cache and {n: v for n, v in cache.items() if n not in keep},
      prefill=self.prefill,
    )
    attention, mamba = attention * m.attention_out, mamba * m.ssm_out
    self.sow("intermediates", "attention_out", attention)
    self.sow("intermediates", "mamba_out", mamba)
    x = constrain(x + (mamba + attention), BATCH_AXES, "sequence", None)
    mlp = self.mlp(name="mlp")(self.norm(name="mlp_norm")(x))
    self.sow("intermediates", "mlp_out", mlp)
    x = constrain(x + mlp, BATCH_AXES, "sequence", None)
    return x, None if cache is None else {**kv, **states}


class FalconH1(nn.Module):
  """The language model; fields are named as in the published config.json.

  Attributes beyond those:
    multipliers: the fixed factors of the forward pass.
    initializer: "mamba" (the usual one for training from scratch) or "normal"
      (that of the reference implementation: A = 1..N, dt_bias = 1).
    dtype: of activations and matrix products; norms, softmax, decays, states
      and logits are float32 throughout.
    param_dtype: of the parameters.
    scan_layers: one compiled layer, parameters stacked on a leading axis (fast
      to compile, for training) or one after another (fast to decode).
    remat: what the backward pass recomputes: "none", "full" or "dots" (all
      but the products with weights).
    attention_implementation, ssd_implementation: see `multihead.ops`.
  """

  vocab_size: int = 258
  hidden_size: int = 128
  intermediate_size: int = 256
  num_hidden_layers: int = 4
  num_attention_heads: int = 2
  num_key_value_heads: int = 1
  head_dim: int = 32
  mamba_n_heads: int = 4
  mamba_d_head: int = 32
  mamba_n_groups: int = 1
  mamba_d_state: int = 32
  mamba_d_conv: int = 4
  mamba_chunk_size: int = 128
  mamba_conv_bias: bool = True
  mamba_proj_bias: bool = False
  mamba_rms_norm: bool = True
  mamba_norm_before_gate: bool = False
  projectors_bias: bool = False
  attention_bias: bool = False
  mlp_bias: bool = False
  rms_norm_eps: float = 1e-5
  rope_theta: float = 1e11
  max_position_embeddings: int = 16384
  time_step_limit: tuple[float, float] = (0.0, float("inf"))
  tie_word_embeddings: bool = False
  initializer_range: float = 0.02
  multipliers: Multipliers = Multipliers()
  initializer: str = "mamba"
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  scan_layers: bool = True
  remat: str = "none"
  attention_implementation: Any = None
  ssd_implementation: Any = None

  def __post_init__(self) -> None:
    super().__post_init__()
    for many, few in (
      ("num_attention_heads", "num_key_value_heads"),
      ("mamba_n_heads", "mamba_n_groups"),
    ):
      if getattr(self, many) % getattr(self, few):
        raise UserError(
          f"{many}={getattr(self, many)} must be a multiple of "
          f"{few}={getattr(self, few)}"
        )
    if self.remat not in ("none", *stacking.REMAT_POLICIES):
      raise UserError(
        f"remat={self.remat!r}; allowed are 'none', 'full' and 'dots'"
      )
    if self.initializer not in ("mamba", "normal"):
      raise UserError(
        f"initializer={self.initializer!r}; allowed are 'mamba' and 'normal'"
      )

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    cache: static.Cache | None = None,
    prefill: bool = False,
    last_only: bool = False,
  ) -> Any:
    """Scores the next token at every position.

    Args:
      tokens: ids in [0, V).
      mask: True for real tokens. Padding on the left or right of the real
        ones changes nothing at them (with a cache that is not empty: on the
        left); logits at padding mean nothing.
      segment_ids: documents packed into a row: neither attention, state nor
        convolution crosses from one id to the next.
      cache: from `init_cache`, or what an earlier call returned; the T tokens
        are appended to it.
      prefill: promises that the cache is empty; only the new tokens are
        then read.
      last_only: compute the logits of the last position alone.

    Returns:
      Logits [B, T, V] float32, or [B, 1, V] if `last_only`; with a cache,
      (logits, cache).

    Raises:
      UserError: T exceeds max_position_embeddings.
      ValueError: shapes disagree, or segment_ids come with a cache.
    """
    self._check(tokens, mask, segment_ids, cache)
    m = self.multipliers
    index = valid = None
    if cache is not None:
      index = cache["index"]
      real = jnp.ones(tokens.shape, bool) if mask is None else mask
      cache, positions = static.advance(cache, real)
      valid = cache["valid"]
    elif mask is not None:
      counts = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
      positions = jnp.maximum(counts - 1, 0)
    else:
      row = jnp.arange(tokens.shape[1], dtype=jnp.int32)
      positions = jnp.broadcast_to(row, tokens.shape)
    context = _Context(positions, mask, segment_ids, index, valid)

    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    normal = nn.initializers.normal(self.initializer_range)
    embed = Embedding(
      self.vocab_size,
      self.hidden_size,
      embedding_init=normal,
      name="embed",
      **types,
    )
    x = embed(tokens) * m.embedding
    x = constrain(x, BATCH_AXES, "sequence", None)
    x, layers = self._layers(
      x, context, None if cache is None else cache["layers"], prefill
    )
    if last_only:
      x = x[:, -1:]
    x = RMSNorm(epsilon=self.rms_norm_eps, name="final_norm", **types)(x)
    if self.tie_word_embeddings:
      logits = embed.attend(x)
    else:
      logits = Linear(
        (self.vocab_size,),
        ("embed", "vocab"),
        kernel_init=normal,
        result_dtype=jnp.float32,
        name="lm_head",
        **types,
      )(x)
    logits = constrain(logits, BATCH_AXES, "sequence", "tensor") * m.lm_head
    if cache is None:
      return logits
    return logits, self.place_cache({**cache, "layers": layers})

  def _layers(
    self, x: Array, context: _Context, cache: Any, prefill: bool
  ) -> tuple[Array, Any]:
    """Runs the layers, scanned or one after another."""
    m = self.multipliers
    shared = dict(
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=nn.initializers.normal(self.initializer_range),
    )
    parts = dict(
      norm=functools.partial(
        RMSNorm,
        epsilon=self.rms_norm_eps,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
      ),
      attention=functools.partial(
        SelfAttention,
        num_heads=self.num_attention_heads,
        num_key_value_heads=self.num_key_value_heads,
        head_dim=self.head_dim,
        rope_theta=self.rope_theta,
        key_multiplier=m.key,
        use_bias=self.attention_bias,
        implementation=self.attention_implementation,
        **shared,
      ),
      mamba=functools.partial(
        Mamba2,
        num_heads=self.mamba_n_heads,
        head_dim=self.mamba_d_head,
        state_size=self.mamba_d_state,
        groups=self.mamba_n_groups,
        conv_width=self.mamba_d_conv,
        chunk_size=self.mamba_chunk_size,
        in_multiplier=m.ssm_in,
        multipliers=m.ssm,
        dt_limit=self.time_step_limit,
        gated_norm=self.mamba_rms_norm,
        norm_before_gate=self.mamba_norm_before_gate,
        epsilon=self.rms_norm_eps,
        conv_bias=self.mamba_conv_bias,
        in_bias=self.mamba_proj_bias,
        out_bias=self.projectors_bias,
        initializer=self.initializer,
        implementation=self.ssd_implementation,
        **shared,
      ),
      mlp=functools.partial(
        GatedMLP,
        hidden=self.intermediate_size,
        gate_multiplier=m.mlp_gate,
        down_multiplier=m.mlp_down,
        use_bias=self.mlp_bias,
        **shared,
      ),
      multipliers=m,
      prefill=prefill,
    )
    layer = _Layer
    if self.remat != "none":
      layer = nn.remat(
        layer,
        prevent_cse=not self.scan_layers,
        policy=stacking.REMAT_POLICIES[self.remat],
      )
    if self.scan_layers:
      scan = nn.scan(
        layer,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        out_axes=0,
        length=self.num_hidden_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      return scan(name="layers", **parts)(x, context, cache)
    states = []
    for i in range(self.num_hidden_layers):
      x, state = layer(name=f"layers_{i}", **parts)(
        x, context, None if cache is None else cache[i]
      )
      states.append(state)
    return x, tuple(states)

  def _check(self, tokens: Any, mask: Any, segments: Any, cache: Any) -> None:
    if tokens.ndim != 2:
      raise ValueError(f"tokens must be [B, T], got shape {tokens.shape}")
    for name, value in (("mask", mask), ("segment_ids", segments)):
      if value is not None and value.shape != tokens.shape:
        raise ValueError(
          f"{name} has shape {value.shape}, tokens {tokens.shape}; they must "
          "be equal"
        )
    if tokens.shape[1] > self.max_position_embeddings:
      raise UserError(
        f"a sequence of {tokens.shape[1]} tokens is longer than the model's "
        f"max_position_embeddings={self.max_position_embeddings}"
      )
    if cache is not None:
      if segments is not None:
        raise ValueError("segment_ids cannot be combined with a cache")
      if cache["valid"].shape[1] < tokens.shape[1]:
        raise ValueError(
          f"{tokens.shape[1]} tokens do not fit a cache of "
          f"{cache['valid'].shape[1]} slots"
        )

  def init_cache(
    self, batch_size: int, max_length: int, dtype: Any = None
  ) -> static.Cache:
    """An empty decode cache.

    Args:
      batch_size: B.
      max_length: S, slots for prompt and new tokens together.
      dtype: of keys, values and convolution inputs, the model's dtype by
        default; the state of the scan is float32 always.

    Returns:
      A cache for `__call__` (see `multihead.cache.static`).

    Raises:
      UserError: max_length exceeds max_position_embeddings.
    """
    if max_length > self.max_position_embeddings:
      raise UserError(
        f"a cache of {max_length} slots is longer than the model's "
        f"max_position_embeddings={self.max_position_embeddings}"
      )
    dtype = self.dtype if dtype is None else dtype
    lead = (self.num_hidden_layers,) if self.scan_layers else ()
    b, taps = batch_size, self.mamba_d_conv - 1
    kv = (b, max_length, self.num_key_value_heads * self.head_dim)
    heads = (self.mamba_n_heads, self.mamba_d_head)
    shapes = {
      "k": (kv, dtype),
      "v": (kv, dtype),
      "conv_x": ((b, taps, *heads), dtype),
      "conv_bc": (
        (b, taps, 2, self.mamba_n_groups, self.mamba_d_state),
        dtype,
      ),
      "ssm": ((b, *heads, self.mamba_d_state), jnp.float32),
    }

    def layer() -> dict[str, Array]:
      return {n: jnp.zeros(lead + s, t) for n, (s, t) in shapes.items()}

    layers = (
      layer()
      if self.scan_layers
      else tuple(layer() for _ in range(self.num_hidden_layers))
    )
    return self.place_cache(static.empty(batch_size, max_length, layers))

  def place_cache(self, cache: static.Cache) -> static.Cache:
    """Pins a cache to the mesh in force: rows and heads are split."""
    heads = dict.fromkeys(("k", "v"), self.num_key_value_heads)
    return static.place(cache, _CACHE_AXES, heads)

  def unroll(self, params: Any) -> tuple["FalconH1", Any]:
    """The same model with its layers one after another, and its parameters."""
    if not self.scan_layers:
      return self, params
    params = stacking.unstack(params, "layers", self.num_hidden_layers)
    return self.clone(scan_layers=False), params

  def stack(self, params: Any) -> tuple["FalconH1", Any]:
    """The same model with its layers scanned, and its parameters stacked."""
    if self.scan_layers:
      return self, params
    params = stacking.stack(params, "layers", self.num_hidden_layers)
    return self.clone(scan_layers=True), params
