"""Table, CSV and pictures of a benchmark, from the samples that its run has written."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from raas_jax.lab.runs.estimates import clustered_mean, clustered_share, pass_at_k, quantile
from raas_jax.lab.runs.results import Results, Sample
from raas_jax.lab.runs.tables import Estimate, markdown_table


@dataclasses.dataclass(frozen=True)
class Point:
    """One policy at one budget.

    Attributes:
      policy: its entry in the configuration.
      samples: all of them.
      figures: by name, in the order of the table; see `FIGURES`.
    """

    policy: dict[str, Any]
    samples: list[Sample]
    figures: dict[str, Estimate]

    @property
    def name(self) -> str:
        return str(self.policy["Policy"])

    @property
    def budget(self) -> int | None:
        """In tokens; None for a policy without one."""
        return self.policy.get("budget")


# Name in the CSV → heading, unit, factor and digits in Markdown.
FIGURES: dict[str, tuple[str, str, float, int]] = {
    "correct": ("Right", " %", 100, 1),
    "tokens": ("Tokens, mean", "", 1, 0),
    "tokens_p10": ("10 %", "", 1, 0),
    "tokens_p50": ("median", "", 1, 0),
    "tokens_p90": ("90 %", "", 1, 0),
    "capped": ("Ran to the cap", " %", 100, 1),
    "seconds_per_answer": ("s per answer", "", 1, 2),
    "latency": ("s from start to end", "", 1, 1),
    "tokens_per_second": ("Tokens/s", "", 1, 0),
    "kv_bytes": ("KV, MiB per row", "", 2.0**-20, 2),
}


def points_of(results: Results) -> list[Point]:
    """All policies that have samples, in the order of the run."""
    found = []
    task, n = results.config["task"]["name"], results.config["asking"]["samples"]
    for policy in results.config["policies"]:
        samples = results.of(task, policy["label"])
        if samples:
            found.append(Point(policy, samples, figures_of(samples, n)))
    return found


def figures_of(samples: Sequence[Sample], n: int) -> dict[str, Estimate]:
    """All figures of one policy, with problems as the units that vary.

    Args:
      samples: of which there is at least one.
      n: samples asked for of each problem.
    """
    items: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        items[str(sample["item"])].append(sample)
    groups = list(items.values())
    rights = [[bool(each["correct"]) for each in group] for group in groups]
    found = {"correct": clustered_share(rights)}
    for k in sorted({*(2**i for i in range(1, n.bit_length())), n} - {1}):
        found[f"pass@{k}"] = pass_at_k(rights, k)
    # A request that could not be answered has no length.
    answered = [[s for s in group if s["finish_reason"] != "error"] for group in groups]
    answered = [group for group in answered if group]
    if not answered:
        return found
    lengths = [float(each["tokens"]) for group in answered for each in group]
    found["tokens"] = clustered_mean([[float(s["tokens"]) for s in group] for group in answered])
    for share in (10, 50, 90):
        found[f"tokens_p{share}"] = Estimate(quantile(lengths, share / 100))
    found["capped"] = clustered_share([[bool(s["capped"]) for s in group] for group in answered])
    # Each start of the run worked up to its last answer.
    ends: dict[int, float] = defaultdict(float)
    for sample in samples:
        ends[sample["start"]] = max(ends[sample["start"]], sample["elapsed"])
    worked = sum(ends.values())
    found["seconds_per_answer"] = Estimate(worked / len(lengths))
    found["latency"] = clustered_mean([[s["seconds"] for s in group] for group in answered])
    found["tokens_per_second"] = Estimate(sum(lengths) / worked if worked else math.nan)
    found["kv_bytes"] = Estimate(max(float(s["kv_bytes"]) for group in answered for s in group))
    return found


def report_benchmark(results: Results) -> tuple[str, list[str]]:
    """Writes `table.md`, `table.csv` and, where matplotlib is installed, the pictures.

    Returns:
      The table in Markdown with its title, and remarks.
    """
    points = points_of(results)
    text = markdown(results, points)
    (results.folder / "table.md").write_text(text, encoding="utf-8")
    (results.folder / "table.csv").write_text(comma_separated(points), encoding="utf-8")
    try:
        from raas_jax.lab.runs.benchmark_plots import draw_benchmark
    except ImportError:
        return text, ["no pictures, which need matplotlib: pip install 'raas-jax[plots]'"]
    pictures = draw_benchmark(points, results.folder)
    return text, [f"pictures: {', '.join(map(str, pictures))}"] if pictures else []


def markdown(results: Results, points: Sequence[Point]) -> str:
    """Title, table, and the answers that could not be graded or given."""
    config = results.config
    asking = config["asking"]
    n, temperature = asking["samples"], asking["sampling"]["temperature"]
    how = "greedy" if temperature == 0 else f"{n} sample(s) each at temperature {temperature:g}"
    title = (
        f"`{config['model']}`, {config['dtype']}, on {config['task']['problems']} problems of "
        f"{config['task']['name']}, {how}. In brackets: 95 % intervals, with problems as the units "
        "that vary.\n\n"
    )
    if not points:
        return title + "No samples yet.\n"
    names = list(dict.fromkeys(name for point in points for name in point.figures))
    headings = [FIGURES[name][0] if name in FIGURES else name for name in names]
    rows = [
        [
            point.name,
            str(point.policy["Budget"]),
            str(len(point.samples)),
            *(_cell(name, point.figures.get(name)) for name in names),
        ]
        for point in points
    ]
    table = markdown_table(["Policy", "Budget", "n", *headings], rows, labels=2)
    return title + table + _errors(points)


def comma_separated(points: Sequence[Point]) -> str:
    """The table for programs: `name`, `name_low`, `name_high`, unrounded."""
    names = list(dict.fromkeys(name for point in points for name in point.figures))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    writer.writerow(["policy", "budget", "samples", *ends])
    for point in points:
        cells: list[Any] = []
        for name in names:
            figure = point.figures.get(name)
            parts = (None,) * 3 if figure is None else (figure.value, figure.low, figure.high)
            cells += ["" if part is None else part for part in parts]
        writer.writerow([point.name, point.budget or "", len(point.samples), *cells])
    return text.getvalue()


def _cell(name: str, figure: Estimate | None) -> str:
    if figure is None or math.isnan(figure.value):
        return "–"
    _, unit, factor, digits = FIGURES.get(name, ("", " %", 100, 1))
    text = f"{figure.value * factor:,.{digits}f}{unit}"
    if figure.low is None or figure.high is None:
        return text
    return f"{text} [{figure.low * factor:,.{digits}f}, {figure.high * factor:,.{digits}f}]"


def _errors(points: Sequence[Point]) -> str:
    reasons = Counter(
        (point.policy["label"], sample["error"])
        for point in points
        for sample in point.samples
        if sample["error"]
    )
    if not reasons:
        return ""
    lines = [f"- {label}: {count} × {reason}\n" for (label, reason), count in reasons.most_common()]
    return "\nAnswers without a mark, counted as wrong:\n\n" + "".join(lines)
