"""Random eviction: the control without any score (as in arXiv 2609.03430)."""

from __future__ import annotations

import dataclasses

import jax

from raas_jax.policies.base import Boundary, Metadata
from raas_jax.policies.budgeted import Batched
from raas_jax.policies.draws import by_slot


@dataclasses.dataclass(frozen=True)
class RandomEviction(Batched):
    """Every `every` tokens, keeps pages drawn uniformly and the `recent` newest tokens.

    The draws are independent for every layer, key/value head (unless `granularity="layer"`) and
    eviction, and the same for a row whatever else is in the batch.
    """

    every: int = 64
    recent: int = 64

    def page_scores(self, meta: Metadata, boundary: Boundary, candidates: jax.Array) -> jax.Array:
        L, _, K, S = candidates.shape
        return by_slot(jax.random.uniform, boundary.keys, (L, K, S))
