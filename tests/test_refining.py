"""Allotments refined where they are used: the pass is a decode, its gradient is the truth."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import written_out
from tiny import QWEN3, VOCAB, WINDOWS, random_params

import raas_jax
from raas_jax.allotting import dense, refine
from raas_jax.lab.fidelity.measure import dense_outputs, follow
from raas_jax.model import ends
from raas_jax.policies import Allotment, RaaS

P, PROMPT, PAGES = 2, 6, 14
POLICY = RaaS(10, page_size=P)
CHOSEN = np.asarray([[1, 4], [5, 2]])  # Two, five, six and three pages.


@pytest.fixture(scope="module", params=[QWEN3, WINDOWS], ids=["full", "windows"])
def params(request):
    return random_params(request.param, 3, 3.0)


@pytest.fixture(scope="module")
def texts():
    return np.random.default_rng(0).integers(0, VOCAB, (2, PROMPT + PAGES * P))


@pytest.fixture(scope="module")
def model(params, texts):
    return refine._Model(params, texts, PROMPT, POLICY)


class Given(Allotment):
    """Whose first losses are the pages."""

    def pages(self, mean, page_size, least=1):
        return self.losses[..., 0].astype(np.int64)


def test_a_pass_is_a_decode(params, texts, monkeypatch):
    """All tokens of a layer at once, in blocks of any size, diverge as those fed one by one.

    What a sink takes stays with it when pages are forgotten, in both.
    """
    if params.config.window_layers:
        monkeypatch.setattr(dense, "QUERIES", 7)
    jax.clear_caches()  # Of programs with other blocks.
    found = refine._Model(params, texts, PROMPT, POLICY).run(CHOSEN)
    pages = np.asarray(refine.GRID)[CHOSEN]
    policy = RaaS(10, page_size=P, allotment=Given([1, 2], np.stack([pages, pages], axis=-1)))
    outputs = [dense_outputs(params, ids.tolist()) for ids in texts]
    *_, fed = follow(params, policy, texts.tolist(), outputs, PROMPT)
    # The last token's successor is not there to be compared: look at all others.
    wanted = [np.sum(each.differences.kl) for each in fed]
    for row, sum_of in enumerate(wanted):
        x, whole = found.inputs[-1][row], jnp.asarray(outputs[row])[None]
        last = refine._divergence(params, x[:, -1:], whole[:, -1:], 0)[0]
        mean = refine._divergence(params, x, whole, PROMPT)[0]
        assert float(mean) * PAGES * P == pytest.approx(sum_of + float(last), rel=1e-3)
    assert found.divergence > 0.01


def divergence_of(params, ids, outputs, seen, blend):
    """Of one text, by attention written out; `seen [2, L, K, T, T]` are what heads read now and
    what they would, and `blend [L, K]` goes from one to the other."""
    config = params.config

    def attended(layer, q, k, v, given):
        scores = written_out.scores_of(layer, q, k)
        if given is None:
            return written_out.read(written_out.shares_of(layer, scores), v), None
        now, then, share = given
        group = q.shape[1] // k.shape[1]

        def read(visible):
            left = jnp.where(jnp.repeat(visible, group, axis=0), scores, -1e30)
            return written_out.read(written_out.shares_of(layer, left), v)

        share = jnp.repeat(share, group)[:, None]
        # Where a head reads something else, the rest of the model sees it; its scores stay.
        return read(now) + share * jax.lax.stop_gradient(read(then) - read(now)), None

    x, _ = written_out.run(params, ids, attended, (*seen, blend))
    model = ends(config, params.weights)
    wanted = jax.nn.log_softmax(model.logits(jnp.asarray(outputs)))
    logs = jax.nn.log_softmax(model.logits(x))
    return jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - logs), axis=-1)[PROMPT:])


def masks(held, L, K):
    """Of pages `[L][n, K, n]` those of tokens, bool `[L, K, T, T]`."""
    page = (np.arange(PROMPT + PAGES * P) - PROMPT) // P
    T = len(page)
    found = np.tri(T, dtype=bool) & np.ones((L, K, T, T), bool)
    for layer, head, t, s in np.ndindex(found.shape):
        if page[s] >= 0 and page[t] > page[s]:
            found[layer, head, t, s] = held[layer][page[t], head, page[s]]
    return found


def test_changes_are_those_of_the_whole_model(params, texts, model):
    """The slope of the divergence, at once through all layers, as one head reads more or less."""
    found = model.run(CHOSEN)
    changes = model.changes(found)
    L, K = CHOSEN.shape
    slope = jax.jit(
        lambda *given: jax.grad(lambda blend: divergence_of(params, *given, blend))(
            jnp.zeros((L, K))
        )
    )
    assert np.all(np.take_along_axis(changes, CHOSEN[..., None], axis=-1) == 0)
    for size in (0, 3, len(model.grid) - 1):
        wanted = np.zeros((L, K))
        for row, ids in enumerate(texts):
            of_text = [np.asarray(held[:, row]) for held in found.held if held is not None]
            now = [
                np.stack([each[:, CHOSEN[layer, head], head] for head in range(K)], axis=1)
                for layer, each in enumerate(of_text)
            ]
            then = [each[:, size] for each in of_text]
            seen = jnp.asarray(np.stack([masks(now, L, K), masks(then, L, K)]))
            outputs = dense_outputs(params, ids.tolist())
            wanted += np.asarray(slope(jnp.asarray(ids), outputs, seen)) / 2
        np.testing.assert_allclose(changes[..., size], wanted, rtol=2e-3, atol=1e-6)
        assert np.abs(wanted).max() > 1e-4


def test_moves_stay_within_the_budget_and_the_step(model):
    rng = np.random.default_rng(1)
    for _ in range(20):
        changes = rng.normal(size=(2, 2, len(model.grid)))
        moved = model.moved(np.full((2, 2), 4), changes, 0.5, 5)
        pages = model.grid[moved]
        assert pages.sum() == 20 and pages.max() <= 7 and pages.min() >= 3
    # Most is saved by one head, nothing by another.
    index = 4.0 - np.arange(len(model.grid))
    changes = np.stack([np.stack([2 * index, 0 * index]), np.stack([index, index])])
    moved = model.grid[model.moved(np.full((2, 2), 4), changes, 0.5, 5)]
    assert moved[0].tolist() == [7, 4] and sorted(moved[1]) == [4, 5]


def test_a_slope_is_believed_as_far_as_it_can_be():
    """More pages cost nothing, and fewer save nothing."""
    changes = np.asarray([[3.0, 1.0, -2.0, 4.0, 0.0, 1.0, -3.0, -1.0]])
    found = refine._never_rising(changes, np.asarray([4]))
    assert found.tolist() == [[4.0, 4.0, 4.0, 4.0, 0.0, 0.0, -3.0, -3.0]]


def test_refining_helps():
    """As a decode of the same texts under the same budget has it."""
    params = random_params(QWEN3, 3, 3.0)
    policy = RaaS(16, page_size=P)
    texts = np.random.default_rng(0).integers(0, VOCAB, (4, PROMPT + 20 * P))
    found = raas_jax.allot(params, texts, policy=policy, budget=16, prompt_tokens=PROMPT, rounds=6)
    made = found.made
    assert made["refined"] < 0.9 * made["evenly"] and made["budget"] == 16
    assert found.pages(8, P).mean() == 8 and found.model
    outputs = [dense_outputs(params, ids.tolist()) for ids in texts]

    def divergence(allotment):
        tried = dataclasses.replace(policy, allotment=allotment)
        *_, fed = follow(params, tried, texts.tolist(), outputs, PROMPT)
        return np.mean([each.differences.kl for each in fed])

    assert divergence(found) < 0.9 * divergence(None)
