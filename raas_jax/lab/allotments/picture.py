"""The picture of an allotment: pages by layer and head, and the curves that they follow from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from raas_jax import files
from raas_jax.policies import Allotment, Budgeted

BUDGET = 256
"""Mean tokens per layer and head, shared out in the picture."""
CURVES = 6


def draw(allotment: Allotment, file: str | Path, policy: Budgeted, budget: int = BUDGET) -> None:
    """Writes a PNG. Raises OSError if that fails."""
    P, least = policy.page_size, policy.least_pages
    mean = max(least + 1, budget // P)
    tokens = P * allotment.pages(mean, P, least)
    if "refined" in allotment.made:  # Then its curves are shares, and no losses.
        figure = Figure(figsize=(5.4, 4.2), layout="constrained")
        _draw_shares(figure, figure.subplots(), tokens, mean * P)
    else:
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        shares, curves = figure.subplots(1, 2, width_ratios=(1.5, 1))
        _draw_shares(figure, shares, tokens, mean * P)
        _draw_curves(curves, allotment, tokens)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130, format="png")
    files.replace_bytes(file, drawn.getvalue())


def _draw_shares(figure: Figure, axis: Any, tokens: np.ndarray, budget: int) -> None:
    image = axis.imshow(tokens.T, aspect="auto", origin="lower", cmap="viridis")
    axis.set(xlabel="Layer", ylabel="Key/value head")
    axis.set_title(f"Tokens kept, mean {budget}", fontsize=10)
    axis.set_yticks(range(tokens.shape[1]))
    figure.colorbar(image, ax=axis, label="Tokens")


def _draw_curves(axis: Any, allotment: Allotment, tokens: np.ndarray) -> None:
    """Heads from the one that is given the most to the one that is given the least."""
    order = np.argsort(-tokens, axis=None, kind="stable")
    for place in np.unique(np.linspace(0, len(order) - 1, CURVES).astype(int)):
        layer, head = np.unravel_index(order[place], tokens.shape)
        curve, given = allotment.losses[layer, head], tokens[layer, head]
        lost = curve > 0  # Where all of a text has room, nothing is, which has no logarithm.
        label = f"layer {layer}, head {head}: {given}"
        (line,) = axis.loglog(allotment.sizes[lost], curve[lost], label=label)
        if (at := np.interp(given, allotment.sizes, curve)) > 0:
            axis.plot([given], [at], "o", color=line.get_color())
    axis.set(xlabel="Tokens kept", ylabel="Loss, nats per token")
    axis.set_title("What a head loses, and what it is given", fontsize=10)
    axis.legend(fontsize=7)
