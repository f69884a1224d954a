"""H2O: the heavy hitters, by all the attention they ever received (arXiv 2306.14048)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from raas_jax.policies.base import Boundary, Evidence, Page, PromptPages, lowest, set_slot
from raas_jax.policies.budgeted import Budgeted


class Heavy(NamedTuple):
    """Metadata of `H2O`.

    Attributes:
      mass: float32 `[L, B, K, S]`, attention that each page ever received.
      current_mass: float32 `[L, B, K]`, the same of the page being written.
      written: int32 `[L, B, K, S]`, the clock when each page was full.
    """

    mass: jax.Array
    current_mass: jax.Array
    written: jax.Array


@dataclasses.dataclass(frozen=True)
class H2O(Budgeted):
    """Evicts, outside a share of recent pages, the page of the least cumulative attention.

    The attention is summed over the queries since the page was begun, over its tokens, and over the
    query heads of the key/value head (the paper's models have one each). With `prompt="evict"` it
    is the published method: the prompt's pages compete, with the attention that they received from
    the prompt itself; of a prompt longer than the budget the same rule chooses.

    Attributes:
      recent_fraction: in [0, 1); share of a row's pages kept for the newest ones, rounded down but
        at least the newest page; the paper's half by default.
    """

    recent_fraction: float = 0.5
    prompts = ("excluded", "included", "evict")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent_fraction < 1:
            raise ValueError(f"recent_fraction is {self.recent_fraction!r}; it must be in [0, 1).")

    @property
    def prompt_queries(self) -> int:
        return 2**30 if self.evicts_prompt else 0

    def init(self, shape: tuple[int, int, int, int]) -> Heavy:
        return Heavy(
            jnp.zeros(shape, jnp.float32),
            jnp.zeros(shape[:3], jnp.float32),
            jnp.zeros(shape, jnp.int32),
        )

    def insert_prompt(self, meta: Heavy, prompt: PromptPages) -> tuple[jax.Array, Heavy]:
        assert prompt.mass is not None
        mass = jax.vmap(lambda x: self.pool(x, jnp.sum))(prompt.mass)
        last = jnp.sum(prompt.fill > 0, axis=-1)[:, None, None]
        recent = self._recent_pages(prompt.room)
        late = jnp.arange(mass.shape[-1]) >= last - recent[..., None]
        pages, written = self.insert_best(jnp.where(late, jnp.inf, mass), prompt, meta.mass.shape)
        placed = jnp.take_along_axis(mass, jnp.maximum(pages, 0), axis=-1)
        return pages, Heavy(jnp.where(pages < 0, 0.0, placed), meta.current_mass, written)

    def observe(self, meta: Heavy, evidence: Evidence, now: jax.Array) -> Heavy:
        mass, current_mass = self.pool_masses(evidence, jnp.sum)
        return Heavy(meta.mass + mass, meta.current_mass + current_mass, meta.written)

    def commit(self, meta: Heavy, slot: jax.Array, page: Page, now: jax.Array) -> Heavy:
        return Heavy(
            set_slot(meta.mass, slot, meta.current_mass),
            jnp.zeros_like(meta.current_mass),
            set_slot(meta.written, slot, now[:, None]),
        )

    def victim(self, meta: Heavy, boundary: Boundary) -> jax.Array:
        count = self._recent_pages(jnp.sum(boundary.allowed, axis=-1))[..., None]
        recent = self.newest(meta.written, boundary.now, count)
        return lowest(jnp.where(recent, jnp.inf, meta.mass), boundary)

    def _recent_pages(self, pages: jax.Array) -> jax.Array:
        """How many of this many pages are recent ones, the one being written included."""
        recent = jnp.floor(pages.astype(jnp.float32) * self.recent_fraction)
        return jnp.clip(recent.astype(jnp.int32), 1, jnp.maximum(pages - 1, 1))
