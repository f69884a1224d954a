"""The definition of `cache_attention`: one operation for each segment, merged by log-sum-exp."""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cache_attention.segments import Attended, Segment, by_prompt, by_row
from pallas_kernels.decode_attention import DecodeAttention, decode_attention
from pallas_kernels.dispatch import Implementation, Target
from pallas_kernels.ragged_decode_attention import ragged_decode_attention
from pallas_kernels.ranges import Ranges


def cache_attention_reference(
    q: jax.Array,
    prompt: Segment | None,
    kept: Segment,
    current: Segment,
    *,
    ranges: Ranges | None,
    scale: float,
    implementation: Implementation = None,
    target: Target | None = None,
) -> Attended:
    """See `api.cache_attention`, which checks; the last two arguments are for each operation."""
    options: Any = {"scale": scale, "implementation": implementation, "target": target}

    def attend(*segment: jax.Array) -> DecodeAttention:
        return decode_attention(*segment, **options)

    fill = jax.lax.dynamic_index_in_dim(kept.tokens, kept.layer, 0, keepdims=False)
    over = q, kept.k, kept.v, fill, kept.layer
    if ranges is None:
        of_kept = attend(*over)
    else:
        of_kept = ragged_decode_attention(*over, ranges=ranges, **options)
    k, v = (x[:, :, :, None] for x in (current.k, current.v))
    written = jnp.reshape(current.tokens, (1, 1, 1))
    of_current = attend(q, k, v, written, current.layer)
    parts = [of_kept, of_current]
    if prompt is not None:
        heads, samples = prompt.k.shape[2], len(q) // prompt.k.shape[1]
        filled = prompt_fill(prompt)[:, None]
        together = attend(by_prompt(q, heads, samples), prompt.k, prompt.v, filled, prompt.layer)
        of_prompt = jax.tree.map(partial(by_row, heads=heads, samples=samples), together)
        parts.insert(0, of_prompt)
    out, lse = merge_segments(parts)
    return Attended(out, lse, of_kept.page_lse, of_current.page_lse[..., 0])


def prompt_fill(prompt: Segment) -> jax.Array:
    """Tokens in each page of the prompts: int32 `[B', S]`."""
    S, P = prompt.k.shape[3:5]
    return jnp.clip(prompt.tokens[:, None] - jnp.arange(S, dtype=jnp.int32) * P, 0, P)


def merge_segments(parts: list[DecodeAttention]) -> tuple[jax.Array, jax.Array]:
    """Joins the attention over several segments exactly, by log-sum-exp.

    Returns:
      The attended values, float32 `[B, N, H]`, and the log of the softmax denominator, float32
      `[B, N]`: `exp(part.page_lse - lse)` is the share of attention that a page received.
    """
    peak = reduce(jnp.maximum, (part.max for part in parts))
    factors = [jnp.exp(part.max - peak) for part in parts]
    total = reduce(jnp.add, (part.sum * f for part, f in zip(parts, factors, strict=True)))
    out = reduce(jnp.add, (part.out * f[..., None] for part, f in zip(parts, factors, strict=True)))
    return out / total[..., None], peak + jnp.log(total)
