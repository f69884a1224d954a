"""From samples to tables: one row per policy, 95 % intervals, Markdown and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Z95 = 1.959963984540054  # Two-sided 95 % point of the normal distribution.
Kind = Literal["share", "mean", "bytes", "ratio"]


@dataclasses.dataclass(frozen=True)
class Column:
    """One figure of a table.

    Attributes:
      name: the samples' field, and the column of the CSV.
      title: heading in Markdown.
      kind: "share" of samples where the field is true (Wilson's interval); "mean" of a number;
        "bytes", a mean without interval; "ratio", the sum of the field over that of `per`, with
        samples as the units that vary.
      per: for a ratio, the field with the denominator.
    """

    name: str
    title: str
    kind: Kind
    per: str = ""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval, `low` and `high` None where it has none."""

    value: float
    low: float | None = None
    high: float | None = None


def wilson(successes: int, trials: int) -> Estimate:
    """Share of successes with Wilson's score interval (JASA 22, 1927)."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes={successes}, trials={trials}: wanted 0 <= successes <= trials")
    p, z2 = successes / trials, Z95 * Z95
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    # Rounding must not put the share itself outside.
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def mean(values: Sequence[float]) -> Estimate:
    """Mean with the normal interval of its standard error; no interval for a single value."""
    return ratio(values, [1.0] * len(values))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Sum over sum, with the linearised standard error over the pairs; NaN where there is none."""
    n, total = len(numerators), sum(denominators)
    if not total:
        return Estimate(math.nan)
    value = sum(numerators) / total
    if n < 2:
        return Estimate(value)
    squares = sum((y - value * x) ** 2 for y, x in zip(numerators, denominators, strict=True))
    half = Z95 * math.sqrt(squares * n / (n - 1)) / total
    return Estimate(value, value - half, value + half)


def paired(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of `first - second` over pairs, with the normal interval of the differences."""
    if not first:
        return Estimate(math.nan)
    return mean([float(a) - float(b) for a, b in zip(first, second, strict=True)])


def estimate(column: Column, samples: Sequence[Mapping[str, Any]]) -> Estimate:
    """The figure of a column over samples, of which there is at least one."""
    values = [sample[column.name] for sample in samples]
    if column.kind == "share":
        return wilson(sum(map(bool, values)), len(values))
    if column.kind == "ratio":
        found = ratio(values, [sample[column.per] for sample in samples])
        if found.low is None or found.high is None:
            return found
        return Estimate(found.value, max(0.0, found.low), min(1.0, found.high))
    if column.kind == "bytes":
        return Estimate(sum(values) / len(values))
    return mean(values)


@dataclasses.dataclass(frozen=True)
class Line:
    """One policy's figures: `labels` (heading → text), number of samples, and the estimates."""

    labels: dict[str, str]
    samples: int
    estimates: tuple[Estimate, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns and lines; `markdown` and `csv` write them."""

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]

    def markdown(self) -> str:
        """A table for people: value, and the 95 % interval in brackets."""
        if not self.lines:
            return "No samples yet.\n"
        headings = [
            *self.lines[0].labels,
            "n",
            *(column.title for column in self.columns),
        ]
        rows = [
            [
                *line.labels.values(),
                str(line.samples),
                *map(cell_text, self.columns, line.estimates),
            ]
            for line in self.lines
        ]
        return markdown_table(headings, rows, labels=len(self.lines[0].labels))

    def csv(self) -> str:
        """A table for programs: `name`, `name_low`, `name_high`, unrounded."""
        names = [
            f"{column.name}{end}"
            for column in self.columns
            for end in ("", *(("_low", "_high") if column.kind != "bytes" else ()))
        ]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        labels = list(self.lines[0].labels) if self.lines else []
        writer.writerow([*(label.lower() for label in labels), "samples", *names])
        for line in self.lines:
            cells: list[float | str] = []
            for column, found in zip(self.columns, line.estimates, strict=True):
                cells.append(found.value)
                if column.kind != "bytes":
                    cells += ["" if x is None else x for x in (found.low, found.high)]
            writer.writerow([*line.labels.values(), line.samples, *cells])
        return text.getvalue()


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


def cell_text(column: Column, found: Estimate) -> str:
    """A figure for people: value, and the 95 % interval in brackets."""
    if math.isnan(found.value):
        return "–"
    if column.kind == "bytes":
        return f"{found.value / 1024:.0f} KiB"
    scale, digits = (100, 1) if column.kind in ("share", "ratio") else (1, 0)
    unit = " %" if scale == 100 else ""
    text = f"{found.value * scale:.{digits}f}{unit}"
    if found.low is None or found.high is None:
        return text
    return f"{text} [{found.low * scale:.{digits}f}, {found.high * scale:.{digits}f}]"
