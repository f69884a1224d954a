"""What policies with a fixed budget share: sizes, checks, and the choice of what to keep.

`Budgeted` evicts one page whenever one is written. `Batched` lets `every` tokens pile up in a
buffer, whose memory counts like any other, and then goes back to its budget at once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax import checks
from raas_jax.policies.allotment import Allotment
from raas_jax.policies.base import Boundary, Evidence, Metadata, Page, Policy, PromptPages, set_slot
from raas_jax.policies.dense import Dense
from raas_jax.policies.sizes import bucket, pages_for

AUTO = "auto"
"""In place of an allotment: that of the model's own folder."""


@dataclasses.dataclass(frozen=True)
class Budgeted(Policy):
    """Base of policies that keep a fixed number of pages.

    Attributes:
      budget: tokens per sequence, layer and key/value head; a multiple of `page_size`, at least
        two pages, and more than what the policy never evicts. The page being written comes on top.
      granularity: decide for each key/value head ("kv_head"), or once per layer ("layer").
      prompt: "excluded": the budget does not count the prompt, which is kept on top of it;
        "included": the prompt is kept and takes its pages from the budget, so that generated tokens
        have what it leaves; "evict", where a policy offers it: prompt pages are counted like any
        other, and may go.
      dense_layers: this many first layers keep everything, at O(N) memory.
      allotment: gives each layer and key/value head a budget of its own, of which `budget` is then
        the mean: an `Allotment`, the file of one, or "auto" for the one in the model's folder.
        None gives all the same.
    """

    budget: int = 1024
    granularity: Literal["kv_head", "layer"] = dataclasses.field(default="kv_head", kw_only=True)
    prompt: Literal["excluded", "included", "evict"] = dataclasses.field(
        default="excluded", kw_only=True
    )
    dense_layers: int = dataclasses.field(default=0, kw_only=True)
    allotment: Allotment | str | None = dataclasses.field(default=None, kw_only=True)

    prompts: ClassVar[tuple[str, ...]] = ("excluded", "included")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget, self.page_size)
        checks.choice("granularity", self.granularity, ("kv_head", "layer"))
        checks.choice("prompt", self.prompt, self.prompts)
        checks.integer("dense_layers", self.dense_layers, 0, checks.MOST_TOKENS)
        if isinstance(self.allotment, (str, os.PathLike)) and self.allotment != AUTO:
            object.__setattr__(self, "allotment", Allotment.read(self.allotment))
        if not isinstance(self.allotment, (Allotment, str, type(None))):
            raise TypeError(
                f"allotment is {checks.short(self.allotment)}; give an Allotment, a file, "
                f"{AUTO!r}, or None."
            )
        if self.dense_layers and self.evicts_prompt:
            raise ValueError(
                f"dense_layers is {self.dense_layers}, but prompt='evict' allows none; use 0."
            )
        pages, reason = self.reserve()
        if self.budget <= pages * self.page_size:
            raise ValueError(
                f"budget is {self.budget}, but {reason} and page_size={self.page_size} "
                f"{type(self).__name__} never evicts {pages} pages. "
                f"Use a budget of at least {(pages + 1) * self.page_size}, or reserve less."
            )

    def reserve(self) -> tuple[int, str]:
        """Pages that are never evicted, the newest one included, and which option makes it so."""
        return 1, "by design"

    @property
    def least_pages(self) -> int:
        """Pages that an allotment gives every head: those that are never evicted."""
        return self.reserve()[0]

    @property
    def buffer_pages(self) -> int:
        """Pages on top of the budget that pile up between two evictions."""
        return 0

    @property
    def evicts_prompt(self) -> bool:
        return self.prompt == "evict"

    def options(self) -> dict[str, Any]:
        found = super().options()
        if self.allotment is None:
            del found["allotment"]  # As those have it that know of none.
        return found

    def groups(self, num_layers: int) -> tuple[tuple[int, Policy], ...]:
        return dense_first(self, self.dense_layers, num_layers)

    def slots(self, prompt_tokens: Sequence[int], max_new_tokens: int) -> int:
        pages = self._most_pages(prompt_tokens) + self.buffer_pages
        return min(pages, self._ample(prompt_tokens, max_new_tokens))

    def slots_by_head(
        self, layers: int, heads: int, prompt_tokens: Sequence[int], max_new_tokens: int
    ) -> np.ndarray:
        if self.allotment is None:
            return super().slots_by_head(layers, heads, prompt_tokens, max_new_tokens)
        given = self._shared_out(self._most_pages(prompt_tokens), layers) + self.buffer_pages
        assert isinstance(self.allotment, Allotment)
        return self.allotment.fitted(given, self._ample(prompt_tokens, max_new_tokens))

    def suited(self, likeness: Callable[[], str], own: Callable[[], Allotment]) -> Policy:
        if self.allotment is None:
            return self
        allotment = own() if isinstance(self.allotment, str) else self.allotment
        here = likeness() if allotment.model else ""
        if here and here != allotment.model:
            raise ValueError(
                f"allotment is {allotment!r}, of a model with the likeness {allotment.model}; this "
                f"one's is {here}. Make it with the same model: `raas-jax allot`."
            )
        return dataclasses.replace(self, allotment=allotment)

    def split(self, parts: int) -> Policy:
        if not isinstance(self.allotment, Allotment):
            return self
        return dataclasses.replace(self, allotment=self.allotment.split(parts))

    def check_model(self, config: Any) -> None:
        if isinstance(self.allotment, str):
            raise ValueError(
                f"allotment is {self.allotment!r}, which stands for a file in the model's folder; "
                "give the Allotment itself where no model is loaded."
            )
        if self.allotment is not None:
            found = self.allotment.layers, self.allotment.heads
            here = config.full_layers, config.num_key_value_heads
            if found != here:
                raise ValueError(
                    f"allotment is of a model with {_sizes(*found)}; this one has {_sizes(*here)}. "
                    "Make it with the same model: `raas-jax allot`."
                )

    def capacity(self, prompt_lengths: jax.Array, slots: np.ndarray) -> jax.Array:
        pages = self.budget_pages(prompt_lengths, *slots.shape) + self.buffer_pages
        same = slots.min() == slots.max()
        return jnp.clip(pages, 0, slots.max() if same else slots[:, None]).astype(jnp.int32)

    def budget_pages(self, prompt_lengths: jax.Array, layers: int, heads: int) -> jax.Array:
        """Pages that each row keeps in the long run, without the buffer.

        Of prompts int32 `[B]`, in a group of L layers with K heads: int32, broadcasts to
        `[L, B, K]`.
        """
        pages = jnp.full(prompt_lengths.shape, self.budget // self.page_size, jnp.int32)
        if self.prompt == "included":
            pages = pages - -(-prompt_lengths // self.page_size)
        if self.allotment is None:
            return pages[:, None]
        if self.prompt != "included":
            given = self._shared_out(self.budget // self.page_size, layers)
            return jnp.asarray(given, jnp.int32)[:, None]
        means = range(self.budget // self.page_size + 1)
        table = np.stack([self._shared_out(mean, layers) for mean in means])
        return jnp.swapaxes(jnp.asarray(table, jnp.int32)[jnp.maximum(pages, 0)], 0, 1)

    def _most_pages(self, prompt_tokens: Sequence[int]) -> int:
        """Pages of the budget for the prompt that leaves the most, without the buffer."""
        pages = self.budget // self.page_size
        if self.prompt != "included":
            return pages
        # Rounded to eighths of the budget, so that few prompt lengths compile anew.
        step = max(1, pages // 8)
        left = pages - pages_for(min(prompt_tokens), self.page_size)
        return min(pages, -(-left // step) * step)

    def _ample(self, prompt_tokens: Sequence[int], max_new_tokens: int) -> int:
        """Pages for all that there will be; no head needs more."""
        pages = pages_for(max_new_tokens, self.page_size)
        if self.evicts_prompt:
            pages += pages_for(max(prompt_tokens), self.page_size)
        return bucket(pages)

    def _shared_out(self, mean: int, layers: int) -> np.ndarray:
        """Pages of each head in the last `layers` layers, by the allotment: `[L, K]`."""
        assert isinstance(self.allotment, Allotment)
        allotment = self.allotment.last(layers)
        if self.granularity == "layer":
            allotment = allotment.by_layer()
        return allotment.pages(mean, self.page_size, self.least_pages)

    def check_prompts(self, prompt_tokens: Sequence[int]) -> None:
        if self.prompt != "included":
            return
        P, least = self.page_size, self.reserve()[0] + 1
        pages = pages_for(max(prompt_tokens), P)
        if self.budget // P - pages < least:
            raise ValueError(
                f"prompt takes {max(prompt_tokens)} tokens ({pages} pages of {P}), which leaves "
                f"less than the {least} pages that {type(self).__name__} needs of "
                f"budget={self.budget}. Use a budget of at least {(pages + least) * P}, or "
                "prompt='excluded'."
            )

    def newest(self, written: jax.Array, now: jax.Array, pages: int | jax.Array) -> jax.Array:
        """Whether a page is among the `pages` newest ones, the one being written included.

        written: int32 `[L, B, K, S]`, the clock when each page was full; now: int32 `[B]`.
        """
        return now[:, None, None] - written <= (pages - 1) * self.page_size

    def pool(self, x: jax.Array, how: Callable[..., jax.Array]) -> jax.Array:
        """`[B, K, G, ...]` → `[B, K, ...]` by `jnp.max` or the like, at "layer" over all heads."""
        x = how(x, axis=2)
        if self.granularity == "layer":
            x = jnp.broadcast_to(how(x, axis=1, keepdims=True), x.shape)
        return x

    def pool_masses(
        self, evidence: Evidence, how: Callable[..., jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """`pool` of the kept pages' mass, `[B, K, S]`, and of the current page's, `[B, K]`."""
        assert evidence.current_mass is not None
        return self.pool(evidence.mass, how), self.pool(evidence.current_mass, how)

    def insert_best(
        self, score: jax.Array, prompt: PromptPages, shape: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """`insert_prompt`: keeps the prompt pages of the largest score, in the order of the text.

        The float32 score broadcasts to `[L, B, K, Sp]`; of equal ones the later page stays. `shape`
        is `(L, B, K, S)`. Returns the page in each slot, and the clock when it would have been
        written had the prompt been generated, 1 for the last page: int32 `[L, B, K, S]`.
        """
        filled = prompt.fill > 0
        score = jnp.where(filled[:, None], score, -jnp.inf)
        score = jnp.broadcast_to(score, (*shape[:3], score.shape[-1]))
        keep = best(score, prompt.room) & filled[:, None]
        order = jnp.argsort(~keep, axis=-1, stable=True).astype(jnp.int32)[..., : shape[3]]
        order = jnp.pad(order, ((0, 0),) * 3 + ((0, shape[3] - order.shape[-1]),))
        count = jnp.sum(keep, axis=-1, keepdims=True)
        end = jnp.minimum((order + 1) * self.page_size, prompt.lengths[:, None, None])
        pages = jnp.where(jnp.arange(shape[3]) < count, order, -1)
        return pages, end - prompt.lengths[:, None, None] + 1


@dataclasses.dataclass(frozen=True)
class Batched(Budgeted):
    """Base of policies that evict every `every` tokens, down to `budget`.

    `S` covers `budget + every` tokens. Metadata is `(written, rest)`: the clock when each page was
    full, int32 `[L, B, K, S]`, and what the policy adds.

    Attributes:
      every: tokens between two evictions; a multiple of `page_size`, or rounded up to one.
      recent: newest tokens that are never evicted, in whole pages.
    """

    every: int = 128
    recent: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("every", self.every, 1, checks.MOST_TOKENS)
        checks.integer("recent", self.recent, 1, checks.MOST_TOKENS)

    def reserve(self) -> tuple[int, str]:
        return pages_for(self.recent, self.page_size), f"with recent={self.recent}"

    @property
    def buffer_pages(self) -> int:
        return pages_for(self.every, self.page_size)

    def page_scores(self, meta: Metadata, boundary: Boundary, candidates: jax.Array) -> jax.Array:
        """Score of each page, float32 `[L, B, K, S]`; of `candidates` (a mask) the lowest go."""
        raise NotImplementedError

    def init(self, shape: tuple[int, int, int, int]) -> Metadata:
        return jnp.zeros(shape, jnp.int32), ()

    def commit(self, meta: Metadata, slot: jax.Array, page: Page, now: jax.Array) -> Metadata:
        written, rest = meta
        return set_slot(written, slot, now[:, None]), rest

    def victim(self, meta: Metadata, boundary: Boundary) -> jax.Array:
        # A slot is always empty, except in a row that is done and computes on unseen.
        free = (boundary.fill == 0) & boundary.allowed
        return jnp.argmax(free, axis=-1).astype(jnp.int32)

    def evict_many(self, meta: Metadata, boundary: Boundary) -> jax.Array:
        written, _ = meta
        filled = boundary.fill > 0
        L, _, K, _ = filled.shape
        keep = self.budget_pages(boundary.prompt_lengths, L, K)
        full = jnp.sum(filled, axis=-1) >= keep + self.buffer_pages

        def choose() -> jax.Array:
            recent = self.newest(written, boundary.now, self.reserve()[0])
            score = self.page_scores(meta, boundary, filled & ~recent)
            if self.granularity == "layer":
                score = jnp.broadcast_to(jnp.mean(score, axis=2, keepdims=True), score.shape)
            score = jnp.where(recent, jnp.inf, score)
            return ~best(jnp.where(filled, score, -jnp.inf), keep)

        # Most boundaries evict nothing, and then nothing is ranked.
        chosen: jax.Array = jax.lax.cond(jnp.any(full), choose, lambda: jnp.zeros_like(filled))
        return chosen & filled & full[..., None]


def best(score: jax.Array, count: jax.Array) -> jax.Array:
    """The `count` largest of each `score [L, B, K, S]`; of equal ones the lowest slot goes.

    The count broadcasts to `[L, B, K]`.
    """
    rank = jnp.argsort(jnp.argsort(score, axis=-1, stable=True), axis=-1)
    return rank >= score.shape[-1] - count[..., None]


def dense_first(policy: Policy, dense: int, layers: int) -> tuple[tuple[int, Policy], ...]:
    """`Policy.groups` with this many first layers dense."""
    dense = min(dense, layers)
    parts = (dense, Dense(page_size=policy.page_size)), (layers - dense, policy)
    return tuple((count, part) for count, part in parts if count)


def _sizes(layers: int, heads: int) -> str:
    return f"{layers} layers and {heads} key/value heads"


def check_budget(budget: int, page_size: int) -> None:
    """Raises ValueError unless the budget is a whole number of at least two pages."""
    two, down = 2 * page_size, budget // page_size * page_size
    if budget < two:
        raise ValueError(
            f"budget is {budget}, less than two pages of page_size={page_size}. Use at least {two}."
        )
    if budget % page_size:
        raise ValueError(
            f"budget is {budget}, not a multiple of page_size={page_size}. "
            f"Use {down} or {down + page_size}."
        )
