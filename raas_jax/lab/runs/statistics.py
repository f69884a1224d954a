"""Figures over samples with 95 % intervals; the problems, not the samples, are what varies.

Samples of one problem are alike, so an interval that took them for independent would be too narrow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from raas_jax.lab.tasks.base import Column

Z95 = 1.959963984540054  # Two-sided 95 % point of the normal distribution.


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval, `low` and `high` None where it has none."""

    value: float
    low: float | None = None
    high: float | None = None

    def within(self, low: float, high: float) -> Estimate:
        """The same, its interval cut where no such figure can lie."""
        if self.low is None or self.high is None:
            return self
        return Estimate(self.value, max(low, self.low), min(high, self.high))


def wilson(successes: int, trials: int) -> Estimate:
    """Share of successes with Wilson's score interval (JASA 22, 1927)."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes={successes}, trials={trials}: wanted 0 <= successes <= trials")
    p, z2 = successes / trials, Z95 * Z95
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    # Rounding must not put the share itself outside.
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def mean(values: Sequence[float]) -> Estimate:
    """Mean with the normal interval of its standard error; no interval for a single value."""
    return ratio(values, [1.0] * len(values))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Sum over sum, with the linearised standard error over the pairs; NaN where there is none."""
    n, total = len(numerators), sum(denominators)
    if not total:
        return Estimate(math.nan)
    value = sum(numerators) / total
    if n < 2:
        return Estimate(value)
    squares = sum((y - value * x) ** 2 for y, x in zip(numerators, denominators, strict=True))
    half = Z95 * math.sqrt(squares * n / (n - 1)) / total
    return Estimate(value, value - half, value + half)


def paired(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of `first - second` over pairs, with the normal interval of the differences."""
    if not first:
        return Estimate(math.nan)
    return mean([float(a) - float(b) for a, b in zip(first, second, strict=True)])


def clustered_share(problems: Sequence[Sequence[bool]]) -> Estimate:
    """Share of the samples of each problem that are true.

    With one sample each the interval is Wilson's; so it is where all problems agree, which a
    standard error would take for certainty.
    """
    if not problems:
        return Estimate(math.nan)
    rights, counts = [sum(map(bool, each)) for each in problems], [len(each) for each in problems]
    if set(counts) == {1}:
        return wilson(sum(rights), len(problems))
    return _never_certain(ratio(rights, counts), len(problems))


def clustered_mean(problems: Sequence[Sequence[float]]) -> Estimate:
    """Mean over the samples of each problem."""
    return ratio([sum(each) for each in problems], [len(each) for each in problems])


def pass_at_k(problems: Sequence[Sequence[bool]], k: int) -> Estimate:
    """Probability that one of k samples is right, averaged over problems.

    The unbiased estimator of Chen et al. (arXiv 2107.03374): of a problem with c right samples of
    n, 1 - C(n - c, k) / C(n, k). Problems with fewer than k samples are left out.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1.")
    enough = [(len(each), sum(map(bool, each))) for each in problems if len(each) >= k]
    if not enough:
        return Estimate(math.nan)
    found = mean([1.0 - math.comb(n - c, k) / math.comb(n, k) for n, c in enough])
    return _never_certain(found, len(enough))


def _never_certain(found: Estimate, trials: int) -> Estimate:
    if found.low is None or found.high is None or found.low == found.high:
        edge = wilson(round(found.value * trials), trials)
        return Estimate(found.value, min(edge.low or 0.0, found.value), edge.high)
    return found.within(0.0, 1.0)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def estimate(column: Column, problems: Sequence[Sequence[Mapping[str, Any]]]) -> Estimate:
    """The figure of a column over the samples of each problem, of which there is at least one."""
    values = [[sample[column.name] for sample in samples] for samples in problems]
    if column.kind == "share":
        return clustered_share(values)
    if column.kind == "ratio":
        per = [sum(sample[column.per] for sample in samples) for samples in problems]
        return ratio([sum(each) for each in values], per).within(0.0, 1.0)
    found = clustered_mean(values)
    return Estimate(found.value) if column.kind == "bytes" else found
