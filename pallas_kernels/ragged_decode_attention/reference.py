"""The definition of `ragged_decode_attention`, in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.reference import DecodeAttention, decode_attention_reference


def ragged_decode_attention_reference(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    fill: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    layer: jax.Array,
    *,
    sizes: tuple[int, ...],
    scale: float,
) -> DecodeAttention:
    """See `api.ragged_decode_attention`, which checks the arguments.

    `starts` and `counts`, int32 `[L, K]`, are those of the ranges; `sizes` their distinct counts.
    """
    k, v = (head_pages(pool, starts[layer], fill.shape[-1]) for pool in (k_pool, v_pool))
    within = jnp.arange(fill.shape[-1]) < counts[layer][:, None]
    alive = jnp.where(within, fill, 0)
    return decode_attention_reference(q, k[None], v[None], alive, jnp.int32(0), scale=scale)


def head_pages(pool: jax.Array, start: jax.Array, most: int) -> jax.Array:
    """Pages `[B, T, ...]` from `start [K]` on, `most` of each head: `[B, K, S, ...]`.

    Beyond a head's range lie pages of others, or the pool's last one again.
    """
    page = start[:, None] + jnp.arange(most)
    return jnp.take(pool, jnp.minimum(page, pool.shape[1] - 1), axis=1)
