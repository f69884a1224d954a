"""Tables, differences and pictures of a study, from the files that its run has written."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raas_jax.lab.runs.results import Results, Sample, write
from raas_jax.lab.runs.speed import SPEED, STEPS
from raas_jax.lab.runs.study import MAIN
from raas_jax.lab.runs.tables import (
    Column,
    Estimate,
    cell_text,
    estimate,
    markdown_table,
    paired,
)


@dataclasses.dataclass(frozen=True)
class Point:
    """One policy at one budget on one task.

    Attributes:
      task, entry, label: of the study's cell.
      budget, own_budget: of the reference policy, and its own; 0 without one.
      bytes: of the key/value memory of a row of median size.
      groups: which tables it belongs to.
      samples: by item.
      figures: by the column's name.
      step_ms: time of a step of a batch, milliseconds; None where it was not measured.
    """

    task: str
    entry: str
    label: str
    budget: int
    own_budget: int
    bytes: int
    groups: tuple[str, ...]
    samples: Mapping[str, Sample]
    figures: Mapping[str, Estimate]
    step_ms: float | None

    def against(self, other: Point) -> Estimate:
        """Difference of the share of right answers, over the questions that both have."""
        both = [item for item in self.samples if item in other.samples]
        mine = [bool(self.samples[item]["correct"]) for item in both]
        return paired(mine, [bool(other.samples[item]["correct"]) for item in both])


class StudyReport:
    """All points of a study's folder, finished or not."""

    def __init__(self, results: Results):
        config = results.config
        self.folder = results.folder
        self.config = config
        self.columns = [Column(**column) for column in config["columns"]]
        self.points: list[Point] = []
        steps = _read(results.folder / STEPS)
        for cell in config["cells"]:
            samples = results.of(cell["task"], cell["label"])
            if not samples:
                continue
            self.points.append(
                Point(
                    cell["task"],
                    cell["entry"],
                    cell["label"],
                    cell["budget"],
                    cell["own_budget"],
                    cell["bytes"],
                    tuple(cell["groups"]),
                    {str(sample["item"]): sample for sample in samples},
                    {column.name: estimate(column, samples) for column in self.columns},
                    steps["milliseconds"].get(cell["label"])
                    if cell["task"] == steps.get("task")
                    else None,
                )
            )
        self.speed: dict[str, list[dict[str, Any]]] = _read(results.folder / SPEED)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(point.task for point in self.points))

    @property
    def reference(self) -> str:
        return str(self.config["reference"])

    @property
    def baselines(self) -> list[str]:
        """What every policy is compared with: the reference, the controls, and the ceiling."""
        ceiling = [self.config["ceiling"]] if self.config["ceiling"] else []
        return [self.reference, *self.config["controls"], *ceiling]

    def of(self, task: str, group: str = MAIN) -> list[Point]:
        """Points of a task in a group, in the order of the study."""
        found = [point for point in self.points if point.task == task and group in point.groups]
        if group == MAIN:
            return found
        entries = self.config["study"]["ablations"][group]["policies"]
        order = {entry["label"]: number for number, entry in enumerate(entries)}
        return sorted(found, key=lambda point: order[point.entry])

    def find(self, task: str, entry: str, budget: int) -> Point | None:
        """The point of a policy at a budget; one without a budget serves all."""
        for point in self.points:
            if (point.task, point.entry) == (task, entry) and point.budget in (budget, 0):
                return point
        return None

    def groups(self) -> list[str]:
        """Labels of the ablations."""
        named = [group for point in self.points for group in point.groups]
        return [group for group in dict.fromkeys(named) if group != MAIN]

    def markdown(self) -> str:
        """All tables with their headings."""
        parts = [
            f"`{self.config['model']}`, {self.config['dtype']}. In brackets: 95 % intervals "
            "(Wilson's for shares, of paired differences for differences).\n"
        ]
        for task in self.tasks:
            problems = max(len(point.samples) for point in self.of(task))
            parts.append(f"\n## {task}: {problems} problems\n")
            for title, name in (
                ("Right answers", "correct"),
                ("Whole derivations right", "derivation"),
                ("Recall of milestones", "written_served"),
                ("Tokens of an answer", "tokens"),
                ("Answers that ran to the cap", "capped"),
            ):
                parts.append(f"\n### {title}\n\n{self.by_budget(task, name)}")
            for baseline in self.baselines:
                parts.append(
                    f"\n### Right answers, difference from {baseline} (percentage points)\n\n"
                    f"{self.differences(task, baseline)}"
                )
            parts.append(f"\n### Bytes and time\n\n{self.costs(task)}")
        for group in self.groups():
            parts.append(f"\n## Ablation: {group}\n\n{self.ablation(group)}")
        if self.config["impossible"]:
            parts.append("\n## Not run\n\n")
            parts += [f"- {reason}\n" for reason in self.config["impossible"]]
        return "".join(parts)

    def by_budget(self, task: str, name: str) -> str:
        """One figure of every policy, budgets side by side."""
        column = next(column for column in self.columns if column.name == name)
        return self._across(task, lambda point, _: cell_text(column, point.figures[name]))

    def differences(self, task: str, baseline: str) -> str:
        """Of every policy from one, at the same budget of the reference."""

        def text(point: Point, budget: int) -> str:
            other = self.find(task, baseline, budget)
            if other is None or other is point:
                return "–"
            found = point.against(other)
            low, high = (found.value if x is None else x for x in (found.low, found.high))
            sign = " *" if low > 0 or high < 0 else ""
            return f"{100 * found.value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]{sign}"

        return self._across(task, text) + "\n\\* the interval leaves out zero.\n"

    def costs(self, task: str) -> str:
        """Own budget, bytes of a row of median size, and time of a step where it was measured."""

        def text(point: Point, _: int) -> str:
            time = f", {point.step_ms:.2f} ms" if point.step_ms is not None else ""
            return f"{point.own_budget or '–'} tokens, {point.bytes / 1024:.0f} KiB{time}"

        return self._across(task, text)

    def ablation(self, group: str) -> str:
        """One option varied: tasks side by side."""
        tasks = [task for task in self.tasks if self.of(task, group)]
        entries = list(dict.fromkeys(p.entry for task in tasks for p in self.of(task, group)))
        column = self.columns[0]
        rows = []
        for entry in entries:
            row = [entry]
            for task in tasks:
                here = [point for point in self.of(task, group) if point.entry == entry]
                row.append(cell_text(column, here[0].figures[column.name]) if here else "–")
            rows.append(row)
        budgets = {task: self.of(task, group)[0].budget for task in tasks}
        return markdown_table(
            ["Policy", *(f"{task}, budget {budgets[task]}" for task in tasks)], rows, labels=1
        )

    def _across(self, task: str, text: Callable[[Point, int], str]) -> str:
        """A line for every policy, a column for every budget."""
        points = self.of(task)
        budgets = sorted({point.budget for point in points if point.budget})
        rows = []
        for entry in dict.fromkeys(point.entry for point in points):
            mine = {point.budget: point for point in points if point.entry == entry}
            cells = [mine.get(budget, mine.get(0)) for budget in budgets]
            row = [
                "–" if point is None else text(point, budget)
                for point, budget in zip(cells, budgets, strict=True)
            ]
            rows.append([entry, *row])
        return markdown_table(["Policy", *(f"budget {b}" for b in budgets)], rows, labels=1)

    def csv(self) -> str:
        """One line per point, all figures unrounded, differences from every baseline."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        heads = ["task", "policy", "budget", "own_budget", "bytes", "groups", "n", "step_ms"]
        for column in self.columns:
            heads += [column.name, f"{column.name}_low", f"{column.name}_high"]
        for baseline in self.baselines:
            heads += [f"minus {baseline}", f"minus {baseline} low", f"minus {baseline} high"]
        writer.writerow(heads)
        for point in self.points:
            line: list[Any] = [
                point.task,
                point.entry,
                point.budget or "",
                point.own_budget or "",
                point.bytes,
                " ".join(point.groups),
                len(point.samples),
                point.step_ms,
            ]
            for column in self.columns:
                line += _three(point.figures[column.name])
            for baseline in self.baselines:
                other = self.find(point.task, baseline, point.budget)
                line += ["", "", ""] if other is None else _three(point.against(other))
            writer.writerow(line)
        return text.getvalue()


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def _three(found: Estimate) -> list[float | str]:
    return [found.value, *("" if x is None else x for x in (found.low, found.high))]


def report_study(results: Results) -> str:
    """Writes `table.md`, `table.csv` and the pictures into the folder; gives the Markdown.

    Without matplotlib the pictures are left out, with a line that says so.
    """
    made = StudyReport(results)
    text = made.markdown()
    try:
        from raas_jax.lab.runs.plots import draw_study
    except ImportError:
        text += "\nNo pictures: `pip install 'raas-jax[plots]'` brings matplotlib.\n"
    else:
        files: Sequence[Path] = draw_study(made)
        text += "\nPictures: " + ", ".join(f"`{file.name}`" for file in files) + "\n"
    write(made.folder / "table.md", text)
    write(made.folder / "table.csv", made.csv())
    return text
