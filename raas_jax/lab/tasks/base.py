"""What a task is: items to answer, how answers are graded, and the columns of its table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Protocol

from raas_jax.lab.inspect.recording import Recording
from raas_jax.lab.tasks.grading import GraderPool
from raas_jax.params import Params

KINDS: Final = ("share", "mean", "bytes", "ratio")


@dataclasses.dataclass(frozen=True)
class Column:
    """One figure of a table.

    Attributes:
      name: the samples' field, and the column of the CSV.
      title: heading in Markdown.
      kind: "share" of samples where the field is true; "mean" of a number; "bytes", a mean without
        interval; "ratio", the sum of the field over that of `per`.
      per: for a ratio, the field with the denominator.
    """

    name: str
    title: str
    kind: Literal["share", "mean", "bytes", "ratio"]
    per: str = ""


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      name: its name within the task, always the same.
      prompt: token ids.
      limit: at most this many tokens may be generated; 0 where the task does not say.
      gold: the reference answer, where the task has it as text.
    """

    name: str
    prompt: tuple[int, ...]
    limit: int = 0
    gold: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Response:
    """What a model answered to an item.

    Attributes:
      item: what was asked.
      sample: which of the item's answers, from 0.
      tokens: ids, the stop token included.
      text: of them; None where there is no tokenizer.
      finish_reason: "stop", "length" or "error".
      measured: further fields of the sample, such as bytes and times.
      recording: of the cache, where one was made.
      error: why there is no answer; None if there is one.
    """

    item: Item
    sample: int
    tokens: Sequence[int]
    text: str | None
    finish_reason: str
    measured: Mapping[str, Any]
    recording: Recording | None = None
    error: str | None = None


class Task(Protocol):
    """A set of items and how their answers are graded. An instance holds its options alone."""

    @property
    def name(self) -> str:
        """What the command line calls it."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """The task's own columns; every table begins with exact answers."""

    @property
    def records(self) -> bool:
        """Whether grading needs a recording of the cache."""

    def config(self) -> dict[str, Any]:
        """All that decides what the items are, as JSON values."""

    def items(self, params: Params, chat: bool = False) -> Sequence[Item]:
        """The items; with `chat`, text goes into the model's chat template.

        Raises ValueError if the model cannot read them.
        """

    def graders(self, workers: int, seconds: float) -> GraderPool | None:
        """Processes that compare an answer with the reference; None if `grade` always can."""

    def grade(self, response: Response) -> dict[str, Any] | None:
        """Fields of the sample, as JSON values: "correct", and what the columns ask for.

        None where the answer must be compared with `gold` by the graders.
        """
