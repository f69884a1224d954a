"""Causal attention over a whole prompt, in bounded memory, on `jax.nn.dot_product_attention`."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

QUERY_BLOCK, LEAST_BLOCK = 512, 16
MOST_SCORES = 1 << 26
"""Of a block of queries, all rows and heads: 0.25 GiB in float32."""


def prefill_attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    sink: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
) -> jax.Array:
    """See `api.prefill_attention`. Of many tokens, `MOST_SCORES` scores are in memory at once."""
    B, T, N, H = q.shape
    attend = partial(_attend, scale=scale, window=window)
    if T <= 2 * QUERY_BLOCK:
        return attend(_Part(q, 0, segments), _Part(k, 0, segments), v, sink)
    size = min(QUERY_BLOCK, max(LEAST_BLOCK, MOST_SCORES // (B * N * T)))
    # A block of queries with a window sees no more than as many keys.
    seen = T if window is None else min(T, size + window - 1)
    blocks = -(-T // size)
    padding = blocks * size - T
    padded = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    if segments is None:
        segments = jnp.zeros((B, T), jnp.int32)
    query_segments = jnp.pad(segments, ((0, 0), (0, padding)), mode="edge")

    def block(index: jax.Array) -> jax.Array:
        start = index * size
        first = jnp.clip(start + size - seen, 0, T - seen)
        queries, their_segments = (
            jax.lax.dynamic_slice_in_dim(x, start, size, 1) for x in (padded, query_segments)
        )
        keys, values, own_segments = (
            jax.lax.dynamic_slice_in_dim(x, first, seen, 1) for x in (k, v, segments)
        )
        own = _Part(keys, first, own_segments)
        return attend(_Part(queries, start, their_segments), own, values, sink)

    out = jax.lax.map(block, jnp.arange(blocks))
    return jnp.moveaxis(out, 0, 1).reshape(B, blocks * size, N, H)[:, :T]


class _Part(NamedTuple):
    """Queries or keys `[B, t, heads, H]`, the number of the first, and their segments."""

    x: jax.Array
    first: jax.Array | int
    segments: jax.Array | None

    @property
    def numbers(self) -> jax.Array:
        return self.first + jnp.arange(self.x.shape[1])


def _attend(
    queries: _Part,
    keys: _Part,
    v: jax.Array,
    sink: jax.Array | None,
    *,
    scale: float,
    window: int | None,
) -> jax.Array:
    now, then = queries.numbers[:, None], keys.numbers
    seen = now >= then
    if window is not None:
        seen = seen & (then > now - window)
    mask = seen[None, None]
    if queries.segments is not None and keys.segments is not None:
        mask = mask & (queries.segments[:, None, :, None] == keys.segments[:, None, None, :])
    # Of float16 the library's own asks for a product that CPUs do not have.
    if sink is None and queries.x.dtype != jnp.float16:
        return jax.nn.dot_product_attention(queries.x, keys.x, v, mask=mask, scale=scale)
    q, k = queries.x, keys.x
    B, t, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, t, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, :, None], scores * scale, -jnp.inf)
    logits = jnp.full((), -jnp.inf)
    if sink is not None:
        logits = sink.astype(jnp.float32).reshape(K, N // K, 1, 1)
    # The library's own log-sum-exp would come rounded to the keys' dtype.
    peak = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), logits)
    shares = jnp.exp(scores - peak)
    shares = shares / (jnp.sum(shares, axis=-1, keepdims=True) + jnp.exp(logits - peak))
    out = jnp.einsum("bkgts,bskh->btkgh", shares.astype(v.dtype), v)
    return out.reshape(B, t, N, H).astype(q.dtype)
