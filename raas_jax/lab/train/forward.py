"""The forward pass of training: the model's own layers, with attention in blocks of queries.

It computes what `Transformer.__call__` computes. A block of queries reads only the keys up to its
own end, so nearly half of the T x T scores are never made: on a CPU that halves the step at
T = 1280.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from raas_jax.config import ModelConfig
from raas_jax.model import block_graph, merge, rope_rotation

QUERY_BLOCK = 128
_NEVER = -1e30  # finite, so that a padding row gives an average and not a NaN


def blocked_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Causal attention within segments, float32.

    Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` and int32 segments `[B, T]` give
    `[B, T, N, H]`.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H) * H**-0.5
    outputs = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        scores = jnp.einsum("btkgh,bskh->bkgts", q[:, start:end], k[:, :end])
        earlier = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        same = segments[:, start:end, None] == segments[:, None, :end]
        scores = jnp.where((earlier[None] & same)[:, None, None], scores, _NEVER)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        outputs.append(jnp.einsum("bkgts,bskh->bkgth", weights, v[:, :end]) / total)
    attended = jnp.concatenate(outputs, axis=3)
    return jnp.transpose(attended, (0, 3, 1, 2, 4)).reshape(B, T, N, H)


def forward(
    config: ModelConfig,
    weights: dict[str, Any],
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
) -> jax.Array:
    """Float32 logits `[B, T, V]` for int32 `tokens`, `positions` and `segments` `[B, T]`."""
    model = merge(config, weights)
    rotation = rope_rotation(config.rope, config.head_dim, positions)
    graph = block_graph(config, weights["embedding"].dtype.name)

    def layer(x: jax.Array, slice_of_stack: Any) -> tuple[jax.Array, None]:
        block = nnx.merge(graph, slice_of_stack)
        q, k, v = block.qkv(x, rotation)
        return block.finish(x, blocked_attention(q, k, v, segments)), None

    x, _ = jax.lax.scan(layer, model.embed(tokens), weights["layers"])
    return model.logits(x)
