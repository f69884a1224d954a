"""Pieces of the transformer that other tests only see as a whole."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QWEN3, random_params

from raas_jax import model


def tiny_layers(layers, pattern, first=0, count=None, xs=None):
    """Runs a body that says what it was given."""
    config = dataclasses.replace(QWEN3, num_hidden_layers=4)
    weights = getattr(model, layers)(random_params(config).weights)

    def body(layer, carry, x):
        norm = jnp.sum(layer.block.attention_norm[...])
        kind = {"full": 1.0, "window": 10.0}[layer.kind]
        return carry * 0.5 + norm * kind, (carry, layer.number, None if x is None else x + 1)

    return model.run_layers(
        config, weights, body, jnp.float32(1), xs, first=first, count=count, pattern=pattern
    )


@pytest.mark.parametrize("pattern", [("full",), ("full", "window")])
@pytest.mark.parametrize("layers", ["stacked", "separate"])
def test_one_loop_over_layers(layers, pattern):
    """Stacked or separate, of one kind or of two in turn: the same as written out."""
    weights = random_params(dataclasses.replace(QWEN3, num_hidden_layers=4)).weights
    norms = np.asarray(weights["layers"]["attention_norm"]).sum(-1)
    last, (carries, numbers, xs) = tiny_layers(layers, pattern, xs=jnp.arange(8.0).reshape(4, 2))
    carry, wanted = 1.0, []
    for number in range(4):
        wanted.append(carry)
        carry = carry * 0.5 + norms[number] * (
            10 if pattern[number % len(pattern)] != "full" else 1
        )
    np.testing.assert_allclose(carries, wanted, rtol=1e-6)
    np.testing.assert_allclose(last, carry, rtol=1e-6)
    np.testing.assert_array_equal(numbers, range(4))
    np.testing.assert_array_equal(xs, np.arange(8.0).reshape(4, 2) + 1)


@pytest.mark.parametrize("layers", ["stacked", "separate"])
def test_a_part_of_the_layers(layers):
    last, (carries, numbers, _) = tiny_layers(layers, ("full",), first=1, count=2)
    np.testing.assert_array_equal(numbers, [1, 2])
    assert carries.shape == (2,) and last != 1
    with pytest.raises(ValueError, match="count is 2 of 4"):
        tiny_layers(layers, ("full", "window"), first=1, count=2)


def test_separate_and_back():
    weights = random_params().weights
    apart = model.separate(weights)
    assert len(apart["layers"]) == 2 and model.separate(apart) is apart
    jax.tree.map(np.testing.assert_array_equal, model.stacked(apart), weights)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    np.testing.assert_allclose(
        model.forward(QWEN3, apart, tokens), model.forward(QWEN3, weights, tokens), atol=1e-5
    )
