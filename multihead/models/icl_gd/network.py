"""The network: self-attention over (input, target) tokens, little else.

Section 2 of arXiv 2212.07677. Tokens are [B, T, D], the query stands last and
the targets in the last channels; context tokens alone are keys and values. The
answer is minus the query's target channels after the last layer.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from multihead import ops
from multihead.errors import UserError, nearest
from multihead.layers import Linear

ATTENTIONS = ("linear", "softmax", "mix", "sum_norm")
POSITIONS = ("none", "add", "concat")
_SUM_EPSILON = 1e-6


def sinusoids(length: int, size: int) -> Float[Array, "T C"]:
  """Positional encodings: sines in even channels, cosines in odd ones.

  Channels 2i and 2i + 1 have the frequency 10000^(-2i / size).
  """
  frequencies = 10000.0 ** (-jnp.arange(0, size, 2) / size)
  angles = jnp.arange(length)[:, None] * frequencies
  both = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
  return both.reshape(length, -1)[:, :size]


class InContextAttention(nn.Module):
  """Multi-head self-attention without biases, linear or not.

  Attributes:
    num_heads: N.
    key_size: H, of queries, keys and values; 0 takes D.
    kind: "linear", out = sum_j (q . k_j) v_j, without a scale; "softmax",
      weights softmax(q . k / sqrt(H)); "mix", g softmax + (1 - g) linear with
      a learned g; "sum_norm", linear with q and k divided by their sums over H.
    kernel_init: of all four kernels.
    dtype: of the arithmetic; the sum over the context is float32.
    param_dtype: of the parameters.
    implementation: see `multihead.ops`.
  """

  num_heads: int
  key_size: int
  kind: str
  kernel_init: Any
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  implementation: Any = None

  @nn.compact
  def __call__(
    self, queries: Float[Array, "B T D"], context: Float[Array, "B S D"]
  ) -> Float[Array, "B T D"]:
    D, N = queries.shape[-1], self.num_heads
    H = self.key_size or D
    into = ("embed", "heads", "head_dim")

    def kernel(name: str, shape: tuple[int, ...], axes: tuple) -> Array:
      # One matrix with as many inputs as the layer it belongs to.
      init = lambda key, shape, dtype: self.kernel_init(
        key, _as_matrix(name, shape), dtype
      ).reshape(shape)
      init = nn.with_logical_partitioning(init, axes)
      return self.param(name, init, shape, self.param_dtype).astype(self.dtype)

    query = kernel("query", (D, N, H), into)
    key = kernel("key", (D, N, H), into)
    value = kernel("value", (D, N, H), into)
    output = kernel("output", (N, H, D), ("heads", "head_dim", "embed"))
    queries, context = (x.astype(self.dtype) for x in (queries, context))
    if self.kind == "linear":
      return self._absorbed(queries, context, query, key, value, output)
    q = jnp.einsum("btd,dnh->btnh", queries, query)
    k = jnp.einsum("bsd,dnh->bsnh", context, key)
    v = jnp.einsum("bsd,dnh->bsnh", context, value)
    if self.kind == "sum_norm":
      q = q / (jnp.sum(q, axis=-1, keepdims=True) + _SUM_EPSILON)
      k = k / (jnp.sum(k, axis=-1, keepdims=True) + _SUM_EPSILON)
      y = self._linear(q, k, v)
    else:
      y = ops.attention(q, k, v, implementation=self.implementation)
    if self.kind == "mix":
      gate = kernel("mix", (1, 1), (None, None))[0, 0]
      gate = jax.nn.sigmoid(10.0 * gate)
      y = gate * y + (1 - gate) * self._linear(q, k, v)
    return jnp.einsum("btnh,nhd->btd", y, output)

  def _linear(self, q: Array, k: Array, v: Array) -> Array:
    """sum_j (q . k_j) v_j: the sum of k_j (outer) v_j, read by q."""
    _, state = ops.linear_attention(
      *(k, k, v),
      causal=False,
      return_final_state=True,
      implementation=self.implementation,
    )
    return jnp.einsum("btnh,bnhv->btnv", q, state.astype(q.dtype))

  def _absorbed(
    self,
    queries: Array,
    context: Array,
    query: Array,
    key: Array,
    value: Array,
    output: Array,
  ) -> Array:
    """The same with the key kernel moved to the queries, and the value's out.

    q . k_j v_j Wp = h Wq Wk^T (c_j (outer) c_j) Wv Wp: only the sum over the
    raw context is as large as the batch, one for all heads, and in the first
    layer it has no gradient.
    """
    absorbed_query = jnp.einsum("dnh,enh->dne", query, key)
    absorbed_value = jnp.einsum("dnh,nhe->nde", value, output)
    q = jnp.einsum("btd,dne->btne", queries, absorbed_query)
    context = context[:, :, None]
    _, state = ops.linear_attention(
      *(context, context, context),
      causal=False,
      return_final_state=True,
      implementation=self.implementation,
    )
    y = jnp.einsum("btne,bef->btnf", q, state[:, 0].astype(q.dtype))
    return jnp.einsum("btnf,nfd->btd", y, absorbed_value)


def _as_matrix(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
  if len(shape) == 2:
    return shape
  a, b, c = shape
  return (a * b, c) if name == "output" else (a, b * c)


class _Layer(nn.Module):
  """Attention, then an MLP if there is one, each added to the tokens."""

  attention: Any
  norm: bool
  mlp_widening: int
  include_query: bool
  targets: int | None
  dampening: float
  clip: float
  kernel_init: Any
  dtypes: Any

  @nn.compact
  def __call__(self, h: Array, *, query_only: bool = False) -> Array:
    """[B, T, D] to the same; with query_only to [B, 1, D], the last token."""
    u = nn.LayerNorm(epsilon=1e-5, name="norm")(h) if self.norm else h
    context = u if self.include_query else u[:, :-1]
    if query_only:
      h, u = h[:, -1:], u[:, -1:]
    h = self._add(h, self.attention(name="attention")(u, context))
    if self.mlp_widening:
      u = nn.LayerNorm(epsilon=1e-5, name="mlp_norm")(h) if self.norm else h
      h = self._add(h, _mlp(self, u, self.mlp_widening, "mlp"))
    return h

  def _add(self, h: Array, update: Array) -> Array:
    if self.targets is not None:
      channels = jnp.arange(h.shape[-1]) >= h.shape[-1] - self.targets
      update = jnp.where(channels, update, 0)
    h = h + self.dampening * update
    return jnp.clip(h, -self.clip, self.clip) if self.clip else h


def _mlp(
  module: Any, x: Array, widening: int, name: str, use_bias: bool = False
) -> Array:
  """Linear, gelu, linear; the inner width is `widening` times the outer."""
  width = x.shape[-1]
  shared = dict(
    use_bias=use_bias, kernel_init=module.kernel_init, **module.dtypes
  )
  inner = Linear(
    (widening * width,), ("embed", "mlp"), name=f"{name}_in", **shared
  )(x)
  return Linear((width,), ("mlp", "embed"), name=f"{name}_out", **shared)(
    jax.nn.gelu(inner)
  )


class _Embedding(nn.Module):
  """A linear map of tokens and a residual MLP around it (section 4)."""

  size: int
  mlp_widening: int
  kernel_init: Any
  dtypes: Any

  @nn.compact
  def __call__(self, tokens: Array) -> Array:
    h = Linear(
      (self.size,),
      (None, "embed"),
      kernel_init=self.kernel_init,
      name="linear",
      **self.dtypes,
    )(tokens)
    if self.mlp_widening:
      h = h + _mlp(self, h, self.mlp_widening, "mlp", use_bias=True)
    return h


class ICLGD(nn.Module):
  """Self-attention that learns in context.

  Attributes:
    num_layers: L.
    recurrent: one set of weights applied L times, or one for each layer.
    output_size: o, the target channels at the end of a token.
    num_heads: N.
    key_size: H of every head; 0 takes the width of the tokens.
    attention: see `InContextAttention`; "mix" with untied layers mixes in the
      first layer alone, as published.
    first_layer_softmax: the first of untied layers is softmax (section 5).
    include_query: the query is also a key and a value, which no construction
      of gradient descent allows.
    layer_norm: before attention (not in the first of untied layers) and MLP.
    mlp_widening: inner width of an MLP after attention over D; 0: no MLP.
    embedding_size: tokens are mapped to this width first; 0: they are not.
    embedding_mlp: inner width of a residual MLP on the embedding, likewise.
    positions: "none", "add" or "concat" sinusoids; these stand before the
      token's channels, so that the targets remain the last.
    position_size: their channels, for "concat".
    position_flip: count positions from the end.
    position_zero: zeros in their place, to see what they are good for.
    update_targets_only: layers write into the target channels alone.
    dampening: factor of every update.
    clip: bound of every channel after an update; 0: none.
    init_scale: s of the truncated normal initial values of variance
      s / (L inputs).
    dtype: of the arithmetic.
    param_dtype: of the parameters.
    implementation: of the operations, see `multihead.ops`.
  """

  num_layers: int = 1
  recurrent: bool = True
  output_size: int = 1
  num_heads: int = 1
  key_size: int = 0
  attention: str = "linear"
  first_layer_softmax: bool = False
  include_query: bool = False
  layer_norm: bool = False
  mlp_widening: int = 0
  embedding_size: int = 0
  embedding_mlp: int = 0
  positions: str = "none"
  position_size: int = 0
  position_flip: bool = False
  position_zero: bool = False
  update_targets_only: bool = False
  dampening: float = 1.0
  clip: float = 0.0
  init_scale: float = 0.002
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  implementation: Any = None

  def __post_init__(self) -> None:
    super().__post_init__()
    for name, allowed in (
      *(("attention", ATTENTIONS), ("positions", POSITIONS)),
    ):
      value = getattr(self, name)
      if value not in allowed:
        raise UserError(
          f"model.{name} is {value!r}{nearest(str(value), allowed)}; it must "
          f"be one of {', '.join(allowed)}"
        )
    for name in ("num_layers", "num_heads", "output_size"):
      if getattr(self, name) < 1:
        raise UserError(
          f"model.{name} is {getattr(self, name)}; it must be at least 1"
        )
    if self.first_layer_softmax and self.recurrent:
      raise UserError(
        "model.first_layer_softmax needs recurrent=False: the layers differ"
      )
    if (self.positions == "concat") != (self.position_size > 0):
      raise UserError(
        f"model.position_size is {self.position_size} with positions="
        f"{self.positions!r}; it belongs to 'concat', where it must be positive"
      )
    if self.embedding_mlp and not self.embedding_size:
      raise UserError("model.embedding_mlp needs an embedding_size")

  def init_inputs(self) -> tuple[Array]:
    """Arguments of `__call__` that make parameters: the published tasks'.

    Their inputs have 10 numbers; tokens of another width make others.
    """
    return (jnp.zeros((1, 2, 10 + self.output_size)),)

  def setup(self) -> None:
    kernel_init = nn.initializers.variance_scaling(
      self.init_scale / self.num_layers, "fan_in", "truncated_normal"
    )
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)

    def layer(index: int, kind: str) -> _Layer:
      return _Layer(
        attention=functools.partial(
          InContextAttention,
          num_heads=self.num_heads,
          key_size=self.key_size,
          kind=kind,
          kernel_init=kernel_init,
          implementation=self.implementation,
          **dtypes,
        ),
        norm=self.layer_norm and (self.recurrent or index > 0),
        mlp_widening=self.mlp_widening,
        include_query=self.include_query,
        targets=self.output_size if self.update_targets_only else None,
        dampening=self.dampening,
        clip=self.clip,
        kernel_init=kernel_init,
        dtypes=dtypes,
      )

    if self.embedding_size:
      self.embedding = _Embedding(
        self.embedding_size, self.embedding_mlp, kernel_init, dtypes
      )
    if self.recurrent:
      self.layer = layer(0, self.attention)
    else:
      later = "linear" if self.attention == "mix" else self.attention
      first = "softmax" if self.first_layer_softmax else self.attention
      self.layers = [
        layer(i, later if i else first) for i in range(self.num_layers)
      ]

  def __call__(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B o"]:
    """Answers the query of each sequence.

    Args:
      tokens: the context and, last, the query; see
        `tasks.in_context_regression`. T >= 2 unless the query is a key.

    Returns:
      -h[query, targets] after the last layer, which is computed for the query
      alone.
    """
    return self.from_embedding(self.embed(tokens))

  def embed(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
    """What the first layer reads: the embedding and positions, if any."""
    if tokens.ndim != 3:
      raise ValueError(f"tokens must be [B, T, D], got {list(tokens.shape)}")
    if tokens.shape[1] < 2 - self.include_query:
      raise ValueError(
        f"tokens {list(tokens.shape)} hold no context: T must be at least 2"
      )
    h = tokens.astype(self.dtype)
    if self.embedding_size:
      h = self.embedding(h)
    if self.positions == "none":
      return h
    size = self.position_size or h.shape[-1]
    encoding = sinusoids(h.shape[1], size).astype(h.dtype)
    if self.position_flip:
      encoding = encoding[::-1]
    if self.position_zero:
      encoding = jnp.zeros_like(encoding)
    if self.positions == "add":
      return h + encoding
    encoding = jnp.broadcast_to(encoding, (len(h), *encoding.shape))
    return jnp.concatenate([encoding, h], axis=-1)

  def from_embedding(self, h: Float[Array, "B T E"]) -> Float[Array, "B o"]:
    """The answer from what `embed` gave."""
    *before, last = self._all_layers()
    for layer in before:
      h = layer(h)
    return self.read_out(last(h, query_only=True))

  def trace(self, tokens: Float[Array, "B T D"]) -> Float[Array, "L1 B T E"]:
    """All tokens after the embedding and after each layer: L + 1 of them.

    `read_out` of it gives the answer after every layer.
    """
    h = [self.embed(tokens)]
    for layer in self._all_layers():
      h.append(layer(h[-1]))
    return jnp.stack(h)

  def read_out(self, h: Float[Array, "*L B T E"]) -> Float[Array, "*L B o"]:
    """Minus the target channels of the query."""
    return -h[..., -1, -self.output_size :]

  def _all_layers(self) -> list[_Layer]:
    return [self.layer] * self.num_layers if self.recurrent else self.layers
