"""A task of one's own: a JSONL file with `prompt` and `answer`, or a small Python file.

The Python file defines `problems()`, which gives the rows as dictionaries, and may define
`grade(gold, text)`, which says whether a text is right; without it math-verify does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from raas_jax.lab.tasks.benchmarks.base import Benchmark
from raas_jax.lab.tasks.benchmarks.datasets import Dataset
from raas_jax.lab.tasks.benchmarks.rows import check_row, from_jsonl


def from_file(file: Path) -> Benchmark:
    """The task of a JSONL file; raises as `from_jsonl`."""
    own = Dataset(file.stem)
    return own.of(from_jsonl(file, own.columns, argument="task"))


def from_python(file: Path, data: str | Path | None = None) -> Benchmark:
    """The task of a Python file, whose `problems` is given `data` if that is not None.

    Raises:
      FileNotFoundError, ValueError: with what is wrong with the file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"task is {str(file)!r}; there is no such file.")
    spec = importlib.util.spec_from_file_location("task_of_ones_own", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        rows = list(module.problems() if data is None else module.problems(data))
    except AttributeError as error:
        if hasattr(module, "problems"):
            raise ValueError(f"{file} failed: {error}") from error
        raise ValueError(
            f"{file} does not define `problems()`, which gives dictionaries with "
            "'prompt' and 'answer'."
        ) from error
    except (Exception, SystemExit) as error:  # It is the user's own code.
        raise ValueError(f"{file} failed: {type(error).__name__}: {error}") from error
    own = Dataset(file.stem)
    for number, row in enumerate(rows):
        check_row(row, own.columns, f"{file}, problem {number}")
    if not rows:
        raise ValueError(f"{file} gives no problems.")
    grader = file if callable(getattr(module, "grade", None)) else None
    return dataclasses.replace(own.of(rows), grader=grader)
