"""SnapKV at decode: what the last queries looked at stays (arXiv 2404.14469)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from raas_jax import checks
from raas_jax.policies.base import Boundary, Evidence, Metadata, Page, lowest, set_slot
from raas_jax.policies.budgeted import Budgeted
from raas_jax.policies.sizes import pages_for
from raas_jax.policies.window import Window


@dataclasses.dataclass(frozen=True)
class SnapKV(Budgeted):
    """Evicts the page of the least attention from the last `window` queries.

    SnapKV compresses a prompt once, by an observation window at its end. Applied at decode, the
    window slides: it is the last `window` tokens, which themselves are never evicted. The mean over
    the query heads of a key/value head counts.

    Departs from the paper: the prompt is kept, and scores are not smoothed over neighbouring
    tokens (the authors pool over 5 or 7), since pages already keep neighbours together. Metadata:
    `Window`, and the clock when each page was written.

    Attributes:
      window: queries that are observed, more than a page of them rounded up to whole pages; the
        paper uses 16 to 64.
    """

    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("window", self.window, 1, checks.MOST_TOKENS)

    def reserve(self) -> tuple[int, str]:
        return pages_for(self.window, self.page_size), f"with window={self.window}"

    def init(self, shape: tuple[int, int, int, int]) -> Metadata:
        return Window.empty(shape, self.window, self.page_size), jnp.zeros(shape, jnp.int32)

    def observe(self, meta: Metadata, evidence: Evidence, now: jax.Array) -> Metadata:
        window, written = meta
        mass, current_mass = self.pool_masses(evidence, jnp.mean)
        return window.observe(mass, current_mass, now, self.window, self.page_size), written

    def commit(self, meta: Metadata, slot: jax.Array, page: Page, now: jax.Array) -> Metadata:
        window, written = meta
        return window.commit(slot), set_slot(written, slot, now[:, None])

    def victim(self, meta: Metadata, boundary: Boundary) -> jax.Array:
        window, written = meta
        recent = self.newest(written, boundary.now, self.reserve()[0])
        return lowest(jnp.where(recent, jnp.inf, window.total()), boundary)
