"""Causal attention over a whole prompt, in bounded memory, on `jax.nn.dot_product_attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

QUERY_BLOCK, LEAST_BLOCK = 512, 16
MOST_SCORES = 1 << 26
"""Of a block of queries, all rows and heads: 0.25 GiB in float32."""


def prefill_attention_reference(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, *, scale: float
) -> jax.Array:
    """See `api.prefill_attention`. Of many tokens, `MOST_SCORES` scores are in memory at once."""
    B, T, N, H = q.shape
    if T <= 2 * QUERY_BLOCK:
        return _attend(q, k, v, segments, segments, 0, scale)
    size = min(QUERY_BLOCK, max(LEAST_BLOCK, MOST_SCORES // (B * N * T)))
    blocks = -(-T // size)
    padding = blocks * size - T
    padded = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    if segments is None:
        segments = jnp.zeros((B, T), jnp.int32)
    query_segments = jnp.pad(segments, ((0, 0), (0, padding)), mode="edge")

    def block(index: jax.Array) -> jax.Array:
        start = index * size
        part = jax.lax.dynamic_slice_in_dim(padded, start, size, 1)
        part_segments = jax.lax.dynamic_slice_in_dim(query_segments, start, size, 1)
        return _attend(part, k, v, part_segments, segments, start, scale)

    out = jax.lax.map(block, jnp.arange(blocks))
    return jnp.moveaxis(out, 0, 1).reshape(B, blocks * size, N, H)[:, :T]


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    start: jax.Array | int,
    scale: float,
) -> jax.Array:
    """Queries `start, start + 1, ...` over all keys; the mask also hides other segments."""
    rows = start + jnp.arange(q.shape[1])
    mask = (rows[:, None] >= jnp.arange(k.shape[1]))[None, None]
    if q_segments is not None and k_segments is not None:
        mask = mask & (q_segments[:, None, :, None] == k_segments[:, None, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale)
