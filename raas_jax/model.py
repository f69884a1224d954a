"""The transformer: one decoder-only network for Llama, Mistral, Qwen2/2.5 and Qwen3.

Flax NNX declares every parameter once, with its shape, its initial values and its logical axes.
The layers are declared stacked (`[L, ...]`), and `run_layers` is the one loop over them. Weights
keep Hugging Face's `[out, in]` order: loading transposes nothing, and a matrix-vector product
reads them in memory order, which is what decoding on a CPU is bound by.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from raas_jax.attention import causal_attention
from raas_jax.config import ModelConfig, Rope

FEW_ROWS = 8
"""On a GPU, XLA copies a layer's weight out of the stack for a product of matrices. Up to so many
rows, sums of products that read it in place are one fusion; more rows would read it twice."""

SUMMED_ROWS = 64
"""Up to so many rows, float32 products on CPUs are written as sums."""

Attend = Callable[..., jax.Array]
"""Attention over a whole text, `(q, k, v, segments=) -> out`, as `causal_attention`."""
Weights = dict[str, Any]
"""Arrays of a model: `embedding`, `norm`, `head` and, stacked or separate, `layers`."""


class Block(nnx.Module):
    """A stack of `L` transformer layers, or one of them once `lax.scan` has sliced the stack."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        c, L = config, config.num_hidden_layers
        D, F, H = c.hidden_size, c.intermediate_size, c.head_dim
        N, K = c.num_attention_heads, c.num_key_value_heads
        self.config = config

        def normal(
            shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int
        ) -> nnx.Param[jax.Array]:
            value = jax.random.normal(rngs.params(), (L, *shape), jnp.float32) / math.sqrt(fan_in)
            return nnx.Param(value.astype(dtype), logical_axes=("layers", *axes))

        def full(
            fill: float, shape: tuple[int, ...], axes: tuple[str, ...]
        ) -> nnx.Param[jax.Array]:
            return nnx.Param(jnp.full((L, *shape), fill, dtype), logical_axes=("layers", *axes))

        self.attention_norm = full(1.0, (D,), ("embed",))
        self.q = normal((N, H, D), ("heads", "head_dim", "embed"), D)
        self.k = normal((K, H, D), ("kv_heads", "head_dim", "embed"), D)
        self.v = normal((K, H, D), ("kv_heads", "head_dim", "embed"), D)
        # Flat, since a last pair of (heads, head_dim) would be laid out anew on a TPU.
        self.o = normal((D, N * H), ("embed", "joined_heads"), N * H)
        if c.qkv_bias:
            self.q_bias = full(0.0, (N, H), ("heads", "head_dim"))
            self.k_bias = full(0.0, (K, H), ("kv_heads", "head_dim"))
            self.v_bias = full(0.0, (K, H), ("kv_heads", "head_dim"))
        if c.output_bias:
            self.o_bias = full(0.0, (D,), ("embed",))
        if c.qk_norm:
            self.q_norm = full(1.0, (H,), ("head_dim",))
            self.k_norm = full(1.0, (H,), ("head_dim",))
        self.mlp_norm = full(1.0, (D,), ("embed",))
        self.gate = normal((F, D), ("mlp", "embed"), D)
        self.up = normal((F, D), ("mlp", "embed"), D)
        self.down = normal((D, F), ("embed", "mlp"), F)
        if c.mlp_bias:
            self.gate_bias = full(0.0, (F,), ("mlp",))
            self.up_bias = full(0.0, (F,), ("mlp",))
            self.down_bias = full(0.0, (D,), ("embed",))

    def qkv(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`[B, T, D]` → rotated q `[B, T, N, H]`, rotated k and plain v `[B, T, K, H]`."""
        c = self.config
        h = rms_norm(x, self.attention_norm[...], c.rms_norm_eps)
        q, k, v = (project(h, w[...]) for w in (self.q, self.k, self.v))
        if c.qkv_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        if c.qk_norm:
            q = rms_norm(q, self.q_norm[...], c.rms_norm_eps)
            k = rms_norm(k, self.k_norm[...], c.rms_norm_eps)
        return rotate(q, rotation), rotate(k, rotation), v

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Output projection of `attended [B, T, N, H]`, the residuals and the MLP → `[B, T, D]`."""
        c = self.config
        flat = attended.reshape(*x.shape[:-1], -1)
        out = project(flat, self.o[...])
        x = x + (out + self.o_bias[...] if c.output_bias else out)
        h = rms_norm(x, self.mlp_norm[...], c.rms_norm_eps)
        gate, up = project(h, self.gate[...]), project(h, self.up[...])
        if c.mlp_bias:
            gate, up = gate + self.gate_bias[...], up + self.up_bias[...]
        out = project(jax.nn.silu(gate) * up, self.down[...])
        return x + (out + self.down_bias[...] if c.mlp_bias else out)


class Ends(nnx.Module):
    """What comes before and after the layers: embedding, final norm and output head."""

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        scale = 1.0 / math.sqrt(D)

        def table() -> nnx.Param[jax.Array]:
            value = jax.random.normal(rngs.params(), (V, D), jnp.float32) * scale
            return nnx.Param(value.astype(dtype), logical_axes=("vocab", "embed"))

        self.embedding = table()
        self.norm = nnx.Param(jnp.ones((D,), dtype), logical_axes=("embed",))
        if not config.tie_word_embeddings:
            self.head = table()

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 `[...]` → `[..., D]` in the weights' dtype."""
        return jnp.take(self.embedding[...], tokens, axis=0)

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden states `[..., D]` → float32 logits `[..., V]`."""
        head = self.embedding if self.config.tie_word_embeddings else self.head
        h = rms_norm(x, self.norm[...], self.config.rms_norm_eps)
        return project(h, head[...], dtype=jnp.float32)


class Transformer(Ends):
    """The whole model, which declares every parameter: `Ends` and `L` stacked layers.

    Only its structure is used: weights are kept as nested dictionaries, and run by `ends` and
    `run_layers`.
    """

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.layers = Block(config, dtype=dtype, rngs=rngs)


@functools.cache
def _abstract(kind: Any, config: ModelConfig, dtype: str) -> tuple[Any, Any]:
    """Structure and `ShapeDtypeStruct`s of a module; nothing is allocated."""
    make = functools.partial(kind, config, dtype=jnp.dtype(dtype))
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))


def abstract_weights(config: ModelConfig, dtype: str) -> Weights:
    """Shape and dtype of every array of the model, its layers stacked; nothing is allocated."""
    return _pure(_abstract(Transformer, config, dtype)[1])


def init_weights(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Weights:
    """Random weights, their layers stacked, from a typed key."""
    model = Transformer(config, dtype=dtype, rngs=nnx.Rngs(params=key))
    return _pure(nnx.split(model)[1])


def logical_axes(config: ModelConfig) -> Weights:
    """The tree of `abstract_weights`, with each array replaced by the names of its axes."""

    def names(variable: Any) -> Any:
        return variable.get_metadata()["logical_axes"]

    def is_variable(leaf: Any) -> bool:
        return isinstance(leaf, nnx.Variable)

    state = _abstract(Transformer, config, "float32")[1]
    return _pure(jax.tree.map(names, state, is_leaf=is_variable))


def _pure(state: Any) -> Weights:
    found: Weights = nnx.to_pure_dict(state)
    return found


def ends(config: ModelConfig, weights: Weights) -> Ends:
    """The module over plain arrays; free, also inside a jit."""
    graph, _ = _abstract(Ends, config, weights["embedding"].dtype.name)
    module: Ends = nnx.merge(graph, {k: v for k, v in weights.items() if k != "layers"})
    return module


def separate(weights: Weights, *, consume: bool = False) -> Weights:
    """The weights with a dictionary of arrays for each layer, which `run_layers` unrolls.

    With `consume`, each stack is taken out of `weights` as it is cut, so that no more than one of
    them is in memory twice.
    """
    layers = weights["layers"]
    if isinstance(layers, tuple):
        return weights
    parts: list[Weights] = [{} for _ in range(layers["q"].shape[0])]
    for name in list(layers):
        stack = layers.pop(name) if consume else layers[name]
        for number, part in enumerate(parts):
            part[name] = stack[number]
    return {**weights, "layers": tuple(parts)}


def stacked(weights: Weights) -> Weights:
    """The inverse of `separate`: every array is `[L, ...]`, which `run_layers` scans."""
    layers = weights["layers"]
    return {**weights, "layers": _stack(layers)} if isinstance(layers, tuple) else weights


def _slice(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


class Layer(NamedTuple):
    """One layer, as `run_layers` gives it to a body.

    Attributes:
      block: its weights, ready to run.
      number: its place in the model: int32 in a scan, an int where layers are unrolled.
      kind: one of `ModelConfig.layer_pattern`.
    """

    block: Block
    number: Any
    kind: str


Body = Callable[[Layer, Any, Any], tuple[Any, Any]]
"""What a layer does: (layer, carry, x) → carry, y; x and y are its own, as in `jax.lax.scan`."""


def run_layers(
    config: ModelConfig,
    weights: Weights,
    body: Body,
    carry: Any,
    xs: Any = None,
    *,
    first: Any = 0,
    count: int | None = None,
    pattern: tuple[str, ...] | None = None,
    by_number: bool = False,
) -> tuple[Any, Any]:
    """Runs a body through layers in their order: the only loop over them.

    Stacked layers are scanned, so that compile time does not grow with depth; separate ones are
    unrolled, which some targets run faster.

    Args:
      config: shape of the model.
      weights: of the whole model.
      body: what each layer does.
      carry: what goes from layer to layer.
      xs: arrays whose leading axis counts the layers that are run; None for nothing.
      first: number of the first layer to run; may be traced where layers are stacked.
      count: how many to run; by default all that follow.
      pattern: kinds of layers in turn; the config's by default.
      by_number: read each layer out of the stack, as decoding does, where a pattern has one kind; a
        part is always read so.

    Returns:
      The last carry, and what the layers gave, stacked.

    Raises:
      ValueError: a part of the layers, or of a pattern, that a scan cannot run.
    """
    layers, total = weights["layers"], config.num_hidden_layers
    graph, _ = _abstract(Block, config, weights["embedding"].dtype.name)
    kinds = config.layer_pattern if pattern is None else pattern
    count = total - first if count is None else count

    def run(arrays: Any, number: Any, kind: str, carry: Any, x: Any) -> tuple[Any, Any]:
        return body(Layer(nnx.merge(graph, arrays), number, kind), carry, x)

    if isinstance(layers, tuple):
        ys = []
        for index, number in enumerate(range(first, first + count)):
            kind = kinds[number % len(kinds)]
            carry, y = run(layers[number], number, kind, carry, _slice(xs, index))
            ys.append(y)
        return carry, _stack(ys)
    numbers = first + jnp.arange(count, dtype=jnp.int32)
    if count < total or (by_number and len(kinds) == 1):
        if len(kinds) > 1:
            raise ValueError(f"count is {count} of {total} layers; a pattern is scanned whole.")

        # A slice of the stack would be a copy of it, so layers are read by their numbers.
        def numbered(carry: Any, scanned: Any) -> tuple[Any, Any]:
            at = functools.partial(jax.lax.dynamic_index_in_dim, index=scanned[0], keepdims=False)
            return run(jax.tree.map(at, layers), scanned[0], kinds[0], carry, scanned[1])

        return jax.lax.scan(numbered, carry, (numbers, xs))
    if len(kinds) == 1:
        return jax.lax.scan(
            lambda carry, own: run(own[0], own[1], kinds[0], carry, own[2]),
            carry,
            (layers, numbers, xs),
        )
    if total % len(kinds):
        raise ValueError(f"pattern {kinds} does not divide the {total} layers.")

    def repeat(carry: Any, scanned: Any) -> tuple[Any, Any]:
        ys = []
        for place, kind in enumerate(kinds):
            arrays, number, x = _slice(scanned, place)
            carry, y = run(arrays, number, kind, carry, x)
            ys.append(y)
        return carry, _stack(ys)

    def folded(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(-1, len(kinds), *leaf.shape[1:])

    carry, ys = jax.lax.scan(repeat, carry, jax.tree.map(folded, (layers, numbers, xs)))
    return carry, jax.tree.map(lambda leaf: leaf.reshape(total, *leaf.shape[2:]), ys)


def hidden_states(
    config: ModelConfig,
    weights: Weights,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    *,
    attend: Attend = causal_attention,
) -> jax.Array:
    """The causal forward pass up to the last layer's output `[B, T, D]`, before `Ends.logits`.

    Tokens, their positions (0..T-1 where not given) and segments (a token attends only within its
    own; None is one segment) are int32 `[B, T]`; `attend` is the attention of every layer.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    rotation = rope_rotation(config.rope, config.head_dim, positions)

    def body(layer: Layer, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        q, k, v = layer.block.qkv(x, rotation)
        return layer.block.finish(x, attend(q, k, v, segments=segments)), None

    x, _ = run_layers(config, weights, body, ends(config, weights).embed(tokens))
    hidden: jax.Array = x
    return hidden


def forward(
    config: ModelConfig,
    weights: Weights,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    *,
    attend: Attend = causal_attention,
) -> jax.Array:
    """float32 logits `[B, T, V]` of the causal forward pass; arguments as in `hidden_states`."""
    x = hidden_states(config, weights, tokens, positions, segments, attend=attend)
    return ends(config, weights).logits(x)


def project(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """`x [..., in]` times `weight [*out, in]` → `[..., *out]`, accumulated in float32.

    The result has `dtype`, by default that of `x`.
    """
    flat = weight.reshape(-1, weight.shape[-1])
    dtype = dtype or x.dtype
    rows = math.prod(x.shape[:-1])
    ways = {"default": _matmul, "cpu": _way_of_cpu(rows, weight.dtype)}
    if rows <= FEW_ROWS:
        ways["cuda"] = _row_by_row
    chosen = {name: functools.partial(way, dtype=dtype) for name, way in ways.items()}
    out: jax.Array = jax.lax.platform_dependent(x, flat, **chosen)
    return out.reshape(*x.shape[:-1], *weight.shape[:-1])


def _way_of_cpu(rows: int, dtype: Any) -> Callable[..., jax.Array]:
    """The product that XLA runs fastest on CPUs; `raas_jax.lab.bench.products` has the times.

    It multiplies half-precision matrices as float32 that it makes of them beforehand, unless the
    result is float32 too; and it lays a weight out anew for a product with few rows, but not for a
    sum of products that says the same.
    """
    half = dtype.itemsize < 4
    if rows == 1:
        return _row_by_row if half else _matmul
    if half:
        return _wide_matmul
    return _sum_of_products if rows <= SUMMED_ROWS else _matmul


def _matmul(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dims, preferred_element_type=dtype)


def _wide_matmul(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    return _matmul(x, weight, jnp.float32).astype(dtype)


def _sum_of_products(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    rows = x.reshape(-1, 1, x.shape[-1])
    sums = jnp.sum(weight[None] * rows, axis=-1)
    return sums.astype(dtype).reshape(*x.shape[:-1], -1)


def _row_by_row(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    """The same for few rows, as sums that XLA fuses into one pass over the weight where it lies."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    wide = weight.astype(jnp.float32)
    sums = [jnp.sum(wide * rows[index], axis=-1) for index in range(rows.shape[0])]
    return jnp.stack(sums).astype(dtype).reshape(*x.shape[:-1], -1)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32, returned in x's dtype."""
    h = x.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
    return (weight.astype(jnp.float32) * h).astype(x.dtype)


def rope_frequencies(rope: Rope, head_dim: int) -> jax.Array:
    """Angular frequencies, float32 `[H / 2]`, radians per position."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / rope.theta**exponent
    if rope.kind == "default":
        return frequency
    if rope.kind == "linear":
        return frequency / rope.factor
    turns = rope.original_max_position_embeddings * frequency / (2 * jnp.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequency / rope.factor + blend * frequency


def rope_rotation(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every angle: float32 `[B, T, 1, H / 2]` from int32 positions `[B, T]`."""
    angle = positions.astype(jnp.float32)[..., None, None] * rope_frequencies(rope, head_dim)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the two halves of each head of `x [B, T, heads, H]` (the layout of Hugging Face)."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
