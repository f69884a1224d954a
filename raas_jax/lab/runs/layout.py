"""What the files of a run must say, checked as they are read; each kind of run has its fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raas_jax import checks, files
from raas_jax.files import Fields
from raas_jax.lab.tasks.base import KINDS, Column

RUN, SAMPLES, BAD, LOCK = "run.json", "samples.jsonl", "samples.bad.jsonl", ".lock"
SPEED, STEPS = "speed.json", "steps.json"
DENSE = "dense"  # What the points of a comparison on text are compared with.
KEY = ("task", "policy", "item", "sample")  # What names a sample within a run.
MOST = 2**63 - 1
Sample = dict[str, Any]
Take = Callable[[Fields, str], Any]


def flag(sample: Fields, name: str) -> Any:
    return sample.flag(name)


def number(sample: Fields, name: str) -> Any:
    return sample.real(name)


def seconds(sample: Fields, name: str) -> Any:
    return sample.real(name, "seconds from 0 to 1e12", 0, 1e12)


def count(sample: Fields, name: str) -> Any:
    return sample.integer(name, 0, MOST)


def text(sample: Fields, name: str) -> Any:
    return sample.text(name)


def numbers(sample: Fields, name: str) -> Any:
    return sample.reals(name, "finite numbers", -math.inf)


def span(sample: Fields, name: str) -> Any:
    return sample.integers(name, 0)


NAMED: dict[str, Take] = dict(zip(KEY, (text, text, text, count), strict=True))
ANSWER: dict[str, Take] = {"correct": flag}
FIDELITY: dict[str, Take] = {
    "span": span,
    **dict.fromkeys(("nll", "kl", "agree"), numbers),
    "seconds": seconds,
    "kv_bytes": count,
}
BENCHMARK: dict[str, Take] = {
    "tokens": count,
    "capped": flag,
    "finish_reason": text,
    "start": count,
    "elapsed": seconds,
}
ANSWERED: dict[str, Take] = {"seconds": seconds, "kv_bytes": count, "kv_bytes_of_length": count}
"""What a benchmark's sample has besides, if it could be answered."""
OF_COLUMN: dict[str, Take] = {"share": flag, "mean": number, "bytes": number, "ratio": number}


class Layout:
    """The configuration of a run, and what its samples must have.

    Attributes:
      config: named fields of the configuration.
      kind: "study", "benchmark", "fidelity", or "" for a task with its cache recorded.
      columns: of the tables, where the configuration says them.
    """

    def __init__(self, config: Any, file: Path):
        """Raises `FileError` for a kind or columns that there are not."""
        remedy = "Restore the file, or give another folder for a new run."
        self.config = Fields(config, file, "config", remedy)
        self.kind: str = self.config.choice("kind", ("", "study", "benchmark", "fidelity"), "")
        shown = self.kind != "benchmark" and "columns" in self.config.values
        listed = self.config.each("columns") if shown else []
        for column in listed:
            column.choice("kind", KINDS)
            for name in ("name", "title"):
                column.text(name)
            column.text("per", "")
        self.columns = [column.build(Column) for column in listed]
        self._needed = NAMED | (FIDELITY if self.kind == "fidelity" else ANSWER)
        if self.kind == "benchmark":
            self._needed |= BENCHMARK
        for each in self.columns:
            self._needed[each.name] = OF_COLUMN[each.kind]
            if each.kind == "ratio":
                self._needed[each.per] = number

    def sample(self, line: str) -> Sample:
        """The sample of a line. Raises ValueError where it is none of this kind of run."""
        if not line.endswith("\n"):
            raise ValueError("a line without its end may be a shorter number than was meant")
        found = Fields(files.parse_json(line), SAMPLES)
        for name, take in self._needed.items():
            take(found, name)
        if self.kind == "benchmark" and found.values["finish_reason"] != "error":
            for name, take in ANSWERED.items():
                take(found, name)
        found.text("error", None)
        return dict(found.values)

    def cells(self) -> list[dict[str, Any]]:
        """What the configuration says of each point, under the names of `points.Point`."""
        if self.kind == "study":
            return [_of_study(cell) for cell in self.config.each("cells")]
        if self.kind == "fidelity":
            kinds = dict.fromkeys(text.text("kind") for text in self.config.each("texts"))
            labels = [DENSE, *(point.text("label") for point in self.config.each("points"))]
            return [{"task": kind, "label": label} for kind in kinds for label in labels]
        task = self.config.inner("task").text("name")
        return [
            {
                "task": task,
                "policy": policy.text("Policy"),
                "label": policy.text("label"),
                "budget": policy.integer("budget", 1, checks.MOST_TOKENS, None),
            }
            for policy in self.config.each("policies")
        ]


def _of_study(cell: Fields) -> dict[str, Any]:
    found = {"task": cell.text("task"), "policy": cell.text("entry"), "label": cell.text("label")}
    for name in ("budget", "own_budget", "bytes"):  # Where there is no budget, they have a zero.
        found[name] = cell.integer(name, 0, MOST) or None
    return found | {"groups": cell.texts("groups")}


def read_speed(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """`speed.json` of a study: by policy, time and bytes at growing lengths; empty without one."""
    found = _times(folder / SPEED)
    for label in found.values:
        for timing in found.each(label):
            timing.integer("tokens", 1)
            timing.integer("kv_bytes", 0, MOST)
            timing.real("ms_per_token", "a number above 0", 0)
    return dict(found.values)


def read_steps(folder: Path) -> dict[str, Any]:
    """`steps.json` of a study: by policy, milliseconds of a step; empty where there is none."""
    found = _times(folder / STEPS)
    if not found.values:
        return {}
    times = found.inner("milliseconds")
    for label in times.values:
        times.real(label, "a number above 0", 0)
    named = {"task": found.text("task"), "beside": found.text("beside")}
    return named | {"milliseconds": dict(times.values)}


def _times(file: Path) -> Fields:
    remedy = "Remove it, and the same command measures the times anew."
    try:
        values: Mapping[str, Any] = files.read_fields(file, remedy)
    except FileNotFoundError:
        values = {}
    return Fields(values, file, remedy=remedy)
