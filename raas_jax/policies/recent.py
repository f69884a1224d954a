"""Recent: the last pages and the prompt. The control that any rule of scoring has to beat."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from raas_jax.policies.base import Boundary, Page, lowest, set_slot
from raas_jax.policies.budgeted import Budgeted


@dataclasses.dataclass(frozen=True)
class Recent(Budgeted):
    """Keeps the last `budget` generated tokens, in whole pages, and the prompt.

    First in, first out: the queue of pages (FIFO) of the caching literature is the same policy at
    any page size, which is why the names "recent" and "fifo" both stand for it. Metadata: the clock
    when each page was written, int32 `[L, B, K, S]`.
    """

    def init(self, shape: tuple[int, int, int, int]) -> jax.Array:
        return jnp.zeros(shape, jnp.int32)

    def commit(self, meta: jax.Array, slot: jax.Array, page: Page, now: jax.Array) -> jax.Array:
        return set_slot(meta, slot, now[:, None])

    def victim(self, meta: jax.Array, boundary: Boundary) -> jax.Array:
        return lowest(meta, boundary)

    def stamps(self, meta: jax.Array) -> jax.Array:
        return meta
