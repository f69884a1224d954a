"""RaaS: evict the page whose last use lies farthest back (arXiv 2502.11147).

Every kept page carries a stamp, the time at which it was last attended to. A milestone is stamped
while the reasoning uses it and then no more; it becomes the oldest and goes. The prompt lies in a
segment of its own, where nothing is ever evicted.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax import checks
from raas_jax.policies.base import Boundary, Evidence, Page, lowest, set_slot
from raas_jax.policies.budgeted import Budgeted
from raas_jax.policies.sizes import pages_for

DEFAULT_TOP_FRACTION = 0.25
PAIRWISE = 128  # Up to this many slots, comparing all pairs is quicker than sorting.


class Stamps(NamedTuple):
    """When each page was last attended to, and when it was written; -1 for an empty slot.

    Both `[L, B, K, S]`, in tokens that the row had generated. `written` is int32, and so is
    `stamp`, which is float32 where stamps are soft.
    """

    stamp: jax.Array
    written: jax.Array


@dataclasses.dataclass(frozen=True)
class RaaS(Budgeted):
    """Reasoning-aware sparsity with a fixed budget.

    After every token, pages that are in use are stamped with the present time. At a page boundary
    the new page, stamped with the present time, takes an empty slot, or else that of the oldest
    stamp. Of pages with the same stamp the one that was written first goes: the paper leaves this
    open, but it matters, since a small `alpha` stamps most pages at every step. The page being
    written always stays.

    Which pages are in use, one of three rules says; give at most one of them. `top_fraction`: those
    of the highest scores (pages that tie with the last one are in use too). `alpha`: those whose
    score exceeds it. `half_life`: there is no threshold, and stamps are soft: of every score that a
    page ever received, what is left halves every `half_life` tokens, and the stamp is the time at
    which a score of one alone would have left as much. Short half-lives are LRU, long ones LFU, as
    in LRFU (Lee et al., IEEE Transactions on Computers 50(12), 2001), with attention as the access.

    The default is what did best in our study (`docs/study.md`): the top quarter. `RaaS.paper` is
    the setting of the paper's experiments.

    Attributes:
      alpha: threshold on a page's score, in [0, 1]; the paper's experiments use 1e-4.
      top_fraction: share of the occupied slots, in (0, 1], rounded up; 0.25 where no rule is given.
      half_life: tokens, above 0.
      recent: newest generated tokens that are never evicted, in whole pages; 0 keeps only the page
        being written.
      score: "mass" is the page's exact share of the softmax; "bound" is the paper's: the softmax,
        over all pages, of the upper bound by the page's representative keys (as in Quest). Of the
        query heads of a group the largest score counts.
    """

    alpha: float | None = None
    top_fraction: float | None = dataclasses.field(default=None, kw_only=True)
    half_life: float | None = dataclasses.field(default=None, kw_only=True)
    recent: int = dataclasses.field(default=0, kw_only=True)
    score: Literal["mass", "bound"] = dataclasses.field(default="mass", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("recent", self.recent, 0, checks.MOST_TOKENS)
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha!r}; it must be in [0, 1] or None.")
        if self.top_fraction is not None and not 0 < self.top_fraction <= 1:
            raise ValueError(
                f"top_fraction is {self.top_fraction!r}; it must be in (0, 1] or None."
            )
        if self.half_life is not None and not 0 < self.half_life < math.inf:
            raise ValueError(
                f"half_life is {self.half_life!r}; it must be a finite number of tokens above 0."
            )
        rules = {name: getattr(self, name) for name in ("alpha", "top_fraction", "half_life")}
        given = [f"{name}={value}" for name, value in rules.items() if value is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are given, each a rule for what is in use. Give one."
            )
        checks.choice("score", self.score, ("mass", "bound"))

    @classmethod
    def paper(cls, budget: int = 1024, *, page_size: int = 16) -> RaaS:
        """The paper's setting: prompt included in the budget, representative keys, alpha 1e-4."""
        return cls(budget, 1e-4, prompt="included", score="bound", page_size=page_size)

    def reserve(self) -> tuple[int, str]:
        return max(1, pages_for(self.recent, self.page_size)), f"with recent={self.recent}"

    @property
    def needs_bounds(self) -> bool:
        return self.score == "bound"

    def init(self, shape: tuple[int, int, int, int]) -> Stamps:
        # Two arrays, since the state is donated and a buffer can be given up only once.
        kind = jnp.int32 if self.half_life is None else jnp.float32
        return Stamps(jnp.full(shape, -1, kind), jnp.full(shape, -1, jnp.int32))

    def observe(self, meta: Stamps, evidence: Evidence, now: jax.Array) -> Stamps:
        score = evidence.bound if self.score == "bound" else evidence.mass
        assert score is not None
        score = self.pool(score, jnp.max)
        occupied = evidence.fill > 0
        now = now[:, None, None]
        if self.half_life is not None:
            now = now.astype(jnp.float32)
            left = jnp.exp2((meta.stamp - now) / self.half_life) + score
            # The logarithm of nothing is no time at all; such a page has been the oldest for long.
            soft = now + self.half_life * jnp.log2(jnp.maximum(left, np.finfo(np.float32).tiny))
            return meta._replace(stamp=jnp.where(occupied, soft, meta.stamp))
        if self.alpha is not None:
            attended = score > self.alpha
        else:
            fraction = DEFAULT_TOP_FRACTION if self.top_fraction is None else self.top_fraction
            attended = _among_top(score, occupied, fraction)
        return meta._replace(stamp=jnp.where(attended & occupied, now, meta.stamp))

    def commit(self, meta: Stamps, slot: jax.Array, page: Page, now: jax.Array) -> Stamps:
        return Stamps(*(set_slot(clock, slot, now[:, None].astype(clock.dtype)) for clock in meta))

    def victim(self, meta: Stamps, boundary: Boundary) -> jax.Array:
        newest = np.iinfo(np.int32).max
        held = boundary.allowed & (boundary.fill > 0)
        if self.recent:
            held &= ~self.newest(meta.written, boundary.now, self.reserve()[0])
        last = jnp.inf if self.half_life is not None else newest
        stamp = jnp.where(held, meta.stamp, last)
        oldest = stamp == jnp.min(stamp, axis=-1, keepdims=True)
        return lowest(jnp.where(oldest, meta.written, newest), boundary)

    def stamps(self, meta: Stamps) -> jax.Array | None:
        return meta.stamp if self.half_life is None else None  # Soft stamps are no clock.


def _among_top(score: jax.Array, occupied: jax.Array, fraction: float) -> jax.Array:
    """Whether a page is among the best `ceil(fraction * occupied)`, ties included: `[B, K, S]`."""
    S = score.shape[-1]
    # Exact numbers: in floating point, 0.55 of 100 pages is more than 55.
    share = Fraction(str(fraction))
    score = jnp.where(occupied, score, -jnp.inf)
    if S <= PAIRWISE:
        # Pages of a higher score are fewer than the share of those occupied: one sum says it, and
        # a GPU launches one reduction. Of no S pages does the simpler share mean another number.
        share = min(Fraction(math.ceil(n * share), n) for n in range(1, S + 1))
        higher = score[..., None, :] > score[..., :, None]
        over = jnp.where(higher, share.denominator, 0) - jnp.where(
            occupied[..., None, :], share.numerator, 0
        )
        return jnp.sum(over, axis=-1, dtype=jnp.int32) < 0
    table = jnp.asarray([math.ceil(n * share) for n in range(S + 1)], jnp.int32)
    count = table[jnp.sum(occupied, axis=-1, keepdims=True)]
    ranked = jnp.sort(score, axis=-1, descending=True)
    return score >= jnp.take_along_axis(ranked, jnp.maximum(count - 1, 0), axis=-1)
