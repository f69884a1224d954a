"""Other rules for who gets how much of a budget, as allotments, to be compared with ours.

The published ones share out a prompt's cache once; here they share out what a decode may keep. They
are written from their papers, as far as a budget that is fixed before the text is known can follow
them, and are called after what they do.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from raas_jax.policies import Allotment


def shuffled(found: Allotment, seed: int) -> Allotment:
    """The control: the same curves, each given to a head drawn at random."""
    curves = found.losses.reshape(-1, found.losses.shape[-1])
    order = np.random.default_rng(seed).permutation(len(curves))
    losses = curves[order].reshape(found.losses.shape)
    return dataclasses.replace(found, losses=losses, made=_made("shuffled"))


def at_random(found: Allotment, seed: int) -> Allotment:
    """Shares drawn evenly from all there are: exponential weights."""
    drawn = np.random.default_rng(seed).exponential(size=(found.layers, found.heads))
    return Allotment.proportional(drawn, found.model, _made("random"))


def pyramid(found: Allotment, beta: float = 20.0) -> Allotment:
    """PyramidKV (2406.02069): from layer to layer in equal steps down to the mean over beta."""
    of_layer = np.linspace(2 - 1 / beta, 1 / beta, found.layers)
    weights = np.repeat(of_layer[:, None], found.heads, axis=1)
    return Allotment.proportional(weights, found.model, _made("pyramid"))


def two_kinds(found: Allotment, large: float = 0.25) -> Allotment:
    """DuoAttention's two kinds of heads (2410.10819): some share what all others do without.

    There a head's kind is learned from what the output loses where it sees only the newest tokens;
    here that is the loss at its smallest size, and a share of `large` are those that lose most.
    """
    order = np.argsort(-found.losses[..., 0], axis=None, kind="stable")
    weights = np.zeros(order.shape)
    weights[order[: max(1, round(large * len(order)))]] = 1
    return Allotment.proportional(
        weights.reshape(found.losses.shape[:2]), found.model, _made("two kinds")
    )


def by_concentration(count: np.ndarray, model: str, safeguard: float = 0.2) -> Allotment:
    """Ada-KV (2407.11550): within each layer, heads share by where the largest attention is.

    `count [L, K]`: of the layer's most attended pages, those that are the head's. `safeguard`, as
    in the paper, is the share of the budget that all heads have alike.
    """
    share = count / np.mean(count, axis=1, keepdims=True)
    weights = safeguard + (1 - safeguard) * share
    return Allotment.proportional(weights, model, _made("concentration"))


def by_copying(score: np.ndarray, model: str, beta: float = 1.2) -> Allotment:
    """HeadKV (2410.19258): beyond a common part, heads share by how much they retrieve.

    `score [L, K]`: attention to earlier places of the token that comes next. `1 / beta` of the
    budget is shared out by it, as in the paper.
    """
    weights = 1 - 1 / beta + score / np.mean(score) / beta
    return Allotment.proportional(weights, model, _made("copying"))


def _made(rule: str) -> dict[str, Any]:
    return {"rule": rule}
