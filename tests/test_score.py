"""Log-likelihoods against the plain forward pass, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raas_jax.lab.tasks.likelihood import likelihoods, next_logprobs
from tiny import random_params

from raas_jax.model import merge


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture(scope="module")
def logits(params):
    """Float64 logits `[T, V]` of a sequence of at most 65 tokens."""
    forward = jax.jit(merge(params.config, params.weights).__call__)

    def of(tokens):
        padded = np.zeros((1, 65), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(forward(padded))[0, : len(tokens)].astype(np.float64)

    return of


def test_likelihoods_of_ends(params, logits):
    rng = np.random.default_rng(0)
    sequences = [(rng.integers(0, 19, n).tolist(), scored) for n, scored in [(5, 2), (65, 64)]]
    sequences += [(sequences[0][0][:4], 3), ([1, 2], 0), (sequences[1][0][:40], 1)]
    said = [3, 1]
    for _ in range(4):
        said.append(int(logits(said)[-1].argmax()))
    sequences += [(said, 4), ([*said[:-1], (said[-1] + 1) % 19], 4)]
    found = dict(likelihoods(params, sequences, rows=3))
    assert sorted(found) == list(range(7))
    for index, (tokens, scored) in enumerate(sequences):
        scores = logits(tokens)
        logprobs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        ends = range(len(tokens) - scored, len(tokens))
        wanted = sum(logprobs[i - 1, tokens[i]] for i in ends)
        assert found[index].logprob == pytest.approx(wanted, abs=1e-4)
        assert found[index].greedy == all(scores[i - 1].argmax() == tokens[i] for i in ends)
    assert found[5].greedy and not found[6].greedy


def test_blocks_change_nothing(params):
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 19, (2, 3, 64)), jnp.int32)
    whole, blocks = (next_logprobs(params, *tokens, positions_at_once=n) for n in (64, 16))
    np.testing.assert_allclose(whole[0], blocks[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(whole[1], blocks[1])


def test_something_must_come_before(params):
    with pytest.raises(ValueError, match="2 of 2 tokens"):
        next(likelihoods(params, [([1, 2], 2)], rows=1))
