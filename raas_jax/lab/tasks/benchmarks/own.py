"""A task of one's own: a JSONL file with `prompt` and `answer`, or a small Python file.

The Python file defines `problems()`, which gives the rows as dictionaries, and may define
`grade(gold, text)`, which says whether a text is right; without it math-verify does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from raas_jax.lab.tasks.benchmarks.base import Benchmark
from raas_jax.lab.tasks.benchmarks.datasets import Dataset, Row
from raas_jax.lab.tasks.benchmarks.rows import check_columns, from_jsonl


def from_file(file: Path) -> Benchmark:
    """The task of a JSONL file; raises as `from_jsonl`."""
    own = Dataset(file.stem)
    return own.of(from_jsonl(file, own.columns, argument="task"))


def from_python(file: Path, data: str | Path | None = None) -> Benchmark:
    """The task of a Python file.

    Args:
      file: defines `problems()`, or `problems(data)` where it reads a file.
      data: given to `problems` if it is not None.

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
        rows = list(_rows(module.problems, data))
    except AttributeError as error:
        if hasattr(module, "problems"):
            raise ValueError(f"{file} failed: {error}") from error
        raise ValueError(
            f"{file} does not define `problems()`, which gives dictionaries with "
            "'prompt' and 'answer'."
        ) from error
    except Exception as error:  # It is the user's own code.
        raise ValueError(f"{file} failed: {type(error).__name__}: {error}") from error
    own = Dataset(file.stem)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{file}: problem {number} is {row!r}; expected a dictionary.")
        check_columns(row, own.columns, f"{file}, problem {number}")
    if not rows:
        raise ValueError(f"{file} gives no problems.")
    grader = file if callable(getattr(module, "grade", None)) else None
    return dataclasses.replace(own.of(rows), grader=grader)


def _rows(problems: object, data: str | Path | None) -> Iterable[Row]:
    assert callable(problems)
    rows: Iterable[Row] = problems() if data is None else problems(data)
    return rows
