"""Drawing tokens: filters, distribution, log-probabilities, keys, and settings out of range."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raas_jax import sampling
from raas_jax.sampling import Sampler, Sampling, row_keys

ROWS, V = 4000, 9
draw = jax.jit(Sampler.__call__)


def naive(logits, setting):
    """Probabilities after temperature, top-k, top-p and min-p, one after the other."""
    x = np.asarray(logits, np.float64) / setting.temperature
    order = sorted(range(len(x)), key=lambda i: -x[i])
    if setting.top_k:
        order = order[: setting.top_k]
    p = {i: math.exp(x[i] - x[order[0]]) for i in order}
    total, kept = sum(p.values()), []
    for i in order:
        reached = sum(p[j] for j in kept) / total
        assume(abs(reached - setting.top_p) > 1e-4)
        if not kept or reached < setting.top_p:
            kept.append(i)
    assume(all(abs(p[i] - setting.min_p) > 1e-4 for i in kept))
    kept = [i for i in kept if p[i] >= setting.min_p]
    total = sum(p[i] for i in kept)
    return np.array([p[i] / total if i in kept else 0.0 for i in range(len(x))])


@settings(max_examples=40)
@given(
    st.integers(0, 2**16),
    st.builds(
        Sampling,
        temperature=st.floats(0.3, 3.0),
        top_k=st.integers(0, V + 2),
        top_p=st.one_of(st.just(1.0), st.floats(0.05, 1.0)),
        min_p=st.one_of(st.just(0.0), st.floats(0.0, 0.9)),
    ),
)
def test_frequencies_are_those_of_a_naive_filter(seed, setting):
    logits = np.random.default_rng(seed).normal(0, 1.5, V).astype(np.float32)
    wanted = naive(logits, setting)
    sampler = Sampler.create([setting] * ROWS, jax.random.split(jax.random.key(seed), ROWS))
    rows = jnp.broadcast_to(jnp.asarray(logits), (ROWS, V))
    tokens, logprobs = draw(sampler, rows, jnp.zeros(ROWS, jnp.int32))
    seen = np.bincount(tokens, minlength=V) / ROWS
    assert np.all(seen[wanted == 0] == 0)
    error = np.sqrt(np.maximum(wanted * (1 - wanted), 1 / ROWS) / ROWS)
    assert np.all(np.abs(seen - wanted) < 6 * error), (seen, wanted)
    # Before temperature and filters.
    model = logits - np.log(np.sum(np.exp(logits.astype(np.float64))))
    np.testing.assert_allclose(logprobs, model[np.asarray(tokens)], rtol=1e-5, atol=1e-5)


def kept_by_sorting(logits, setting):
    """Which tokens the filters leave; None where rounding decides."""
    x = np.asarray(logits, np.float64) / setting.temperature
    order = np.argsort(-x, kind="stable")
    rank = len(x) if not setting.top_k else min(setting.top_k, len(x))
    keep = x >= x[order[rank - 1]]
    mass = np.where(keep, np.exp(x - x.max()), 0)
    if setting.top_p < 1:
        above = np.array([mass[x > each].sum() for each in x]) / mass.sum()
        if np.abs(above - setting.top_p).min() < 1e-6:
            return None
        keep &= above < setting.top_p
    return keep & (mass >= setting.min_p)


WAYS = {"cpu": sampling._ON_CPU, "tpu": sampling._ON_TPU, "gpu": sampling._ON_GPU}
SETTINGS = [
    Sampling(1.0, top_k=1),
    Sampling(0.6, top_k=20, top_p=0.95, min_p=0.02),
    Sampling(1.3, top_p=0.9),
    Sampling(2.0, top_k=300),
    Sampling(0.8, top_k=5000, top_p=1e-6),
    Sampling(1.0, min_p=0.1),
    Sampling(1.7, top_p=0.9999),
    Sampling(0.7),
]


@pytest.mark.parametrize("name", WAYS)
def test_every_platforms_bounds_are_those_of_a_sort(name):
    """Of logits of both signs, with equals among them and some of no probability at all."""
    random, size = np.random.default_rng(5), 700
    logits = random.normal(-1, 3, (len(SETTINGS), size)).astype(np.float32)
    logits[:, 100:200] = logits[:, :100]
    logits[3:, 300:350] = -np.inf
    logits[5] *= 1e-30
    logits[6] = np.round(logits[6])
    sampler = Sampler.create(SETTINGS, None)
    found = sampling._filter(
        sampler,
        jnp.asarray(logits),
        jnp.asarray(sampler.temperature)[:, None],
        jnp.ones(len(SETTINGS), bool),
        WAYS[name],
    )
    checked = 0
    for row, setting in enumerate(SETTINGS):
        keep = kept_by_sorting(logits[row], setting)
        if keep is not None:
            np.testing.assert_array_equal(np.isfinite(found[row]), keep & np.isfinite(logits[row]))
            checked += 1
    assert checked > len(SETTINGS) - 2


def test_every_platform_draws_the_same_tokens():
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 2, (len(SETTINGS), 500)), jnp.float32)
    sampler = Sampler.create(SETTINGS, row_keys(4, len(SETTINGS)))
    index, greedy = jnp.arange(len(SETTINGS)), jnp.argmax(logits, axis=-1)
    alike = jax.jit(sampling._draw, static_argnames="way")
    for way in WAYS.values():
        drawn = alike(sampler, logits, index, greedy, way=way)
        np.testing.assert_array_equal(drawn, draw(sampler, logits, index)[0])


def test_mixed_rows_keep_their_own_settings():
    """A greedy row beside a filtered and an unfiltered one, with their own keys."""
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1, (3, V)), jnp.float32)
    settings = [Sampling(), Sampling(temperature=5.0, top_k=2), Sampling(temperature=5.0)]
    keys = row_keys([1, 2, 3], 3)
    seen = []
    for index in range(60):
        at = jnp.full(3, index)
        together = draw(Sampler.create(settings, keys), logits, at)
        for row in range(3):
            alone = draw(
                Sampler.create([settings[row]], keys[row : row + 1]),
                logits[row : row + 1],
                at[:1],
            )
            assert int(alone[0][0]) == int(together[0][row])
        seen.append(np.asarray(together[0]))
    kinds = [len(set(column.tolist())) for column in np.stack(seen, 1)]
    assert kinds[0] == 1 and kinds[1] == 2 and kinds[2] > 5


def test_greedy_takes_the_lowest_of_equals():
    logits = jnp.asarray([[1.0, 3.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    for others in (Sampling(), Sampling(temperature=1.0)):
        sampler = Sampler.create([Sampling(), Sampling(), others], row_keys(0, 3))
        tokens, _ = draw(sampler, jnp.concatenate([logits, logits[:1]]), jnp.zeros(3, jnp.int32))
        assert tokens[:2].tolist() == [1, 0]


def test_no_two_draws_share_a_key():
    """Different rows and different steps draw different noise; the same ones the same."""
    logits = jnp.zeros((64, 1000))
    sampler = Sampler.create([Sampling(temperature=1.0)] * 64, row_keys(3, 64))
    steps = [draw(sampler, logits, jnp.full(64, step))[0].tolist() for step in range(8)]
    pairs = [token for tokens in steps for token in tokens]
    # 512 draws from 1,000 values: about 400 differ if they are independent.
    assert len(set(pairs)) > 360
    assert len({tuple(tokens) for tokens in steps}) == 8
    assert draw(sampler, logits, jnp.full(64, 3))[0].tolist() == steps[3]


def test_seeds():
    def data(seed, rows):
        return jax.random.key_data(row_keys(seed, rows)).tolist()

    assert data(7, 3) == data(jax.random.key(7), 3)
    assert data(7, 5)[:3] == data(7, 3)
    assert data([7, 8], 2) == data([7], 1) + data([8], 1)
    assert len({tuple(key) for key in data(7, 100)}) == 100
    for bad in (1.5, "7", [1, 2], jnp.zeros(2, jnp.uint32), True, None):
        with pytest.raises((TypeError, ValueError), match="seed"):
            row_keys(bad, 3)
    for beyond in (2**63, -(2**63) - 1, [0, 10**30, 0]):
        with pytest.raises(ValueError, match=r"seed.* is .*at (most|least)"):
            row_keys(beyond, 3)
    assert data(np.int64(7), 2) == data(7, 2) and data([np.int32(7), 8], 2) == data([7, 8], 2)
    with pytest.raises(ValueError, match="seed holds"):
        row_keys(jax.random.split(jax.random.key(0), 2), 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", 10**12),
        ("temperature", "warm"),
        ("temperature", 10**400),
        ("top_p", None),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", -1.0),
        ("top_p", math.nan),
        ("min_p", 1.0),
        ("min_p", -0.1),
    ],
)
def test_settings_out_of_range_name_the_argument(name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name} is .*must be"):
        Sampling(**{name: value})


def test_numbers_of_numpy_are_taken_as_pythons():
    mine = Sampling(np.float32(0.5), np.int64(3), np.float64(0.5), jnp.float32(0.25))
    assert mine == Sampling(0.5, 3, 0.5, 0.25)
    assert [type(value) for value in dataclasses.astuple(mine)] == [float, int, float, float]


def test_a_temperature_near_zero_is_greedy():
    """Logits divided by it would be infinite, and the first of several infinities would win."""
    logits = jnp.asarray([[1.0, 2.0, 5.0, 3.0]])
    for temperature in (1e-6, 1e-12, 1e-37, 1e-44):
        sampler = Sampler.create([Sampling(temperature)], row_keys(0, 1))
        assert draw(sampler, logits, jnp.zeros(1, jnp.int32))[0].tolist() == [2]
