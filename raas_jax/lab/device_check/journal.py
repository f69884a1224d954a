"""What a check has found so far: a JSON object a line, on disk as soon as it is known."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from raas_jax import checks
from raas_jax.lab.bench.turns import ran_out

Kind = Literal["fact", "figure", "kernel", "missing", "status"]
Row = dict[str, Any]
"""`kind`, `section`, `what`, and what the kind needs; see `Journal`."""


@dataclasses.dataclass(frozen=True)
class Journal:
    """Writes rows of one section into the file that all of them share."""

    file: Path
    section: str

    def write(self, kind: Kind, what: str, **more: Any) -> None:
        """Adds a row; it survives whatever happens to the process next."""
        row = {"kind": kind, "section": self.section, "what": what, **more}
        line = json.dumps({name: _plain(value) for name, value in row.items()})
        # A process that was ended may have left half a line, which ends here.
        start = "\n" if _ends_within_a_line(self.file) else ""
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(f"{start}{line}\n")
            out.flush()
            os.fsync(out.fileno())

    def fact(self, what: str, value: Any) -> None:
        """Something that was not measured, such as a version."""
        self.write("fact", what, value=value)

    def figure(
        self, what: str, value: float, unit: str, *, floor: float | None = None, **more: Any
    ) -> None:
        """A measurement; `floor`, in the same unit, is the least that it could be."""
        over = None if floor is None else value / floor
        self.write("figure", what, value=value, unit=unit, floor=floor, over_floor=over, **more)

    def kernel(self, what: str, right: bool | None, error: float | None, why: str = "") -> None:
        """Whether a kernel agrees with its reference; None where it declines these arguments."""
        self.write("kernel", what, right=right, error=error, why=why)

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What goes wrong inside is a row, and the section goes on."""
        try:
            yield
        except Exception as error:
            why = "out of memory" if ran_out(error) else said(error)
            self.write("missing", what, why=why)


def said(error: BaseException) -> str:
    """The kind of an error and what it says first."""
    return f"{type(error).__name__}: {checks.first_line(error)}"


def read(file: Path) -> list[Row]:
    """All whole rows; a process that was ended may have left half of one."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            if isinstance(row := json.loads(line), dict):
                rows.append(row)
    return rows


def _ends_within_a_line(file: Path) -> bool:
    try:
        with open(file, "rb") as found:
            found.seek(-1, os.SEEK_END)
            return found.read() != b"\n"
    except OSError:  # There is no file, or nothing in it.
        return False


def _plain(value: Any) -> Any:
    """JSON has no infinities and no NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
