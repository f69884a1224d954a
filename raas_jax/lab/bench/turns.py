"""What is compared takes turns in one process, so that a busy moment hits all of it alike."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from raas_jax import checks
from raas_jax.decode import DecodeState, RowRequest
from raas_jax.params import Params
from raas_jax.policies import pages_for
from raas_jax.session import Session

T = TypeVar("T")
wait: Callable[[Any], Any] = jax.block_until_ready  # Which JAX leaves without types.


class Contender(NamedTuple):
    """What is timed beside others; `time_chunk` measures the seconds per step anew."""

    name: str
    length: int  # generated tokens at which it is timed
    time_chunk: Callable[[], float]


def take_turns(
    contenders: Sequence[Contender], turns: int, progress: bool = False
) -> list[list[float]]:
    """Times of each contender, one for every turn; they go now first to last, now last to first."""
    times: list[list[float]] = [[] for _ in contenders]
    entries = list(zip(contenders, times, strict=True))
    with tqdm(total=turns * len(entries), unit="run", disable=not progress) as bar:
        for turn in range(turns):
            for contender, own in entries[:: -1 if turn % 2 else 1]:
                bar.set_description(f"timing {contender.name}")
                own.append(contender.time_chunk())
                bar.update()
    return times


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios, turn by turn."""
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


def random_prompts(params: Params, rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Token ids of any kind, int32 `[rows, tokens]`."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, params.config.vocab_size, (rows, tokens), dtype=np.int32)


def check_positive(**numbers: int) -> None:
    """Raises TypeError or ValueError for a number that is no int, below 1 or beyond any cache."""
    for name, number in numbers.items():
        checks.integer(name, number, 1, checks.MOST_TOKENS)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call gives, once it is computed, and the seconds until then."""
    start = time.perf_counter()
    result: T = wait(call())
    return result, time.perf_counter() - start


def ran_out(error: BaseException) -> bool:
    """Whether an error says, in the words of Python, JAX or torch, that memory is used up."""
    text = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text


def cores() -> int:
    """Cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def endless(rows: int) -> RowRequest:
    """Greedy rows of which none ends, since a row that has ended keeps nothing."""
    return RowRequest.create([2**30] * rows)


@dataclasses.dataclass(frozen=True)
class TimedDecode:
    """A decode that has come to some length; its next chunk is timed as often as wanted."""

    session: Session
    state: DecodeState  # at a page boundary
    pages: int  # in a chunk

    @classmethod
    def start(
        cls, session: Session, prompts: Sequence[Sequence[int]], tokens: int, pages: int
    ) -> TimedDecode:
        """Reads the prompts and decodes so many tokens, in whole chunks, with rows that never end.

        The session has room for the prompts and a chunk more than the tokens.
        """
        session.compile(pages)
        state, _ = session.start(prompts, endless(session.rows))
        return cls(session, state, pages).after(tokens)

    @property
    def chunk(self) -> int:
        """Tokens that are timed together."""
        return self.pages * self.session.plan.page_size

    def after(self, tokens: int) -> TimedDecode:
        """This decode so many tokens later, in whole chunks; the memory of the state is used."""
        state = self.state
        for _ in range(pages_for(tokens, self.chunk)):
            state, _ = self.session.advance(state, self.pages)
        return dataclasses.replace(self, state=wait(state))

    def time_chunk(self) -> float:
        """Seconds per step over the chunk, on a copy of the state."""
        _, seconds = timed(partial(self.session.advance, copied(self.state), self.pages))
        return seconds / self.chunk


def copied(state: DecodeState) -> DecodeState:
    """The same state in memory of its own."""
    copy: DecodeState = wait(_copied(state))
    return copy


_copied = jax.jit(partial(jax.tree.map, jnp.copy))
