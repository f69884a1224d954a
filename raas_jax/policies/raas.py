"""RaaS: evict the page whose last use lies farthest back (arXiv 2502.11147).

Every kept page carries a stamp, the time at which it was last attended to. A milestone is stamped
while the reasoning uses it and then no more; it becomes the oldest and goes. The prompt lies in a
segment of its own, where nothing is ever evicted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from raas_jax.policies.base import (
    Boundary,
    Evidence,
    Page,
    Policy,
    lowest,
    pages_for,
    put,
)
from raas_jax.policies.dense import Dense, bucket


class Stamps(NamedTuple):
    """When each page was last attended to, and when it was written; -1 for an empty slot.

    Both int32 `[L, B, K, S]`, in tokens that the row had generated.
    """

    stamp: jax.Array
    written: jax.Array


@dataclasses.dataclass(frozen=True)
class RaaS(Policy):
    """Reasoning-aware sparsity with a fixed budget.

    After every token, a page is stamped with the present time if its score is above `alpha`, or,
    where `top_fraction` is given, if it is among that share of the occupied slots (rounded up;
    pages that tie with the last one are stamped too). At a page boundary the new page, stamped
    with the present time, takes an empty slot, or else that of the oldest stamp. Of pages with the
    same stamp the one that was written first goes: the paper leaves this open, but it matters,
    since a small `alpha` stamps most pages at every step. The page being written always stays.

    Attributes:
      budget: tokens per sequence, layer and key/value head; a multiple of `page_size`, at least
        two pages. With `prompt="beside"` they are generated tokens, and the prompt comes on top.
        With `prompt="within"`, as in the paper, prompt and kept pages share them.
      alpha: threshold on a page's score, in [0, 1]; the paper's experiments use 1e-4.
      top_fraction: in (0, 1]; stamps a share of the pages instead of comparing with `alpha`.
      score: "mass" is the page's exact share of the softmax; "bound" is the paper's: the softmax,
        over all pages, of the upper bound by the page's representative keys (as in Quest). Of the
        query heads of a group the largest score counts.
      share: decide for each key/value head ("kv_head"), or once per layer ("layer", by the largest
        score among the heads).
      prompt: "beside" or "within" the budget; never evicted either way.
      dense_layers: this many first layers keep everything, at O(N) memory.
    """

    budget: int = 1024
    alpha: float = 1e-4
    top_fraction: float | None = None
    score: Literal["mass", "bound"] = "mass"
    share: Literal["kv_head", "layer"] = "kv_head"
    prompt: Literal["beside", "within"] = "beside"
    dense_layers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget, self.page_size)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha!r}; it must be in [0, 1].")
        if self.top_fraction is not None and not 0 < self.top_fraction <= 1:
            raise ValueError(
                f"top_fraction is {self.top_fraction!r}; it must be in (0, 1] or None."
            )
        check_choice("score", self.score, ("mass", "bound"))
        check_choice("share", self.share, ("kv_head", "layer"))
        check_choice("prompt", self.prompt, ("beside", "within"))
        if not isinstance(self.dense_layers, int) or self.dense_layers < 0:
            raise ValueError(f"dense_layers is {self.dense_layers!r}; it must be an int >= 0.")

    @classmethod
    def paper(cls, budget: int = 1024, *, page_size: int = 16) -> RaaS:
        """The paper's setting: prompt within the budget, representative keys, alpha 1e-4."""
        return cls(budget, prompt="within", score="bound", alpha=1e-4, page_size=page_size)

    @property
    def needs_bounds(self) -> bool:
        return self.score == "bound"

    def groups(self, num_layers: int) -> tuple[tuple[int, Policy], ...]:
        dense = min(self.dense_layers, num_layers)
        parts = (dense, Dense(page_size=self.page_size)), (num_layers - dense, self)
        return tuple((layers, policy) for layers, policy in parts if layers)

    def slots(self, prompt_tokens: Sequence[int], max_new_tokens: int) -> int:
        slots = self.budget // self.page_size
        if self.prompt == "within":
            # Rounded to eighths of the budget, so that few prompt lengths compile anew.
            step = max(1, slots // 8)
            left = slots - pages_for(min(prompt_tokens), self.page_size)
            slots = min(slots, -(-left // step) * step)
        return min(slots, bucket(pages_for(max_new_tokens, self.page_size)))

    def capacity(self, prompt_lengths: jax.Array, slots: int) -> jax.Array:
        if self.prompt == "beside":
            return super().capacity(prompt_lengths, slots)
        left = self.budget // self.page_size - -(-prompt_lengths // self.page_size)
        return jnp.clip(left, 0, slots).astype(jnp.int32)

    def check_prompts(self, prompt_tokens: Sequence[int]) -> None:
        if self.prompt == "beside":
            return
        pages = pages_for(max(prompt_tokens), self.page_size)
        if self.budget // self.page_size - pages < 2:
            raise ValueError(
                f"prompt takes {max(prompt_tokens)} tokens ({pages} pages of {self.page_size}), "
                f"which leaves less than two pages of budget={self.budget}. Use a budget of at "
                f"least {(pages + 2) * self.page_size}, or prompt='beside'."
            )

    def init(self, shape: tuple[int, int, int, int]) -> Stamps:
        # Two arrays, since the state is donated and a buffer can be given up only once.
        return Stamps(jnp.full(shape, -1, jnp.int32), jnp.full(shape, -1, jnp.int32))

    def observe(self, marks: Stamps, evidence: Evidence, now: jax.Array) -> Stamps:
        score = evidence.bound if self.score == "bound" else evidence.mass
        assert score is not None
        score = jnp.max(score, axis=2)
        if self.share == "layer":
            score = jnp.broadcast_to(jnp.max(score, axis=1, keepdims=True), score.shape)
        occupied = evidence.fill > 0
        attended = score > self.alpha
        if self.top_fraction is not None:
            attended = score >= _score_of_last(score, occupied, self.top_fraction)
        stamp = jnp.where(attended & occupied, now[:, None, None], marks.stamp)
        return marks._replace(stamp=stamp)

    def commit(self, marks: Stamps, slot: jax.Array, page: Page, now: jax.Array) -> Stamps:
        return Stamps(*(put(mark, slot, now[:, None]) for mark in marks))

    def victim(self, marks: Stamps, boundary: Boundary) -> jax.Array:
        newest = jnp.iinfo(jnp.int32).max
        held = boundary.allowed[:, None] & (boundary.fill > 0)
        oldest = jnp.min(jnp.where(held, marks.stamp, newest), axis=-1, keepdims=True)
        return lowest(jnp.where(marks.stamp == oldest, marks.written, newest), boundary)


def _score_of_last(score: jax.Array, occupied: jax.Array, fraction: float) -> jax.Array:
    """The lowest score among the best `ceil(fraction * occupied)` pages: `[B, K, 1]`."""
    count = jnp.sum(occupied, axis=-1, keepdims=True)
    # A table of exact numbers: in floating point, 0.55 of 100 pages is more than 55.
    share = Fraction(str(fraction))
    best = jnp.asarray([math.ceil(n * share) for n in range(score.shape[-1] + 1)])[count]
    ranked = jnp.sort(jnp.where(occupied, score, -jnp.inf), axis=-1, descending=True)
    return jnp.take_along_axis(ranked, jnp.maximum(best - 1, 0), axis=-1)


def check_budget(budget: int, page_size: int) -> None:
    """Raises ValueError unless the budget is a whole number of at least two pages."""
    if not isinstance(budget, int) or isinstance(budget, bool):
        raise ValueError(f"budget is {budget!r}; it must be a whole number of tokens.")
    if budget % page_size:
        down = budget // page_size * page_size
        raise ValueError(
            f"budget is {budget}, not a multiple of page_size={page_size}. "
            f"Use {max(down, 2 * page_size)} or {max(down, page_size) + page_size}."
        )
    if budget < 2 * page_size:
        raise ValueError(
            f"budget is {budget}, less than two pages of page_size={page_size}. "
            f"Use at least {2 * page_size}, or a smaller page_size."
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}.")
