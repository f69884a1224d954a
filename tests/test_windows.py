"""Layers that see a window: what is in their rings, and that they go with everything else."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import QWEN3, WINDOWS, prompts_of, random_params

import raas_jax
from raas_jax import Dense, Engine, RaaS, Request, Sampling, policies
from raas_jax.decode import RowRequest, dense_bytes
from raas_jax.model import forward
from raas_jax.plan import Plan
from raas_jax.session import Session

P = 4
ONCE = pytest.mark.once
EVERY_LAYER = dataclasses.replace(QWEN3, window=10, window_layers=(0, 1))
WIDE = dataclasses.replace(WINDOWS, window=1000)
PROMPTS = prompts_of([3, 9, 10, 21, 40])
EVERYTHING = RaaS(1024, page_size=P)


def params_of(config, seed=0):
    return random_params(config, seed, sharpness=3.0)


@pytest.fixture(scope="module")
def params():
    return params_of(WINDOWS)


# What a ring holds, by positions alone.


@dataclasses.dataclass
class Row:
    """A row of a ring by the book: which positions a token sees. It knows of no page or slot."""

    window: int
    prompt: int

    def seen(self, position):
        return [p for p in range(position + 1) if position - p < self.window]


def keys_of_first_layer(params, ids):
    """Rotated keys of the first layer `[T, K, H]`, which depend on nothing but token and place."""
    c, weights = params.config, params.weights
    layer = {name: np.asarray(leaf[0], np.float64) for name, leaf in weights["layers"].items()}

    def norm(x, weight):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + c.rms_norm_eps) * weight

    x = np.asarray(weights["embedding"], np.float64)[np.asarray(ids)]
    keys = np.einsum("td,khd->tkh", norm(x, layer["attention_norm"]), layer["k"])
    keys = norm(keys, layer["k_norm"])
    half = c.head_dim // 2
    angle = np.arange(len(ids))[:, None] / c.rope.theta ** (np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = keys[..., :half], keys[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def positions_in(pages, fill, keys):
    """Positions of what lies in pages `[S, P, H]`, as far as they are filled, by its keys."""
    found = []
    for page, count in zip(pages, fill, strict=True):
        for key in page[:count]:
            (place,) = np.flatnonzero(np.abs(keys - key).max(-1) < 1e-4)
            found.append(int(place))
    return sorted(found)


@pytest.mark.once
@settings(max_examples=8)
@example(page_size=3, window=4, lengths=[1, 30, 3], pages=6)
@example(page_size=4, window=23, lengths=[30, 5, 24], pages=2)
@given(
    page_size=st.sampled_from([1, 2, 3, 4]),
    window=st.integers(4, 23),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    pages=st.integers(0, 6),
)
def test_a_ring_holds_what_a_window_sees(page_size, window, lengths, pages):
    """Windows that are no multiple of a page, of less and more than the prompt, at every token."""
    config = dataclasses.replace(EVERY_LAYER, window=window)
    params, new = params_of(config), pages * page_size + 1
    prompts = prompts_of(lengths, seed=window)
    session = Session.create(params, Dense(page_size=page_size), lengths, new + page_size)
    state, first = session.start(prompts, RowRequest.create([new + page_size] * len(lengths)))
    tokens = [np.asarray(first.tokens)]
    for _ in range(pages):
        state, progress = session.advance(state)
        tokens.append(np.asarray(progress.tokens))
    answers = np.concatenate(tokens).T
    ring, group = state.cache.kept[-1], session.plan.groups[-1]
    assert group.ring.window == window and group.slots == ring.k.shape[3]
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = [*prompt, *answer.tolist()]
        keys = keys_of_first_layer(params, ids)
        book, fed = Row(window, len(prompt)), len(ids) - 1  # The last one is not fed yet.
        for ahead in range(page_size):
            position = jnp.full(len(lengths), fed + ahead)
            fill = np.asarray(group.ring.in_sight(state.meta[-1], position))[0, row]
            wanted = [p for p in book.seen(fed + ahead) if p < fed]
            for head in range(config.num_key_value_heads):
                pages_of_head = np.asarray(ring.k[0, row, head])
                found = positions_in(pages_of_head, fill[head], keys[:, head])
                assert found == wanted


# Decoding: the same as reading the whole text at once.


def check_is_forward(params, prompts, outs):
    texts = [[*prompt, *out.tokens] for prompt, out in zip(prompts, outs, strict=True)]
    longest = max(map(len, texts))
    ids = jnp.asarray([[*text, *[0] * (longest - len(text))] for text in texts])
    read = jax.jit(lambda ids: jax.nn.log_softmax(forward(params.config, params.weights, ids)))
    for prompt, out, logs in zip(prompts, outs, read(ids), strict=True):
        first = len(prompt) - 1
        wanted = logs[first:][jnp.arange(len(out.tokens)), jnp.asarray(out.tokens)]
        np.testing.assert_allclose(out.logprobs, wanted, atol=2e-4)


@pytest.mark.parametrize(
    "config",
    [WINDOWS, pytest.param(EVERY_LAYER, marks=ONCE), pytest.param(WIDE, marks=ONCE)],
    ids=["mixed", "all", "wide"],
)
def test_decoding_is_reading(config):
    """Prompts shorter and longer than the window; tokens that leave it as others come."""
    params = params_of(config)
    outs = raas_jax.generate(params, PROMPTS, policy=EVERYTHING, max_new_tokens=30)
    check_is_forward(params, PROMPTS, outs)


@pytest.mark.once
def test_a_window_of_everything_is_none():
    with_windows = params_of(dataclasses.replace(WIDE, window_rope=None))
    plain = dataclasses.replace(WIDE, window=0, window_layers=(), window_rope=None)
    without = dataclasses.replace(with_windows, config=plain)
    outs, wanted = (
        raas_jax.generate(params, PROMPTS, policy=EVERYTHING, max_new_tokens=20)
        for params in (with_windows, without)
    )
    for one, other in zip(outs, wanted, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_what_is_written_out_by_hand():
    """One window layer in float64, with sinks, so that prefill and decode share no oracle."""
    config = dataclasses.replace(
        QWEN3, num_hidden_layers=1, window=7, window_layers=(0,), sinks=True
    )
    params = params_of(config)
    (out,) = raas_jax.generate(params, [PROMPTS[2]], policy=EVERYTHING, max_new_tokens=12)
    ids = [*PROMPTS[2], *out.tokens]
    c, weights = config, params.weights
    layer = {name: np.asarray(leaf[0], np.float64) for name, leaf in weights["layers"].items()}
    embedding, head = (np.asarray(weights[name], np.float64) for name in ("embedding", "head"))

    def norm(x, weight):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + c.rms_norm_eps) * weight

    def turn(x):
        half = c.head_dim // 2
        angle = np.arange(len(ids))[:, None] / c.rope.theta ** (np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = embedding[np.asarray(ids)]
    h = norm(x, layer["attention_norm"])
    q = turn(norm(np.einsum("td,nhd->tnh", h, layer["q"]), layer["q_norm"]))
    v = np.einsum("td,khd->tkh", h, layer["v"])
    k = keys_of_first_layer(params, ids)
    attended = np.zeros_like(q)
    for t, n in np.ndindex(q.shape[:2]):
        seen = [s for s in range(t + 1) if t - s < 7]
        scores = np.asarray([q[t, n] @ k[s, n // 2] / math.sqrt(c.head_dim) for s in seen])
        total = np.sum(np.exp(scores)) + np.exp(layer["sink"][n])
        attended[t, n] = sum(
            np.exp(score) / total * v[s, n // 2] for score, s in zip(scores, seen, strict=True)
        )
    x = x + attended.reshape(len(ids), -1) @ layer["o"].T
    h = norm(x, layer["mlp_norm"])
    gate = h @ layer["gate"].T
    x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["up"].T)) @ layer["down"].T
    logits = norm(x, np.asarray(weights["norm"], np.float64)) @ head.T
    logs = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    first = len(PROMPTS[2]) - 1
    wanted = [logs[first + i, token] for i, token in enumerate(out.tokens)]
    np.testing.assert_allclose(out.logprobs, wanted, atol=1e-4)


# With everything else.

SMALL = {
    "raas": RaaS(3 * P, page_size=P),
    "dense first": RaaS(3 * P, dense_layers=1, page_size=P),
    "quest": policies.create("quest", budget=3 * P, page_size=P),
    "evicts the prompt": policies.create("h2o", budget=3 * P, prompt="evict", page_size=P),
}


@pytest.mark.parametrize(
    "name",
    ["quest", *(pytest.param(name, marks=ONCE) for name in ("dense first", "evicts the prompt"))],
)
def test_feeding_is_decoding(params, name):
    """Page by page or token by token, under policies of every make."""
    sampling = Sampling(temperature=1.0)
    options = {"policy": SMALL[name], "max_new_tokens": 30}
    outs = raas_jax.generate(params, PROMPTS, sampling=sampling, **options)
    scores = raas_jax.score(params, PROMPTS, [out.tokens for out in outs], policy=SMALL[name])
    for out, score in zip(outs, scores, strict=True):
        np.testing.assert_allclose(out.logprobs, score.logprobs, atol=3e-4)


@pytest.mark.parametrize(
    ("config", "samples"),
    [(WINDOWS, 2), pytest.param(EVERY_LAYER, 1, marks=ONCE)],
    ids=["mixed", "all"],
)
def test_rows_come_and_go(config, samples):
    """Rows whose ring another one filled; and several that share a prompt."""
    params, policy = params_of(config), SMALL["raas"]
    requests = [
        Request(i, prompt, Sampling(temperature=1.0), seed=i, max_new_tokens=4 + 7 * i % 19,
                n=samples)
        for i, prompt in enumerate(prompts_of([1 + 5 * i % 23 for i in range(9)]))
    ]  # fmt: skip
    engine = Engine(params, policy=policy, rows=4, max_new_tokens=24, max_prompt_tokens=24,
                    prefill_rows=2, samples=samples)  # fmt: skip
    found = {(result.id, result.sample): result for result in engine.run(requests)}
    assert len(found) == 9 * samples
    alone = raas_jax.generate(
        params,
        [request.prompt for request in requests],
        policy=policy,
        sampling=Sampling(temperature=1.0),
        seed=list(range(9)),
        max_new_tokens=24,
    )
    for request, wanted in zip(requests, alone, strict=True):
        result = found[request.id, 0]
        count = len(result.tokens)
        assert count == request.max_new_tokens
        assert result.tokens == wanted.tokens[:count]
        np.testing.assert_allclose(result.logprobs, wanted.logprobs[:count], atol=1e-4)


@pytest.mark.once
def test_saved_and_restored(params, tmp_path):
    prompts = PROMPTS[:3]
    session = Session.create(params, SMALL["raas"], [len(each) for each in prompts], 40)
    state, _ = session.start(prompts, RowRequest.create([40] * 3))
    state, _ = session.advance(state, 3)
    session.save(state, tmp_path / "state")
    _, wanted = session.advance(state, 3)
    _, found = session.advance(session.restore(tmp_path / "state"), 3)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.logprobs, wanted.logprobs)


def test_what_has_left_the_window_never_matters(params):
    """NaN in what a ring holds beyond what is in sight."""
    prompts = PROMPTS[:3]
    session = Session.create(params, SMALL["raas"], [len(each) for each in prompts], 40)
    state, _ = session.start(prompts, RowRequest.create([40] * 3))
    state, _ = session.advance(state, 3)
    generated = 1 + 3 * P
    position = jnp.asarray([len(each) + generated - 1 for each in prompts])
    group, ring = session.plan.groups[-1], state.cache.kept[-1]
    fill = group.ring.in_sight(state.meta[-1], position)
    out_of_sight = (jnp.arange(P) >= fill[..., None])[..., None]
    assert np.asarray(out_of_sight).any()
    poisoned = dataclasses.replace(
        ring, k=jnp.where(out_of_sight, jnp.nan, ring.k), v=jnp.where(out_of_sight, jnp.nan, ring.v)
    )
    kept = *state.cache.kept[:-1], poisoned
    bad = dataclasses.replace(state, cache=dataclasses.replace(state.cache, kept=kept))
    _, wanted = session.advance(jax.tree.map(jnp.copy, state), 3)
    _, found = session.advance(jax.tree.map(jnp.copy, bad), 3)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.logprobs, wanted.logprobs)


# Memory.


def bytes_of(*arrays):
    return sum(array.size * array.dtype.itemsize for array in arrays)


def test_memory_is_that_of_each_kind(params):
    new, lengths = 1000, [40, 12]
    plan = Plan.create(WINDOWS, SMALL["raas"], lengths, new)
    full, ring = plan.groups
    assert (full.numbers, ring.numbers) == ((1, 3), (0, 2))
    assert ring.slots == -(-(WINDOWS.window - 1) // P)
    assert plan == Plan.create(WINDOWS, SMALL["raas"], lengths, 100 * new)
    shape = Session(params, plan, 2).shape.cache
    page = 2 * P * WINDOWS.head_dim * 2 * 4  # Both heads, float32, keys and values.
    assert bytes_of(shape.prompt.k, shape.prompt.v) == 2 * 2 * plan.prompt_slots * page
    for kept in shape.kept:  # Two layers and two rows in each group, of three pages.
        assert bytes_of(kept.k, kept.v) == 2 * 2 * 3 * page
    token = page // P
    assert dense_bytes(WINDOWS, 6, jnp.float32) == 4 * 6 * token
    assert dense_bytes(WINDOWS, 100, jnp.float32) == 2 * (100 + 10) * token


def test_a_ring_takes_no_more_than_there_will_be():
    plan = Plan.create(WIDE, EVERYTHING, [5], 11)
    assert plan.groups[-1].slots == 2 + 3


def test_pages_larger_than_the_window_are_refused():
    with pytest.raises(ValueError, match="page_size is 16, and the model has layers that see 10"):
        raas_jax.generate(params_of(WINDOWS), [1, 2], policy=RaaS(32), max_new_tokens=2)
