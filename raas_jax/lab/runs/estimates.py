"""Shares and means over problems that were answered several times, and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence

from raas_jax.lab.runs.tables import Estimate, mean, ratio, wilson


def clustered_share(items: Sequence[Sequence[bool]]) -> Estimate:
    """Share of samples that are true, with problems as the units that vary.

    Samples of one problem are alike, so an interval that took them for independent would be too
    narrow. With one sample each it is Wilson's; so it is where all problems agree, which a standard
    error would take for certainty.

    Args:
      items: the samples of each problem.
    """
    if not items:
        return Estimate(math.nan)
    rights, counts = [sum(map(bool, each)) for each in items], [len(each) for each in items]
    if set(counts) == {1}:
        return wilson(sum(rights), len(items))
    found = ratio(rights, counts)
    if found.low is None or found.high is None or found.low == found.high:
        edge = wilson(round(found.value * len(items)), len(items))
        return Estimate(found.value, min(edge.low or 0.0, found.value), edge.high)
    return Estimate(found.value, max(0.0, found.low), min(1.0, found.high))


def clustered_mean(items: Sequence[Sequence[float]]) -> Estimate:
    """Mean over samples, with problems as the units that vary."""
    return ratio([sum(each) for each in items], [len(each) for each in items])


def pass_at_k(items: Sequence[Sequence[bool]], k: int) -> Estimate:
    """Probability that one of k samples is right, averaged over problems.

    The unbiased estimator of Chen et al. (arXiv 2107.03374): of a problem with c right samples of
    n, 1 - C(n - c, k) / C(n, k). Problems with fewer than k samples are left out.

    Args:
      items: the samples of each problem.
      k: at least 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1.")
    enough = [(len(each), sum(map(bool, each))) for each in items if len(each) >= k]
    if not enough:
        return Estimate(math.nan)
    found = mean([1.0 - math.comb(n - c, k) / math.comb(n, k) for n, c in enough])
    if found.low is None or found.high is None or found.low == found.high:
        edge = wilson(round(found.value * len(enough)), len(enough))
        return Estimate(found.value, min(edge.low or 0.0, found.value), edge.high)
    return Estimate(found.value, max(0.0, found.low), min(1.0, found.high))


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
