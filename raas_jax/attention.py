"""Attention over the three segments of the cache, and over a whole prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import DecodeAttention, prefill_attention


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segments: jax.Array | None = None
) -> jax.Array:
    """Causal attention of q `[B, T, N, H]` over k, v `[B, T, K, H]` → `[B, T, N, H]`."""
    return prefill_attention(q, k, v, segments)


def merge_segments(parts: list[DecodeAttention]) -> tuple[jax.Array, jax.Array]:
    """Joins the attention over several segments exactly, by log-sum-exp.

    Returns:
      The attended values, float32 `[B, N, H]`, and the log of the softmax denominator, float32
      `[B, N]`: `exp(part.page_lse - lse)` is the share of attention that a page received.
    """
    peak = jnp.max(jnp.stack([part.max for part in parts]), axis=0)
    factors = [jnp.exp(part.max - peak) for part in parts]
    total = sum(part.sum * factor for part, factor in zip(parts, factors, strict=True))
    out = sum(part.out * factor[..., None] for part, factor in zip(parts, factors, strict=True))
    return out / total[..., None], peak + jnp.log(total)
