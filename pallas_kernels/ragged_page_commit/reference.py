"""The definition of `ragged_page_commit`, in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def ragged_page_commit_reference(
    pool: jax.Array, page: jax.Array, slot: jax.Array, starts: jax.Array
) -> jax.Array:
    """See `api.ragged_page_commit`, which checks the arguments; starts, of ranges: int32 `[L, K]`.

    A part of a pool has the starts of the whole one, counted from its own beginning.
    """
    row = jnp.broadcast_to(jnp.arange(pool.shape[0])[:, None], slot.shape)
    at = starts[:, None] % pool.shape[1] + slot
    # Full index arrays: with a donated buffer this is one in-place scatter and no copy.
    return pool.at[row, at].set(page, mode="promise_in_bounds")
