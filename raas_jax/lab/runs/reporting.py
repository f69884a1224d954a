"""Makes the tables and pictures of a run of any kind, from the files in its folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from raas_jax import files
from raas_jax.lab.runs.points import Findings, Point
from raas_jax.lab.runs.results import Results
from raas_jax.lab.runs.study_tables import study_csv, study_markdown
from raas_jax.lab.runs.tables import (
    PERCENT,
    STAR,
    Heading,
    heading,
    in_points,
    markdown_table,
    points_csv,
    points_markdown,
)

SAMPLED = {
    "correct": Heading("Right", *PERCENT),
    "tokens": Heading("Tokens, mean", digits=",.0f"),
    "tokens_p10": Heading("10 %", digits=",.0f"),
    "tokens_p50": Heading("median", digits=",.0f"),
    "tokens_p90": Heading("90 %", digits=",.0f"),
    "capped": Heading("Ran to the cap", *PERCENT),
    "seconds_per_answer": Heading("s per answer", digits=",.2f"),
    "latency": Heading("s from start to end", digits=",.1f"),
    "tokens_per_second": Heading("Tokens/s", digits=",.0f"),
    "kv_bytes": Heading("KV, MiB per row", factor=2.0**-20, digits=",.2f"),
}
"""How the figures of a benchmark are shown; pass@k comes on top."""


def report(folder: str | Path) -> tuple[str, list[str]]:
    """Makes `table.md`, `table.csv` and pictures of a run's folder from its samples.

    Without matplotlib the pictures are left out, with a line that says so.

    Returns:
      The table in Markdown with its title, and remarks on lines that could not be read.
    """
    results = Results.read(folder)
    findings, remarks = Findings(results), results.remarks()
    pictures = _draw(findings, results.folder)
    if findings.kind == "study":
        text, csv = study_markdown(findings), study_csv(findings)
        text += f"\n{pictures}\n" if pictures else ""
    else:
        text = _title(findings) + _table(findings) + _differences(findings)
        text += _unfinished(findings) + _errors(findings)
        exact = [column.name for column in findings.columns if column.kind == "bytes"]
        csv = points_csv(findings.points, exact, "" if findings.kind else "–")
        remarks += [pictures] if pictures else []
    files.replace_text(results.folder / "table.md", text)
    files.replace_text(results.folder / "table.csv", csv)
    return text, remarks


def table(results: Results) -> str:
    """The table in Markdown alone; of a run that is finished or not, and is no study."""
    return _table(Findings(results))


def _table(findings: Findings) -> str:
    headings = {column.name: heading(column) for column in findings.columns}
    for name in (name for point in findings.points for name in point.figures):
        headings.setdefault(name, SAMPLED.get(name, Heading(name, *PERCENT)))
    return points_markdown(findings.points, headings)


def _title(findings: Findings) -> str:
    config, task = findings.config, findings.config.inner("task")
    if findings.kind != "benchmark":
        given = task.values.items()
        options = ", ".join(f"{key} {value}" for key, value in given if value is not None)
        return f"`{findings.model}` on {options}. In brackets: 95 % intervals.\n\n"
    asking = config.inner("asking")
    n, temperature = asking.integer("samples", 1), asking.inner("sampling").real("temperature")
    how = "greedy" if temperature == 0 else f"{n} sample(s) each at temperature {temperature:g}"
    return (
        f"`{findings.model}`, {config.text('dtype')}, on {task.integer('problems', 0)} problems of "
        f"{task.text('name')}, {how}. In brackets: 95 % intervals, with problems as the units "
        "that vary.\n\n"
    )


def _differences(findings: Findings) -> str:
    """Every policy against the first one of its budget, and against dense."""
    if findings.kind != "benchmark":
        return ""
    dense = next((point for point in findings.points if point.budget is None), None)
    first: dict[int | None, Point] = {}
    lines = []
    for point in findings.points:
        if point.budget is not None:
            other = first.setdefault(point.budget, point)
            pairs = [None if dense is None else point.against(dense), point.against(other)]
            cells = [in_points(each) if each else "–" for each in pairs]
            cells[1] = "–" if other is point else f"{cells[1]} ({other.policy})"
            lines.append([point.policy, str(point.budget), *cells])
    head = ["Policy", "Budget", "minus dense", "minus the first of the budget"]
    what = "\nRight answers on the problems that both answered, differences in points:\n\n"
    return what + markdown_table(head, lines, labels=2) + STAR if lines else ""


def _unfinished(findings: Findings) -> str:
    """Which policies have not answered all that others have."""
    most = max((len(point.samples) for point in findings.points), default=0)
    lines = [
        f"- {point.label}: {len(point.samples)} of {most}\n"
        for point in findings.points
        if len(point.samples) < most
    ]
    what = "\nNot finished; short answers come first, so these are not like the others:\n\n"
    return what + "".join(lines) if lines and findings.kind == "benchmark" else ""


def _errors(findings: Findings) -> str:
    reasons = Counter(
        (point.label, sample["error"])
        for point in findings.points
        for sample in point.samples
        if sample.get("error")
    )
    lines = [f"- {label}: {count} × {reason}\n" for (label, reason), count in reasons.most_common()]
    return "\nAnswers without a mark, counted as wrong:\n\n" + "".join(lines) if lines else ""


def _draw(findings: Findings, folder: Path) -> str:
    """Draws the pictures; gives a line that names them, or says why there are none."""
    if not findings.kind:
        return ""
    try:
        from raas_jax.lab.runs.figures import draw
    except ImportError:
        return "No pictures: `pip install -e '.[plots]'` brings matplotlib."
    files = draw(findings, folder)
    return "Pictures: " + ", ".join(f"`{file.name}`" for file in files) if files else ""
