"""Attention: over a whole prompt, and of one token over the three segments of the cache."""

from __future__ import annotations

import dataclasses
from functools import partial, reduce

import jax
import jax.numpy as jnp

from pallas_kernels import DecodeAttention, decode_attention, page_bound, prefill_attention
from raas_jax.cache import Cache, page_bounds


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segments: jax.Array | None = None
) -> jax.Array:
    """Causal attention of q `[B, T, N, H]` over k, v `[B, T, K, H]` → `[B, T, N, H]`."""
    return prefill_attention(q, k, v, segments)


@dataclasses.dataclass(frozen=True)
class Reader:
    """One layer's view of the cache, for the token at `offset` of the open page.

    Attributes:
      cache: all segments; `cache.open` holds the token's own key and value already.
      group: index of the layer's group in `cache.kept`.
      layer: int32 scalar, the layer's number in the model.
      layer_in_group: int32 scalar, its number in the group.
      fill: int32 `[B, K, S]`, tokens in each kept slot of this layer.
      prompt_fill: int32 `[B', 1, Sp]`, tokens in each page of the prompts.
      offset: int32 scalar, 0..P-1.
      samples: rows that share one prompt, `B / B'`.
    """

    cache: Cache
    group: int
    layer: jax.Array
    layer_in_group: jax.Array
    fill: jax.Array
    prompt_fill: jax.Array
    offset: jax.Array
    samples: int

    def attend(self, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Attention of q `[B, N, H]` over everything.

        Returns:
          The attended values, float32 `[B, N, H]`, and the exact share of the softmax that each
          kept page received, float32 `[B, N, S]`.
        """
        prompt, kept, opened = self.cache.prompt, self.cache.kept[self.group], self.cache.open
        heads = prompt.k.shape[2]
        shared = decode_attention(
            by_prompt(q, heads, self.samples), prompt.k, prompt.v, self.prompt_fill, self.layer
        )
        of_kept = decode_attention(q, kept.k, kept.v, self.fill, self.layer_in_group)
        of_open = decode_attention(
            q,
            opened.k[:, :, :, None],
            opened.v[:, :, :, None],
            jnp.broadcast_to(self.offset + 1, (1, 1, 1)),
            self.layer,
        )
        of_prompt = jax.tree.map(partial(by_row, heads=heads, samples=self.samples), shared)
        out, lse = merge_segments([of_prompt, of_kept, of_open])
        return out, jnp.exp(of_kept.page_lse - lse[..., None])

    def bound(self, q: jax.Array) -> jax.Array:
        """Softmax, over all pages, of Quest's bound; the kept pages' part, float32 `[B, N, S]`."""
        prompt, kept, opened = self.cache.prompt, self.cache.kept[self.group], self.cache.open
        assert prompt.bounds is not None and kept.bounds is not None
        heads, N = prompt.k.shape[2], q.shape[1]
        open_k = jax.lax.dynamic_index_in_dim(opened.k, self.layer, 0)[:, :, :, None]
        open_bounds = page_bounds(open_k, jnp.broadcast_to(self.offset + 1, open_k.shape[:4]))
        of_prompt = page_bound(
            by_prompt(q, heads, self.samples),
            prompt.bounds.key_min,
            prompt.bounds.key_max,
            self.layer,
        )
        of_kept = page_bound(q, kept.bounds.key_min, kept.bounds.key_max, self.layer_in_group)
        of_open = page_bound(q, open_bounds.key_min, open_bounds.key_max, 0)
        prompt_filled = jnp.repeat(self.prompt_fill > 0, self.samples, axis=0)
        kept_filled = jnp.repeat(self.fill > 0, N // heads, axis=1)
        pages = [
            jnp.where(kept_filled, of_kept, -jnp.inf),
            jnp.where(prompt_filled, by_row(of_prompt, heads, self.samples), -jnp.inf),
            of_open,
        ]
        share = jax.nn.softmax(jnp.concatenate(pages, axis=-1), axis=-1)
        return share[..., : of_kept.shape[-1]]


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


def by_prompt(x: jax.Array, heads: int, samples: int) -> jax.Array:
    """`[B, N, ...]` → `[B', samples * N, ...]`: rows of one prompt become one larger head group."""
    if samples == 1:
        return x
    B, N, *rest = x.shape
    split = x.reshape(B // samples, samples, heads, N // heads, *rest)
    return jnp.swapaxes(split, 1, 2).reshape(B // samples, samples * N, *rest)


def by_row(x: jax.Array, heads: int, samples: int) -> jax.Array:
    """The inverse of `by_prompt`."""
    if samples == 1:
        return x
    prompts, N, *rest = x.shape
    split = x.reshape(prompts, heads, samples, N // samples // heads, *rest)
    return jnp.swapaxes(split, 1, 2).reshape(prompts * samples, N // samples, *rest)
