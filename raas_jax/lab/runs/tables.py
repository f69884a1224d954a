"""How figures are written: in Markdown for people, in CSV for programs."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from raas_jax.lab.runs.points import Point
from raas_jax.lab.runs.statistics import Estimate
from raas_jax.lab.tasks.base import Column


class Heading(NamedTuple):
    """How people read a figure: its title, its unit, what it is multiplied with, its digits."""

    title: str
    unit: str = ""
    factor: float = 1
    digits: str = ".0f"

    def text(self, found: Estimate | None) -> str:
        """The value, and the 95 % interval in brackets."""
        if found is None or math.isnan(found.value):
            return "–"
        value, *interval = (
            "" if each is None else f"{each * self.factor:{self.digits}}"
            for each in dataclasses.astuple(found)
        )
        return value + self.unit + (f" [{', '.join(interval)}]" if all(interval) else "")


PERCENT = (" %", 100, ".1f")
_KINDS: dict[str, tuple[str, float, str]] = {
    "share": PERCENT,
    "ratio": PERCENT,
    "mean": ("", 1, ".0f"),
    "bytes": (" KiB", 1 / 1024, ".0f"),
}


def heading(column: Column) -> Heading:
    """How people read the figure of a column."""
    return Heading(column.title, *_KINDS[column.kind])


def points_markdown(points: Sequence[Point], headings: Mapping[str, Heading]) -> str:
    """A line for every point of a task, with the figures that one of them has."""
    if not points:
        return "No samples yet.\n"
    names = list(dict.fromkeys(name for point in points for name in point.figures))
    rows = [
        [
            *(point.policy, str(point.budget or "–"), str(len(point.samples))),
            *(headings[name].text(point.figures.get(name)) for name in names),
        ]
        for point in points
    ]
    titles = [headings[name].title for name in names]
    return markdown_table(["Policy", "Budget", "n", *titles], rows, labels=2)


def points_csv(points: Sequence[Point], exact: Collection[str] = (), no_budget: str = "") -> str:
    """The same unrounded; `exact` names figures that never have an interval."""
    rows = []
    for point in points:
        row: dict[str, Any] = {
            "policy": point.policy,
            "budget": point.budget or no_budget,
            "samples": len(point.samples),
        }
        for name, found in point.figures.items():
            row |= {name: found.value} if name in exact else csv_cells(name, found)
        rows.append(row)
    return csv_text(rows)


STAR = "\n\\* the interval leaves out zero.\n"
"""Goes below a table of `in_points`."""


def in_points(found: Estimate) -> str:
    """A difference of shares in percentage points; a star where the interval leaves out zero."""
    low, high = (found.value if x is None else x for x in (found.low, found.high))
    sign = " *" if low > 0 or high < 0 else ""
    return f"{100 * found.value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]{sign}"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, labels: int) -> str:
    """A padded table that reads well on a terminal too; the first `labels` columns are text."""
    widths = [max(3, *map(len, column)) for column in zip(headings, *rows, strict=True)]
    rule = ["-" * w if i < labels else "-" * (w - 1) + ":" for i, w in enumerate(widths)]

    def join(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(w) if i < labels else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |\n"

    return "".join(map(join, [headings, rule, *rows]))


def csv_cells(name: str, found: Estimate | None, between: str = "_") -> dict[str, Any]:
    """A figure and the ends of its interval."""
    names = (name, f"{name}{between}low", f"{name}{between}high")
    return dict(zip(names, dataclasses.astuple(found) if found else (None,) * 3, strict=True))


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, with every column that one of them has."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
