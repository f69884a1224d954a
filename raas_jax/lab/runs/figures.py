"""The pictures of a run, as PNG files: a panel for each task, the same look for each policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from raas_jax.lab.runs.points import Findings, Point
from raas_jax.lab.runs.statistics import Estimate

# Told apart also by colour-blind readers (Okabe and Ito's colours), and by their markers.
_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6BB1", "#666633")
_MARKERS = "osD^v<>pP*X"
_REFERENCE, _CEILING, _CONTROL = "#D55E00", "#000000", "#8a8a8a"
_RIGHT = "right answers, %"
BINS = 8
"""Points of a curve over lengths, each of as many answers."""


def draw(findings: Findings, folder: Path) -> list[Path]:
    """Draws every picture that the run has data for, and gives the files."""
    if not any(point.answered for point in findings.points):
        return []
    pictures = PICTURES[findings.kind]
    return save({name: picture(findings) for name, picture in pictures.items()}, folder)


def save(figures: Mapping[str, Figure | None], folder: Path) -> list[Path]:
    """Writes those figures that there are, by the names of their files, and gives the files."""
    files = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=110, bbox_inches="tight")
            files.append(folder / name)
    return files


def accuracy_against_budget(findings: Findings) -> Figure | None:
    """Share of right answers over the budget; a policy without one is a line across."""
    return _curves(findings, "correct", _RIGHT, "budget, tokens", across=True)


def accuracy_against_bytes(findings: Findings) -> Figure | None:
    """Share of right answers over the bytes of a row's keys, values and metadata."""
    x_label = "KiB of keys, values and metadata per sequence"
    return _curves(findings, "correct", _RIGHT, x_label, lambda point: point.bytes / 1024)


def accuracy_against_time(findings: Findings) -> Figure | None:
    """Share of right answers over the time of a step of the batch."""
    x_label = "milliseconds per step of the batch"
    return _curves(findings, "correct", _RIGHT, x_label, lambda p: p.step_ms, joined=False)


def recall_against_budget(findings: Findings) -> Figure | None:
    """Share of look-ups that found a source in the cache, over the budget."""
    y_label = "milestones found when looked up, %"
    return _curves(findings, "written_served", y_label, "budget of the reference policy, tokens")


def _curves(
    findings: Findings,
    name: str,
    y_label: str,
    x_label: str,
    place: Callable[[Point], float | None] | None = None,
    *,
    joined: bool = True,
    across: bool = False,
) -> Figure | None:
    """A figure of every policy, over the budget or over what `place` says of a point."""
    at = place or (lambda point: point.budget)
    tasks = [x for x in findings.tasks if across or any(at(p) for p in findings.of_task(x))]
    if not tasks:
        return None
    figure, axes = panels(len(tasks), height=4.6)
    for axis, task in zip(axes, tasks, strict=True):
        points = sorted(findings.of_task(task), key=lambda point: point.budget or 0)
        for policy in findings.policies:
            mine = [point for point in points if point.policy == policy]
            placed = [(x, p.figures[name]) for p in mine if (x := at(p)) is not None]
            look = _look(findings, policy)
            if placed:
                xs, found = [x for x, _ in placed], [figure for _, figure in placed]
                ys = [100 * each.value for each in found]
                axis.plot(xs, ys, **look if joined else look | {"linestyle": "none"})
                if policy in (findings.baselines or findings.policies):
                    bars = {"color": look["color"], "linewidth": 1, "alpha": 0.5, "fmt": "none"}
                    axis.errorbar(xs, ys, yerr=_reach(found), **bars)
            elif across and mine:
                value, reach = 100 * mine[0].figures[name].value, _reach([mine[0].figures[name]])
                axis.axhline(value, **look | {"marker": "", "linestyle": "--"})
                span = value - reach[0][0], value + reach[1][0]
                axis.axhspan(*span, color=look["color"], alpha=0.1, linewidth=0)
        if place is None:
            budgets = sorted({point.budget for point in points if point.budget})
            axis.set_xscale("log", base=2)
            axis.set_xticks(budgets, map(str, budgets))
        axis.set_title(task)
        axis.set_xlabel(x_label)
    axes[0].set_ylabel(y_label)
    legend(figure, axes)
    return figure


def time_against_length(findings: Findings) -> Figure:
    """Seconds from the start of a row to its end, over the tokens that it wrote."""
    return _over_lengths(findings, "completion time, s", lambda s: s["seconds"], scattered=True)


def memory_against_length(findings: Findings) -> Figure:
    """Bytes of keys, values and metadata that an answer of this length takes."""
    y_label = "keys, values and metadata, MiB"
    return _over_lengths(findings, y_label, lambda sample: sample["kv_bytes_of_length"] / 2**20)


def _over_lengths(
    findings: Findings,
    y_label: str,
    value: Callable[[dict[str, Any]], float],
    *,
    scattered: bool = False,
) -> Figure:
    figure, axes = panels(len(findings.tasks), height=4.6)
    for axis, task in zip(axes, findings.tasks, strict=True):
        for number, point in enumerate(findings.of_task(task)):
            if point.answered:
                pairs = sorted((sample["tokens"], value(sample)) for sample in point.answered)
                style = numbered(number)
                if scattered:
                    axis.scatter(*zip(*pairs, strict=True), s=6, alpha=0.25, linewidths=0, **style)
                axis.plot(*_medians(pairs), markersize=4, label=point.label, **style)
        axis.set_title(task)
        axis.set_xlabel("decode length, tokens")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel(y_label)
    legend(figure, axes)
    return figure


def _medians(pairs: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Medians of both, over parts of the sorted pairs of about the same size."""
    size = -(-len(pairs) // BINS)
    parts: dict[float, list[float]] = {}
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        # Many answers of one length make several parts of it: they count as one.
        parts.setdefault(median(x for x, _ in part), []).extend(y for _, y in part)
    return list(parts), [median(values) for values in parts.values()]


def lengths(findings: Findings) -> Figure:
    """How long answers are, and how many ran to the cap; of a study, at the smallest budget."""
    figure, axes = panels(len(findings.tasks), height=6.0)
    for axis, task in zip(axes, findings.tasks, strict=True):
        shown = [point for point in findings.of_task(task) if point.answered][::-1]
        names = [point.label for point in shown]
        if findings.kind == "study":
            smallest = min((point.budget for point in shown if point.budget), default=None)
            shown = [point for point in shown if point.budget in (smallest, None)]
            names, task = [point.policy for point in shown], f"{task}, budget {smallest or '–'}"
        boxes = [[sample["tokens"] for sample in point.answered] for point in shown]
        axis.boxplot(boxes, orientation="horizontal", widths=0.6, whis=(5, 95), showfliers=False)
        capped = [f"{100 * point.figures['capped'].value:.0f} % to the cap" for point in shown]
        ticks = [f"{name}\n{share}" for name, share in zip(names, capped, strict=True)]
        axis.set_yticks(range(1, len(shown) + 1), ticks, fontsize=8)
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("tokens of an answer (quartiles, 5-95 %)")
    return figure


def distance_to_ceiling(findings: Findings) -> Figure | None:
    """Percentage points of right answers that a policy lies below Belady's."""
    shown, ceiling = {}, findings.ceiling
    for task in findings.tasks if ceiling else ():
        points = [point for point in findings.of_task(task) if point.policy != ceiling]
        budgets = sorted({point.budget for point in points if point.budget})
        middle = budgets[len(budgets) // 2] if budgets else None
        if ceiling and (other := findings.find(task, ceiling, middle)):
            bars = [(p.policy, p.against(other)) for p in points if p.budget == middle]
            shown[f"{task}, budget {middle}"] = sorted(bars, key=lambda bar: bar[1].value)
    if not shown:
        return None
    figure, axes = panels(len(shown), height=6.0)
    for axis, (title, bars) in zip(axes, shown.items(), strict=True):
        names, found = [name for name, _ in bars], [each for _, each in bars]
        style = {"color": [_colour(findings, name) for name in names], "ecolor": "#555555"}
        values = [100 * each.value for each in found]
        axis.barh(names, values, xerr=_reach(found), height=0.7, **style)
        axis.axvline(0, color=_CEILING, linewidth=1)
        axis.set_title(title)
        axis.set_xlabel(f"right answers beside {ceiling}, points")
    return figure


def ablations(findings: Findings) -> Figure | None:
    """Right answers under each option, a panel for every ablation."""
    if not findings.ablations:
        return None
    figure, axes = panels(len(findings.ablations), height=3.2, columns=3)
    for axis, group in zip(axes, findings.ablations, strict=True):
        by_task = {task: findings.of_task(task, group) for task in findings.tasks}
        for number, (task, points) in enumerate((t, ps) for t, ps in by_task.items() if ps):
            found = [point.figures["correct"] for point in points]
            values = [100 * each.value for each in found]
            style = numbered(number) | {"markersize": 5, "linewidth": 1, "capsize": 2}
            label = f"{task}, {points[0].budget}"
            axis.errorbar(range(len(points)), values, yerr=_reach(found), label=label, **style)
            names = [point.policy for point in points]
            axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axis.set_title(group, fontsize=10)
        axis.legend(fontsize=7)
    for axis in axes[:: min(3, len(axes))]:
        axis.set_ylabel(_RIGHT)
    return figure


def against_length(findings: Findings) -> Figure | None:
    """Memory, time of a token, and time of the whole answer, over its length."""
    if not findings.speed:
        return None
    figure, axes = panels(3, height=3.8)
    for number, (policy, timings) in enumerate(findings.speed.items()):
        tokens = [timing["tokens"] for timing in timings]
        style = numbered(number) | {"color": _colour(findings, policy, number), "markersize": 4}
        pairs = zip([0, *tokens], timings, strict=False)
        spent = ((each["tokens"] - before) * each["ms_per_token"] for before, each in pairs)
        axes[0].plot(tokens, [each["kv_bytes"] / 1024 for each in timings], label=policy, **style)
        axes[1].plot(tokens, [each["ms_per_token"] for each in timings], **style)
        axes[2].plot(tokens, [ms / 1e3 for ms in accumulate(spent)], **style)
    names = ("KiB of keys, values, metadata", "milliseconds per token", "seconds to this length")
    for axis, name in zip(axes, names, strict=True):
        axis.set_xlabel("tokens generated")
        axis.set_title(name, fontsize=10)
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    return figure


PICTURES: dict[str, dict[str, Callable[[Findings], Figure | None]]] = {
    "benchmark": {  # The first three are those of the RaaS paper (arXiv 2502.11147).
        "accuracy.png": accuracy_against_budget,
        "time.png": time_against_length,
        "memory.png": memory_against_length,
        "lengths.png": lengths,
    },
    "study": {
        "accuracy_bytes.png": accuracy_against_bytes,
        "recall.png": recall_against_budget,
        "lengths.png": lengths,
        "accuracy_time.png": accuracy_against_time,
        "ceiling.png": distance_to_ceiling,
        "ablations.png": ablations,
        "length.png": against_length,
    },
}


def _reach(found: Sequence[Estimate]) -> list[list[float]]:
    """How far intervals reach below and above their values, in percentage points."""
    return [
        [0.0 if f.low is None else 100 * max(0.0, f.value - f.low) for f in found],
        [0.0 if f.high is None else 100 * max(0.0, f.high - f.value) for f in found],
    ]


def panels(count: int, *, height: float, columns: int = 4) -> tuple[Figure, Sequence[Any]]:
    """A figure of so many panels, each `height` inches high, and their axes."""
    columns = min(count, columns)
    rows = -(-count // columns)
    # Not through pyplot, whose backend and open figures belong to the caller.
    figure = Figure(figsize=(max(6.4, 4.8 * columns), height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for number, axis in enumerate(axes):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_visible(number < count)
    return figure, axes[:count]


def _colour(findings: Findings, policy: str, number: int = 0) -> str:
    if policy == findings.reference:
        return _REFERENCE
    if policy == findings.ceiling:
        return _CEILING
    return _CONTROL if policy in findings.controls else _COLOURS[number % len(_COLOURS)]


def numbered(number: int) -> dict[str, Any]:
    """Colour and marker of the curve with this number."""
    return {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}


def _look(findings: Findings, policy: str) -> dict[str, Any]:
    """Solid for policies, strong for the reference, broken for controls, dotted for the ceiling."""
    number, strong = findings.policies.index(policy), policy == findings.reference
    line_style = "--" if policy in findings.controls else "-"
    return numbered(number) | {
        "color": _colour(findings, policy, number),
        "linestyle": ":" if policy == findings.ceiling else line_style,
        "markersize": 6 if strong else 4,
        "linewidth": 2.5 if strong else 1.2,
        "zorder": 5 if strong else 3,
        "label": policy,
    }


def legend(figure: Figure, axes: Sequence[Any]) -> None:
    """One legend beside all panels."""
    named: dict[str, Any] = {}
    for handles, labels in (axis.get_legend_handles_labels() for axis in axes):
        named |= zip(labels, handles, strict=True)
    style = {"loc": "outside right center", "fontsize": 8, "frameon": False}
    figure.legend(list(named.values()), list(named), **style)
