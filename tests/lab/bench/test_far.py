"""A decode brought far without its model is where a real one would be."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny import QWEN3, WINDOWS, random_params

from raas_jax import Dense, RaaS, policies
from raas_jax.lab.bench.far import at_length, step_seconds
from raas_jax.lab.bench.turns import endless
from raas_jax.session import Session

PROMPT, ROWS, PAGE = 5, 2, 4


def session_of(policy, new=80, config=QWEN3):
    return Session.create(random_params(config), policy, [PROMPT] * ROWS, new)


@pytest.mark.parametrize(
    ("policy", "config", "pages"),
    [
        (RaaS(16, page_size=PAGE), QWEN3, 2),
        (RaaS(16, page_size=PAGE), QWEN3, 9),
        (Dense(page_size=PAGE), QWEN3, 2),
        (Dense(page_size=PAGE), QWEN3, 9),
        (RaaS(16, page_size=PAGE), WINDOWS, 9),
        (RaaS(16, page_size=PAGE), WINDOWS, 1),
    ],
    ids=["raas-2", "raas-9", "dense-2", "dense-9", "windows-9", "windows-1"],
)
def test_it_is_where_a_real_decode_would_be(policy, config, pages):
    session = session_of(policy, config=config)
    real, _ = session.start([[3, 1, 4, 1, 5]] * ROWS, endless(ROWS))
    for _ in range(pages):
        real, _ = session.advance(real)
    far = at_length(session, PROMPT, 1 + pages * PAGE)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), far) == jax.tree.map(
        lambda x: (x.shape, x.dtype), real
    )
    for name in ("generated", "limit", "done", "committed", "evicted"):
        np.testing.assert_array_equal(getattr(far.rows, name), getattr(real.rows, name), name)
    np.testing.assert_array_equal(far.cache.prompt.lengths, real.cache.prompt.lengths)
    for own, wanted in zip(far.cache.kept, real.cache.kept, strict=True):
        np.testing.assert_array_equal(np.sort(own.fill), np.sort(wanted.fill))
    if config is WINDOWS:
        assert len(far.meta) == 2
        np.testing.assert_array_equal(np.sort(far.meta[1]), np.sort(real.meta[1]))
        used = np.asarray(far.cache.kept[1].fill) > 0
        assert np.all(np.asarray(far.cache.kept[1].k)[used] != 0)
        in_ring = np.broadcast_to(
            5 + PAGE * pages - PAGE * np.asarray([3, 2, 1]), far.meta[1].shape
        )
        np.testing.assert_array_equal(np.sort(far.meta[1]), in_ring)
    if isinstance(policy, RaaS):
        own = far.meta[0]
        # Written in turn, and the last of them are kept: nothing was attended to on the way.
        held = min(pages, 4)
        written = 1 + PAGE * np.arange(pages - held + 1, pages + 1)
        found = np.sort(own.written)[..., -held:]
        np.testing.assert_array_equal(found, np.broadcast_to(written, found.shape))
        np.testing.assert_array_equal(own.stamp, own.written)


def test_between_pages_it_is_at_the_boundary_before():
    session = session_of(RaaS(16, page_size=PAGE))
    assert at_length(session, PROMPT, 24).rows.generated.tolist() == [21] * ROWS


def test_pages_differ_and_hold_numbers_of_the_size_of_keys():
    session = session_of(RaaS(16, page_size=PAGE))
    (kept,) = at_length(session, PROMPT, 33).cache.kept
    pages = np.asarray(kept.k).reshape(-1, PAGE * kept.k.shape[-1])
    assert len(np.unique(pages, axis=0)) == len(pages)
    assert np.std(pages) == pytest.approx(1, rel=0.3)


def test_it_goes_on_as_a_decode_does():
    session = session_of(RaaS(16, page_size=PAGE))
    state = at_length(session, PROMPT, 33)
    times, first = step_seconds(session, state, 1, 3)
    assert len(times) == 3 and 0 < min(times) < first
    assert ("advance", 1) in session.called
    state, progress = session.advance(at_length(session, PROMPT, 33))
    assert np.asarray(progress.tokens).min() >= 0 and np.isfinite(progress.logprobs).all()
    assert state.rows.generated.tolist() == [33 + PAGE] * ROWS
    assert not np.any(state.rows.done)


def test_a_policy_without_a_prompt_of_its_own_is_refused():
    policy = policies.parse("h2o:prompt=evict", budget=32, page_size=PAGE)
    with pytest.raises(ValueError, match="one that keeps the prompt"):
        at_length(session_of(policy), PROMPT, 9)
