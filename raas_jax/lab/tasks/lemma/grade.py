"""The grader: the final answer, and apart from it every line of the derivation."""

import dataclasses

from raas_jax.lab.tasks.lemma.language import ANSWER, SPECIAL
from raas_jax.lab.tasks.lemma.problems import Problem


@dataclasses.dataclass(frozen=True)
class Grade:
    """What is right about one written derivation."""

    answer: bool  # it ends with `answer <question> <right value>`
    lines: tuple[bool, ...]  # line by line, against the one right derivation
    finished: bool  # an answer line was written at all

    @property
    def derivation(self) -> bool:
        """Whether every line is right, the answer included, and none is missing or extra."""
        return all(self.lines)

    @property
    def first_wrong_line(self) -> int | None:
        """Index of the first wrong line, None when there is none."""
        return next((index for index, right in enumerate(self.lines) if not right), None)


def split_lines(text: str) -> tuple[tuple[str, ...], ...]:
    """The lines of a written derivation as words, each with the `;` that ends it."""
    lines: list[tuple[str, ...]] = []
    line: list[str] = []
    for word in text.split():
        if word in SPECIAL:
            continue
        line.append(word)
        if word == ";":
            lines.append(tuple(line))
            line = []
    return (*lines, tuple(line)) if line else tuple(lines)


def grade(problem: Problem, text: str) -> Grade:
    """Grade a derivation written for `problem`; special tokens in the text do not count.

    `lines` has as many entries as the longer of the written and the right derivation: a missing
    line is wrong, and so is one too many.
    """
    wanted, written = problem.lines(), split_lines(text)
    lines = tuple(
        index < len(wanted) and index < len(written) and wanted[index] == written[index]
        for index in range(max(len(wanted), len(written)))
    )
    finished = bool(written) and written[-1][0] == ANSWER
    answer = bool(written) and written[-1] == wanted[-1]
    return Grade(answer=answer, lines=lines, finished=finished)
