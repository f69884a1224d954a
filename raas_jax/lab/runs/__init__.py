"""Evaluation: tasks, a results folder that goes on where it stopped, and tables with intervals."""

from raas_jax.lab.inspect.recording import record
from raas_jax.lab.runs.decoding import Asking, EngineDecoding, RecordedDecoding
from raas_jax.lab.runs.reporting import report, table
from raas_jax.lab.runs.results import Results
from raas_jax.lab.runs.runner import run
from raas_jax.lab.tasks.base import Item, Response, Task
from raas_jax.lab.tasks.benchmarks import check_task, open_benchmark
from raas_jax.lab.tasks.lemma.task import LemmaTask

__all__ = [
    "Asking",
    "EngineDecoding",
    "Item",
    "LemmaTask",
    "RecordedDecoding",
    "Response",
    "Results",
    "Task",
    "check_task",
    "open_benchmark",
    "record",
    "report",
    "run",
    "table",
]
