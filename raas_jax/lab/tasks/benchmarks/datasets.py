"""Data sets whose rows become questions, each asked as in the RaaS paper (arXiv 2502.11147)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from raas_jax.lab.tasks.benchmarks.base import Benchmark, Question
from raas_jax.lab.tasks.benchmarks.rows import Hub, from_hub, from_jsonl

Row = Mapping[str, Any]
# What the paper adds to a question, word for word.
STEP_BY_STEP = "Let's think step by step and output in latex format."
STANDALONE = "Make sure the final answer is standalone and in latex format."


def plain_answer(row: Row) -> tuple[str, str]:
    """Reference and worked solution, each in a column of its own."""
    return str(row["answer"]), str(row.get("solution", ""))


def gsm8k_answer(row: Row) -> tuple[str, str]:
    """The worked solution ends in the reference, as `#### 1,234`."""
    solution = str(row["answer"])
    return solution.rpartition("####")[2].strip().replace(",", ""), solution


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Where questions come from; by default a file of one's own.

    Attributes:
      name: what the command line calls it.
      column: with the question; the answer is in `answer`.
      added: put on a line of its own after the question.
      answer: gives reference and worked solution of a row.
      hub: where it is read from unless a file is given.
    """

    name: str
    column: str = "prompt"
    added: str = ""
    answer: Callable[[Row], tuple[str, str]] = plain_answer
    hub: Hub | None = None

    @property
    def columns(self) -> tuple[str, str]:
        """Those that every row must have."""
        return self.column, "answer"

    def open(self, data: str | Path | None = None) -> Benchmark:
        """The questions of a JSONL file, or of the hub.

        Raises:
          FileNotFoundError: there is no such file. ValueError: it cannot be read, or lacks columns.
          OSError, ImportError: the hub cannot be reached, or `datasets` is missing.
        """
        if data is not None:
            return self.of(from_jsonl(data, self.columns))
        assert self.hub is not None
        return self.of(from_hub(self.name, self.hub, self.columns))

    def of(self, rows: Iterable[Row]) -> Benchmark:
        """The questions of rows."""
        end = f"\n{self.added}" if self.added else ""
        questions = (
            Question(str(index), f"{row[self.column]}{end}", *self.answer(row))
            for index, row in enumerate(rows)
        )
        return Benchmark(self.name, tuple(questions))


# Grade-school word problems (arXiv 2110.14168), 1,319 in the test split.
GSM8K = Hub("openai/gsm8k", "main", "test")
# Competition mathematics (arXiv 2103.03874), the 500 problems of arXiv 2305.20050.
MATH500 = Hub("HuggingFaceH4/MATH-500", None, "test")
# Both papers of the invitational of 2024: 30 problems with answers from 0 to 999.
AIME24 = Hub("HuggingFaceH4/aime_2024", None, "train")
DATASETS = {
    "gsm8k": Dataset("gsm8k", "question", STANDALONE, gsm8k_answer, GSM8K),
    "math500": Dataset("math500", "problem", STEP_BY_STEP, hub=MATH500),
    "aime24": Dataset("aime24", "problem", STANDALONE, hub=AIME24),
}
