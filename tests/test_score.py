"""`score` against the plain forward pass, transformers and a forced oracle in NumPy.

On a mesh: `tests/engine/on_mesh.py`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tiny import VOCAB, allotment_of, prompts_of, random_params, shares_of

import raas_jax
from raas_jax import Dense, RaaS, scoring
from raas_jax.model import forward
from raas_jax.policies import H2O, Quest, Recent
from raas_jax.scoring import next_logprobs, scores

P = 4
POLICY = RaaS(3 * P, alpha=0.12, page_size=P)
LENGTHS = [(5, 41), (9, 30), (1, 44), (7, 1), (3, 17)]  # Of prompts and continuations.


@pytest.fixture(scope="module")
def params():
    return random_params(sharpness=3.0)


def texts(seed=0):
    prompts = prompts_of([prompt for prompt, _ in LENGTHS], seed)
    return prompts, prompts_of([length for _, length in LENGTHS], seed + 1)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - (logits.max(-1, keepdims=True))
    )


def by_forward(params, prompt, continuation):
    """Log-probabilities `[T, V]` from which each token of the continuation is chosen."""
    ids = jnp.asarray([[*prompt, *continuation]], jnp.int32)
    return log_softmax(forward(params.config, params.weights, ids)[0])[len(prompt) - 1 : -1]


def by_oracle(params, policy, prompt, continuation):
    """The same where the cache forgets, by a decode written in NumPy."""
    own, budget = policy.allotment, policy.budget
    shares = None if own is None else shares_of(own, budget, P)
    rules = oracle.Rules(page_size=P, budget=budget, alpha=policy.alpha, shares=shares)
    network = oracle.Network(
        jax.tree.map(np.asarray, params.weights),
        theta=params.config.rope.theta,
        eps=params.config.rms_norm_eps,
    )
    doubt = oracle.Doubt(margin=1e-4)
    row = oracle.Sequence(network, rules, list(prompt), doubt)
    logits, evicted = [row.first_logits], 0
    for index, token in enumerate(continuation[:-1]):
        logits.append(row.step(int(token), lambda *_: False))
        if (index + 1) % P == 0:
            evicted += sum(gone for _, gone in row.boundary().values())
    return log_softmax(np.stack(logits)), evicted, doubt


def check(found, wanted, continuation, atol):
    assert found.logprobs.dtype == np.float32
    assert found.tokens == list(continuation)
    chosen = np.take_along_axis(wanted, np.asarray(continuation)[:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(found.logprobs, chosen, atol=atol, rtol=0)
    sure = np.sort(wanted)[:, -1] - np.sort(wanted)[:, -2] > 1e-3
    np.testing.assert_array_equal(found.greedy[sure], (wanted.argmax(-1) == continuation)[sure])
    assert found.total == pytest.approx(chosen.sum(), abs=len(chosen) * atol)


@pytest.mark.parametrize(
    "policy", [Dense(page_size=P), RaaS(64, page_size=P)], ids=["dense", "raas"]
)
def test_what_forgets_nothing_is_the_forward_pass(params, policy):
    """In one pass, and fed through a decode whose budget covers the text; ragged batches of two."""
    prompts, continuations = texts()
    found = raas_jax.score(params, prompts, continuations, policy=policy, rows=2)
    for each, prompt, continuation in zip(found, prompts, continuations, strict=True):
        check(each, by_forward(params, prompt, continuation), continuation, 2e-4)


@pytest.mark.parametrize("allotment", [None, allotment_of()], ids=["alike", "allotted"])
def test_a_small_budget_is_the_oracle_forced(params, allotment):
    """Token by token, in a ragged batch, and each row as it is alone."""
    policy = dataclasses.replace(POLICY, allotment=allotment)
    prompts, continuations = texts(3)
    found = raas_jax.score(params, prompts, continuations, policy=policy)
    doubtful, forgotten, different = 0, 0, 0
    for index, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        wanted, evicted, doubt = by_oracle(params, policy, prompt, continuation)
        forgotten += evicted
        if doubt.doubtful:
            doubtful += 1
            continue
        check(found[index], wanted, continuation, 2e-4)
        dense = by_forward(params, prompt, continuation)
        different += np.abs(wanted - dense).max() > 1e-2
    assert forgotten > 20 and doubtful <= 1 and different >= 3
    alone = raas_jax.score(params, prompts[1], continuations[1], policy=policy)
    np.testing.assert_allclose(alone.logprobs, found[1].logprobs, atol=1e-4)


@pytest.mark.parametrize("kind", [Recent, H2O, Quest])
def test_any_policy_scores_what_it_generated(params, kind):
    """Greedy answers have the log-probabilities that generation gave them, and are all greedy."""
    prompts, policy = prompts_of([5, 9, 2]), kind(3 * P, page_size=P)
    outs = raas_jax.generate(params, prompts, policy=policy, max_new_tokens=30)
    found = raas_jax.score(params, prompts, [out.tokens for out in outs], policy=policy)
    for each, out in zip(found, outs, strict=True):
        np.testing.assert_allclose(each.logprobs, out.logprobs, atol=1e-4)
        assert each.greedy.all()


def test_ends_of_texts(params):
    """Many of mixed lengths, nothing to score among them, the longest first."""
    rng = np.random.default_rng(0)
    texts = [(rng.integers(0, VOCAB, n).tolist(), scored) for n, scored in [(5, 2), (65, 64)]]
    texts += [(texts[0][0][:4], 3), ([1, 2], 0), (texts[1][0][:40], 1)]
    prompts = [ids[: len(ids) - scored] for ids, scored in texts]
    ends = [ids[len(ids) - scored :] for ids, scored in texts]
    found = dict(scores(params, prompts, ends, Dense(), rows=3))
    assert next(iter(found)) == 1 and sorted(found) == list(range(5))
    assert found[3].total == 0 and found[3].greedy.all()
    for index in (0, 1, 2, 4):
        check(found[index], by_forward(params, prompts[index], ends[index]), ends[index], 1e-4)


def test_blocks_change_nothing(params, monkeypatch):
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (2, 3, 64)), jnp.int32)
    lengths = jnp.full(tokens[0].shape[0], tokens[0].shape[1])
    whole = next_logprobs(params, *tokens, lengths)
    monkeypatch.setattr(scoring, "POSITIONS_AT_ONCE", 48)
    jax.clear_caches()
    blocks = next_logprobs(params, *tokens, lengths)
    jax.clear_caches()
    np.testing.assert_allclose(whole[0], blocks[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(whole[1], blocks[1])


def test_wrong_arguments_are_named(params):
    with pytest.raises(ValueError, match=r"prompts\[0\] is empty"):
        next(scores(params, [[]], [[1, 2]], Dense()))
    with pytest.raises(ValueError, match="continuation is .* for 2 prompts"):
        raas_jax.score(params, [[1], [2]], [[1]])
    with pytest.raises(ValueError, match="rows is 0"):
        raas_jax.score(params, [1], [2], rows=0)
    with pytest.raises(ValueError, match=r"continuation\[1\] is 99"):
        raas_jax.score(params, [1], [2, 99])
    for wrong in (None, 3, b"a", np.int32(3), (i for i in [1]), {1: 2}):
        with pytest.raises(TypeError, match="continuation is .*text or token ids"):
            raas_jax.score(params, [1], wrong)
        with pytest.raises(TypeError, match="continuation is .* for 2 prompts"):
            raas_jax.score(params, [[1], [2]], wrong)
    with pytest.raises(TypeError, match=r"mesh is \(1, 2\); expected one from"):
        raas_jax.score(params, [1], [2], mesh=(1, 2))
    with pytest.raises(ValueError, match="no tokenizer"):
        raas_jax.score(params, [1], "text")
    with pytest.raises(TypeError, match="policy"):
        raas_jax.score(params, [1], [2], policy="raas")


@pytest.mark.parametrize("policy", [POLICY, Dense(page_size=P)], ids=["raas", "dense"])
def test_transformers_and_text(policy):
    """The demo: text in, and what transformers says of the same tokens."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params = raas_jax.load("demo", dtype="float32")
    prompt, answer = "a = 4 ; b = 9 ; c = a + b ; ? c :", "a = 4 , a 4 ; b = 9 , b 9 ;"
    policy = RaaS(64, page_size=P) if isinstance(policy, RaaS) else policy
    found = raas_jax.score(params, prompt, answer, policy=policy)
    model = transformers.AutoModelForCausalLM.from_pretrained(params.source, dtype=torch.float32)
    ids = raas_jax.tokenizer.encode(params, prompt)[0][0]
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *found.tokens]])).logits[0]
    wanted = torch.log_softmax(logits.double(), -1).numpy()[len(ids) - 1 : -1]
    check(found, wanted, found.tokens, 2e-4)
    assert found.greedy.all()
