"""Ranges of the laboratory's counts: what is above them is a slip, and would never end."""

from __future__ import annotations

from typing import Any

from raas_jax import checks

MOST_PROBLEMS = 2**20
MOST_SAMPLES = checks.MOST_SAMPLES
MOST_ROWS = checks.MOST_ROWS
MOST_DEFINITIONS = 96  # As many as there are names.
MOST_WORKERS = 256
MOST_TURNS = 10_000
MOST_SECONDS = 10.0**6
SEEDS = (-(2**63), 2**64 - 1)


def check_counts(given: Any, **ranges: tuple[int, int]) -> None:
    """Makes Python ints of some fields of a frozen dataclass; None stays where it is the default.

    Raises TypeError or ValueError for a field that is no int, or not in its range.
    """
    for name, (least, most) in ranges.items():
        value = getattr(given, name)
        if value is not None or getattr(type(given), name, 0) is not None:
            object.__setattr__(given, name, checks.integer(name, value, least, most))
