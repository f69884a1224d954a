"""Rules for who gets how much, that ours is compared with."""

from __future__ import annotations

import numpy as np
import pytest

from raas_jax.lab.allotments import rules
from raas_jax.policies import Allotment

L, K, P = 6, 4, 16


@pytest.fixture
def found():
    losses = np.random.default_rng(0).exponential(size=(L, K))[..., None] * np.array([4.0, 2, 1, 0])
    return Allotment(np.asarray([16, 32, 64, 2048]), losses, "model")


def pages(allotment, mean=64):
    given = allotment.pages(mean, P)
    assert given.sum() == mean * L * K and allotment.model == "model"
    return given


@pytest.mark.parametrize("mean", [8, 64])
def test_shares_are_as_the_weights(mean):
    weights = np.random.default_rng(1).uniform(0.3, 2, (L, K))
    given = pages(Allotment.proportional(weights, "model", {}), mean)
    np.testing.assert_allclose(given, mean * weights / weights.mean(), rtol=0.1, atol=1.5)


def test_a_head_of_no_weight_has_the_least(found):
    weights = np.ones((L, K))
    weights[2] = 0
    given = pages(Allotment.proportional(weights, "model", {}))
    assert np.all(given[2] == 1) and np.all(given[[0, 1, 3, 4, 5]] >= 76)


def test_the_shuffled_have_the_same_pages(found):
    one, other = (pages(rules.shuffled(found, seed)) for seed in (0, 1))
    assert sorted(one.flat) == sorted(other.flat) == sorted(pages(found).flat)
    assert np.any(one != other) and np.any(one != pages(found))
    np.testing.assert_array_equal(one, pages(rules.shuffled(found, 0)))


def test_the_random_differ(found):
    one, other = (pages(rules.at_random(found, seed)) for seed in (0, 1))
    assert np.any(one != other) and one.std() > 20


def test_the_pyramid(found):
    given = pages(rules.pyramid(found))
    assert np.all(given == given[:, :1])
    np.testing.assert_allclose(np.diff(given[:, 0]), -np.full(L - 1, 64 * 1.9 / (L - 1)), atol=4)
    assert given[0, 0] > 120 and given[-1, 0] < 6


def test_two_kinds(found):
    given = pages(rules.two_kinds(found))
    large = given > 1
    assert large.sum() == 6 and np.ptp(given[large]) <= 1
    assert found.losses[large, 0].min() > found.losses[~large, 0].max()


def test_concentration_counts_within_a_layer():
    count = np.array([[4.0, 0, 0, 0]] + [[10.0, 10, 20, 0]] * (L - 1))
    given = pages(rules.by_concentration(count, "model"))
    np.testing.assert_allclose(given.sum(axis=1), 64 * K, rtol=0.05)
    np.testing.assert_allclose(given[0], 64 * np.array([3.4, 0.2, 0.2, 0.2]), rtol=0.1, atol=1.5)


def test_copying_is_shared_out_over_all():
    score = np.ones((L, K))
    score[3, 2] = 13.0
    given = pages(rules.by_copying(score, "model"))
    assert given[3, 2] == given.max() and np.ptp(given[given < given.max()]) <= 2
    np.testing.assert_allclose(given[3, 2] / 64, 1 / 6 + 13 / 1.5 / 1.2, rtol=0.05)
