"""Dense: keep everything. Memory grows with the length; the standard of accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from raas_jax.policies.base import Boundary, Metadata, Policy, lowest, pages_for


@dataclasses.dataclass(frozen=True)
class Dense(Policy):
    """Keeps every page; `S` covers `max_new_tokens`, rounded up to a bucket."""

    def slots(self, prompt_tokens: Sequence[int], max_new_tokens: int) -> int:
        return bucket(pages_for(max_new_tokens, self.page_size))

    def victim(self, meta: Metadata, boundary: Boundary) -> jax.Array:
        return lowest(boundary.fill, boundary)


def bucket(size: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: few distinct sizes, less than half too large."""
    power = 1 << max(size - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power
