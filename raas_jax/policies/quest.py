"""Quest: keep everything, read only what may matter (arXiv 2406.10774)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from raas_jax import checks
from raas_jax.policies.base import Boundary, Bounded, Metadata, Policy, Selection, lowest
from raas_jax.policies.budgeted import check_budget, dense_first
from raas_jax.policies.sizes import bucket, pages_for


@dataclasses.dataclass(frozen=True)
class Quest(Policy):
    """Reads, at every token, the `budget / P` pages that may hold the highest scores.

    A page's score is bounded from above by its channel-wise smallest and largest keys. Pages of the
    prompt and generated ones compete; the page being written is always read, on top. Nothing is
    evicted, so memory is O(N), with two more keys per page.

    Departs from the paper: the query heads of a key/value head share their pages, by the largest of
    their bounds (the paper's models have one each); and all layers are sparse by default, where the
    paper leaves the first two dense.

    Attributes:
      budget: tokens read per token, layer and key/value head; a multiple of `page_size`.
      granularity: choose for each key/value head ("kv_head"), or once per layer ("layer").
      dense_layers: this many first layers read everything; 2 in the paper.
    """

    budget: int = 1024
    granularity: Literal["kv_head", "layer"] = dataclasses.field(default="kv_head", kw_only=True)
    dense_layers: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget, self.page_size)
        checks.choice("granularity", self.granularity, ("kv_head", "layer"))
        checks.integer("dense_layers", self.dense_layers, 0, checks.MOST_TOKENS)

    @property
    def needs_bounds(self) -> bool:
        return True

    @property
    def selects(self) -> bool:
        return True

    def groups(self, num_layers: int) -> tuple[tuple[int, Policy], ...]:
        return dense_first(self, self.dense_layers, num_layers)

    def slots(self, prompt_tokens: Sequence[int], max_new_tokens: int) -> int:
        return bucket(pages_for(max_new_tokens, self.page_size))

    def select(self, meta: Metadata, bounded: Bounded) -> Selection:
        assert bounded.prompt is not None and bounded.kept is not None
        Sp = bounded.prompt.shape[-1]
        bound = jnp.concatenate([bounded.prompt, bounded.kept], axis=-1)
        pages = top_pages(bound, self.budget // self.page_size, self.granularity)
        # Each segment is read by a list of its own, in which the other's pages count as none.
        return Selection(
            prompt=jnp.where(pages < Sp, pages, -1), kept=jnp.where(pages >= Sp, pages - Sp, -1)
        )

    def victim(self, meta: Metadata, boundary: Boundary) -> jax.Array:
        return lowest(boundary.fill, boundary)


def top_pages(bound: jax.Array, count: int, granularity: str) -> jax.Array:
    """The pages of the largest bounds `[B, K, G, S]`: int32 `[B, K, count]`, -1 for empty ones."""
    bound = jnp.max(bound, axis=2)
    if granularity == "layer":
        bound = jnp.broadcast_to(jnp.max(bound, axis=1, keepdims=True), bound.shape)
    value, page = jax.lax.top_k(bound, min(count, bound.shape[-1]))
    return jnp.where(jnp.isneginf(value), -1, page)
