"""The table of families, and its place in a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from raas_jax.lab.parity.measure import POLICIES, Parity
from raas_jax.lab.runs.tables import markdown_table

BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
"""Lines of a page between which the table is."""
HEAD = (
    *("family", "variants", "logits differ by", "greedy tokens", "beyond a window"),
    *("exported bytes", "engine", "mesh of 8", "policies"),
)


def table(found: Mapping[str, Sequence[Parity]]) -> str:
    """A line for each family, of all its variants."""
    lines = [[f"`{family}`", *_cells(of_one)] for family, of_one in found.items()]
    return markdown_table(HEAD, lines, labels=1)


def _cells(variants: Sequence[Parity]) -> list[str]:
    if not variants:
        return ["0", *["-"] * (len(HEAD) - 2)]
    policies = [set(each.policies) for each in variants if each.policies is not None]
    return [
        str(len(variants)),
        f"{max(each.logits for each in variants):.0e}",
        _verdict([each.greedy for each in variants]),
        _verdict([each.windowed for each in variants]),
        _verdict([each.exported for each in variants]),
        _verdict([each.engine for each in variants]),
        _verdict([each.mesh for each in variants]),
        f"{len(set.intersection(*policies))} of {len(POLICIES)}" if policies else "-",
    ]


def _verdict(told: Sequence[bool | None]) -> str:
    """Of all variants to which it applies."""
    found = [each for each in told if each is not None]
    if not found:
        return "-"
    return "equal" if all(found) else f"differ in {found.count(False)} of {len(found)}"


def write(file: Path, text: str) -> None:
    """Writes the table into a page, between its marks, or as a file of its own.

    In a page, the lines of other families stay. Raises ValueError for a page with one mark only.
    """
    page = file.read_text("utf-8") if file.exists() else ""
    marks = page.count(BEGIN), page.count(END)
    if marks == (0, 0):
        file.write_text(f"{text.strip()}\n", "utf-8")
        return
    if marks != (1, 1):
        raise ValueError(f"{file} has {marks[0]} lines {BEGIN} and {marks[1]} lines {END}.")
    before, rest = page.split(BEGIN)
    old, after = rest.split(END)
    lines = {line[0]: line for line in [*_lines(old), *_lines(text)]}
    both = markdown_table(HEAD, [lines[family] for family in sorted(lines)], labels=1)
    file.write_text(f"{before}{BEGIN}\n{both.strip()}\n{END}{after}", "utf-8")


def _lines(table: str) -> list[list[str]]:
    """The cells of each family's line."""
    lines = table.strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
