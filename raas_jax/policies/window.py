"""The attention of the last few queries, kept for every page: an observation window.

Pages are chosen only at page boundaries, so the window is needed only there, and one sum for each
page of queries does: S numbers for each P tokens of the window, not for each of them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from raas_jax.policies.sizes import pages_for


class Window(NamedTuple):
    """Attention from the queries of the last `W` pages, that of page number `n` at `n % W`.

    Attributes:
      kept: float32 `[L, B, K, W, S]` (without `L` in the layer loop).
      current: float32 `[L, B, K, W]`, to the page being written.
    """

    kept: jax.Array
    current: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], queries: int, page_size: int) -> Window:
        """No attention yet, of this many queries; shape is `(L, B, K, S)`."""
        *front, S = shape
        W = pages_for(queries, page_size)
        return cls(jnp.zeros((*front, W, S), jnp.float32), jnp.zeros((*front, W), jnp.float32))

    def observe(
        self, mass: jax.Array, current_mass: jax.Array, now: jax.Array, queries: int, page_size: int
    ) -> Window:
        """Adds a query; mass `[B, K, S]`, current_mass `[B, K]`, now `[B]`.

        Of less than a page of `queries` only the last ones of each page count; more are rounded up
        to whole pages.
        """
        W = self.kept.shape[-2]
        number, offset = jnp.divmod(now - 1, page_size)
        first = max(page_size - queries, 0)
        here = jnp.arange(W) == (number % W)[:, None]
        # What the entry holds from W pages ago, or from queries too early, is given up.
        stays = (~here | (offset > first)[:, None])[:, None]
        adds = (here & (offset >= first)[:, None])[:, None]
        kept = jnp.where(stays[..., None], self.kept, 0.0)
        current = jnp.where(stays, self.current, 0.0)
        return Window(
            kept + jnp.where(adds[..., None], mass[:, :, None], 0.0),
            current + jnp.where(adds, current_mass[..., None], 0.0),
        )

    def commit(self, slot: jax.Array) -> Window:
        """The current page moves to `slot [L, B, K]`."""
        chosen = jnp.arange(self.kept.shape[-1]) == slot[..., None]
        return Window(
            jnp.where(chosen[..., None, :], self.current[..., None], self.kept),
            jnp.zeros_like(self.current),
        )

    def total(self) -> jax.Array:
        """Sum over the window: float32 `[L, B, K, S]`."""
        return jnp.sum(self.kept, axis=-2)
