"""What a cache holds while it decodes: a policy that keeps a diary of another one.

`Recorded` wraps any policy and remembers which page lies in which slot; the decode itself is the
library's own, so what is recorded is what an ordinary run does.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax.config import ModelConfig
from raas_jax.decode import DecodeState, Probe, Progress, RowRequest, cache_bytes, empty_state
from raas_jax.generation import TOKENS_PER_SYNC
from raas_jax.params import Params
from raas_jax.plan import Plan
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
from raas_jax.session import Session


class Diary(NamedTuple):
    """Metadata of a `Recorded` policy.

    Attributes:
      page: int32 `[L, B, K, S]`, number of the page in each slot, counted from the row's first
        generated token; -1 for an empty slot.
      inner: metadata of the policy that is recorded.
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

    def groups(self, num_layers: int) -> tuple[tuple[int, Policy], ...]:
        return tuple((layers, Recorded(policy)) for layers, policy in self.inner.groups(num_layers))

    def suited(self, likeness: Callable[[], str], own: Callable[[], Any]) -> Policy:
        return Recorded(self.inner.suited(likeness, own))

    def split(self, parts: int) -> Policy:
        return Recorded(self.inner.split(parts))

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


# All that knows nothing of metadata is the inner policy's own.
for _name in (
    *("needs_bounds", "needs_prompt_bounds", "selects", "evicts_prompt", "prompt_queries"),
    *("slots", "slots_by_head", "capacity", "check_model", "check_prompts"),
):
    setattr(Recorded, _name, property(operator.attrgetter(f"inner.{_name}")))


def _tables(state: DecodeState) -> tuple[jax.Array, ...]:
    """For each group of layers int32 `[L, B, K, S]`, the number of the page in every slot."""
    return tuple(
        # An emptied slot holds nothing, whatever lay in it.
        jnp.where(kept.fill > 0, diary.page, -1)
        for diary, kept in zip(state.meta, state.cache.kept, strict=True)
        if isinstance(diary, Diary)
    )


@dataclasses.dataclass(frozen=True)
class _Stamps:
    """For each group of layers its policy's stamps; equal ones share what is compiled."""

    policies: tuple[Policy, ...]

    def __call__(self, state: DecodeState) -> tuple[jax.Array | None, ...]:
        diaries = [each for each in state.meta if isinstance(each, Diary)]
        pairs = zip(self.policies, diaries, strict=True)
        return tuple(policy.stamps(diary.inner) for policy, diary in pairs)


@dataclasses.dataclass(frozen=True)
class Recording:
    """One answer, and what the cache held while it was written.

    `L` counts the layers that see everything; those that see a window forget by themselves.

    The token with index `i` (from 0) is drawn by feeding token `i - 1`, while page
    `(i - 1) // page_size` is open; token `i` itself lies in page `i // page_size`.

    Attributes:
      tokens: ids, the stop token included.
      finish_reason: "stop", "length", or "error" where logits were not finite.
      page_size: `P`.
      present: bool `[n, L, K, n]`; `[i, l, k, j]` says whether page j can be read while page i is
        open. The current page itself can.
      stamps: int32 `[n * P, L, K, n]`, the policy's stamp of every page after each step, -1 where
        there is none; None unless asked for and the policy has any (`Policy.stamps`).
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
        page_now, page = (token - 1) // self.page_size, source // self.page_size
        return np.asarray(self.present[page_now, :, :, page])


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
      every_step: record the policy's stamps after every token.
      prepare: changes the state that prefill left, as an oracle does that knows the future.

    Yields:
      The index of a prompt, and its recording.
    """
    began = time.perf_counter()
    idle = max(0, (rows or 0) - len(prompts))
    padded = [*prompts, *[prompts[0]] * idle]
    limit = [*limits, *[1] * idle]
    session = Session.create(params, Recorded(policy), [len(each) for each in padded], max(limit))
    P = session.plan.page_size
    recorded = tuple(group.policy for group in session.plan.groups)
    inner = tuple(each.inner for each in recorded if isinstance(each, Recorded))
    probe = Probe(_tables, _Stamps(inner) if every_step else None)
    state, progress = session.start(padded, RowRequest.create(limit, stop_tokens))
    if prepare is not None:
        state = prepare(state)

    seen: list[Progress] = []
    open_rows = list(range(len(prompts)))
    while True:
        seen.append(session.read(progress))
        finished = [row for row in open_rows if seen[-1].done[row]]
        open_rows = [row for row in open_rows if not seen[-1].done[row]]
        seconds = time.perf_counter() - began
        for row in finished:
            column = np.concatenate([each.tokens[:, row] for each in seen])[: limit[row]]
            reason, length = _end(column, stop_tokens)
            answer: list[int] = column[:length].tolist()
            written = pages_for(max(0, length - 1), P)
            tables, stamps = _of_row([each.probed for each in seen[1:]], row, written)
            present, marks = _present(tables, written), _stamps(tables, stamps, written)
            yield row, Recording(answer, reason, P, present, marks, seconds)
        if not open_rows:
            return
        state, progress = session.advance(state, max(1, TOKENS_PER_SYNC // P), probe=probe)


def _end(tokens: np.ndarray, stop_tokens: Sequence[int]) -> tuple[str, int]:
    """Why an answer ended, and after how many of the tokens `[T]` that its row gave out."""
    stops, nothing = np.flatnonzero(np.isin(tokens, stop_tokens)), np.flatnonzero(tokens < 0)
    if len(stops):
        return "stop", int(stops[0]) + 1
    # Only logits that are not finite end a row without a token.
    return ("error", int(nothing[0])) if len(nothing) else ("length", len(tokens))


def _of_row(
    probed: list[Any], row: int, pages: int
) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """For each group, the tables `[pages, L, K, S]` and stamps `[pages, P, L, K, S]` of one row."""

    def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([part.take(row, axis=-3) for part in parts])[:pages]

    tables = [joined(parts) for parts in zip(*(each.page for each in probed), strict=True)]
    stamps = zip(*(each.step or () for each in probed), strict=True)
    return tables, [None if parts[0] is None else joined(parts) for parts in stamps]


def _by_page(table: np.ndarray, values: Any, empty: np.generic, pages: int) -> np.ndarray:
    """What is known of the page in each slot `[..., S]`, by number of the page: `[..., pages]`."""
    found = np.full((*table.shape[:-1], pages + 1), empty)
    # An empty slot points at a column that is cut off.
    np.put_along_axis(found, np.where(table < 0, pages, table), values, axis=-1)
    return found[..., :pages]


def _present(tables: list[np.ndarray], pages: int) -> np.ndarray:
    if not tables:
        return np.zeros((pages, 0, 0, pages), bool)
    parts = [_by_page(table, True, np.bool_(False), pages) for table in tables]
    present, now = np.concatenate(parts, axis=1), np.arange(pages)
    present[now, :, :, now] = True
    return present


def _stamps(
    tables: list[np.ndarray], marks: list[np.ndarray | None], pages: int
) -> np.ndarray | None:
    """`[n * P, L, K, n]`; layers of a group without stamps (dense ones) have -1."""
    P = next((each.shape[1] for each in marks if each is not None), None)
    if P is None:
        return None
    parts: list[np.ndarray] = []
    for table, stamp in zip(tables, marks, strict=True):
        every_step = np.broadcast_to(table[:, None], (pages, P, *table.shape[1:]))
        values = -1 if stamp is None else stamp
        parts.append(_by_page(every_step, values, np.int32(-1), pages))
    return np.concatenate(parts, axis=2).reshape(pages * P, -1, tables[0].shape[2], pages)


@functools.cache
def row_bytes(
    config: ModelConfig, policy: Policy, prompt_tokens: int, limit: int, dtype: str
) -> int:
    """Bytes that `generate` allocates for the cache of such a row when it runs alone."""
    plan = Plan.create(config, policy, [prompt_tokens], limit)
    return cache_bytes(jax.eval_shape(partial(empty_state, config, plan, 1, jnp.dtype(dtype))))
