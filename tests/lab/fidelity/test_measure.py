"""What is measured of a text, against a decode and a divergence written in NumPy."""

from __future__ import annotations

import jax
import numpy as np
import oracle
import pytest
from tiny import prompts_of, random_params

from raas_jax import RaaS, scoring
from raas_jax.lab.fidelity import measure
from raas_jax.policies import Recent

P, PROMPT = 4, 6
POLICY = RaaS(3 * P, alpha=0.12, page_size=P)


@pytest.fixture(scope="module")
def params():
    return random_params(sharpness=3.0)


def followed(params, policy, texts):
    outputs = [measure.dense_outputs(params, ids) for ids in texts]
    *steps, found = measure.follow(params, policy, texts, outputs, PROMPT)
    assert steps[-1] == max(map(len, texts)) - PROMPT - 1
    return found


def by_numpy(params, ids, budget):
    """Log-probabilities `[T - PROMPT - 1, V]` of the tokens from PROMPT + 1 on."""
    rules = oracle.Rules(page_size=P, budget=budget, alpha=POLICY.alpha)
    network = oracle.Network(
        jax.tree.map(np.asarray, params.weights),
        theta=params.config.rope.theta,
        eps=params.config.rms_norm_eps,
    )
    row = oracle.Sequence(network, rules, list(ids[:PROMPT]), oracle.Doubt(margin=1e-4))
    logits = []
    for index, token in enumerate(ids[PROMPT:-1]):
        logits.append(row.step(int(token), lambda *_: False))
        if (index + 1) % P == 0:
            row.boundary()
    logits = np.stack(logits).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_against_numpy(params):
    texts = prompts_of([47, 47, 30], 3)
    losses = []
    for ids, found in zip(texts, followed(params, POLICY, texts), strict=True):
        dense, kept = (by_numpy(params, ids, budget) for budget in (1000, POLICY.budget))
        following = np.asarray(ids[PROMPT + 1 :])[:, None]
        seen = found.differences
        for got, logs in ((seen.nll, kept), (seen.dense_nll, dense)):
            wanted = -np.take_along_axis(logs, following, axis=-1)[:, 0]
            np.testing.assert_allclose(got, wanted, atol=2e-5)
        np.testing.assert_allclose(
            seen.kl, (np.exp(dense) * (dense - kept)).sum(-1), atol=2e-5, rtol=1e-4
        )
        np.testing.assert_array_equal(seen.agree, dense.argmax(-1) == kept.argmax(-1))
        losses.append(seen.kl.sum())
    assert min(losses) > 0.1  # It forgets, and that is seen.


def test_nothing_forgotten_is_no_loss(params):
    for found in followed(params, Recent(64, page_size=P), prompts_of([40, 25], 1)):
        seen = found.differences
        assert seen.agree.all() and np.abs(seen.kl).max() < 1e-5
        np.testing.assert_allclose(seen.nll, seen.dense_nll, atol=1e-4)


def test_a_text_does_not_depend_on_its_neighbours(params):
    texts = prompts_of([40, 33], 5)
    together = followed(params, POLICY, texts)
    for ids, found in zip(texts, together, strict=True):
        (alone,) = followed(params, POLICY, [ids])
        np.testing.assert_allclose(found.differences.kl, alone.differences.kl, atol=1e-5)


def test_many_positions_at_once(params, monkeypatch):
    """Logits are made for a few positions at a time, however many there are."""
    monkeypatch.setattr(scoring, "POSITIONS_AT_ONCE", 3)
    jax.clear_caches()
    few = followed(params, POLICY, [ids := prompts_of([40], 5)[0]])[0].differences
    monkeypatch.undo()
    jax.clear_caches()
    many = followed(params, POLICY, [ids])[0].differences
    np.testing.assert_allclose(few.kl, many.kl, atol=1e-6)
