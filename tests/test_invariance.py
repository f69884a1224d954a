"""What must not matter does not: a budget that suffices, neighbours in the batch, dead memory."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from pools import poisoned
from tiny import prompts_of, random_params

import raas_jax
from raas_jax import Dense, RaaS, Sampling
from raas_jax.decode import RowRequest
from raas_jax.plan import Plan
from raas_jax.session import Session

NEW = 42  # The first, drawn by prefill; ten pages of four; and one more.

SETTINGS = [
    Sampling(),
    Sampling(temperature=1.2),
    Sampling(temperature=0.9, top_k=9, top_p=0.9, min_p=0.02),
]

TIGHT = {
    "dense": Dense(page_size=4),
    "mass": RaaS(12, alpha=0.12, page_size=4),
    "bound, layer, within, two kinds of layers": RaaS(
        20, top_fraction=0.5, score="bound", granularity="layer", prompt="included", dense_layers=1,
        page_size=4,
    ),
    "tokens": RaaS(5, alpha=0.12, score="bound", page_size=1),
}  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return random_params(sharpness=3.0)


def check_equal(one, other):
    """Two `Output`s tell the same story."""
    assert one.tokens == other.tokens
    np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "policy",
    [
        RaaS(48, alpha=0.12, page_size=4, granularity="layer"),
        RaaS(64, top_fraction=0.5, score="bound", prompt="included", dense_layers=1, page_size=4),
    ],
    ids=["excluded", "included"],
)
def test_a_budget_that_covers_the_length_is_dense(params, policy):
    ask = {"max_new_tokens": NEW, "sampling": SETTINGS, "seed": 4}
    prompts = prompts_of([3, 9, 12])
    outs = raas_jax.generate(params, prompts, policy=policy, **ask)
    dense = raas_jax.generate(params, prompts, policy=Dense(page_size=4), **ask)
    for out, wanted in zip(outs, dense, strict=True):
        check_equal(out, wanted)
        assert len(out.tokens) == NEW and out.finish_reason == "length"
        assert out.stats.evicted_pages == 0 and out.stats.kept_pages == 10


@pytest.mark.parametrize("name", TIGHT)
def test_a_row_does_not_depend_on_its_neighbours(params, name):
    """Greedy, sampled and filtered rows of a ragged batch, each against its run alone; then with a
    stop token, after which a row is decoded on, unseen, beside the others."""
    policy, prompts, seeds = TIGHT[name], prompts_of([3, 9, 12], 1), [5, 6, 7]
    ask = {"policy": policy, "max_new_tokens": NEW}
    batch = raas_jax.generate(params, prompts, sampling=SETTINGS, seed=seeds, **ask)
    assert name == "dense" or all(out.stats.evicted_pages > 0 for out in batch)
    for prompt, setting, seed, out in zip(prompts, SETTINGS, seeds, batch, strict=True):
        alone = raas_jax.generate(params, [prompt], sampling=setting, seed=[seed], **ask)[0]
        check_equal(out, alone)
        assert out.finish_reason == alone.finish_reason == "length"
        assert out.stats.kept_pages == alone.stats.kept_pages
        assert out.stats.evicted_pages == alone.stats.evicted_pages
    # Cut short by a stop token, the others are as they were.
    last = batch[0].tokens[5]
    cut = raas_jax.generate(
        params, prompts, sampling=SETTINGS, seed=seeds, stop_token_ids=[last], **ask
    )
    for short, whole in zip(cut, batch, strict=True):
        length = whole.tokens.index(last) + 1 if last in whole.tokens else NEW
        assert short.tokens == whole.tokens[:length]


def test_samples_that_share_a_prompt_equal_samples_that_do_not(params):
    prompts = jnp.asarray(prompts_of([7, 7], 3), jnp.int32)
    lengths = jnp.asarray([7, 5], jnp.int32)
    ask = {
        "policy": RaaS(8, alpha=0.12, score="bound", page_size=4),
        "sampling": Sampling(temperature=1.0),
        "max_new_tokens": 30,
        "seed": 8,
    }
    shared = raas_jax.generate_ids(params, prompts, lengths, samples=3, **ask)
    repeated = jnp.repeat(prompts, 3, 0), jnp.repeat(lengths, 3)
    apart = raas_jax.generate_ids(params, *repeated, **ask)
    np.testing.assert_array_equal(shared.tokens, apart.tokens)
    np.testing.assert_allclose(shared.logprobs, apart.logprobs, rtol=1e-3, atol=1e-4)
    assert len({tuple(row) for row in np.asarray(shared.tokens).tolist()}) == 6


@pytest.mark.parametrize("name", ["dense", "bound, layer, within, two kinds of layers"])
def test_dead_memory_is_never_read(params, name):
    """All that holds no token is NaN: empty slots, their bounds, the rest of the prompt's last
    page and what is not yet written of the current page. Nothing changes."""
    policy, prompts = TIGHT[name], prompts_of([3, 9, 12], 1)
    plan = Plan.create(params.config, policy, [3, 9, 12], NEW)
    session = Session(params, plan, 3)

    def run(bad):
        state, _ = session.start(prompts, RowRequest.create([NEW] * 3, (), SETTINGS, 1))
        return session.advance(poisoned(state, plan) if bad else state, 8)

    (state, drawn), (_, wanted) = run(True), run(False)
    np.testing.assert_array_equal(drawn.tokens, wanted.tokens)
    np.testing.assert_array_equal(drawn.logprobs, wanted.logprobs)
    assert np.all(np.isfinite(drawn.logprobs))
    # The poison was there, and what has been written since is sound.
    for kept in state.cache.kept:
        filled = np.asarray(kept.fill) > 0
        assert np.all(np.isfinite(np.asarray(kept.k)[filled]))
        assert np.all(np.isnan(np.asarray(kept.v)[~filled]))
    assert np.any(np.isnan(state.cache.prompt.k))
