"""The tables of a study: budgets side by side, differences from the baselines, ablations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raas_jax.lab.runs.points import Findings, Point
from raas_jax.lab.runs.tables import STAR, csv_cells, csv_text, heading, in_points, markdown_table


def study_markdown(findings: Findings) -> str:
    """All tables with their headings."""
    config = findings.config
    parts = [
        f"`{findings.model}`, {config.text('dtype')}. In brackets: 95 % intervals "
        "(Wilson's for shares, of paired differences for differences).\n"
    ]
    for task in findings.tasks:
        problems = max(len(point.samples) for point in findings.of_task(task))
        parts.append(f"\n## {task}: {problems} problems\n")
        for title, name in (
            ("Right answers", "correct"),
            ("Whole derivations right", "derivation"),
            ("Recall of milestones", "written_served"),
            ("Tokens of an answer", "tokens"),
            ("Answers that ran to the cap", "capped"),
        ):
            parts.append(f"\n### {title}\n\n{by_budget(findings, task, name)}")
        for baseline in findings.baselines:
            parts.append(
                f"\n### Right answers, difference from {baseline} (percentage points)\n\n"
                f"{differences(findings, task, baseline)}"
            )
        parts.append(f"\n### Bytes and time\n\n{costs(findings, task)}")
    for group in findings.ablations:
        parts.append(f"\n## Ablation: {group}\n\n{ablation(findings, group)}")
    if impossible := config.texts("impossible", []):
        parts.append("\n## Not run\n\n")
        parts += [f"- {reason}\n" for reason in impossible]
    return "".join(parts)


def by_budget(findings: Findings, task: str, name: str) -> str:
    """One figure of every policy, budgets side by side."""
    shown = next(heading(column) for column in findings.columns if column.name == name)
    return _across(findings, task, lambda point, _: shown.text(point.figures[name]))


def differences(findings: Findings, task: str, baseline: str) -> str:
    """Every policy against one, at the same budget of the reference."""

    def text(point: Point, budget: int) -> str:
        other = findings.find(task, baseline, budget)
        if other is None or other is point:
            return "–"
        return in_points(point.against(other))

    return _across(findings, task, text) + STAR


def costs(findings: Findings, task: str) -> str:
    """Own budget, bytes of a row of median size, and time of a step where it was measured."""

    def text(point: Point, _: int) -> str:
        time = f", {point.step_ms:.2f} ms" if point.step_ms is not None else ""
        return f"{point.own_budget or '–'} tokens, {point.bytes / 1024:.0f} KiB{time}"

    return _across(findings, task, text)


def ablation(findings: Findings, group: str) -> str:
    """One option varied: tasks side by side."""
    by_task = {task: findings.of_task(task, group) for task in findings.tasks}
    by_task = {task: points for task, points in by_task.items() if points}
    column = findings.columns[0]
    rows = []
    for policy in dict.fromkeys(point.policy for points in by_task.values() for point in points):
        here = [
            next((point for point in points if point.policy == policy), None)
            for points in by_task.values()
        ]
        figures = (None if point is None else point.figures[column.name] for point in here)
        rows.append([policy, *map(heading(column).text, figures)])
    heads = [f"{task}, budget {points[0].budget or 0}" for task, points in by_task.items()]
    return markdown_table(["Policy", *heads], rows, labels=1)


def _across(findings: Findings, task: str, text: Callable[[Point, int], str]) -> str:
    """A line for every policy, a column for every budget."""
    points = findings.of_task(task)
    budgets = sorted({point.budget for point in points if point.budget})
    rows = []
    for policy in dict.fromkeys(point.policy for point in points):
        mine = {point.budget: point for point in points if point.policy == policy}
        here = [(budget, mine.get(budget, mine.get(None))) for budget in budgets]
        rows.append([policy, *("–" if point is None else text(point, b) for b, point in here)])
    return markdown_table(["Policy", *(f"budget {b}" for b in budgets)], rows, labels=1)


def study_csv(findings: Findings) -> str:
    """One line per point, all figures unrounded, differences from every baseline."""
    rows = []
    for point in findings.points:
        row: dict[str, Any] = {
            "task": point.task,
            "policy": point.policy,
            "budget": point.budget,
            "own_budget": point.own_budget,
            "bytes": point.bytes,
            "groups": " ".join(point.groups),
            "n": len(point.samples),
            "step_ms": point.step_ms,
        }
        for name, found in point.figures.items():
            row |= csv_cells(name, found)
        for baseline in findings.baselines:
            other = findings.find(point.task, baseline, point.budget)
            difference = None if other is None else point.against(other)
            row |= csv_cells(f"minus {baseline}", difference, between=" ")
        rows.append(row)
    return csv_text(rows)
