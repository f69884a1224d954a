"""The definition of `page_commit`, in plain jnp. Also the CPU path."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def page_commit_reference(pages: jax.Array, page: jax.Array, slot: jax.Array) -> jax.Array:
    """See `api.page_commit`, which checks the arguments."""
    L, B, K = slot.shape
    # Full index arrays: with a donated buffer this is one in-place scatter and no copy.
    layer, row, head = jnp.meshgrid(jnp.arange(L), jnp.arange(B), jnp.arange(K), indexing="ij")
    return pages.at[layer, row, head, slot].set(page, mode="promise_in_bounds")
