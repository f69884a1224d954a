"""Intervals against numbers worked by hand, counting, and the textbook formula in NumPy."""

import itertools
import math

import numpy as np
import pytest

from raas_jax.lab.runs.statistics import (
    clustered_mean,
    clustered_share,
    estimate,
    mean,
    paired,
    pass_at_k,
    quantile,
    ratio,
    wilson,
)
from raas_jax.lab.tasks.base import Column

ITEMS = [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [1, 1, 0, 1]]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(k):
    by_hand = [np.mean([any(drawn) for drawn in itertools.combinations(item, k)]) for item in ITEMS]
    found = pass_at_k(ITEMS, k)
    assert found.value == pytest.approx(np.mean(by_hand))
    half = 1.96 * np.std(by_hand, ddof=1) / math.sqrt(5)
    assert found.high == pytest.approx(min(1.0, np.mean(by_hand) + half), abs=1e-4)


def test_pass_at_k_leaves_out_what_has_too_few():
    assert pass_at_k([[1, 0], [0, 0, 0]], 3).value == 0
    assert math.isnan(pass_at_k([[1]], 2).value)
    with pytest.raises(ValueError, match="k is 0"):
        pass_at_k(ITEMS, 0)


def test_one_sample_each_is_wilsons():
    assert clustered_share([[True], [False], [True]]) == wilson(2, 3)


def test_samples_of_a_problem_are_not_independent():
    """Ten problems whose ten samples agree say no more than ten samples."""
    alike = [[index < 6] * 10 for index in range(10)]
    found = clustered_share(alike)
    assert found.value == 0.6
    spread = 1.96 * np.std([1] * 6 + [0] * 4, ddof=1) / math.sqrt(10)
    assert found.high - found.value == pytest.approx(spread, abs=1e-3)
    assert wilson(60, 100).high < found.high


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_agreement_of_all_problems_is_no_certainty(share):
    items = [[index < 4 * share for index in range(4)]] * 8
    found = clustered_share(items)
    assert found.value == share and found.low <= share <= found.high
    assert found.high - found.low > 0.25


def test_coverage_of_the_clustered_interval():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        chance = rng.beta(2, 2, size=60)
        items = (rng.random((60, 4)) < chance[:, None]).tolist()
        found = clustered_share(items)
        hits += found.low <= 0.5 <= found.high
    assert 0.9 < hits / 300 < 0.99


def test_means_and_quantiles():
    assert clustered_mean([[1, 3], [5]]).value == 3
    assert [quantile([4, 1, 3, 2], share) for share in (0.1, 0.5, 0.9)] == [1, 2, 4]
    assert math.isnan(clustered_share([]).value)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # 8 of 10: centre (0.8 + 0.19207) / 1.38415 = 0.71674, half width 0.22657.
    [(8, 10, 0.49016, 0.94332), (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0)],
)
def test_wilson(successes, trials, low, high):
    found = wilson(successes, trials)
    assert found.value == successes / trials
    assert found.low == pytest.approx(low, abs=1e-5)
    assert found.high == pytest.approx(high, abs=1e-5)


def test_wilson_refuses_nonsense():
    for successes, trials in ((3, 2), (0, 0), (-1, 2)):
        with pytest.raises(ValueError, match="wanted 0 <= successes"):
            wilson(successes, trials)


def test_mean_and_ratio():
    # 1, 2, 3, 4: variance 5 / 3, standard error sqrt(5 / 12) = 0.645497, times 1.959964.
    found = mean([1, 2, 3, 4])
    assert found.value == 2.5
    assert found.high - 2.5 == pytest.approx(1.265151, abs=1e-6)
    assert mean([7]).low is None
    # 3 of 4 and 1 of 4: ratio 1/2, residuals 1 and -1, error sqrt(2 * 2) / 8 = 0.25.
    found = ratio([3, 1], [4, 4])
    assert (found.value, found.low) == (0.5, pytest.approx(0.5 - 1.959964 * 0.25, abs=1e-6))
    assert math.isnan(ratio([0, 0], [0, 0]).value)
    problems = [[{"served": 4, "lookups": 4}], [{"served": 3, "lookups": 4}]]
    clipped = estimate(Column("served", "Recall", "ratio", per="lookups"), problems)
    assert clipped.value == 0.875 and clipped.high == 1.0


def test_paired_differences_by_hand():
    found = paired([True, True, False, True], [False, True, False, True])
    assert found.value == 0.25
    # Differences 1, 0, 0, 0: variance 0.25, standard error 0.25.
    assert found.low == pytest.approx(0.25 - 1.959964 * 0.25)
