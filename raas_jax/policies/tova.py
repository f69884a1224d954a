"""TOVA: the token that the last query attends to least goes (arXiv 2401.06104)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from raas_jax.policies.base import Boundary, Evidence, Page, PromptPages, lowest, set_slot
from raas_jax.policies.budgeted import Budgeted


@dataclasses.dataclass(frozen=True)
class TOVA(Budgeted):
    """Evicts the page of the least attention from the last query.

    As in the paper, the mean over all heads decides once per layer; `granularity="kv_head"` takes
    the mean over the query heads of each key/value head instead. With `prompt="evict"` it is the
    published method, and a prompt longer than the budget is cut by the attention of its last token.

    Departs from the paper: the page just written stays, however little its last token attends to
    it. Metadata: the last query's attention, float32 `[L, B, K, S]`.
    """

    granularity: Literal["kv_head", "layer"] = dataclasses.field(default="layer", kw_only=True)
    prompts = ("excluded", "included", "evict")

    @property
    def prompt_queries(self) -> int:
        return 1 if self.evicts_prompt else 0

    def init(self, shape: tuple[int, int, int, int]) -> jax.Array:
        return jnp.zeros(shape, jnp.float32)

    def insert_prompt(self, meta: jax.Array, prompt: PromptPages) -> tuple[jax.Array, jax.Array]:
        assert prompt.mass is not None
        mass = jax.vmap(lambda x: self.pool(x, jnp.mean))(prompt.mass)
        last = jnp.sum(prompt.fill > 0, axis=-1)[:, None, None] - 1
        newest = jnp.arange(mass.shape[-1]) == last
        pages, _ = self.insert_best(jnp.where(newest, jnp.inf, mass), prompt, meta.shape)
        # The next query overwrites the attention before anything is evicted by it.
        return pages, meta

    def observe(self, meta: jax.Array, evidence: Evidence, now: jax.Array) -> jax.Array:
        return self.pool(evidence.mass, jnp.mean)

    def commit(self, meta: jax.Array, slot: jax.Array, page: Page, now: jax.Array) -> jax.Array:
        return set_slot(meta, slot, 0.0)

    def victim(self, meta: jax.Array, boundary: Boundary) -> jax.Array:
        return lowest(meta, boundary)
