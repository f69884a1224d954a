"""Rows of a data set, from a JSONL file or from the hub, with their columns checked."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raas_jax import files
from raas_jax.checks import short


@dataclasses.dataclass(frozen=True)
class Hub:
    """A data set on the hub: its id, the name of its configuration if it has several, a split."""

    path: str
    name: str | None
    split: str


def from_jsonl(
    file: str | Path, columns: Sequence[str], argument: str = "data"
) -> list[dict[str, Any]]:
    """All rows of a file; blank lines are skipped.

    Args:
      file: path of the file.
      columns: that every row must have.
      argument: what the caller's argument is called, for the errors.

    Raises:
      FileNotFoundError, ValueError: with the file and the line.
    """
    path = Path(file)
    try:
        # Not splitlines: a line of JSON may hold characters that it takes for ends of lines.
        lines = files.read_text(path).split("\n")
    except FileNotFoundError:
        what = f"{argument} is {str(file)!r}; there is no such file."
        raise FileNotFoundError(what) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = files.parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}).") from None
        check_row(row, columns, f"{path}, line {number}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty; write one JSON object per line.")
    return rows


def from_hub(task: str, hub: Hub, columns: Sequence[str]) -> list[dict[str, Any]]:
    """All rows of a split on the hub, from the local cache where they are in it.

    Raises:
      ImportError: `datasets` is missing. OSError: the hub cannot be reached.
      ValueError: the data set has other columns.
    """
    file = f"data, a JSONL file with {_listed(columns)}"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{task} is read from the hub by the library datasets: in the checkout of raas_jax, "
            f"pip install -e '.[eval]', or give {file}."
        ) from error
    try:
        found = load_dataset(hub.path, hub.name, split=hub.split)
    except Exception as error:  # datasets, the hub's client and HTTP each raise their own.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise OSError(
            f"{task} could not be read from the hub ({hub.path}): {reason}. Check the connection, "
            f"or give {file}."
        ) from error
    rows = [dict(row) for row in found]
    if not rows:
        raise ValueError(f"{hub.path} has no rows in its split {hub.split}; give {file}.")
    for number, row in enumerate(rows):
        check_row(row, columns, f"{hub.path}, row {number}")
    return rows


def check_row(row: object, columns: Sequence[str], where: str) -> None:
    """Raises ValueError, with near matches, for a row that lacks a column or has an odd value."""
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise ValueError(f"{where}: is a {kind}; expected a dictionary with {_listed(columns)}.")
    for column in columns:
        if column not in row:
            near = difflib.get_close_matches(column, list(row), n=1)
            hint = f" Is {near[0]!r} meant to be {column!r}?" if near else ""
            raise ValueError(
                f"{where}: there is no column {column!r}; the row has "
                f"{_listed(list(row)) or 'nothing'}.{hint}"
            )
        value = row[column]
        if not isinstance(value, str | int | float) or isinstance(value, bool) or value == "":
            raise ValueError(
                f"{where}: {column!r} is {short(value)}; expected text that is not empty, or a "
                "number."
            )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
