"""The definition of `selected_decode_attention`, in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.reference import DecodeAttention, decode_attention_reference


def selected_decode_attention_reference(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    fill: jax.Array,
    slots: jax.Array,
    layer: jax.Array,
    *,
    scale: float,
) -> DecodeAttention:
    """See `api.selected_decode_attention`, which checks the arguments."""
    chosen = chosen_pages(k_pages, v_pages, fill, slots, layer)
    return decode_attention_reference(q, *chosen, jnp.zeros((), jnp.int32), scale=scale)


def chosen_pages(
    k_pages: jax.Array, v_pages: jax.Array, fill: jax.Array, slots: jax.Array, layer: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pages at `slots [B, K, C]`: k and v `[1, B, K, C, P, H]`, and their fill `[B, K, C]`."""
    at, chosen_fill = chosen_slots(fill, slots)
    # One gather from the whole buffer: only the chosen pages are read.
    k, v = (x.at[layer, *at].get(mode="promise_in_bounds") for x in (k_pages, v_pages))
    return k[None], v[None], chosen_fill


def chosen_slots(fill: jax.Array, slots: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Indices (row, head, slot) of the pages at `slots [B, K, C]`, and their fill `[B, K, C]`."""
    B, K, _ = slots.shape
    row = (jnp.arange(B) // (B // fill.shape[0]))[:, None, None]
    # A slot of -1 reads page 0, which a fill of 0 then hides.
    at = row, jnp.arange(K)[None, :, None], jnp.maximum(slots, 0)
    return at, jnp.where(slots < 0, 0, fill[at])
