"""The ceiling: what eviction could do if it knew the future. No policy for users.

Eviction is cache replacement with attention as the access: RaaS is LRU, H2O is LFU. For a known
future the best replacement is known too: evict what will be used again latest (Belady, IBM Systems
Journal 5(2), 1966). Here the future is that of a dense run: its accesses are recorded, the victims
follow from them, and the same question is answered again with these victims. An answer that departs
from the dense one needs other pages than were foreseen, so this is a very good eviction, and not
provably the best one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax.decode import DecodeState
from raas_jax.lab.inspect.recording import Diary, Recording, record
from raas_jax.params import Params
from raas_jax.policies import Boundary, Budgeted, RaaS, bucket, pages_for
from raas_jax.policies.base import Metadata

NEVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Scripted(Budgeted):
    """Overwrites the slots that a script names: int32 `[L, B, K, boundaries]`, its only metadata.

    Attributes:
      boundaries: page boundaries that the script covers; the last entry serves any later one.
    """

    boundaries: int = dataclasses.field(default=1, kw_only=True)

    def slots(self, prompt_tokens: Sequence[int], max_new_tokens: int) -> int:
        return self.budget // self.page_size  # As many as the script reckons with.

    def init(self, shape: tuple[int, int, int, int]) -> Metadata:
        return jnp.zeros((*shape[:3], self.boundaries), jnp.int32)

    def victim(self, meta: jax.Array, boundary: Boundary) -> jax.Array:
        return scripted_slot(meta, boundary.now, self.page_size)


def scripted_slot(script: jax.Array, now: jax.Array, page_size: int) -> jax.Array:
    """The entry of each row's boundary, int32 `[L, B, K]`, of `[L, B, K, boundaries]`."""
    # Prefill draws token 0; each page of P steps feeds P tokens and draws as many.
    index = jnp.clip((now - 1) // page_size - 1, 0, script.shape[-1] - 1)
    return jnp.take_along_axis(script, index[None, :, None, None], axis=-1)[..., 0]


def accesses(stamps: np.ndarray) -> np.ndarray:
    """Whether each page received more than alpha at each step, bool `[T, L, K, n]`.

    `stamps` are those of a `Recording` under `RaaS`, whose budget covers the answer.
    """
    # The clock of a step counts the tokens drawn before it, that of prefill included.
    now = np.arange(1, len(stamps) + 1, dtype=np.int32)[:, None, None, None]
    return np.asarray(stamps == now)


def next_access(accessed: np.ndarray) -> np.ndarray:
    """The first step at or after each one at which a page is used; int32, `NEVER` if it is not."""
    steps = np.arange(len(accessed), dtype=np.int32)[:, None, None, None]
    later = np.where(accessed, steps, NEVER)
    return np.asarray(np.minimum.accumulate(later[::-1], axis=0)[::-1])


def belady(accessed: np.ndarray, page_size: int, slots: int, boundaries: int) -> np.ndarray:
    """Belady's victims for every layer and key/value head.

    Args:
      accessed: bool `[T, L, K, n]`, see `accesses`; T is `n * page_size`.
      page_size: `P`.
      slots: `S`, pages that are kept besides the open one.
      boundaries: how many to script; those after the recorded answer go round, oldest first.

    Returns:
      int32 `[L, K, boundaries]`: slot that page 0, 1, ... is written to. A page that is never used
      again goes first; of pages that are used again at the same time, the one written first.
    """
    upcoming = next_access(accessed)
    T, L, K, _ = accessed.shape
    held = np.full((L, K, slots), -1)  # Number of the page in each slot.
    script = np.zeros((L, K, boundaries), np.int32)
    for page in range(boundaries):
        step = (page + 1) * page_size
        if page < slots:
            chosen = np.full((L, K), page)
        elif step < T:
            wait = np.take_along_axis(upcoming[step], held, axis=-1).astype(np.int64)
            # Pages are numbered as they were written: the smaller number breaks a tie.
            chosen = np.argmax(wait * boundaries - held, axis=-1)
        else:
            chosen = np.argmin(held, axis=-1)
        script[..., page] = chosen
        np.put_along_axis(held, chosen[..., None], page, axis=-1)
    return script


def record_ceiling(
    params: Params,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    policy: Scripted,
    *,
    stop_tokens: Sequence[int],
    rows: int | None = None,
    threshold: float,
) -> Iterator[tuple[int, Recording]]:
    """As `record`, under the victims of a dense run of the same prompts.

    Args:
      params, prompts, limits, stop_tokens, rows: see `record`.
      policy: says the budget; its script is made here.
      threshold: share of the attention, of the largest of a group's query heads, that is an access.
    """
    P = policy.page_size
    ample = bucket(pages_for(max(limits), P)) * P
    watched = RaaS(max(ample, 2 * P), threshold, page_size=P)
    ask = partial(record, params, prompts, limits, stop_tokens=stop_tokens, rows=rows)
    scripts: dict[int, np.ndarray] = {}
    for index, recording in ask(watched, every_step=True):
        stamps = recording.stamps
        scripts[index] = np.zeros((1, 1, policy.boundaries), np.int32)
        if stamps is not None and len(stamps):
            slots = policy.budget // P
            scripts[index] = belady(accesses(stamps), P, slots, policy.boundaries)

    def prepare(state: DecodeState) -> DecodeState:
        # Layers that see a window, the last group, have no diary: nothing is decided there.
        meta = (scripted(each) if isinstance(each, Diary) else each for each in state.meta)
        return dataclasses.replace(state, meta=tuple(meta))

    def scripted(diary: Diary) -> Diary:
        script = np.zeros(diary.inner.shape, np.int32)
        for index, of_row in scripts.items():
            script[:, index] = of_row
        return diary._replace(inner=jnp.asarray(script))

    return ask(policy, prepare=prepare)


def ceiling(
    budget: int, page_size: int, longest: int, threshold: float
) -> tuple[Scripted, partial[Iterator[tuple[int, Recording]]]]:
    """The policy, for answers of at most `longest` tokens, and what answers a batch with it."""
    policy = Scripted(budget, page_size=page_size, boundaries=pages_for(longest, page_size))
    return policy, partial(record_ceiling, threshold=threshold)
