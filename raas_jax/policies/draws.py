"""Random numbers for page slots that do not depend on the rest of the batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def by_slot(
    draw: Callable[[jax.Array, tuple[int, int]], jax.Array],
    keys: jax.Array,
    shape: tuple[int, int, int],
) -> jax.Array:
    """Independent numbers `[L, B, K, S]` of `jax.random.uniform` or the like.

    The keys are typed, `[B]`; the shape is `(L, K, S)`. A row's numbers depend on its key alone,
    and a slot's not on how many there are.
    """
    L, K, S = shape

    def of_slot(key: jax.Array, slot: jax.Array) -> jax.Array:
        return draw(jax.random.fold_in(key, slot), (L, K))

    of_row = jax.vmap(of_slot, in_axes=(None, 0), out_axes=2)
    return jax.vmap(of_row, in_axes=(0, None), out_axes=1)(keys, jnp.arange(S))
