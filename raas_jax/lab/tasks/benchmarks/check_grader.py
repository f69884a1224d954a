"""Checks a grader on questions whose answers are known: right ones right, near misses wrong."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from tqdm.auto import tqdm

from raas_jax.lab.tasks.benchmarks.base import Question
from raas_jax.lab.tasks.grading.graders import GraderPool
from raas_jax.lab.tasks.grading.near_misses import NEAR_MISSES

# How a model may put its answer.
FORMS = {
    "in a box": r"So we get $\boxed{%s}$.",
    "in a displayed box": "Thus\n\\[\n\\boxed{%s}\n\\]\nand we are done.",
    "in a box after other numbers": r"From 7 and $x = 19$ follows \boxed{%s}, as 3 > 2.",
    "after a thought": "<think>Perhaps \\boxed{17}? No.</think>\nIt is $\\boxed{%s}$.",
    "the final answer is $...$": "Therefore, the final answer is $%s$.",
    "the answer is ...": "The answer is %s",
    "bold": "**Final Answer:** %s",
    "alone on the last line": "We add the two and find\n\n$%s$",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One text to be graded, and what the mark must be."""

    kind: str
    gold: str
    text: str
    right: bool


def wrong_numbers(gold: str) -> list[str]:
    """Numbers near a number: one more, one less, the other sign, ten times as much."""
    plain = gold.replace(",", "")
    if not re.fullmatch(r"-?\d+", plain):
        return []
    value = int(plain)
    return [str(wrong) for wrong in (value + 1, value - 1, -value, 10 * value) if wrong != value]


def cases(questions: Sequence[Question]) -> Iterator[Case]:
    """Every reference answer in every form and its worked solution, then what is wrong."""
    for question in questions:
        for kind, form in FORMS.items():
            yield Case(kind, question.answer, form % question.answer, True)
        if question.solution:
            yield Case("the reference solution", question.answer, question.solution, True)
        for wrong in wrong_numbers(question.answer):
            yield Case("a number near it", question.answer, rf"\boxed{{{wrong}}}", False)
    for gold, misses in NEAR_MISSES.items():
        yield Case("right beside the near misses", gold, rf"\boxed{{{gold}}}", True)
        for wrong in misses:
            yield Case("a near miss", gold, rf"\boxed{{{wrong}}}", False)


def check_grader(
    questions: Sequence[Question], graders: GraderPool, progress: bool | None = None
) -> tuple[str, list[str]]:
    """Grades every case, right or wrong, whose mark is known.

    Returns:
      A table in Markdown, and a line for every wrong mark.
    """
    asked = list(cases(questions))
    marks = [graders.submit(each.gold, each.text) for each in asked]
    graded, good, bad = Counter[str](), Counter[str](), []
    hidden = None if progress is None else not progress
    bar = tqdm(marks, unit="answer", disable=hidden)
    for each, found in zip(asked, (mark.result() for mark in bar), strict=True):
        wanted = "right" if each.right else "wrong"
        row = f"{each.kind} | {wanted}"
        graded[row] += 1
        good[row] += found.correct is each.right and not found.error
        if found.correct is not each.right or found.error:
            why = found.error or f"read as {found.answer!r}"
            end = each.text[-200:]
            bad.append(f"{each.kind}: {each.gold!r} should be {wanted} ({why}): {end!r}")
    lines = ["| answers | must be | graded so |", "|---|---|---:|"]
    lines += [f"| {row} | {good[row]} of {count} |" for row, count in graded.items()]
    return "\n".join(lines) + "\n", bad
