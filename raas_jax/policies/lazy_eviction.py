"""LazyEviction: what recurs rarely may wait longer (arXiv 2506.15969)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from raas_jax.policies.base import Boundary, Evidence, Metadata, Page, set_slot
from raas_jax.policies.budgeted import Batched


class Recurrence(NamedTuple):
    """When a page was last in use, and the longest time between two uses: int32 `[L, B, K, S]`."""

    stamp: jax.Array
    interval: jax.Array


@dataclasses.dataclass(frozen=True)
class LazyEviction(Batched):
    """Every `every` tokens, evicts the pages that are least likely to be needed again.

    A page is in use when its attention exceeds `alpha` (the largest of the query heads counts). Its
    interval is the longest time that ever lay between two of its uses, the first of which is its
    writing. With s(x) = 2 / (1 + exp(x)), a page scores `s(time since its last use / interval)`,
    how likely it is to come back, plus `s(interval - 1)`, how often it does. A page that was never
    used again scores less than all that were; of several such ones the longest unused goes. The
    `recent` newest tokens stay, as many as `every` in the paper.

    The second term follows the paper's words, by which shorter intervals score more; the
    authors' code was not compared. Departs from the paper: the prompt is kept.

    Attributes:
      every, recent: the paper measures for each model and task how long most intervals are, for
        example 175 tokens.
      alpha: threshold on a page's attention, in [0, 1]; 1e-4 or 5e-4 in the paper, by the model.
    """

    every: int = 64
    recent: int = 64
    alpha: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha!r}; it must be in [0, 1].")

    def init(self, shape: tuple[int, int, int, int]) -> Metadata:
        # An array each: the state is donated, and no buffer can be given away twice.
        written, stamp, interval = (jnp.zeros(shape, jnp.int32) for _ in range(3))
        return written, Recurrence(stamp, interval)

    def observe(self, meta: Metadata, evidence: Evidence, now: jax.Array) -> Metadata:
        written, (stamp, interval) = meta
        used = (self.pool(evidence.mass, jnp.max) > self.alpha) & (evidence.fill > 0)
        now = now[:, None, None]
        longest = jnp.maximum(interval, now - stamp)
        return written, Recurrence(jnp.where(used, now, stamp), jnp.where(used, longest, interval))

    def commit(self, meta: Metadata, slot: jax.Array, page: Page, now: jax.Array) -> Metadata:
        written, (stamp, interval) = meta
        written, _ = super().commit((written, ()), slot, page, now)
        # The page's last token was read one tick ago.
        stamp = set_slot(stamp, slot, now[:, None] - 1)
        return written, Recurrence(stamp, set_slot(interval, slot, 0))

    def page_scores(self, meta: Metadata, boundary: Boundary, candidates: jax.Array) -> jax.Array:
        _, (stamp, interval) = meta
        waited = (boundary.now[:, None, None] - 1 - stamp).astype(jnp.float32)
        longest = interval.astype(jnp.float32)
        back = 2 * jax.nn.sigmoid(-waited / jnp.maximum(longest, 1.0))
        often = 2 * jax.nn.sigmoid(1.0 - longest)
        return jnp.where(interval > 0, back + often, -waited)
