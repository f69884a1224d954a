"""Allotments are found from what a policy would keep, and from what that costs."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import written_out
from tiny import ALL_WINDOWS, MOE, QWEN3, VOCAB, WINDOWS, random_params

import raas_jax
from raas_jax.allotting import dense, losses
from raas_jax.allotting.simulate import simulate, simulated
from raas_jax.lab.inspect.recording import record
from raas_jax.model import ends, hidden_states
from raas_jax.policies import H2O, RKV, RaaS, RaaSQuest, Recent, SnapKV
from raas_jax.policies.lazy_eviction import LazyEviction

P, PROMPT, PAGES = 2, 6, 12


@pytest.fixture(scope="module")
def params():
    return random_params(QWEN3, 3, 3.0)


def first_layer(params, tokens):
    """What `allot` hands to the simulation of the first layer that sees everything."""
    x, first = dense.embed(params, jnp.asarray(tokens)), 0
    while params.config.layer_kinds[first] == "window":
        x = dense.forward(params, x, jnp.int32(first), kind="window")
        first += 1
    found = dense.backward(params, x, jnp.ones_like(x), jnp.int32(first), prompt=PROMPT, P=P)
    return found.seen


def test_what_is_simulated_is_what_a_decode_holds_beside_windows():
    """Windows before it and sinks in it: masses are shares of the softmax with the sink."""
    sharp = random_params(WINDOWS, 3, 3.0)
    test_what_is_simulated_is_what_a_decode_holds(sharp, RaaS(8, 0.12, page_size=P))


@pytest.mark.parametrize(
    "policy",
    [
        RaaS(8, page_size=P),
        RaaS(8, 0.12, page_size=P, recent=3),
        Recent(8, page_size=P),
        H2O(8, page_size=P),
        SnapKV(8, window=3, page_size=P),
        LazyEviction(8, every=4, recent=4, alpha=0.12, page_size=P),
        RKV(8, every=4, recent=2, window=2, page_size=P),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_what_is_simulated_is_what_a_decode_holds(params, policy):
    """In the first layer a decode sees the dense model's queries and keys, whatever it forgot."""
    prompt = np.random.default_rng(0).integers(0, VOCAB, PROMPT).tolist()
    new = PAGES * P + 1
    ((_, recording),) = record(params, [prompt], [new], policy, stop_tokens=())
    seen = first_layer(params, np.asarray([*prompt, *recording.tokens[:-1]]))
    seen = jax.tree.map(lambda x: x[None], seen)
    held = simulate(simulated(policy), (4, 6), seen)[:, 0, 0]
    now = np.arange(PAGES)
    wanted = recording.present[:, 0].copy()
    wanted[now, :, now] = False
    np.testing.assert_array_equal(held, wanted)
    assert wanted.sum() < now.sum() * wanted.shape[1]


def gradients(params, tokens, drawn):
    """Of the likelihood of the drawn tokens, by each layer's attention: `[L, T, N, H]`, at once.

    Of the layers that see everything; also what these attend to, their shares, and values.
    """
    config = params.config

    def attended(layer, q, k, v, change):
        out, shares = written_out.plainly(layer, q, k, v)
        return out if change is None else out + change, (out, shares, v)

    def likelihood(change):
        x, seen = written_out.run(params, tokens, attended, change)
        logs = jax.nn.log_softmax(ends(config, params.weights).logits(x))
        return jnp.sum(jnp.take_along_axis(logs, drawn[:, None], axis=-1)), seen

    shape = config.full_layers, len(tokens), config.num_attention_heads, config.head_dim
    return jax.jit(jax.grad(likelihood, has_aux=True))(jnp.zeros(shape, jnp.float32))


@pytest.mark.parametrize(
    ("config", "queries"),
    [(QWEN3, dense.QUERIES), (WINDOWS, 7)],
    ids=["at once", "windows and blocks"],
)
def test_the_losses_are_those_of_the_whole_model_at_once(monkeypatch, config, queries):
    """Layer by layer and block by block, they are half of (g · change)², as it is defined."""
    params = random_params(config, 3, 3.0)
    monkeypatch.setattr(dense, "QUERIES", queries)
    jax.clear_caches()  # Of programs with other blocks.
    tokens = np.random.default_rng(1).integers(0, VOCAB, PROMPT + PAGES * P)
    drawn = np.random.default_rng(2).integers(0, VOCAB, len(tokens))
    monkeypatch.setattr(
        losses, "_drawn_gradient", lambda params, x, *_: gradient_of(params, x, drawn)
    )
    held = {}

    def watched(policy, sizes, seen):
        held[len(held)] = found = simulate(policy, sizes, seen)
        return found

    monkeypatch.setattr(losses, "simulate", watched)
    policy = RaaS(8, page_size=P)
    found = raas_jax.allot(params, [tokens], policy=policy, prompt_tokens=PROMPT)
    assert found.sizes.tolist() == [P * size for size in (1, 2, 3, 4, 6, 8, PAGES)]
    g, (out, shares, v) = gradients(params, tokens, drawn)
    L, K = found.layers, found.heads
    assert config.full_layers == L
    group = g.shape[2] // K
    page = np.arange(PAGES * P) // P
    for layer in range(L):
        of_layer = np.asarray(held[L - 1 - layer][:, 0])  # Backwards, as they were found.
        for size in range(6):
            for head in range(K):
                visible = of_layer[page][:, size, head][:, page] | (page[:, None] == page)
                visible = np.concatenate([np.ones((len(page), PROMPT), bool), visible], axis=1)
                effect = np.zeros(len(page))
                for n in range(head * group, (head + 1) * group):
                    whole = np.float64(shares[layer, n, PROMPT:])
                    left = np.where(visible, whole, 0)
                    values = np.float64(v[layer, :, head])
                    # What is not there goes to the rest, a sink among it.
                    stays = left.sum(axis=1, keepdims=True) + 1 - whole.sum(axis=1, keepdims=True)
                    changed = left @ values / stays
                    difference = changed - np.float64(out[layer, PROMPT:, n])
                    effect += np.sum(difference * np.float64(g[layer, PROMPT:, n]), axis=1)
                wanted = np.mean(effect**2) / 2
                assert found.losses[layer, head, size] == pytest.approx(wanted, rel=2e-3, abs=1e-9)
    assert np.all(found.losses[..., -1] == 0) and np.all(found.losses[..., 0] > 0)


def test_the_way_back_is_the_gradient_through_experts_too():
    """Of the way forwards, which is the model's own; of a window, and of what sees everything."""
    config = dataclasses.replace(MOE, window=5, window_layers=(0,), sinks=True)
    params = random_params(config, 3, 3.0)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, 16))
    wanted = hidden_states(config, params.weights, tokens[None])
    inputs = [dense.embed(params, tokens)]
    for number, kind in enumerate(config.layer_kinds):
        forward = partial(dense.forward, params, number=jnp.int32(number), kind=kind)
        out, pull = jax.vjp(lambda x, forward=forward: forward(x), inputs[-1])
        back = jnp.asarray(np.random.default_rng(number).normal(size=out.shape), jnp.float32)
        if kind == "window":
            found = dense.backward_through(params, inputs[-1], back, number, kind=kind)
        else:
            found = dense.backward(params, inputs[-1], back, number, prompt=4, P=2).at_input
        np.testing.assert_allclose(found, pull(back)[0], rtol=1e-4, atol=1e-4)
        inputs.append(out)
    np.testing.assert_allclose(inputs[-1], wanted, atol=1e-5)


def gradient_of(params, x, drawn):
    def likelihood(x):
        logs = jax.nn.log_softmax(ends(params.config, params.weights).logits(x[0]))
        return jnp.sum(jnp.take_along_axis(logs, jnp.asarray(drawn)[:, None], axis=-1))

    return jax.grad(likelihood)(x)


def test_the_same_texts_give_the_same(params):
    """Texts add up to their mean, whatever the layout of the weights; a seed draws anew."""
    texts = np.random.default_rng(3).integers(0, VOCAB, (2, PROMPT + PAGES * P)).tolist()
    ask = partial(raas_jax.allot, policy=RaaS(8, page_size=P), prompt_tokens=PROMPT)
    both = ask(params, texts)
    assert both.made["texts"] == 2 and both.model
    again = ask(params.separate(), texts)
    np.testing.assert_allclose(again.losses, both.losses, rtol=1e-3, atol=1e-9)
    assert again.model == both.model
    assert not np.allclose(ask(params, texts, seed=1).losses, both.losses, rtol=1e-3)


@pytest.mark.parametrize(
    ("texts", "policy", "named"),
    [
        ([], RaaS(8, page_size=P), "texts have the lengths"),
        ([[1] * 30, [1] * 31], RaaS(8, page_size=P), "texts have the lengths"),
        ([[1] * 10], RaaS(8, page_size=P), "texts have 2 pages of 2 tokens.* at least 12,"),
        ([[1] * 30], raas_jax.Dense(), "no budget to share out"),
        ([[1] * 30], RaaS.paper(64), "looks at more than"),
        ([[1] * 30], RaaSQuest(64), "looks at more than"),
    ],
)
def test_what_cannot_be_read_is_refused(params, texts, policy, named):
    with pytest.raises(ValueError, match=named):
        raas_jax.allot(params, texts, policy=policy, prompt_tokens=PROMPT)


def test_a_model_of_windows_alone_has_nothing_to_share_out():
    with pytest.raises(ValueError, match="2 layers, all with a window of 7 tokens"):
        raas_jax.allot(random_params(ALL_WINDOWS), [[1] * 30], prompt_tokens=PROMPT)
