"""A benchmark: questions with reference answers, asked as text and graded by their answers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from raas_jax import checks, files, tokenizer
from raas_jax.lab.tasks.base import Column, Item, Response
from raas_jax.lab.tasks.grading import GraderPool, Verdict
from raas_jax.lab.tasks.grading.mathematics import stated
from raas_jax.params import Params


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      name: its place in the data, from "0"; the same whatever else is asked.
      prompt: what the model is asked.
      answer: the reference, as a grader reads it.
      solution: a worked solution that ends in the answer, to check graders on; "" if there is none.
      limit: tokens that an answer may have; 0 where the question does not say.
    """

    name: str
    prompt: str
    answer: str
    solution: str = ""
    limit: int = 0


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Questions with reference answers, as a task.

    Attributes:
      name: what the command line calls it.
      questions: all that are asked.
      grader: file with a `grade(gold, text)`; None is math-verify.
      is_right: grades in this process instead, for plain comparisons that cannot hang.
    """

    columns: ClassVar[tuple[Column, ...]] = ()
    records: ClassVar[bool] = False

    name: str
    questions: tuple[Question, ...]
    grader: Path | None = None
    is_right: Callable[[str, str], bool] | None = None

    def first(self, count: int | None) -> Benchmark:
        """The benchmark with its first questions only; None is all of them."""
        if count is not None:
            checks.integer("limit", count, 1)
        return dataclasses.replace(self, questions=self.questions[:count])

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "problems": len(self.questions), "data": self.digest()}

    def digest(self) -> str:
        """A short name for these questions and their grader: other data, another run."""
        found = hashlib.blake2b(digest_size=8)
        for question in self.questions:
            for part in (question.name, question.prompt, question.answer):
                found.update(part.encode() + b"\0")
        if self.grader is not None:
            found.update(files.read_bytes(self.grader))
        return found.hexdigest()

    def items(self, params: Params, chat: bool = False) -> Sequence[Item]:
        asked: list[Any] = [question.prompt for question in self.questions]
        if chat:
            asked = [[{"role": "user", "content": prompt}] for prompt in asked]
        prompts = tokenizer.encode(params, asked)[0]
        return [
            Item(question.name, tuple(prompt), question.limit, question.answer)
            for question, prompt in zip(self.questions, prompts, strict=True)
        ]

    def graders(self, workers: int, seconds: float) -> GraderPool | None:
        return None if self.is_right else GraderPool(workers, seconds, self.grader)

    def grade(self, response: Response) -> dict[str, Any] | None:
        text = response.text or ""
        if response.error is not None:
            return Verdict(False, None, response.error)._asdict()
        if response.finish_reason == "length" and not self.has_answer(text):
            return Verdict(False)._asdict()
        if self.is_right is not None:
            return Verdict(self.is_right(response.item.gold, text))._asdict()
        return None

    def has_answer(self, text: str) -> bool:
        """Whether a text that was cut off at the cap states its answer all the same.

        The last number of a thought that was cut off is no answer, though it may be the right one.
        """
        if self.is_right is not None:
            return False
        return self.grader is not None or stated(text) is not None
