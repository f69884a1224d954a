"""The synthetic reasoning task: problems, their derivations, a grader and liveness marks."""

from raas_jax.lab.tasks.lemma.draws import Knobs, draw, split_of
from raas_jax.lab.tasks.lemma.grade import Grade, grade
from raas_jax.lab.tasks.lemma.liveness import Liveness, Lookup, liveness
from raas_jax.lab.tasks.lemma.parse import normalise, parse_problem
from raas_jax.lab.tasks.lemma.problems import Definition, Problem

__all__ = [
    "Definition",
    "Grade",
    "Knobs",
    "Liveness",
    "Lookup",
    "Problem",
    "draw",
    "grade",
    "liveness",
    "normalise",
    "parse_problem",
    "split_of",
]
