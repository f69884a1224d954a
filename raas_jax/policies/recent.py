"""Recent: the last pages and the prompt. The control that any rule of scoring has to beat."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from raas_jax.policies.base import Boundary, Marks, Page, lowest, put
from raas_jax.policies.budgeted import Budgeted


@dataclasses.dataclass(frozen=True)
class Recent(Budgeted):
    """Keeps the last `budget` generated tokens, in whole pages, and the prompt.

    First in, first out: the queue of pages (FIFO) of the caching literature is the same policy at
    any page size, which is why the names "recent" and "fifo" both stand for it. Metadata: the clock
    when each page was written, int32 `[L, B, K, S]`.
    """

    def init(self, shape: tuple[int, int, int, int]) -> Marks:
        return jnp.zeros(shape, jnp.int32)

    def commit(self, marks: Marks, slot: jax.Array, page: Page, now: jax.Array) -> Marks:
        return put(marks, slot, now[:, None])

    def victim(self, marks: Marks, boundary: Boundary) -> jax.Array:
        return lowest(marks, boundary)
