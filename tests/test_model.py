"""Pieces of the transformer that other tests only see as a whole."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import QWEN3, random_params

from raas_jax import model


def run_tiny(layers, kinds, first=0, xs=None):
    """Runs a body that says what it was given, over the last layers of a model."""
    config = dataclasses.replace(QWEN3, num_hidden_layers=first + len(kinds))
    weights = getattr(model, layers)(random_params(config).weights)

    def body(layer, carry, x):
        norm = jnp.sum(layer.block.attention_norm[...])
        given = carry, layer.number, layer.place, None if x is None else x + 1
        return carry * 0.5 + norm * FACTORS[layer.kind], given

    found = model.run_layers(config, weights, body, jnp.float32(1), xs, kinds=kinds, first=first)
    return *found, np.asarray(random_params(config).weights["layers"]["attention_norm"]).sum(-1)


FACTORS = {"full": 1.0, "window": 10.0, 7: 100.0}
KINDS = {
    "one": ("full",) * 4,
    "two in turn": ("window", "full") * 2,
    "a pattern and a rest": ("window", "window", "full") * 2 + ("window", "window"),
    "a change and a pattern": ("window", 7) + ("window", "full") * 2 + ("full",) * 3,
    "one layer": (7,),
}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("layers", ["stacked", "separate"])
@pytest.mark.parametrize("first", [0, 2])
def test_one_loop_over_layers(layers, kinds, first):
    """Stacked or separate, whole or a part, of whatever kinds: the same as written out."""
    xs = {"full": jnp.arange(20.0).reshape(10, 2)[: kinds.count("full")]}
    last, given, norms = run_tiny(layers, kinds, first, xs)
    carry, wanted = 1.0, {kind: ([], []) for kind in kinds}
    for number, kind in enumerate(kinds, first):
        wanted[kind][0].append(carry)
        wanted[kind][1].append(number)
        carry = carry * 0.5 + norms[number] * FACTORS[kind]
    np.testing.assert_allclose(last, carry, rtol=1e-6)
    assert set(given) == set(kinds)
    for kind, (carries, numbers, places, ys) in given.items():
        np.testing.assert_allclose(carries, wanted[kind][0], rtol=1e-6)
        np.testing.assert_array_equal(numbers, wanted[kind][1])
        np.testing.assert_array_equal(places, range(kinds.count(kind)))
        if kind == "full":
            np.testing.assert_array_equal(ys, xs["full"] + 1)
        else:
            assert ys is None


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=24))
def test_stages_are_the_kinds(kinds):
    found = model.stages(kinds)
    together = [kind for stage in found for kind in stage.pattern * stage.repeats]
    assert together == kinds
    for stage in found:
        assert stage.earlier == {kind: kinds[: stage.first].count(kind) for kind in stage.pattern}


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ("f" * 36, [("f", 36)]),
        ("wwwwwf" * 10 + "ww", [("wwwwwf", 10), ("w", 2)]),  # Gemma 3, 27B
        ("wf" * 12, [("wf", 12)]),
        ("f" * 20 + "w" * 8, [("f", 20), ("w", 8)]),
        ("d" * 2 + "f" * 28, [("d", 2), ("f", 28)]),
        ("wwwd" + "wwwf" * 7, [("w", 3), ("d", 1), ("wwwf", 7)]),
    ],
)
def test_stages_are_few(kinds, wanted):
    """So that compile time hardly grows with depth."""
    assert [("".join(s.pattern), s.repeats) for s in model.stages(tuple(kinds))] == wanted


def test_separate_and_back():
    weights = random_params().weights
    apart = model.separate(weights)
    assert len(apart["layers"]) == 2 and model.separate(apart) is apart
    jax.tree.map(np.testing.assert_array_equal, model.stacked(apart), weights)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    np.testing.assert_allclose(
        model.forward(QWEN3, apart, tokens), model.forward(QWEN3, weights, tokens), atol=1e-5
    )
