"""The synthetic reasoning task as a benchmark: sampled answers, without a look into the cache."""

from __future__ import annotations

from raas_jax.lab.tasks.benchmarks.base import Benchmark, Problem, Row
from raas_jax.lab.tasks.lemma.grade import split_lines
from raas_jax.lab.tasks.lemma.task import LemmaTask, answer_limit


def read(row: Row) -> tuple[str, str, str]:
    """The last line of a derivation is the answer."""
    return str(row["prompt"]), str(row["answer"]), ""


def is_right(gold: str, text: str) -> bool:
    """Whether a derivation ends with the right answer line."""
    return split_lines(text)[-1:] == (tuple(gold.split()),)


LEMMA = Benchmark("lemma", ("prompt", "answer"), read, is_right=is_right)


def lemma_problems(task: LemmaTask) -> tuple[Problem, ...]:
    """The problems of the task, each with the limit of its length."""
    found = []
    for index in range(task.problems):
        problem = task.problem(str(index))
        answer = " ".join(problem.lines()[-1])
        limit = task.max_new_tokens or answer_limit(problem)
        found.append(Problem(str(index), problem.prompt, answer, limit=limit))
    return tuple(found)
