"""Benchmarks by name, and tasks of one's own from files."""

from __future__ import annotations

import difflib
from pathlib import Path

from raas_jax.lab.tasks.benchmarks.base import Benchmark, Question
from raas_jax.lab.tasks.benchmarks.datasets import DATASETS
from raas_jax.lab.tasks.benchmarks.own import from_file, from_python

__all__ = ["DATASETS", "Benchmark", "Question", "check_task", "open_benchmark"]


def check_task(name: str) -> None:
    """Raises ValueError, with near matches, for a task that does not exist."""
    known = ("lemma", *DATASETS)
    if name not in known and not name.endswith((".jsonl", ".py")):
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"task is {name!r}; there is {', '.join(known)}, or a file of your own, as in "
            f"mine.jsonl or mine.py.{hint}"
        )


def open_benchmark(name: str, data: str | Path | None = None) -> Benchmark:
    """A benchmark with its questions.

    Args:
      name: one of `DATASETS`, or a task of one's own: a `.jsonl` or `.py` file.
      data: JSONL file with the rows, instead of the hub; given to `problems` of a `.py` file.

    Raises:
      KeyError: there is no such benchmark. Otherwise as `Dataset.open`.
    """
    if name.endswith(".py"):
        return from_python(Path(name), data)
    if name.endswith(".jsonl"):
        if data is not None:
            raise ValueError(f"data is {str(data)!r}, but task is a file already; leave data out.")
        return from_file(Path(name))
    return DATASETS[name].open(data)
