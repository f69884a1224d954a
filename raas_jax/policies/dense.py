"""Dense: keep everything. Memory grows with the length; the standard of accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from raas_jax.policies.base import Boundary, Metadata, Policy, lowest
from raas_jax.policies.sizes import bucket, pages_for


@dataclasses.dataclass(frozen=True)
class Dense(Policy):
    """Keeps every page; `S` covers `max_new_tokens`, rounded up to a bucket."""

    def slots(self, prompt_tokens: Sequence[int], max_new_tokens: int) -> int:
        return bucket(pages_for(max_new_tokens, self.page_size))

    def victim(self, meta: Metadata, boundary: Boundary) -> jax.Array:
        return lowest(boundary.fill, boundary)
