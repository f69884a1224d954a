"""Evaluation: tasks, a results folder that goes on where it stopped, and tables with intervals."""

from raas_jax.lab.inspect.recording import Recorded, Recording, record
from raas_jax.lab.runs.results import Results
from raas_jax.lab.runs.run import report, run, table
from raas_jax.lab.tasks.base import Item, Task, check_task
from raas_jax.lab.tasks.lemma.task import LemmaTask

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
