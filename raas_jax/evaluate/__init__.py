"""Evaluation: tasks, a results folder that goes on where it stopped, and tables with intervals."""

from raas_jax.evaluate.lemma import LemmaTask
from raas_jax.evaluate.recording import Recorded, Recording, record
from raas_jax.evaluate.results import Results
from raas_jax.evaluate.run import report, run, table
from raas_jax.evaluate.tasks import Item, Task, check_task

__all__ = [
    "Item",
    "LemmaTask",
    "Recorded",
    "Recording",
    "Results",
    "Task",
    "check_task",
    "record",
    "report",
    "run",
    "table",
]
