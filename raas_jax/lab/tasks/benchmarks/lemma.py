"""The synthetic reasoning task as a benchmark: sampled answers, without a look into the cache."""

from __future__ import annotations

from raas_jax.lab.tasks.benchmarks.base import Benchmark, Question
from raas_jax.lab.tasks.lemma.grade import split_lines
from raas_jax.lab.tasks.lemma.task import LemmaTask, answer_limit


def lemma_benchmark(task: LemmaTask) -> Benchmark:
    """The problems of the task, each with the limit of its length."""
    questions = []
    for index in range(task.problems):
        problem = task.problem(str(index))
        answer = " ".join(problem.lines()[-1])
        limit = task.max_new_tokens or answer_limit(problem)
        questions.append(Question(str(index), problem.prompt, answer, limit=limit))
    return Benchmark(task.name, tuple(questions), is_right=ends_in)


def ends_in(gold: str, text: str) -> bool:
    """Whether a derivation ends in the right answer line."""
    return split_lines(text)[-1:] == (tuple(gold.split()),)
