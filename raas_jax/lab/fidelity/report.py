"""Tables and pictures of a comparison, from the files in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raas_jax import files
from raas_jax.lab.fidelity.findings import Findings
from raas_jax.lab.fidelity.run import BLOCK
from raas_jax.lab.runs.results import Results
from raas_jax.lab.runs.tables import PERCENT, Heading, csv_cells, csv_text, markdown_table

NATS, DIFFERENCE = Heading("", digits=".3f"), Heading("", digits="+.3f")
SHARE = Heading("", *PERCENT)
QUARTERS = 4


def report(folder: str | Path) -> tuple[str, list[str]]:
    """Makes `table.md`, `table.csv` and pictures of a comparison's folder from its samples.

    Without matplotlib the pictures are left out, with a line that says so.

    Returns:
      The tables in Markdown, and remarks on lines that could not be read.
    """
    results = Results.read(folder)
    findings, remarks = Findings(results), results.remarks()
    text = markdown(findings)
    files.replace_text(results.folder / "table.md", text)
    files.replace_text(results.folder / "table.csv", csv(findings))
    try:
        from raas_jax.lab.fidelity.figures import draw
    except ImportError:
        return text, [*remarks, "No pictures: `pip install -e '.[plots]'` brings matplotlib."]
    drawn = [file.name for file in draw(findings, results.folder)]
    return text, [*remarks, *(["Pictures: " + ", ".join(drawn)] if drawn else [])]


def markdown(findings: Findings) -> str:
    """All tables with their headings."""
    if not findings.points:
        return "No texts yet.\n"
    half = findings.half
    parts = [
        f"`{findings.model}`, {findings.dtype}: {len(findings.texts)} texts of {findings.length} "
        f"tokens, {findings.prompt_tokens} of them the prompt. Means over tokens {half} to "
        f"{findings.length - 1}, where nothing else is said; in nats. Policies have the bytes of "
        f"{findings.reference} at the same budget. In brackets: 95 % intervals (bootstrap over "
        f"texts within their kind and blocks of {BLOCK} tokens; differences are paired).\n",
        "\n## All texts\n\n",
        _main(findings, half),
    ]
    if len(findings.kinds) > 1:
        parts += ["\n## KL from dense, by kind of text\n\n", _by_kind(findings, half)]
    parts += ["\n## KL from dense, along the text\n\n", _along(findings)]
    return "".join(parts)


def _main(findings: Findings, half: int) -> str:
    heads = ["Policy", "Budget", "KL from dense", f"minus {findings.reference}", "NLL over dense"]
    heads += ["Same top token", "Own budget", "KV, KiB", "s per text", "texts"]
    rows = []
    for point in findings.ordered():
        minus = findings.find(findings.reference, point.budget)
        difference = (
            findings.estimate(point, "kl", minus, since=half)
            if minus is not None and minus is not point
            else None
        )
        rows.append(
            [
                point.policy,
                str(point.budget or "–"),
                NATS.text(findings.estimate(point, "kl", since=half)),
                DIFFERENCE.text(difference),
                DIFFERENCE.text(findings.estimate(point, "excess", since=half)),
                SHARE.text(findings.estimate(point, "agree", since=half)),
                str(point.own_budget or "–"),
                f"{point.bytes / 1024:,.0f}",
                f"{point.seconds:.1f}",
                str(len(point.texts)),
            ]
        )
    return markdown_table(heads, rows, labels=1)


def _by_kind(findings: Findings, half: int) -> str:
    return _by_part(findings, {kind: {"kind": kind, "since": half} for kind in findings.kinds})


def _by_part(findings: Findings, parts: Mapping[str, Mapping[str, Any]]) -> str:
    """KL from dense of every point, with a column for each part of the texts."""
    rows = [
        [
            point.policy,
            str(point.budget or "–"),
            *(NATS.text(findings.estimate(point, "kl", **part)) for part in parts.values()),
        ]
        for point in findings.ordered()
    ]
    return markdown_table(["Policy", "Budget", *parts], rows, labels=1)


def ranges(findings: Findings) -> Sequence[tuple[int, int]]:
    """Quarters of the text, in positions of whole blocks."""
    inner = {findings.length * part // QUARTERS // BLOCK * BLOCK for part in range(1, QUARTERS)}
    edges = [0, *sorted(edge for edge in inner if edge > findings.prompt_tokens)]
    return list(zip(edges, [*edges[1:], findings.length], strict=True))


def _along(findings: Findings) -> str:
    first = findings.prompt_tokens + 1
    parts = {
        f"{max(first, since)}-{until - 1}": {"since": since, "until": until}
        for since, until in ranges(findings)
    }
    return _by_part(findings, parts)


def csv(findings: Findings) -> str:
    """One line per policy, budget and part of the texts, all figures unrounded."""
    half, rows = findings.half, []
    whole: list[tuple[str, dict[str, Any]]] = [("second half", {"since": half})]
    whole += [(f"kind {kind}", {"kind": kind, "since": half}) for kind in findings.kinds]
    whole += [
        (f"tokens {since}-{until - 1}", {"since": since, "until": until})
        for since, until in ranges(findings)
    ]
    for point in findings.ordered():
        for name, part in whole:
            row: dict[str, Any] = {
                "policy": point.policy,
                "budget": point.budget,
                "own_budget": point.own_budget,
                "bytes": point.bytes,
                "texts": len(point.texts),
                "part": name,
            }
            for measure in ("kl", "excess", "agree"):
                row |= csv_cells(measure, findings.estimate(point, measure, **part))
            minus = findings.find(findings.reference, point.budget)
            if minus is not None and minus is not point:
                found = findings.estimate(point, "kl", minus, **part)
                row |= csv_cells(f"kl minus {findings.reference}", found)
            rows.append(row)
    return csv_text(rows)
