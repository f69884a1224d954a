"""Logits that are not finite end their own row, with an error that says so, and no other row."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QWEN3, prompts_of, random_params

import raas_jax
from raas_jax import Dense, Engine, RaaS, Request, Sampling, policies
from raas_jax.lab.inspect.recording import record

POLICY = RaaS(16, page_size=4)
N = 24


@pytest.fixture(scope="module")
def sound():
    return random_params(dataclasses.replace(QWEN3, vocab_size=97), sharpness=3.0)


@pytest.fixture(scope="module")
def case(sound):
    """Weights that break once a token is read which one answer writes on its way, and prompts."""
    prompts = prompts_of([5, 7, 6, 9, 4])
    answers = [each.tokens for each in generate(sound, prompts)]
    for row, answer in enumerate(answers):
        others = {token for each in (*prompts, *answers) if each is not answer for token in each}
        for token in set(answer[3:-6]) - others - set(answer[:3]):
            embedding = sound.weights["embedding"].at[token].set(jnp.nan)
            broken = dataclasses.replace(sound, weights={**sound.weights, "embedding": embedding})
            return broken, prompts, answers, row, answer.index(token) + 1
    raise AssertionError("no answer has a token of its own; take other prompts")


def generate(params, prompts, policy=POLICY, **options):
    return raas_jax.generate(params, prompts, policy=policy, max_new_tokens=N, **options)


@pytest.mark.parametrize("how", ["generate", "stream", "engine"])
def test_in_the_middle_of_an_answer(case, how):
    broken, prompts, answers, bad, length = case
    if how == "generate":
        found = generate(broken, prompts)
    elif how == "stream":
        pieces = list(raas_jax.stream(broken, prompts, policy=POLICY, max_new_tokens=N))
        found = [each.output for each in sorted(pieces, key=lambda p: p.row) if each.output]
    else:
        engine = Engine(broken, policy=POLICY, rows=2, max_new_tokens=N, max_prompt_tokens=12)
        # Twice, so that sound prompts follow in the row that has broken.
        requests = [Request(i, prompt) for i, prompt in enumerate([*prompts, *prompts])]
        results = sorted(engine.run(requests), key=lambda result: result.id)
        assert [r.tokens for r in results[:5]] == [r.tokens for r in results[5:]]
        found = results[:5]
    for row, (output, answer) in enumerate(zip(found, answers, strict=True)):
        if row == bad:
            assert output.finish_reason == "error" and output.tokens == answer[:length]
            assert f"logits of token {length} were not finite" in output.error
            assert np.all(np.isfinite(output.logprobs)) and len(output.logprobs) == length
        else:
            assert output.tokens == answer
            assert (output.finish_reason, output.error) == ("length", None)


def test_at_the_first_token(sound):
    """Of a prompt that breaks the model; nothing was drawn."""
    embedding = sound.weights["embedding"].at[7].set(jnp.inf)
    broken = dataclasses.replace(sound, weights={**sound.weights, "embedding": embedding})
    for sampling in (None, Sampling(temperature=0.8, top_k=5)):
        bad, good = generate(broken, [[7, 8], [8, 9]], sampling=sampling)
        assert (bad.tokens, bad.finish_reason) == ([], "error") and "token 0" in bad.error
        alone = generate(sound, [[8, 9], [8, 9]], sampling=sampling)[1]
        if 7 not in alone.tokens:
            assert good.tokens == alone.tokens


def test_all_weights_are_nan(sound):
    nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), sound.weights)
    for name in ("raas", "h2o", "quest", "dense"):
        options = {} if name == "dense" else {"budget": 16}
        policy = policies.create(name, page_size=4, **options)
        outputs = generate(dataclasses.replace(sound, weights=nothing), [[1, 2], [3]], policy)
        assert [(o.tokens, o.finish_reason) for o in outputs] == [([], "error")] * 2


def test_inside_a_jit(case):
    broken, prompts, answers, bad, length = case
    ids = jnp.asarray([prompts[bad]])
    step = jax.jit(partial(raas_jax.generate, policy=POLICY, max_new_tokens=N))
    output = step(broken, ids)
    assert output.tokens[0].tolist() == answers[bad][:length] + [-1] * (N - length)
    assert np.flatnonzero(np.isnan(output.logprobs[0])).tolist() == [length]


@pytest.mark.parametrize("policy", [POLICY, Dense(page_size=4)], ids=["raas", "dense"])
def test_scores(case, sound, policy):
    """Numbers up to the page with the token that breaks the model, and none from there."""
    broken, prompts, answers, bad, length = case
    found = raas_jax.score(broken, prompts, answers, policy=policy)
    whole = raas_jax.score(sound, prompts, answers, policy=policy)
    for row, (score, sound_score) in enumerate(zip(found, whole, strict=True)):
        # A pass over a text, or a page, attends to what comes later with weights of zero. The first
        # page comes after the first token, which the prompt gives.
        whole_pages = 1 + (length - 1) // policy.page_size * policy.page_size if length else 0
        end = N if row != bad else 0 if isinstance(policy, Dense) else whole_pages
        np.testing.assert_allclose(score.logprobs[:end], sound_score.logprobs[:end], atol=1e-5)
        assert np.all(np.isnan(score.logprobs[end:])) and np.isnan(score.total) == (row == bad)


def test_recordings(case):
    broken, prompts, answers, bad, length = case
    found = dict(record(broken, prompts, [N] * len(prompts), POLICY, stop_tokens=()))
    for row, recording in found.items():
        reason, end = ("error", length) if row == bad else ("length", N)
        assert (recording.finish_reason, recording.tokens) == (reason, answers[row][:end])
