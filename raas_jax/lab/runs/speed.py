"""Times of a study: at growing lengths of the answer, and of a step under every policy."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from raas_jax import checks
from raas_jax.lab.bench.steps import bench
from raas_jax.lab.bench.turns import Contender, TimedDecode, median_ratio, take_turns
from raas_jax.lab.limits import MOST_ROWS, MOST_TURNS, check_counts
from raas_jax.lab.runs.layout import SPEED, STEPS, read_speed, read_steps
from raas_jax.lab.runs.results import write_json
from raas_jax.lab.tasks.base import Item
from raas_jax.params import Params
from raas_jax.policies import Policy, pages_for
from raas_jax.session import Session

TIMED_TOKENS = 64
"""Tokens that are timed together."""
TURNS = 7
"""How often each policy's are."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """What to measure: these policies, at these lengths of the answer.

    Attributes:
      policies: labels of policies of the study.
      lengths: generated tokens.
      budget: tokens, of those that have one.
      prompt_tokens: length of the prompt.
      batch: rows at once.
      repetitions: timed turns; the median counts.
      steps_of: label of a task: the step of every policy is timed on a batch of its problems.
    """

    policies: tuple[str, ...]
    lengths: tuple[int, ...]
    budget: int
    prompt_tokens: int = 128
    batch: int = 1
    repetitions: int = 9
    steps_of: str | None = None

    def __post_init__(self) -> None:
        for name in ("policies", "lengths"):  # Lists, where they come from a file.
            if not isinstance(getattr(self, name), list | tuple):
                raise TypeError(f"{name} is {checks.short(getattr(self, name))}; it must be a list")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for length in self.lengths:
            checks.integer("lengths", length, 1, checks.MOST_TOKENS)
        tokens, turns = (1, checks.MOST_TOKENS), (1, MOST_TURNS)
        check_counts(self, budget=tokens, prompt_tokens=tokens, batch=(1, MOST_ROWS))
        check_counts(self, repetitions=turns)


def measure_speed(
    params: Params,
    speed: Speed,
    tried: Mapping[str, Policy],
    folder: Path,
    progress: bool | None = None,
) -> None:
    """Adds to `speed.json`, policy by policy, what is not there yet."""
    file = folder / SPEED
    found = read_speed(folder)
    missing = [label for label in tried if label not in found]
    hidden = None if progress is None else not progress
    for label in tqdm(missing, desc="time per token", unit="policy", disable=hidden):
        names = ("prompt_tokens", "lengths", "batch", "repetitions")
        measured = bench(params, tried[label], **{name: getattr(speed, name) for name in names})
        found[label] = [
            {
                "tokens": t.generated,
                "ms_per_token": round(t.ms_per_token, 4),
                "kv_bytes": t.kv_bytes,
            }
            for t in measured.timings
        ]
        write_json(file, found)


def measure_steps(
    params: Params,
    task: str,
    tried: Mapping[str, Policy],
    items: Sequence[Item],
    folder: Path,
    progress: bool | None = None,
) -> None:
    """Adds to `steps.json`, policy by policy: milliseconds of a step of a batch of a task's items.

    The batch is decoded nearly to its longest answer, so that budgets are full; the rest is timed,
    what compiles left out. Machines are now faster and now slower: each policy takes turns with the
    first one, and its median ratio to that one's time is what is told.
    """
    file = folder / STEPS
    found = read_steps(folder)
    first = next(iter(tried))
    if (found.get("task"), found.get("beside")) != (task, first):
        found = {"task": task, "beside": first, "milliseconds": {}}
    times = found["milliseconds"]
    missing = [label for label in tried if label not in times]
    if not missing:
        return
    baseline = _contender(params, first, tried[first], items)
    if first not in times:
        (alone,) = take_turns([baseline], 2 * TURNS)
        times[first] = round(1e3 * statistics.median(alone), 4)
    hidden = None if progress is None else not progress
    for label in tqdm(missing, desc="time of a step", unit="policy", disable=hidden):
        if label != first:
            own = _contender(params, label, tried[label], items)
            ratio = median_ratio(*take_turns([own, baseline], TURNS))
            times[label] = round(ratio * times[first], 4)
        write_json(file, found)


def _contender(params: Params, label: str, policy: Policy, items: Sequence[Item]) -> Contender:
    """Times, whenever it is called, the same last steps of a batch."""
    longest = max(item.limit for item in items)
    prompts = [item.prompt for item in items]
    session = Session.create(params, policy, [len(prompt) for prompt in prompts], longest)
    pages = pages_for(TIMED_TOKENS, policy.page_size)
    chunk = pages * policy.page_size
    tokens = max(1, longest // chunk - 1) * chunk
    decode = TimedDecode.start(session, prompts, tokens, pages)
    return Contender(label, tokens, decode.time_chunk)
