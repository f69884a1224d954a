"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of numbers, its first column among them."""
    from raas_jax.lab.runs.tables import markdown_table

    return markdown_table(head, rows, labels=0)
