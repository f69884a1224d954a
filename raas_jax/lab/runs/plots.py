"""Pictures of a study: one file each, all from `StudyReport`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from raas_jax.lab.runs.study_report import Point, StudyReport
    from raas_jax.lab.runs.tables import Estimate

# Told apart also by colour-blind readers (Okabe and Ito's colours), and by their markers.
_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6BB1", "#666633")
_MARKERS = "osD^v<>pP*X"
_REFERENCE, _CEILING, _CONTROL = "#D55E00", "#000000", "#8a8a8a"


def draw_study(report: StudyReport) -> list[Path]:
    """Draws every picture that the study has data for, as PNG files in its folder."""
    pictures: list[tuple[str, Callable[[StudyReport], Any]]] = [
        ("accuracy_bytes.png", accuracy_against_bytes),
        ("recall.png", recall_against_budget),
        ("lengths.png", lengths),
    ]
    if any(point.step_ms is not None for point in report.points):
        pictures.append(("accuracy_time.png", accuracy_against_time))
    if report.config["ceiling"]:
        pictures.append(("ceiling.png", distance_to_ceiling))
    if report.groups():
        pictures.append(("ablations.png", ablations))
    if report.speed:
        pictures.append(("length.png", against_length))
    files = []
    for name, draw in pictures:
        figure = draw(report)
        file = report.folder / name
        figure.savefig(file, dpi=110, bbox_inches="tight")
        files.append(file)
    return files


def accuracy_against_bytes(report: StudyReport) -> Any:
    """Share of right answers over the bytes of a row's keys, values and metadata."""
    return _curves(
        report,
        lambda point: point.bytes / 1024,
        "correct",
        "KiB of keys, values and metadata per sequence",
        "right answers, %",
    )


def accuracy_against_time(report: StudyReport) -> Any:
    """Share of right answers over the time of a step of the batch."""
    return _curves(
        report,
        lambda point: point.step_ms,
        "correct",
        "milliseconds per step of the batch",
        "right answers, %",
        joined=False,
    )


def recall_against_budget(report: StudyReport) -> Any:
    """Share of look-ups that found a source in the cache, over the budget."""
    return _curves(
        report,
        lambda point: point.budget or None,
        "written_served",
        "budget of the reference policy, tokens",
        "milestones found when looked up, %",
        logarithmic=True,
    )


def _curves(
    report: StudyReport,
    place: Callable[[Point], float | None],
    name: str,
    x_label: str,
    y_label: str,
    *,
    logarithmic: bool = False,
    joined: bool = True,
) -> Any:
    tasks = [
        task for task in report.tasks if any(place(point) is not None for point in report.of(task))
    ]
    figure, axes = _panels(len(tasks), height=4.6)
    look = _looks(report)
    for axis, task in zip(axes, tasks, strict=True):
        for entry in dict.fromkeys(point.entry for point in report.of(task)):
            points = [p for p in report.of(task) if p.entry == entry and place(p) is not None]
            points.sort(key=lambda point: point.budget)
            if not points:
                continue
            style = look[entry]
            x = [place(point) for point in points]
            found = [point.figures[name] for point in points]
            y = [100 * each.value for each in found]
            axis.plot(x, y, **style, linestyle=_style(entry, report) if joined else "none")
            if entry in report.baselines:
                low = [100 * (e.value if e.low is None else e.low) for e in found]
                high = [100 * (e.value if e.high is None else e.high) for e in found]
                axis.vlines(x, low, high, color=style["color"], linewidth=1, alpha=0.5)
        if logarithmic:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_title(task)
        axis.set_xlabel(x_label)
    axes[0].set_ylabel(y_label)
    _legend(figure, axes)
    return figure


def _style(entry: str, report: StudyReport) -> str:
    """Solid for policies, broken for controls, dotted for the ceiling."""
    if entry == report.config["ceiling"]:
        return ":"
    return "--" if entry in report.config["controls"] else "-"


def lengths(report: StudyReport) -> Any:
    """How long answers are, and how many ran to the cap, at the smallest budget."""
    figure, axes = _panels(len(report.tasks), height=6.0)
    for axis, task in zip(axes, report.tasks, strict=True):
        points = report.of(task)
        smallest = min(point.budget for point in points if point.budget)
        shown = [point for point in points if point.budget in (smallest, 0)][::-1]
        boxes = [[sample["tokens"] for sample in point.samples.values()] for point in shown]
        axis.boxplot(boxes, orientation="horizontal", widths=0.6, whis=(5, 95), showfliers=False)
        axis.set_yticks(range(1, len(shown) + 1), [point.entry for point in shown])
        right = axis.get_xlim()[1]
        for row, point in enumerate(shown, start=1):
            share = 100 * point.figures["capped"].value
            axis.text(right, row, f" {share:.0f} %", va="center", fontsize=8)
        axis.set_title(f"{task}, budget {smallest}; right: ran to the cap", fontsize=10)
        axis.set_xlabel("tokens of an answer (quartiles, 5-95 %)")
    return figure


def distance_to_ceiling(report: StudyReport) -> Any:
    """Percentage points of right answers that a policy lies below Belady's."""
    ceiling = report.config["ceiling"]
    figure, axes = _panels(len(report.tasks), height=6.0)
    for axis, task in zip(axes, report.tasks, strict=True):
        points = [p for p in report.of(task) if p.budget and p.entry != ceiling]
        budgets = sorted({point.budget for point in points})
        middle = budgets[len(budgets) // 2]
        other = report.find(task, ceiling, middle)
        if other is None:
            axis.set_visible(False)
            continue
        here = [(point.entry, point.against(other)) for point in points if point.budget == middle]
        here.sort(key=lambda each: each[1].value)
        names = [entry for entry, _ in here]
        values = [100 * found.value for _, found in here]
        reach = spread([found for _, found in here])
        colours = [_colour(report, name, 0) for name in names]
        axis.barh(names, values, xerr=reach, color=colours, ecolor="#555555", height=0.7)
        axis.axvline(0, color=_CEILING, linewidth=1)
        axis.set_title(f"{task}, budget {middle}")
        axis.set_xlabel(f"right answers beside {ceiling}, points")
    return figure


def ablations(report: StudyReport) -> Any:
    """Right answers under each option, a panel for every ablation."""
    groups = report.groups()
    figure, axes = _panels(len(groups), height=3.2, columns=3)
    for axis, group in zip(axes, groups, strict=False):
        tasks = [task for task in report.tasks if report.of(task, group)]
        for number, task in enumerate(tasks):
            points = report.of(task, group)
            names = [point.entry for point in points]
            found = [point.figures["correct"] for point in points]
            axis.errorbar(
                range(len(names)),
                [100 * each.value for each in found],
                yerr=spread(found),
                marker=_MARKERS[number],
                markersize=5,
                color=_COLOURS[number],
                linewidth=1,
                capsize=2,
                label=f"{task}, {points[0].budget}",
            )
            axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axis.set_title(group, fontsize=10)
        axis.legend(fontsize=7)
    for axis in axes[:: min(3, len(axes))]:
        axis.set_ylabel("right answers, %")
    return figure


def against_length(report: StudyReport) -> Any:
    """Memory, time of a token, and time of the whole answer, over its length."""
    figure, axes = _panels(3, height=3.8)
    for number, (label, lines) in enumerate(report.speed.items()):
        tokens = [line["tokens"] for line in lines]
        colour = _colour(report, label, number)
        style: dict[str, Any] = {"color": colour, "marker": _MARKERS[number], "markersize": 4}
        axes[0].plot(tokens, [line["kv_bytes"] / 1024 for line in lines], label=label, **style)
        axes[1].plot(tokens, [line["ms_per_token"] for line in lines], label=label, **style)
        total, before, spent = [], 0, 0.0
        for line in lines:
            spent += (line["tokens"] - before) * line["ms_per_token"] / 1e3
            before = line["tokens"]
            total.append(spent)
        axes[2].plot(tokens, total, label=label, **style)
    names = ("KiB of keys, values, metadata", "milliseconds per token", "seconds to this length")
    for axis, name in zip(axes, names, strict=True):
        axis.set_xlabel("tokens generated")
        axis.set_title(name, fontsize=10)
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    return figure


def spread(found: Sequence[Estimate]) -> list[list[float]]:
    """How far intervals reach below and above their values, in percentage points."""
    return [
        [0.0 if f.low is None else 100 * max(0.0, f.value - f.low) for f in found],
        [0.0 if f.high is None else 100 * max(0.0, f.high - f.value) for f in found],
    ]


def _panels(count: int, *, height: float, columns: int = 4) -> tuple[Any, Sequence[Any]]:
    columns = min(count, columns)
    rows = -(-count // columns)
    # Not through pyplot, whose backend and open figures belong to the caller.
    figure = Figure(figsize=(4.8 * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _colour(report: StudyReport, entry: str, number: int) -> str:
    if entry == report.reference:
        return _REFERENCE
    if entry == report.config["ceiling"]:
        return _CEILING
    if entry in report.config["controls"]:
        return _CONTROL
    return _COLOURS[number % len(_COLOURS)]


def _looks(report: StudyReport) -> dict[str, dict[str, Any]]:
    found = {}
    for number, entry in enumerate(dict.fromkeys(point.entry for point in report.points)):
        strong = entry == report.reference
        found[entry] = {
            "color": _colour(report, entry, number),
            "marker": _MARKERS[number % len(_MARKERS)],
            "markersize": 6 if strong else 4,
            "linewidth": 2.5 if strong else 1.2,
            "zorder": 5 if strong else 3,
            "label": entry,
        }
    return found


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    named: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        named.update(zip(labels, handles, strict=True))
    figure.legend(
        list(named.values()), list(named), loc="outside right center", fontsize=8, frameon=False
    )
