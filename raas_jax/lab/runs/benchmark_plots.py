"""The three figures of the RaaS paper (arXiv 2502.11147) and the lengths of answers, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from raas_jax.lab.runs.benchmark_report import Point
from raas_jax.lab.runs.plots import spread

# Told apart also by colour-blind readers (Okabe and Ito's colours), and by their markers.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
MARKERS = "os^Dv<>pP*X"
BINS = 8  # Points of a curve, each of as many answers.


def draw_benchmark(points: Sequence[Point], folder: Path) -> list[Path]:
    """Draws every picture that the samples allow, and gives the files."""
    answered = [point for point in points if "tokens" in point.figures]
    if not answered:
        return []
    files = []
    for name, draw in (
        ("accuracy.png", accuracy_against_budget),
        ("time.png", time_against_length),
        ("memory.png", memory_against_length),
        ("lengths.png", lengths),
    ):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        draw(axis, answered)
        figure.savefig(folder / name, dpi=120)
        files.append(folder / name)
    return files


def accuracy_against_budget(axis: Any, points: Sequence[Point]) -> None:
    """Right answers over the budget; a policy without one is a line across."""
    budgets = sorted({point.budget for point in points if point.budget})
    for index, name in enumerate(_names(points)):
        mine = sorted((p for p in points if p.name == name), key=lambda p: p.budget or 0)
        figures = [point.figures["correct"] for point in mine]
        colour = COLOURS[index % len(COLOURS)]
        if mine[0].budget is None:
            axis.axhline(100 * figures[0].value, color=colour, linestyle="--", label=name)
            if figures[0].low is not None and figures[0].high is not None:
                span = (100 * figures[0].low, 100 * figures[0].high)
                axis.axhspan(*span, color=colour, alpha=0.1, linewidth=0)
            continue
        axis.errorbar(
            [point.budget for point in mine],
            [100 * figure.value for figure in figures],
            yerr=spread(figures),
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            capsize=3,
            label=name,
        )
    if budgets:
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, [str(budget) for budget in budgets])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("budget, tokens")
    axis.set_ylabel("right answers, %")
    axis.legend(fontsize=8)


def _look(index: int) -> dict[str, str]:
    return {"color": COLOURS[index % len(COLOURS)], "scorer": MARKERS[index % len(MARKERS)]}


def time_against_length(axis: Any, points: Sequence[Point]) -> None:
    """Seconds from the start of a row to its end, over the tokens that it wrote."""
    for index, point in enumerate(points):
        pairs = sorted((s["tokens"], s["seconds"]) for s in _answered(point))
        style = _look(index)
        axis.scatter(*zip(*pairs, strict=True), s=6, alpha=0.25, linewidths=0, **style)
        axis.plot(*_medians(pairs), markersize=4, label=point.policy["label"], **style)
    axis.set_xlabel("decode length, tokens")
    axis.set_ylabel("completion time, s")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)


def memory_against_length(axis: Any, points: Sequence[Point]) -> None:
    """Bytes of keys, values and metadata that an answer of this length takes."""
    for index, point in enumerate(points):
        pairs = sorted((s["tokens"], s["kv_bytes_of_length"] / 2**20) for s in _answered(point))
        style = _look(index)
        axis.plot(*_medians(pairs), markersize=4, label=point.policy["label"], **style)
    axis.set_xlabel("decode length, tokens")
    axis.set_ylabel("keys, values and metadata, MiB")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)


def lengths(axis: Any, points: Sequence[Point]) -> None:
    """How long answers are: quartiles, 5 and 95 %, and the share that ran to the cap."""
    shown = list(points)[::-1]
    boxes = [[sample["tokens"] for sample in _answered(point)] for point in shown]
    axis.boxplot(boxes, orientation="horizontal", widths=0.6, whis=(5, 95), showfliers=False)
    axis.set_yticks(
        range(1, len(shown) + 1),
        [
            f"{point.policy['label']}\n{100 * point.figures['capped'].value:.0f} % to the cap"
            for point in shown
        ],
        fontsize=8,
    )
    axis.set_xlabel("tokens of an answer")


def _medians(pairs: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Medians of both, over parts of the sorted pairs of about the same size."""
    size = -(-len(pairs) // BINS)
    parts: dict[float, list[float]] = {}
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        # Many answers of one length make several parts of it: they count as one.
        parts.setdefault(median(x for x, _ in part), []).extend(y for _, y in part)
    return list(parts), [median(values) for values in parts.values()]


def _names(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.name for point in points))


def _answered(point: Point) -> list[dict[str, Any]]:
    return [sample for sample in point.samples if sample["finish_reason"] != "error"]
