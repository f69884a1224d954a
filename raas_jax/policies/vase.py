"""VaSE: large values stay, the rest is sampled by attention (arXiv 2606.03928)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from raas_jax import checks
from raas_jax.policies.base import Boundary, Evidence, Metadata, Page, set_slot
from raas_jax.policies.budgeted import Batched, best
from raas_jax.policies.draws import by_slot
from raas_jax.policies.window import Window


@dataclasses.dataclass(frozen=True)
class VaSE(Batched):
    """Every `every` tokens, keeps large values and a sample of the rest, and the newest tokens.

    The range of a token is the largest minus the smallest component of its value vector; of a page,
    the largest of its tokens. Of the pages older than `recent`, those of the largest range fill the
    share `protected` of the budget. What is left of it is drawn from the others without
    replacement, with probability proportional to their attention from the last `window` queries
    (mean over the query heads): the pages with the largest log attention plus Gumbel noise. Draws
    are the same for a row whatever else is in the batch.

    Departs from the paper: the prompt is kept, and with it the first four tokens, which the authors
    protect by name; attention is the share of the whole softmax, where they take it anew over the
    candidates; and it is not smoothed over 5 neighbouring tokens, since pages keep neighbours
    together.

    Attributes:
      protected: share of a row's budget for large values, in whole pages, rounded down; a quarter
        in the paper.
      window: queries whose attention counts, more than a page of them rounded up to whole pages;
        as many as `every` and `recent` in the paper, 64.
    """

    every: int = 64
    recent: int = 64
    protected: float = 0.25
    window: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("window", self.window, 1, checks.MOST_TOKENS)
        if not 0 <= self.protected < 1:
            raise ValueError(f"protected is {self.protected!r}; it must be in [0, 1).")
        pages, recent = self.budget // self.page_size, self.reserve()[0]
        if recent + int(pages * self.protected) >= pages:
            raise ValueError(
                f"budget is {self.budget}, of which recent={self.recent} and "
                f"protected={self.protected} leave no page to draw. Use a larger budget, or "
                "reserve less."
            )

    def init(self, shape: tuple[int, int, int, int]) -> Metadata:
        window = Window.empty(shape, self.window, self.page_size)
        return jnp.zeros(shape, jnp.int32), (window, jnp.zeros(shape, jnp.float32))

    def observe(self, meta: Metadata, evidence: Evidence, now: jax.Array) -> Metadata:
        written, (window, spread) = meta
        mass, current_mass = self.pool_masses(evidence, jnp.mean)
        window = window.observe(mass, current_mass, now, self.window, self.page_size)
        return written, (window, spread)

    def commit(self, meta: Metadata, slot: jax.Array, page: Page, now: jax.Array) -> Metadata:
        written, (window, spread) = super().commit(meta, slot, page, now)
        v = page.v.astype(jnp.float32)
        of_page = jnp.max(jnp.max(v, axis=-1) - jnp.min(v, axis=-1), axis=-1)
        if self.granularity == "layer":
            of_page = jnp.broadcast_to(jnp.max(of_page, axis=2, keepdims=True), of_page.shape)
        return written, (window.commit(slot), set_slot(spread, slot, of_page))

    def page_scores(self, meta: Metadata, boundary: Boundary, candidates: jax.Array) -> jax.Array:
        _, (window, spread) = meta
        L, _, K, S = spread.shape
        heads = 1 if self.granularity == "layer" else K
        noise = by_slot(jax.random.gumbel, boundary.keys, (L, heads, S))
        pages = self.budget_pages(boundary.prompt_lengths, L, K)
        count = jnp.floor(pages.astype(jnp.float32) * self.protected).astype(jnp.int32)
        large = best(jnp.where(candidates, spread, -jnp.inf), count) & candidates
        return jnp.where(large, jnp.inf, jnp.log(window.total() + 1e-30) + noise)
