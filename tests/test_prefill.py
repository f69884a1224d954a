"""A prompt that goes through a layer in chunks: the same answer, in memory that hardly grows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import allotment_of, prompts_of, random_params

from pallas_kernels.prefill_attention import reference
from raas_jax import ModelConfig, RaaS, attention, chunks, policies
from raas_jax.aot.memory import abstract_session
from raas_jax.decode import RowRequest, pad_prompts, prefill
from raas_jax.plan import Plan
from raas_jax.sampling import Sampling

EVICTED = {"budget": 8, "prompt": "evict", "page_size": 4}
POLICIES = {
    "raas": RaaS(16, page_size=4),
    "bounds of the prompt": policies.create("quest", budget=16, page_size=4),
    "evicted by the last query": policies.create("tova", **EVICTED),
    "evicted from pools": policies.create("h2o", allotment=allotment_of(page_size=4), **EVICTED),
}


def start(policy, lengths, samples=1):
    """The state and the first tokens, compiled anew, since a chunk is not among the arguments."""
    params = random_params()
    plan = Plan.create(params.config, policy, lengths, 20, samples)
    request = RowRequest.create([20] * len(lengths) * samples, (), Sampling(1.0), seed=1)
    arguments = (params, *pad_prompts(prompts_of(lengths), plan), request)
    return jax.jit(lambda *arguments: prefill.__wrapped__(*arguments, plan=plan))(*arguments)


@pytest.mark.parametrize(
    ("name", "size", "samples"),
    [
        ("raas", 4, 1),
        ("bounds of the prompt", 32, 2),
        ("evicted by the last query", 4, 2),
        ("evicted from pools", 32, 1),
    ],
)
def test_chunks_change_nothing(monkeypatch, name, size, samples):
    """Where they divide the 48 tokens of padded prompts, and where the last overlaps."""
    lengths = [41, 1, 18]
    whole = start(POLICIES[name], lengths, samples)
    monkeypatch.setattr(chunks, "MOST_TOKENS", size * 3 + 2)
    monkeypatch.setattr(attention, "MOST_SCORES", 1)
    assert chunks.chunk_size(3, 48) == size
    parts = start(POLICIES[name], lengths, samples)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = map(jax.random.key_data, (one, other))
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 4, 7, 8, 9, 15, 16])
def test_every_token_is_done_whether_or_not_chunks_divide_them(monkeypatch, tokens):
    monkeypatch.setattr(chunks, "MOST_TOKENS", 8)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, tokens, 3)), jnp.float32)
    place = jnp.broadcast_to(jnp.arange(tokens), (2, tokens))
    seen = []

    def part(x, place):
        seen.append(x.shape[1])
        return {"a": x + jnp.float32(1), "b": place}

    found = chunks.in_chunks(part, x, place)
    np.testing.assert_array_equal(found["a"], x + jnp.float32(1))
    np.testing.assert_array_equal(found["b"], place)
    assert max(seen) == min(tokens, 4)


def test_a_prompt_of_one_chunk_is_the_program_it_was():
    x = jnp.zeros((2, chunks.MOST_TOKENS // 2, 3))
    assert "while" not in str(jax.make_jaxpr(lambda x: chunks.in_chunks(jnp.sin, x))(x))
    assert chunks.chunk_size(1, chunks.MOST_TOKENS + 1) == chunks.MOST_TOKENS
    assert chunks.chunk_size(3 * chunks.MOST_TOKENS, 2) == 1


def test_blocks_of_queries_shrink_as_prompts_grow(monkeypatch):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, 70, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(1, 70, 2, 8)), jnp.float32) for _ in range(2))

    def attend():
        return jax.jit(lambda *x: reference.prefill_attention_reference(*x, None, scale=0.3))(
            q, k, v
        )

    whole = attend()
    for name, value in ("QUERY_BLOCK", 8), ("LEAST_BLOCK", 2), ("MOST_SCORES", 70 * 4 * 3):
        monkeypatch.setattr(reference, name, value)
    parts = attend()
    np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-6)


def test_memory_grows_by_little_more_than_the_cache():
    """By the compiler's account, of a model whose mlp would take most: a token has 8,192 numbers.

    It would take 64 KiB a token by itself; scores of a token with all are 0.5 MiB or more.
    """
    config = ModelConfig(32, 32, 4096, 2, 4, 2, 16, model_type="llama")
    policy = policies.create("h2o", budget=1024, prompt="evict")
    temporaries, tokens = [], (32_768, 65_536)
    for count in tokens:
        session = abstract_session(config, policy, [count], 32, "float32", None)
        program = session.lower_start().compile()
        temporaries.append(program.memory_analysis().temp_size_in_bytes)
    a_token = (temporaries[1] - temporaries[0]) / (tokens[1] - tokens[0])
    # x and its successor, q, k, v, what was attended to, and once more where XLA turns them.
    layer = 4 * (2 * config.hidden_size + 2 * (2 * 4 + 2 * 2) * config.head_dim)
    cache = 4 * 2 * 2 * 2 * config.head_dim
    assert a_token < 2 * layer + cache
    assert temporaries[1] < (1 << 30) + tokens[1] * (2 * layer + cache)


@pytest.mark.parametrize("sink", [None, (-60.0, 0.5, 2.0, 60.0)])
def test_the_mass_of_a_prompts_pages_by_hand(monkeypatch, sink):
    """Shares of the softmax with a sink in it, summed over the last tokens of rows that differ."""
    monkeypatch.setattr(attention, "MOST_SCORES", 1)  # In blocks of 16 tokens.
    (B, T, N, K, H, P), lengths, queries = (2, 24, 4, 2, 8, 4), [21, 5], 3
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K))
    given = None if sink is None else jnp.asarray(sink)
    found = attention.prompt_mass(
        jnp.asarray(q), jnp.asarray(k), jnp.array(lengths), P, queries, given
    )
    wanted = np.zeros((B, K, N // K, T))
    for row, head, token in np.ndindex(B, N, T):
        if not lengths[row] - queries <= token < lengths[row]:
            continue
        one = head // (N // K)
        weights = np.exp(
            k[row, : token + 1, one].astype(np.float64) @ q[row, token, head] / np.sqrt(H)
        )
        total = weights.sum() + (0.0 if sink is None else np.exp(sink[head]))
        wanted[row, one, head % (N // K), : token + 1] += weights / total
    pages = wanted.reshape(B, K, N // K, T // P, P).sum(-1)
    np.testing.assert_allclose(found, pages, rtol=1e-5, atol=1e-6)
