"""Benchmarks by name, and tasks of one's own from files."""

from __future__ import annotations

from pathlib import Path

from raas_jax.lab.tasks.benchmarks.aime24 import AIME24
from raas_jax.lab.tasks.benchmarks.base import Benchmark, Problem, digest
from raas_jax.lab.tasks.benchmarks.gsm8k import GSM8K
from raas_jax.lab.tasks.benchmarks.math500 import MATH500
from raas_jax.lab.tasks.benchmarks.own import COLUMNS, from_python, read

__all__ = ["BENCHMARKS", "Benchmark", "Problem", "digest", "is_own", "open_benchmark"]

BENCHMARKS = {each.name: each for each in (GSM8K, MATH500, AIME24)}


def is_own(name: str) -> bool:
    """Whether a task is named by its file."""
    return name.endswith((".jsonl", ".py"))


def open_benchmark(name: str, data: str | None = None) -> tuple[Benchmark, tuple[Problem, ...]]:
    """A benchmark and its questions.

    Args:
      name: one of `BENCHMARKS`, or a task of one's own: a `.jsonl` or `.py` file.
      data: JSONL file with the rows, instead of the hub.

    Raises:
      KeyError: there is no such benchmark. Otherwise as `Benchmark.problems`.
    """
    if name.endswith(".py"):
        return from_python(Path(name), data)
    if name.endswith(".jsonl"):
        if data is not None:
            raise ValueError(f"task is {name!r}, a file already; leave --data out.")
        own = Benchmark(Path(name).stem, COLUMNS, read)
        return own, own.problems(name)
    benchmark = BENCHMARKS[name]
    return benchmark, benchmark.problems(data)
