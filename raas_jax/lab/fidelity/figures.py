"""The pictures of a comparison: loss against memory, and loss along the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from raas_jax.lab.fidelity.findings import Findings
from raas_jax.lab.runs.figures import legend, numbered, panels, save

SHOWN = 9
"""Policies with a curve along the text; more could not be told apart."""
LEAST = 1e-3
"""Nats; below it, before anything is forgotten, there is no curve."""
SMOOTHED = 4
"""Blocks of a point of a curve along the text."""


def draw(findings: Findings, folder: Path) -> list[Path]:
    """Draws every picture that there is data for, and gives the files."""
    drawn = {"kl_bytes.png": against_bytes(findings), "kl_along.png": along(findings)}
    return save(drawn, folder)


def against_bytes(findings: Findings) -> Figure | None:
    """KL from dense over the bytes of a row, a panel for each kind of text; of several budgets."""
    if len({point.budget for point in findings.points if point.budget}) < 2:
        return None  # All bytes are equal.
    kinds = findings.kinds if len(findings.kinds) > 1 else []
    figure, axes = panels(1 + len(kinds), height=3.6, columns=3)
    half = findings.half
    for axis, kind in zip(axes, [None, *kinds], strict=True):
        for number, policy in enumerate(_policies(findings)):
            found = [
                (point.bytes / 1024, estimate)
                for point in sorted(findings.points, key=lambda point: point.bytes)
                if point.policy == policy
                and (estimate := findings.estimate(point, "kl", kind=kind, since=half))
            ]
            if not found:
                continue
            sizes, values = [size for size, _ in found], [each.value for _, each in found]
            axis.plot(sizes, values, **_look(findings, policy, number))
            if policy == findings.reference:
                low, high = ([getattr(e, end) for _, e in found] for end in ("low", "high"))
                axis.fill_between(sizes, low, high, color=_REFERENCE, alpha=0.15, linewidth=0)
        axis.set_yscale("log")
        axis.set_title(kind or "all texts", fontsize=10)
        axis.set_xlabel("KiB of keys, values and metadata per row")
    axes[0].set_ylabel("KL from dense, nats")
    legend(figure, axes)
    return figure


def along(findings: Findings) -> Figure | None:
    """KL from dense over the position in the text, a panel for each budget."""
    budgets = sorted({point.budget for point in findings.points if point.budget})
    if not budgets:
        return None
    figure, axes = panels(len(budgets), height=4.2, columns=3)
    for axis, budget in zip(axes, budgets, strict=True):
        mine = [point for point in findings.ordered() if point.budget == budget]
        shown = {point.policy for point in mine[:SHOWN]} | {findings.reference}
        for point in mine:
            if point.policy not in shown:
                continue
            sums = point.sums["kl"][point.texts].sum(axis=0)
            tokens = findings.tokens * len(point.texts)
            edges = np.arange(0, len(sums), SMOOTHED)
            curve = np.add.reduceat(sums, edges) / np.add.reduceat(tokens, edges)
            curve = np.where(curve < LEAST, np.nan, curve)
            number = _policies(findings).index(point.policy)
            look = _look(findings, point.policy, number) | {"marker": ""}
            axis.plot(findings.starts[edges], curve, **look)
        axis.set_yscale("log")
        axis.set_title(f"budget {budget}", fontsize=10)
        axis.set_xlabel("position in the text, tokens")
    axes[0].set_ylabel("KL from dense, nats")
    legend(figure, axes)
    return figure


_REFERENCE = "#D55E00"


def _policies(findings: Findings) -> list[str]:
    return [policy for policy in findings.policies if policy != findings.reference] + [
        policy for policy in findings.policies if policy == findings.reference
    ]


def _look(findings: Findings, policy: str, number: int) -> dict[str, Any]:
    if policy == findings.reference:
        return {"color": _REFERENCE, "marker": "o", "linewidth": 2.5, "zorder": 5, "label": policy}
    # After seven colours they come again, with other lines.
    line = ("-", "--", ":")[number // 7 % 3]
    return numbered(number) | {
        "linewidth": 1.2,
        "markersize": 4,
        "label": policy,
        "linestyle": line,
    }
