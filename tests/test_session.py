"""A decode driven by hand: page by page, looked at, forced, paused and resumed."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from tiny import prompts_of, random_params

import raas_jax
from raas_jax import Dense, RaaS, Sampling
from raas_jax.decode import Probe, RowRequest, cache_bytes
from raas_jax.session import Session

P, NEW = 4, 33
POLICY = RaaS(3 * P, alpha=0.12, page_size=P)
PROMPTS = prompts_of([5, 9, 2])


@pytest.fixture(scope="module")
def params():
    return random_params(sharpness=3.0)


@pytest.fixture
def session(params):
    return Session.create(params, POLICY, [len(prompt) for prompt in PROMPTS], NEW)


def request(**options):
    return RowRequest.create([NEW] * len(PROMPTS), (), Sampling(temperature=1.0), 7, **options)


def drive(session, state, progress, pages=1, **options):
    """Tokens and log-probabilities `[T, B]` to the end."""
    seen = [session.read(progress)]
    while not seen[-1].done.all():
        state, progress = session.advance(state, pages, **options)
        seen.append(session.read(progress))
    return (
        np.concatenate([getattr(each, name) for each in seen]) for name in ("tokens", "logprobs")
    )


@pytest.mark.parametrize("pages", [1, 3])
def test_by_hand_as_generate(params, session, pages):
    tokens, logprobs = drive(session, *session.start(PROMPTS, request()), pages)
    outs = raas_jax.generate(
        params,
        PROMPTS,
        policy=POLICY,
        max_new_tokens=NEW,
        sampling=Sampling(temperature=1.0),
        seed=7,
    )
    for row, out in enumerate(outs):
        assert tokens[: len(out.tokens), row].tolist() == out.tokens
        np.testing.assert_allclose(logprobs[: len(out.tokens), row], out.logprobs, atol=1e-5)
        assert out.stats.kv_bytes == session.row_bytes
    assert np.all(tokens[NEW:] == -1)


def test_forced_tokens_are_fed_and_some_are_sampled(session):
    """-1 samples what an undisturbed run would, as long as nothing else was forced before it."""
    free, logprobs = drive(session, *session.start(PROMPTS, request()))
    forced = np.full_like(free, -1)
    forced[:, 0] = free[:, 0]  # What it would have sampled anyway.
    forced[9:, 1] = 3
    state, progress = session.start(PROMPTS, request(), force=forced[0])
    seen = [session.read(progress)]
    for first in range(1, len(free), P):
        state, progress = session.advance(state, force=forced[first : first + P])
        seen.append(session.read(progress))
    tokens, found, greedy = (
        np.concatenate([getattr(each, name) for each in seen])
        for name in ("tokens", "logprobs", "greedy")
    )
    np.testing.assert_array_equal(tokens[:, [0, 2]], free[:, [0, 2]])
    np.testing.assert_array_equal(tokens[:9, 1], free[:9, 1])
    assert np.all(tokens[9:NEW, 1] == 3)
    np.testing.assert_allclose(found[:, [0, 2]], logprobs[:, [0, 2]], atol=1e-5)
    assert found[10, 1] != logprobs[10, 1] and greedy.dtype == bool


def filled(state):
    return tuple(kept.fill for kept in state.cache.kept)


def generated(state):
    return state.rows.generated


def test_a_probe_sees_the_state_on_its_way(session):
    state, _ = session.start(PROMPTS, request())
    state, progress = session.advance(state, 6, probe=Probe(filled, generated))
    (fill,), steps, hidden = session.read(progress).probed
    assert hidden is None
    assert fill.shape[0] == 6 and steps.shape == (6, P, len(PROMPTS))
    # Before page n, n pages were committed, as far as there are slots.
    np.testing.assert_array_equal((fill > 0).sum(-1)[:, 0, 0, 0], [0, 1, 2, 3, 3, 3])
    np.testing.assert_array_equal(steps.reshape(-1, 3)[:, 0], 2 + np.arange(6 * P))


def test_exactly_one_transfer_for_each_look(params, monkeypatch):
    """`generate` brings everything to the host at once, and nothing else on the way."""
    advances, reads = [], []
    advance, get = Session.advance, jax.device_get

    def counted(*arguments, **options):
        advances.append(1)
        return advance(*arguments, **options)

    def get_counted(tree):
        reads.append(1)
        return get(tree)

    monkeypatch.setattr(Session, "advance", counted)
    monkeypatch.setattr(jax, "device_get", get_counted)
    with jax.transfer_guard_device_to_host("disallow"):
        raas_jax.generate(params, PROMPTS, policy=POLICY, max_new_tokens=100)
    assert len(advances) == -(-99 // 32) and len(reads) == 1 + len(advances)


def test_saved_and_restored_by_another_session(params, session, tmp_path):
    state, progress = session.start(PROMPTS, request())
    first = session.read(progress)
    state, progress = session.advance(state, 4)
    before = session.read(progress)
    session.save(state, tmp_path / "state")
    rest = [session.read(session.advance(state, 5)[1])]
    other = Session.create(params, POLICY, [len(prompt) for prompt in PROMPTS], NEW)
    again = [other.read(other.advance(other.restore(tmp_path / "state"), 5)[1])]
    for one, two in zip(rest, again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, two)
    assert first.tokens.shape == (1, 3) and before.tokens.shape == (4 * P, 3)
    for policy, lengths, said in [
        (RaaS(5 * P, page_size=P), [5, 9, 2], "another plan"),
        (dataclasses.replace(POLICY, alpha=0.5), [5, 9, 2], "another plan, .* here it is .*0.5"),
        (POLICY, [5, 9, 2, 2], "other shapes"),
    ]:
        with pytest.raises(ValueError, match=said):
            Session.create(params, policy, lengths, NEW).restore(tmp_path / "state")
    with pytest.raises(FileNotFoundError, match="no saved state"):
        session.restore(tmp_path / "nothing")
    with pytest.raises(FileExistsError):
        session.save(other.restore(tmp_path / "state"), tmp_path / "state")


def test_compiled_ahead_it_does_the_same(session):
    session.compile(2)
    ahead = [*drive(session, *session.start(PROMPTS, request()), 2)]
    session._compiled.clear()
    called = [*drive(session, *session.start(PROMPTS, request()), 2)]
    for one, two in zip(ahead, called, strict=True):
        np.testing.assert_array_equal(one, two)


def test_stopped_rows_end(session):
    state, _ = session.start(PROMPTS, request())
    state = session.stop(state, np.array([False, True, False]))
    state, progress = session.advance(state)
    seen = session.read(progress)
    assert seen.done.tolist() == [False, True, False]
    assert np.all(seen.tokens[:, 1] == -1) and np.all(seen.tokens[:, 0] >= 0)


def test_the_shape_is_that_of_the_state(session):
    state, _ = session.start(PROMPTS, request())
    like = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), session.shape.cache)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state.cache) == like
    assert cache_bytes(state) == 3 * session.row_bytes
    # Nothing runs in an empty state.
    assert np.all(session.empty().rows.done)


@pytest.mark.parametrize("layers", ["separate", "stacked"])
def test_layers_stacked_or_separate(params, layers):
    """How weights are stored changes no token."""
    outs = [
        raas_jax.generate(each, PROMPTS, policy=policy, max_new_tokens=20)
        for policy in (POLICY, dataclasses.replace(POLICY, dense_layers=1))
        for each in (params, getattr(params, layers)())
    ]
    for one, two in zip(outs[::2], outs[1::2], strict=True):
        assert [out.tokens for out in one] == [out.tokens for out in two]


def test_a_cache_that_cannot_fit_is_refused_before_anything_is_allocated(params):
    for policy, limit in ((Dense(page_size=P), 2**26), (RaaS(2**26, page_size=P), 2**27)):
        session = Session.create(params, policy, [3] * 512, limit)
        with pytest.raises(ValueError, match="whose cache for 512 rows takes .* bytes, and there"):
            session.start([[1, 2, 3]] * 512, RowRequest.create([limit] * 512))
        with pytest.raises(ValueError, match="Use fewer rows, a smaller budget"):
            session.empty()
