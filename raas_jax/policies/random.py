"""Random eviction: the control without any score (as in arXiv 2609.03430)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from raas_jax.policies.base import Boundary
from raas_jax.policies.budgeted import Batched


@dataclasses.dataclass(frozen=True)
class RandomEviction(Batched):
    """Every `every` tokens, keeps pages drawn uniformly and the `recent` newest tokens.

    The draws are independent for every layer, key/value head (unless `share="layer"`) and eviction,
    and the same for a row whatever else is in the batch.
    """

    every: int = 64
    recent: int = 64

    def worth(self, marks: Any, boundary: Boundary, candidates: jax.Array) -> jax.Array:
        L, _, K, S = candidates.shape

        def draw(key: jax.Array, slot: jax.Array) -> jax.Array:
            # Folded with the slot: a draw does not depend on how many slots the batch has.
            return jax.random.uniform(jax.random.fold_in(key, slot), (L, K))

        of_row = jax.vmap(draw, in_axes=(None, 0), out_axes=2)
        return jax.vmap(of_row, in_axes=(0, None), out_axes=1)(boundary.keys, jnp.arange(S))
