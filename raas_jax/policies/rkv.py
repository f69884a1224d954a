"""R-KV: important and not redundant (arXiv 2505.24133)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax import checks
from raas_jax.policies.base import Boundary, Evidence, Metadata, Page
from raas_jax.policies.budgeted import Batched
from raas_jax.policies.window import Window


@dataclasses.dataclass(frozen=True)
class RKV(Batched):
    """Every `every` tokens, keeps the pages of the largest `mix * I - (1 - mix) * R`.

    The importance `I` is the attention of the last `window` queries, the largest of the query heads
    of a key/value head, as a share of what all candidates received. The redundancy `R` is a softmax
    over the pages of their mean cosine similarity with the others, where a page is not held against
    the latest page that is more similar to it than `similar`: of a group of like pages the last one
    stays. The `recent` newest tokens, those of the window, are never evicted.

    A page is represented by the mean of its keys' directions; at `page_size=1` that is the key.
    Departs from the authors' code: query heads are pooled after the softmax, not before; importance
    is not smoothed over 7 neighbouring tokens, since pages keep neighbours together; the prompt is
    kept; and a page without a similar one loses nothing (there, the first token's similarity is
    dropped instead).

    Attributes:
      window: observation queries, more than a page of them rounded up to whole pages; the paper
        uses 8.
      mix: weight of importance; 0.1 in the paper, 0.07 in the authors' code.
      similar: cosine above which two pages are alike.
    """

    window: int = 8
    mix: float = 0.1
    similar: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("window", self.window, 1, checks.MOST_TOKENS)
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix is {self.mix!r}; it must be in [0, 1].")
        if not -1 <= self.similar <= 1:
            raise ValueError(f"similar is {self.similar!r}; it must be a cosine, in [-1, 1].")

    def init(self, shape: tuple[int, int, int, int]) -> Metadata:
        return jnp.zeros(shape, jnp.int32), Window.empty(shape, self.window, self.page_size)

    def observe(self, meta: Metadata, evidence: Evidence, now: jax.Array) -> Metadata:
        written, window = meta
        mass, current_mass = self.pool_masses(evidence, jnp.max)
        return written, window.observe(mass, current_mass, now, self.window, self.page_size)

    def commit(self, meta: Metadata, slot: jax.Array, page: Page, now: jax.Array) -> Metadata:
        written, window = super().commit(meta, slot, page, now)
        return written, window.commit(slot)

    def page_scores(self, meta: Metadata, boundary: Boundary, candidates: jax.Array) -> jax.Array:
        written, window = meta
        mass = jnp.where(candidates, window.total(), 0.0)
        total = jnp.sum(mass, axis=-1, keepdims=True)
        importance = mass / jnp.where(total > 0, total, 1.0)
        # One layer at a time: the float32 copy of the keys is a layer's, not the cache's.
        redundancy: jax.Array = jax.lax.map(
            lambda layer: _redundancy(boundary.k(layer[0]), layer[1], layer[2], self.similar),
            (jnp.arange(len(written)), boundary.fill, written),
        )
        return self.mix * importance - (1 - self.mix) * redundancy


def _redundancy(k: jax.Array, fill: jax.Array, written: jax.Array, similar: float) -> jax.Array:
    """Softmax over one layer's pages of their mean similarity: float32 `[B, K, S]`, 0 if empty.

    k: `[B, K, S, P, H]`; fill and written, the clock when each page was full: int32 `[B, K, S]`.
    """
    S, P = k.shape[2:4]
    filled = fill > 0
    valid = (jnp.arange(P) < fill[..., None])[..., None]
    direction = jnp.sum(_unit(jnp.where(valid, k.astype(jnp.float32), 0.0)), axis=-2)
    direction = _unit(direction)
    cosine = jnp.einsum("bksh,bkth->bkst", direction, direction)
    cosine = jnp.where(jnp.eye(S, dtype=bool), 0.0, cosine)
    alike = (cosine > similar) & filled[:, :, None]
    when = jnp.where(alike, written[:, :, None], np.iinfo(np.int32).min)
    latest = jnp.arange(S) == jnp.argmax(when, axis=-1, keepdims=True)
    cosine = jnp.where(latest & alike, 0.0, cosine)
    # Directions of empty slots are 0, and add nothing to the sum.
    count = jnp.sum(filled, axis=-1, keepdims=True).astype(jnp.float32)
    mean = jnp.sum(cosine, axis=-2) / jnp.maximum(count, 1.0)
    return jax.nn.softmax(jnp.where(filled, mean, -jnp.inf), axis=-1)


def _unit(x: jax.Array) -> jax.Array:
    length: jax.Array = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / (length + 1e-8)
