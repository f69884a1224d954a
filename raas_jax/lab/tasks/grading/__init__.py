"""Grading: what counts as the same answer, in processes that may hang or die."""

from raas_jax.lab.tasks.grading.graders import GraderPool
from raas_jax.lab.tasks.grading.mathematics import Verdict

__all__ = ["GraderPool", "Verdict"]
