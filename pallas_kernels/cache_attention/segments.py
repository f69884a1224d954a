"""What `cache_attention` is given and what it gives; and the rows of one prompt taken together."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Segment(NamedTuple):
    """A part of a cache, whole, so that no layer is sliced out.

    Attributes:
      k, v: pages; their axes differ by segment, see `cache_attention`.
      tokens: int32, how many tokens live in it; what lies beyond them, NaN included, never matters.
      layer: int32 scalar, which layer to read.
    """

    k: jax.Array
    v: jax.Array
    tokens: jax.Array
    layer: jax.Array


class CacheAttention(NamedTuple):
    """Attention over a whole cache.

    Attributes:
      out: `[B, N, H]`, normalised; float32, or of the dtype that was asked for.
      kept_mass: float32 `[B, N, S]`, the share of the softmax that each kept page received; 0 for
        an empty one.
      current_mass: float32 `[B, N]`, that of the current page.
    """

    out: jax.Array
    kept_mass: jax.Array
    current_mass: jax.Array


class Attended(NamedTuple):
    """What a backend finds, before a sink joins and masses are formed; float32.

    Attributes:
      out: `[B, N, H]`, normalised; of another dtype where one was asked for.
      lse: `[B, N]`, the log of the softmax's denominator.
      kept_lse: `[B, N, S]`, log-sum-exp of the scores of each kept page; -inf for an empty one.
      current_lse: `[B, N]`, that of the current page.
    """

    out: jax.Array
    lse: jax.Array
    kept_lse: jax.Array
    current_lse: jax.Array


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


def join_sink(
    out: jax.Array, lse: jax.Array, sink: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Attended values `[B, N, H]` and their log-sum-exp `[B, N]` with logits `sink [N]` among them.

    A sink has no value: it takes its share of the softmax, and gives nothing.
    """
    if sink is None:
        return out, lse
    joined = jnp.logaddexp(lse, sink.astype(jnp.float32))
    return out * jnp.exp(lse - joined)[..., None], joined
