"""The definition of `decode_attention`, in plain jnp."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import finite


class DecodeAttention(NamedTuple):
    """Attention over one segment of pages, not yet normalised, so that segments can be merged.

    Attributes:
      out: float32 `[B, N, H]`, sum over tokens of `exp(score - max) * value`.
      max: float32 `[B, N]`, the largest score; -inf where the segment is empty.
      sum: float32 `[B, N]`, sum of `exp(score - max)`; 0 where the segment is empty.
      page_lse: float32 `[B, N, S]`, log-sum-exp of the scores in each page; -inf for an empty page.
    """

    out: jax.Array
    max: jax.Array
    sum: jax.Array
    page_lse: jax.Array


class PageWeights(NamedTuple):
    """The softmax over the pages of a segment, of scores `[..., S, P]`.

    Attributes:
      weights: `[..., S, P]`, `exp(score - max)`; 0 where there is no token.
      max, sum: `[...]`, see `DecodeAttention`.
      page_lse: `[..., S]`, see `DecodeAttention`.
    """

    weights: jax.Array
    max: jax.Array
    sum: jax.Array
    page_lse: jax.Array


def page_weights(scores: jax.Array, valid: jax.Array) -> PageWeights:
    """The weights of pages with scores `[..., S, P]`; `valid`, bool, broadcasts to them."""
    scores = jnp.where(valid, scores, -jnp.inf)
    peak = jnp.max(scores, axis=(-2, -1))
    safe = finite(peak)
    weights = jnp.exp(scores - safe[..., None, None])
    page_sum = jnp.sum(weights, axis=-1)
    page_lse = safe[..., None] + jnp.log(page_sum)
    return PageWeights(weights, peak, jnp.sum(page_sum, axis=-1), page_lse)


def decode_attention_reference(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    fill: jax.Array,
    layer: jax.Array,
    *,
    scale: float,
) -> DecodeAttention:
    """See `api.decode_attention`, which checks the arguments."""
    B, N, H = q.shape
    _, _, K, S, P, _ = k_pages.shape
    k = jax.lax.dynamic_index_in_dim(k_pages, layer, 0, keepdims=False)
    v = jax.lax.dynamic_index_in_dim(v_pages, layer, 0, keepdims=False)
    valid = jnp.arange(P) < fill[..., None]
    # A dead slot may hold anything, NaN included, and 0 * NaN is NaN.
    v = jnp.where(valid[..., None], v, 0)
    grouped = q.reshape(B, K, N // K, H)
    scores = jnp.einsum(
        "bkgh,bkth->bkgt",
        grouped,
        k.reshape(B, K, S * P, H),
        preferred_element_type=jnp.float32,
    ).reshape(B, K, N // K, S, P)
    softmax = page_weights(scores * scale, valid[:, :, None])
    out = jnp.einsum(
        "bkgt,bkth->bkgh",
        softmax.weights.reshape(B, K, N // K, S * P).astype(v.dtype),
        v.reshape(B, K, S * P, H),
        preferred_element_type=jnp.float32,
    )
    return DecodeAttention(
        out=out.reshape(B, N, H),
        max=softmax.max.reshape(B, N),
        sum=softmax.sum.reshape(B, N),
        page_lse=softmax.page_lse.reshape(B, N, S),
    )
