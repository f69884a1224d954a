"""VaSE: large values stay, the rest is sampled by attention (after arXiv 2606.03928)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from raas_jax.policies.base import Boundary, Evidence, Marks, Page, lowest, pages_for, put
from raas_jax.policies.budgeted import Budgeted, best, check_count
from raas_jax.policies.window import Window


@dataclasses.dataclass(frozen=True)
class VaSE(Budgeted):
    """Protects the pages of the largest value range, and samples which of the others to keep.

    The range of a token is the largest minus the smallest component of its value vector; of a page,
    the largest of its tokens. Of the pages that are not protected, those kept are drawn without
    replacement with probability proportional to their attention: the one with the lowest log
    attention plus Gumbel noise goes. Draws are the same for a row whatever else is in the batch.

    The paper's recipe has these two parts; which attention is meant is our choice here, that of the
    last `window` queries (mean over the query heads), whose own tokens are never evicted. The
    prompt is kept.

    Attributes:
      protected: share of a row's pages for large values, rounded down; a quarter in the paper.
      window: queries whose attention counts.
    """

    protected: float = 0.25
    window: int = 8

    def __post_init__(self) -> None:
        check_count("window", self.window, 1)
        if not 0 <= self.protected < 1:
            raise ValueError(f"protected is {self.protected!r}; it must be in [0, 1).")
        super().__post_init__()

    def reserve(self) -> tuple[int, str]:
        recent, pages = pages_for(self.window, self.page_size), self.budget // self.page_size
        reason = f"with window={self.window}, protected={self.protected}"
        return recent + int(pages * self.protected), reason

    def init(self, shape: tuple[int, int, int, int]) -> Marks:
        zeros = jnp.zeros(shape, jnp.float32)
        return Window.empty(shape, self.window), zeros, zeros.astype(jnp.int32)

    def observe(self, marks: Any, evidence: Evidence, now: jax.Array) -> Marks:
        window, spread, written = marks
        return window.observe(*self.pool_masses(evidence, jnp.mean), now), spread, written

    def commit(self, marks: Any, slot: jax.Array, page: Page, now: jax.Array) -> Marks:
        window, spread, written = marks
        v = page.v.astype(jnp.float32)
        of_page = jnp.max(jnp.max(v, axis=-1) - jnp.min(v, axis=-1), axis=-1)
        if self.share == "layer":
            of_page = jnp.broadcast_to(jnp.max(of_page, axis=2, keepdims=True), of_page.shape)
        return (
            window.commit(slot),
            put(spread, slot, of_page),
            put(written, slot, now[:, None]),
        )

    def victim(self, marks: Any, boundary: Boundary) -> jax.Array:
        window, spread, written = marks
        L, _, K, S = spread.shape
        heads = 1 if self.share == "layer" else K

        def draw(key: jax.Array, slot: jax.Array) -> jax.Array:
            # Folded with the slot: a draw does not depend on how many slots the batch has.
            return jax.random.gumbel(jax.random.fold_in(key, slot), (L, heads))

        of_row = jax.vmap(draw, in_axes=(None, 0), out_axes=2)
        noise = jax.vmap(of_row, in_axes=(0, None), out_axes=1)(boundary.keys, jnp.arange(S))
        score = jnp.log(window.total() + 1e-30) + noise
        # The share of a row's own pages, even where the batch has more slots.
        pages = jnp.sum(boundary.allowed, axis=-1)
        count = jnp.floor(pages.astype(jnp.float32) * self.protected).astype(jnp.int32)
        large = best(jnp.where(boundary.fill > 0, spread, -jnp.inf), count)
        recent = self.newest(written, boundary.now, pages_for(self.window, self.page_size))
        return lowest(jnp.where(large | recent, jnp.inf, score), boundary)
