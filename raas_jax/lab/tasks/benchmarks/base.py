"""What a benchmark is: rows of a data set, how each becomes a problem, and where they come from."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from raas_jax.lab.tasks.benchmarks.rows import Hub, from_hub, from_jsonl
from raas_jax.lab.tasks.grading.mathematics import stated

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question.

    Attributes:
      name: its place in the data, from "0"; the same whatever else is asked.
      prompt: what the model is asked.
      answer: the reference, as a grader reads it.
      solution: a worked solution that ends in the answer, to check graders on; "" if there is none.
      limit: tokens that an answer may have, where the problem itself says so.
    """

    name: str
    prompt: str
    answer: str
    solution: str = ""
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A data set of questions with reference answers.

    Attributes:
      name: what the command line calls it.
      columns: that every row must have.
      read: gives prompt, answer and solution of a row.
      hub: where it is read from by default; None if it is only in files.
      grader: file with a `grade(gold, text)`; None is math-verify.
      is_right: grades in this process instead, for plain comparisons that cannot hang.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], tuple[str, str, str]]
    hub: Hub | None = None
    grader: Path | None = None
    is_right: Callable[[str, str], bool] | None = None

    def problems(self, data: str | Path | None = None) -> tuple[Problem, ...]:
        """The questions of a JSONL file, or of the hub.

        Raises:
          FileNotFoundError: there is no such file. ValueError: it cannot be read, or lacks columns.
          OSError, ImportError: the hub cannot be reached, or `datasets` is missing.
        """
        if data is not None:
            return self.of(from_jsonl(data, self.columns))
        if self.hub is None:
            raise ValueError(f"{self.name} is not on the hub; give --data FILE.")
        return self.of(from_hub(self.name, self.hub, self.columns))

    def has_answer(self, text: str) -> bool:
        """Whether a text that was cut off at the cap states its answer all the same.

        The last number of a thought that was cut off is no answer, though it may be the right one.
        """
        if self.is_right is not None:
            return False
        return self.grader is not None or bool(stated(text))

    def of(self, rows: Iterable[Row]) -> tuple[Problem, ...]:
        """The questions of rows."""
        return tuple(Problem(str(i), *self.read(row)) for i, row in enumerate(rows))


def digest(problems: Iterable[Problem], grader: Path | None = None) -> str:
    """A short name for these questions and their grader: other data, another run."""
    found = hashlib.blake2b(digest_size=8)
    for problem in problems:
        for part in (problem.name, problem.prompt, problem.answer):
            found.update(part.encode() + b"\0")
    if grader is not None:
        found.update(grader.read_bytes())
    return found.hexdigest()
