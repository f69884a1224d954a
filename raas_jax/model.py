"""The transformer: one decoder-only network for Llama, Mistral, Qwen2/2.5 and Qwen3.

Flax NNX declares every parameter once, with its shape, its initial values and its logical axes.
The layers are declared stacked (`[L, ...]`), so that `lax.scan` runs them and compile time does not
grow with depth. Weights keep Hugging Face's `[out, in]` order: loading transposes nothing, and a
matrix-vector product reads them in memory order, which is what decoding on a CPU is bound by.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from raas_jax.attention import causal_attention
from raas_jax.config import ModelConfig, Rope

FEW_ROWS = 8
"""On a GPU, XLA copies a layer's weight out of the stack for a product of matrices. Up to so many
rows, sums of products that read it in place are one fusion; more rows would read it twice."""

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Block(nnx.Module):
    """A stack of `L` transformer layers, or one of them once `lax.scan` has sliced the stack."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        c, L = config, config.num_hidden_layers
        D, F, H = c.hidden_size, c.intermediate_size, c.head_dim
        N, K = c.num_attention_heads, c.num_key_value_heads
        self.config = config

        def normal(shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int) -> nnx.Param:
            value = jax.random.normal(rngs.params(), (L, *shape), jnp.float32) / math.sqrt(fan_in)
            return nnx.Param(value.astype(dtype), logical_axes=("layers", *axes))

        def full(fill: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
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


class Transformer(nnx.Module):
    """Embedding, `L` stacked layers, final norm and output head.

    `model(tokens)` is the plain causal forward pass used for training and for checking;
    decoding drives `embed`, `Block` and `logits` itself (`raas_jax.decode`).
    """

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        scale = 1.0 / math.sqrt(D)

        def table() -> nnx.Param:
            value = jax.random.normal(rngs.params(), (V, D), jnp.float32) * scale
            return nnx.Param(value.astype(dtype), logical_axes=("vocab", "embed"))

        self.embedding = table()
        self.layers = Block(config, dtype=dtype, rngs=rngs)
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

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        *,
        remat: bool = False,
    ) -> jax.Array:
        """Causal forward pass.

        Args:
          tokens: int32 `[B, T]`.
          positions: int32 `[B, T]`; 0..T-1 where not given.
          segments: int32 `[B, T]`; a token attends only within its own segment. None: one segment.
          remat: recompute each layer in the backward pass, to save memory in training.

        Returns:
          float32 logits `[B, T, V]`.
        """
        return self.logits(self.hidden(tokens, positions, segments, remat=remat))

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        *,
        remat: bool = False,
    ) -> jax.Array:
        """As a call, up to the last layer's output `[B, T, D]`, of which `logits` makes logits."""
        B, T = tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        rotation = rope_rotation(self.config.rope, self.config.head_dim, positions)
        graph, layers = nnx.split(self.layers)

        def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
            block = nnx.merge(graph, weights)
            q, k, v = block.qkv(x, rotation)
            return block.finish(x, causal_attention(q, k, v, segments=segments)), None

        x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, self.embed(tokens), layers)
        return x


@functools.cache
def abstract_model(config: ModelConfig, dtype: str) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and `ShapeDtypeStruct`s of the parameters; nothing is allocated."""
    make = functools.partial(Transformer, config, dtype=jnp.dtype(dtype))
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))


def merge(config: ModelConfig, weights: dict[str, Any]) -> Transformer:
    """The NNX module over a plain nested dictionary of arrays; free, also inside a jit."""
    graph, _ = abstract_model(config, weights["embedding"].dtype.name)
    return nnx.merge(graph, weights)


def block_graph(config: ModelConfig, dtype: str) -> nnx.GraphDef:
    """Structure of one `Block`, to merge with a layer's slice of `weights["layers"]`."""
    graph, _ = _abstract_block(config, dtype)
    return graph


@functools.cache
def _abstract_block(config: ModelConfig, dtype: str) -> tuple[nnx.GraphDef, nnx.State]:
    make = functools.partial(Block, config, dtype=jnp.dtype(dtype))
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))


def init_weights(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random weights as a nested dictionary of arrays, from a typed key."""
    model = Transformer(config, dtype=dtype, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.split(model)[1])


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """The tree of `weights`, with each array replaced by the names of its axes."""
    _, state = abstract_model(config, "float32")
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    named = jax.tree.map(lambda v: v.get_metadata()["logical_axes"], state, is_leaf=is_variable)
    return nnx.to_pure_dict(named)


def project(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """`x [..., in]` times `weight [*out, in]` → `[..., *out]`, accumulated in float32.

    The result has `dtype`, by default that of `x`.
    """
    flat = weight.reshape(-1, weight.shape[-1])
    dtype = dtype or x.dtype
    product = functools.partial(_matmul, dtype=dtype)
    if math.prod(x.shape[:-1]) <= FEW_ROWS:
        sums = functools.partial(_row_by_row, dtype=dtype)
        out = jax.lax.platform_dependent(x, flat, cuda=sums, default=product)
    else:
        out = product(x, flat)
    return out.reshape(*x.shape[:-1], *weight.shape[:-1])


def _matmul(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dims, preferred_element_type=dtype)


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
