"""`metrics.jsonl`: the scores of a training run every so many steps, the same after a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raas_jax import files

FILE = "metrics.jsonl"
EVERY = 25
"""Steps from one line to the next; each line has the means of as many steps."""
AVERAGED = ("loss", "token_accuracy", "exact", "size")
Scores = dict[str, float]


class Metrics:
    """Adds lines to the file in a folder of checkpoints.

    Attributes:
      recent: scores of the last steps, as many as a line averages; a checkpoint keeps them.
      seconds: that the steps before took, by the newest line.
    """

    def __init__(self, folder: Path, step: int, recent: Sequence[Scores] = ()):
        """Goes on after `step`: lines of later steps, whose work was lost, are dropped."""
        self._file = folder / FILE
        self.recent = list(recent)
        kept = [line for line in read_metrics(self._file) if line["step"] <= step]
        self.seconds = float(kept[-1]["seconds"]) if kept else 0.0
        files.replace_text(self._file, "".join(json.dumps(line) + "\n" for line in kept))

    def count(self, scores: Mapping[str, Any]) -> None:
        """The scores of one more step, kept as they are: to read them would wait for the step."""
        self.recent = [*self.recent[1 - EVERY :], {name: scores[name] for name in AVERAGED}]

    def settle(self) -> list[Scores]:
        """The recent scores as numbers. Raises ValueError for a loss that is none."""
        self.recent = [{name: float(value) for name, value in each.items()} for each in self.recent]
        if not all(math.isfinite(each["loss"]) for each in self.recent):
            raise ValueError("the loss is not finite any more; use smaller learning rates.")
        return self.recent

    def means(self) -> Scores:
        """Of the recent steps, rounded."""
        recent = self.settle()
        return {
            name: round(sum(each[name] for each in recent) / len(recent), 5) for name in AVERAGED
        }

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line."""
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def read_metrics(file: Path) -> list[Scores]:
    """One entry per step, of whole lines; of two lines of one step the later counts.

    Raises `FileError` for what is no file; there are no entries where there is none.
    """
    by_step: dict[float, Scores] = {}
    try:
        for line in files.lines(file):
            if (found := _parse(line)) is not None:
                by_step[found["step"]] = found
    except FileNotFoundError:
        pass
    return [by_step[step] for step in sorted(by_step)]


def _parse(line: str) -> Scores | None:
    """A line, if it is a whole one of a run and not cut by a kill."""
    try:
        found = files.parse_json(line)
    except ValueError:
        return None
    whole = line.endswith("\n") and isinstance(found, dict)
    if not whole or not found.keys() >= {"step", "seconds", *AVERAGED}:
        return None
    return found if all(isinstance(value, int | float) for value in found.values()) else None
