"""The synthetic reasoning task as something to evaluate on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from raas_jax import checks, tokenizer
from raas_jax.lab.limits import MOST_DEFINITIONS, MOST_PROBLEMS, SEEDS, check_counts
from raas_jax.lab.tasks.base import Column, Item, Response
from raas_jax.lab.tasks.lemma import Knobs, Problem, draw, grade
from raas_jax.lab.tasks.lemma.language import UNKNOWN, WORDS
from raas_jax.lab.tasks.lemma.milestones import recall
from raas_jax.lab.tasks.lemma.tokenizer import BOS_ID, encode
from raas_jax.params import Params

SLACK = 16  # Tokens that even the shortest answer may run over.


@dataclasses.dataclass(frozen=True)
class LemmaTask:
    """Held-out problems of `raas_jax.lab.tasks.lemma`.

    Attributes:
      problems: how many.
      smallest, largest: definitions of each.
      late_facts: values found early that are needed only at the end.
      seed: another seed draws other problems, from the same split.
      split: "test", or "validation" for choosing.
      max_new_tokens: cap of every answer; None allows half as much again as the right one takes.
    """

    name: ClassVar[str] = "lemma"
    records: ClassVar[bool] = True
    columns: ClassVar[tuple[Column, ...]] = (
        Column("derivation", "Whole derivations", "share"),
        Column("tokens", "Tokens", "mean"),
        Column("capped", "Ran to the cap", "share"),
        Column("served", "Recall to the first error", "ratio", per="lookups"),
        Column("written_served", "Milestone recall", "ratio", per="written_lookups"),
    )

    problems: int = 200
    smallest: int = 24
    largest: int = 48
    late_facts: int = 0
    seed: int = 0
    split: str = "test"
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, problems=(1, MOST_PROBLEMS), seed=SEEDS)
        check_counts(self, max_new_tokens=(1, checks.MOST_TOKENS))
        sizes = (1, MOST_DEFINITIONS)
        check_counts(self, smallest=sizes, largest=sizes, late_facts=(0, MOST_DEFINITIONS))
        if self.split not in ("test", "validation"):
            raise ValueError(
                f"split is {checks.short(self.split)}; choose test or validation (the model has "
                "seen train)."
            )
        Knobs(self.smallest, self.largest, late_facts=self.late_facts)

    def config(self) -> dict[str, Any]:
        return {"name": self.name, **dataclasses.asdict(self)}

    def items(self, params: Params, chat: bool = False) -> Sequence[Item]:
        return [self._item(params, index) for index in range(self.problems)]

    def graders(self, workers: int, seconds: float) -> None:
        return None

    def grade(self, response: Response) -> dict[str, Any]:
        problem, recording = self.problem(response.item.name), response.recording
        if recording is None:
            raise ValueError("recording is None; lemma counts milestones in a recorded cache.")
        graded, stopped = grade(problem, response.text or ""), response.finish_reason == "stop"
        return {
            "correct": graded.answer and stopped,
            "derivation": graded.derivation and stopped,
            "first_wrong_line": graded.first_wrong_line,
            "definitions": len(problem.definitions),
            **recall(problem, recording, words_of(recording.tokens))._asdict(),
        }

    def problem(self, name: str) -> Problem:
        """The problem of an item."""
        return _draw(self, int(name))

    def _item(self, params: Params, index: int) -> Item:
        problem = _draw(self, index)
        ids = (BOS_ID, *encode(problem.prompt_words))
        if index == 0 and not reads_lemma(params, problem):
            raise ValueError(
                "the model does not read lemma problems word by word, as its milestones need; "
                "take the model 'demo', or one that `raas-jax train` made."
            )
        return Item(str(index), ids, self.max_new_tokens or answer_limit(problem))


@functools.lru_cache(maxsize=4096)
def _draw(task: LemmaTask, index: int) -> Problem:
    knobs = Knobs(task.smallest, task.largest, late_facts=task.late_facts)
    return draw(task.split, task.seed, index, knobs)


def answer_limit(problem: Problem) -> int:
    """Half as many tokens again as the right answer takes, and a few more."""
    right = len(problem.derivation_words) + 1
    return right + right // 2 + SLACK


def reads_lemma(params: Params, problem: Problem) -> bool:
    """Whether the model's tokenizer is that of the task."""
    if not tokenizer.has_tokenizer(params):
        return False
    ids, _ = tokenizer.encode(params, problem.prompt)
    return ids == [[BOS_ID, *encode(problem.prompt_words)]]


def words_of(tokens: Sequence[int]) -> list[str]:
    """The word of each token, `<unk>` for ids that are none."""
    return [WORDS[token] if token < len(WORDS) else UNKNOWN for token in tokens]
