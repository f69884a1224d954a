"""The attention of the last few queries, kept for every page: an observation window."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Window(NamedTuple):
    """Attention from the last `W` queries, newest at index `clock % W`.

    Attributes:
      kept: float32 `[L, B, K, S, W]` (without `L` in the layer loop).
      opened: float32 `[L, B, K, W]`, to the page being written.
    """

    kept: jax.Array
    opened: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], width: int) -> Window:
        """No attention yet; shape is `(L, B, K, S)`."""
        return cls(
            jnp.zeros((*shape, width), jnp.float32), jnp.zeros((*shape[:3], width), jnp.float32)
        )

    def observe(self, mass: jax.Array, open_mass: jax.Array, now: jax.Array) -> Window:
        """Replaces the oldest query; mass `[B, K, S]`, open_mass `[B, K]`, now `[B]`."""
        width = self.kept.shape[-1]
        oldest = jnp.arange(width) == (now % width)[:, None]
        return Window(
            jnp.where(oldest[:, None, None], mass[..., None], self.kept),
            jnp.where(oldest[:, None], open_mass[..., None], self.opened),
        )

    def commit(self, slot: jax.Array) -> Window:
        """The open page moves to `slot [L, B, K]`."""
        chosen = jnp.arange(self.kept.shape[3]) == slot[..., None]
        return Window(
            jnp.where(chosen[..., None], self.opened[:, :, :, None], self.kept),
            jnp.zeros_like(self.opened),
        )

    def total(self) -> jax.Array:
        """Sum over the window: float32 `[L, B, K, S]`."""
        return jnp.sum(self.kept, axis=-1)
