"""What a task is: questions, a grader, and the columns of its table."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, Protocol

from raas_jax.lab.inspect.recording import Recording
from raas_jax.lab.runs.tables import Column
from raas_jax.params import Params


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      name: its name within the task, always the same.
      prompt: token ids.
      limit: at most this many tokens may be generated.
    """

    name: str
    prompt: tuple[int, ...]
    limit: int


class Task(Protocol):
    """A set of questions with a grader. An instance holds its options and nothing else."""

    @property
    def name(self) -> str:
        """What the command line calls it."""
        ...

    @property
    def columns(self) -> tuple[Column, ...]:
        """The task's own columns; every table begins with exact answers."""
        ...

    def config(self) -> dict[str, Any]:
        """All that decides what the questions are, as JSON values."""
        ...

    def items(self, params: Params) -> Sequence[Item]:
        """The questions. Raises ValueError if the model cannot read them."""
        ...

    def grade(self, item: Item, recording: Recording, text: str) -> dict[str, Any]:
        """Fields of the sample: "correct", and what the columns ask for, as JSON values."""
        ...


def check_task(name: str) -> None:
    """Raises ValueError, with near matches, for a task that does not exist."""
    from raas_jax.lab.tasks.benchmarks import BENCHMARKS, is_own

    known = ("lemma", *BENCHMARKS)
    if name not in known and not is_own(name):
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"task is {name!r}; there is {', '.join(known)}, or a file of your own, as in "
            f"mine.jsonl or mine.py.{hint}"
        )
