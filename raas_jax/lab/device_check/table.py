"""All that a check found, in one table for an issue."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from raas_jax.lab.device_check.journal import Row
from raas_jax.lab.runs.tables import markdown_table

SLOWER = 1.1
"""Times its floor from which a figure is named."""


def line(row: Row) -> str:
    """One row, as it is told while a check runs."""
    section, what = row["section"], row["what"]
    if row["kind"] == "figure":
        over = "" if row["over_floor"] is None else f", {_times(row['over_floor'])} its floor"
        return f"{section}: {what}: {_value(row['value'], row['unit'])}{over}"
    if row["kind"] == "kernel":
        return f"{section}: {what}: {_verdict(row)}"
    if row["kind"] == "fact":
        return f"{section}: {what} {row['value']}"
    if row["kind"] == "missing":
        return f"{section}: {what}: {row['why']}"
    return f"{section}: {row['how']}, {row['seconds']:.0f} s"


def table(rows: Sequence[Row]) -> str:
    """Markdown: the device, every figure beside its floor, what is slow, and what is missing."""
    parts = [f"### raas-jax device-check\n\n{_about(rows)}\n"]
    lines = [*_kernels(rows), *_figures(rows)]
    if lines:
        parts += [markdown_table(HEAD, lines, labels=2), FLOORS]
    for title, found in (("Slower than the floor", _slow(rows)), ("Missing", _missing(rows))):
        if found:
            parts.append(f"{title}:\n" + "".join(f"- {each}\n" for each in found))
    return "\n".join(parts)


HEAD = ("section", "what", "measured", "floor", "times its floor (share)")
FLOORS = """A floor is what must be read or written once, over the bandwidth of a large copy; of a \
prompt, its multiplications and additions over those of a large product of matrices.
"""


def wrong(rows: Sequence[Row]) -> list[Row]:
    """Kernels that disagree with their references."""
    return [row for row in rows if row["kind"] == "kernel" and row["right"] is False]


def failed(rows: Sequence[Row]) -> list[Row]:
    """Sections that ended before they were done."""
    return [row for row in rows if row["kind"] == "status" and row["failed"]]


def _about(rows: Sequence[Row]) -> str:
    facts: dict[str, Any] = {row["what"]: row["value"] for row in rows if row["kind"] == "fact"}
    if not facts:
        return "Nothing is known of the device."
    memory = facts.pop("memory", None)
    first = f"{facts.pop('device', '?')} ({facts.pop('platform', '?')})"
    if (count := facts.pop("devices", 1)) != 1:
        first += f", one of {count}"
    if memory:
        first += f", {memory / 2**30:.1f} GiB"
    model = f"{facts.pop('model', '?')}'s shape, {facts.pop('dtype', '?')}"
    return ", ".join([first, model, *(f"{name} {value}" for name, value in facts.items())])


def _kernels(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each operation, and one for each case that is wrong."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == "kernel":
            by_name.setdefault(row["what"].partition(",")[0], []).append(row)
    lines = []
    for name, own in by_name.items():
        right = [row for row in own if row["right"]]
        asked = [row for row in own if row["right"] is not None]
        said = f"{len(right)} of {len(asked)} right" if asked else "no kernel"
        if right:
            said += f", {_error(max(row['error'] for row in right))}"
        if asked and len(asked) < len(own):
            said += f"; {len(own) - len(asked)} declined"
        lines.append([own[0]["section"], name, said, "", ""])
        lines += [[row["section"], row["what"], _verdict(row), "", ""] for row in wrong(own)]
    return lines


def _figures(rows: Sequence[Row]) -> list[list[str]]:
    return [
        [
            *(row["section"], row["what"], _value(row["value"], row["unit"])),
            "" if row["floor"] is None else _value(row["floor"], row["unit"]),
            "" if row["over_floor"] is None else _with_share(row["over_floor"]),
        ]
        for row in rows
        if row["kind"] == "figure"
    ]


def _slow(rows: Sequence[Row]) -> list[str]:
    """Worst first."""
    slow = [row for row in rows if row["kind"] == "figure" and (row["over_floor"] or 0) >= SLOWER]
    return [
        f"{row['what']}: {_times(row['over_floor'])}, "
        f"{_value(row['value'] - row['floor'], row['unit'])} more than the floor"
        for row in sorted(slow, key=lambda row: -row["over_floor"])
    ]


def _missing(rows: Sequence[Row]) -> list[str]:
    found = [f"{row['section']}: {row['how']}" for row in failed(rows)]
    found += [f"{row['what']}: {row['why']}" for row in rows if row["kind"] == "missing"]
    return [each.replace("|", "/") for each in found]


def _verdict(row: Row) -> str:
    if row["right"] is None:
        return f"no kernel: {row['why']}"
    return f"right, {_error(row['error'])}" if row["right"] else f"WRONG: {row['why']}"


def _error(error: float) -> str:
    return f"error {error:.0e}" if error else "to the bit"


def _value(value: Any, unit: str) -> str:
    """Three digits, or all before the point."""
    if not isinstance(value, float | int):
        return f"{value} {unit}"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 9)}f} {unit}"


def _times(value: Any) -> str:
    return f"{value:.2f} x" if isinstance(value, float) else str(value)


def _with_share(value: Any) -> str:
    """A multiple of the floor, and what it leaves of the bandwidth: that inverted."""
    return _times(value) + (f" ({1 / value:.0%})" if isinstance(value, float) else "")
