"""Grading: what counts as the same answer, in processes that may hang or die."""

from raas_jax.evaluate.grading.graders import Graders
from raas_jax.evaluate.grading.mathematics import Mark

__all__ = ["Graders", "Mark"]
