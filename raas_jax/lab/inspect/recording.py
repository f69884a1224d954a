"""What a cache holds while it decodes: a policy that keeps a diary of another one.

`Recorded` wraps any policy and remembers which page lies in which slot; the decode itself is the
library's own, so what is recorded is what an ordinary run does.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax.config import ModelConfig
from raas_jax.decode import (
    DecodeState,
    Plan,
    Sampled,
    commit_page,
    empty_cache,
    init_metadata,
    pad_prompts,
    prefill,
    request,
    token_step,
)
from raas_jax.generate import TOKENS_PER_SYNC
from raas_jax.params import Params
from raas_jax.policies import (
    Boundary,
    Bounded,
    Evidence,
    Page,
    Policy,
    PromptPages,
    Selection,
    pages_for,
    set_slot,
)
from raas_jax.policies.base import Metadata
from raas_jax.sampling import Sampler, Sampling, row_keys


class Diary(NamedTuple):
    """Metadata of a `Recorded` policy.

    Attributes:
      page: int32 `[L, B, K, S]`, number of the page in each slot, counted from the row's first
        generated token; -1 for an empty slot.
      inner: @@meta of the policy that is recorded.
    """

    page: jax.Array
    inner: Metadata


@dataclasses.dataclass(frozen=True)
class Recorded(Policy):
    """Decides as `inner` does, and remembers the number of the page in every slot."""

    inner: Policy

    def __post_init__(self) -> None:
        object.__setattr__(self, "page_size", self.inner.page_size)
        super().__post_init__()

    @property
    def needs_bounds(self) -> bool:
        return self.inner.needs_bounds

    @property
    def needs_prompt_bounds(self) -> bool:
        return self.inner.needs_prompt_bounds

    @property
    def selects(self) -> bool:
        return self.inner.selects

    @property
    def evicts_prompt(self) -> bool:
        return self.inner.evicts_prompt

    @property
    def prompt_queries(self) -> int:
        return self.inner.prompt_queries

    def groups(self, num_layers: int) -> tuple[tuple[int, Policy], ...]:
        return tuple((layers, Recorded(policy)) for layers, policy in self.inner.groups(num_layers))

    def slots(self, prompt_tokens: Sequence[int], max_new_tokens: int) -> int:
        return self.inner.slots(prompt_tokens, max_new_tokens)

    def capacity(self, prompt_lengths: jax.Array, slots: int) -> jax.Array:
        return self.inner.capacity(prompt_lengths, slots)

    def check_prompts(self, prompt_tokens: Sequence[int]) -> None:
        self.inner.check_prompts(prompt_tokens)

    def init(self, shape: tuple[int, int, int, int]) -> Diary:
        return Diary(jnp.full(shape, -1, jnp.int32), self.inner.init(shape))

    def insert_prompt(self, meta: Diary, prompt: PromptPages) -> tuple[jax.Array, Diary]:
        pages, inner = self.inner.insert_prompt(meta.inner, prompt)
        return pages, meta._replace(inner=inner)

    def select(self, meta: Diary, bounded: Bounded) -> Selection:
        return self.inner.select(meta.inner, bounded)

    def observe(self, meta: Diary, evidence: Evidence, now: jax.Array) -> Diary:
        return meta._replace(inner=self.inner.observe(meta.inner, evidence, now))

    def commit(self, meta: Diary, slot: jax.Array, page: Page, now: jax.Array) -> Diary:
        # Prefill draws token 0; each page of P steps feeds P tokens and draws as many.
        number = (now - 1) // self.page_size - 1
        inner = self.inner.commit(meta.inner, slot, page, now)
        return Diary(set_slot(meta.page, slot, number[:, None]), inner)

    def victim(self, meta: Diary, boundary: Boundary) -> jax.Array:
        return self.inner.victim(meta.inner, boundary)

    def evict_many(self, meta: Diary, boundary: Boundary) -> jax.Array | None:
        return self.inner.evict_many(meta.inner, boundary)


class Pages(NamedTuple):
    """What `record_pages` saw, for each of `n` pages.

    Attributes:
      tokens: int32 `[n * P, B]`, drawn tokens; -1 for a row that was done.
      tables: for each group of layers int32 `[n, L, B, K, S]`, page numbers in the slots while the
        page was written.
      meta: for each group, @@meta of the recorded policy after every token, with `[n, P]` before
        their own axes; None unless asked for.
    """

    tokens: jax.Array
    tables: tuple[jax.Array, ...]
    meta: tuple[Any, ...] | None


@partial(jax.jit, static_argnames=("plan", "pages", "every_step"), donate_argnames="state")
def record_pages(
    params: Params, state: DecodeState, *, plan: Plan, pages: int, every_step: bool = False
) -> tuple[DecodeState, Pages]:
    """As `raas_jax.decode.decode_pages`, for a plan whose policy is `Recorded`."""

    def step(state: DecodeState, offset: jax.Array) -> tuple[DecodeState, Any]:
        state, drawn = token_step(params, state, offset, plan)
        inner = tuple(meta.inner for meta in state.meta) if every_step else None
        return state, (drawn.tokens, inner)

    def page(state: DecodeState, _: None) -> tuple[DecodeState, Any]:
        # A released slot is empty, whatever lay in it.
        tables = tuple(
            jnp.where(kept.fill > 0, meta.page, -1)
            for meta, kept in zip(state.meta, state.cache.kept, strict=True)
        )
        offsets = jnp.arange(plan.page_size, dtype=jnp.int32)
        state, (tokens, inner) = jax.lax.scan(step, state, offsets)
        return commit_page(params.config, state, plan), (tokens, tables, inner)

    state, (tokens, tables, inner) = jax.lax.scan(page, state, None, length=pages)
    return state, Pages(tokens.reshape(-1, tokens.shape[-1]), tables, inner)


@dataclasses.dataclass(frozen=True)
class Recording:
    """One answer, and what the cache held while it was written.

    The token with index `i` (from 0) is drawn by feeding token `i - 1`, while page
    `(i - 1) // page_size` is open; token `i` itself lies in page `i // page_size`.

    Attributes:
      tokens: ids, the stop token included.
      finish_reason: "stop" or "length".
      page_size: `P`.
      present: bool `[n, L, K, n]`; `[i, l, k, j]` says whether page j can be read while page i is
        open. The current page itself can.
      stamps: int32 `[n * P, L, K, n]`, the policy's mark of every page after each step, -1 where
        there is none; None unless asked for and the policy's meta are one integer per page.
      seconds: from the start of the batch to the look that saw its end.
    """

    tokens: list[int]
    finish_reason: str
    page_size: int
    present: np.ndarray
    stamps: np.ndarray | None
    seconds: float

    def held(self, token: int, source: int) -> np.ndarray:
        """Whether the token with index `source` can be read as `token` is drawn: `[L, K]`."""
        if not 0 <= source < token < len(self.tokens):
            raise ValueError(
                f"token={token}, source={source}: wanted 0 <= source < token < {len(self.tokens)}"
            )
        held: np.ndarray = self.present[
            (token - 1) // self.page_size, :, :, source // self.page_size
        ]
        return held


def begin(
    params: Params,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    plan: Plan,
    stop_tokens: Sequence[int] = (),
) -> tuple[DecodeState, Sampled]:
    """`prefill` of a batch that is decoded greedily."""
    sampler = Sampler.create([Sampling()] * len(prompts), row_keys(0, len(prompts)))
    asked = request(jnp.asarray(limits), stop_tokens, sampler)
    return prefill(params, *pad_prompts(prompts, plan), asked, plan=plan)


def record(
    params: Params,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    policy: Policy,
    *,
    stop_tokens: Sequence[int],
    rows: int | None = None,
    every_step: bool = False,
    prepare: Callable[[DecodeState], DecodeState] | None = None,
) -> Iterator[tuple[int, Recording]]:
    """Answers prompts in one batch, greedily, and gives each as soon as it is finished.

    Args:
      params: the model.
      prompts: token ids.
      limits: at most this many tokens for each.
      policy: which pages to keep.
      stop_tokens: ids that end an answer.
      rows: size of the batch that is compiled for; the missing rows are idle.
      every_step: record the policy's @@meta after every token.
      prepare: changes the state that prefill left, as an oracle does that knows the future.

    Yields:
      The index of a prompt, and its recording.
    """
    began = time.perf_counter()
    idle = max(0, (rows or 0) - len(prompts))
    padded = [*prompts, *[prompts[0]] * idle]
    limit = [*limits, *[1] * idle]
    plan = Plan.create(params.config, Recorded(policy), [len(each) for each in padded], max(limit))
    P = plan.page_size
    pages = max(1, TOKENS_PER_SYNC // P)
    state, first = begin(params, padded, limit, plan, stop_tokens)
    if prepare is not None:
        state = prepare(state)

    drawn = [np.asarray(first.tokens)[None]]
    tables: list[tuple[np.ndarray, ...]] = []
    meta: list[tuple[np.ndarray, ...]] = []
    open_rows = list(range(len(prompts)))
    while True:
        done = np.asarray(state.done)
        finished = [row for row in open_rows if done[row]]
        open_rows = [row for row in open_rows if not done[row]]
        if finished:
            all_drawn = np.concatenate(drawn)
            seconds = time.perf_counter() - began
        for row in finished:
            column = all_drawn[:, row]
            answer: list[int] = column[: _end(column, limit[row], stop_tokens)].tolist()
            written = pages_for(len(answer) - 1, P)
            table = _of_row(tables, row, written)
            yield (
                row,
                Recording(
                    tokens=answer,
                    finish_reason="stop" if answer[-1] in stop_tokens else "length",
                    page_size=P,
                    present=_present(table, written),
                    stamps=_stamps(table, _of_row(meta, row, written), written) if meta else None,
                    seconds=seconds,
                ),
            )
        if not open_rows:
            return
        state, seen = record_pages(params, state, plan=plan, pages=pages, every_step=every_step)
        drawn.append(np.asarray(seen.tokens))
        tables.append(tuple(np.asarray(table) for table in seen.tables))
        stamps = [getattr(mark, "stamp", mark) for mark in seen.meta or ()]
        if stamps and all(map(_is_stamp, stamps)):
            meta.append(tuple(np.asarray(stamp) for stamp in stamps if not _is_empty(stamp)))


def _is_empty(meta: Any) -> bool:
    return not jax.tree.leaves(meta)


def _is_stamp(meta: Any) -> bool:
    one = isinstance(meta, jax.Array) and meta.ndim == 6
    return _is_empty(meta) or (one and jnp.issubdtype(meta.dtype, jnp.integer))


def _end(column: np.ndarray, limit: int, stop_tokens: Sequence[int]) -> int:
    """Length of an answer: up to its stop token or its limit."""
    stops = np.flatnonzero(np.isin(column[:limit], stop_tokens))
    return int(stops[0]) + 1 if len(stops) else limit


def _of_row(parts: list[tuple[np.ndarray, ...]], row: int, pages: int) -> list[np.ndarray]:
    """For each group, what was seen of one row: `[pages, (P,) L, K, S]`."""
    if not parts:
        return []
    return [
        np.concatenate([part[group].take(row, axis=-3) for part in parts])[:pages]
        for group in range(len(parts[0]))
    ]


def _present(tables: list[np.ndarray], pages: int) -> np.ndarray:
    parts = []
    for table in tables:
        # An empty slot points at a column that is cut off.
        present = np.zeros((*table.shape[:3], pages + 1), bool)
        np.put_along_axis(present, np.where(table < 0, pages, table), True, axis=-1)
        parts.append(present[..., :pages])
    if not parts:
        return np.zeros((0, 0, 0, 0), bool)
    present = np.concatenate(parts, axis=1)
    now = np.arange(pages)
    present[now, :, :, now] = True
    return present


def _stamps(tables: list[np.ndarray], meta: list[np.ndarray], pages: int) -> np.ndarray | None:
    """`[n * P, L, K, n]`; layers of a group without meta (dense ones) have -1."""
    if not meta:
        return None
    P = meta[0].shape[1]
    parts: list[np.ndarray] = []
    given = iter(meta)
    for table in tables:
        stamps = np.full((pages, P, *table.shape[1:3], pages + 1), -1, np.int32)
        # A group without meta comes first, if there is one: the dense first layers.
        if len(tables) - len(parts) <= len(meta):
            index = np.where(table < 0, pages, table)[:, None]
            index = np.broadcast_to(index, (pages, P, *table.shape[1:]))
            np.put_along_axis(stamps, index, next(given), axis=-1)
        parts.append(stamps[..., :pages])
    return np.concatenate(parts, axis=2).reshape(pages * P, -1, parts[0].shape[3], pages)


@functools.cache
def row_bytes(
    config: ModelConfig, policy: Policy, prompt_tokens: int, limit: int, dtype: str
) -> int:
    """Bytes that `generate` allocates for the cache of such a row when it runs alone."""
    plan = Plan.create(config, policy, [prompt_tokens], limit)
    trees = jax.eval_shape(
        lambda: (empty_cache(config, plan, 1, jnp.dtype(dtype)), init_metadata(config, plan, 1))
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))
