"""Pieces of the transformer that other tests only see as a whole."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QWEN3, random_params

from raas_jax import model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 48), (5, 1, 48)])
def test_few_rows_on_a_gpu_are_the_product_of_all(shape, dtype):
    """The form for GPUs, here on a CPU, against the product in float64."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], shape, dtype)
    weight = jax.random.normal(keys[1], (30, 48), dtype)
    wanted = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    for form in (model._row_by_row, model._matmul):
        got = form(x, weight, jnp.dtype("float32"))
        assert got.shape == (*shape[:-1], 30)
        np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert model._row_by_row(x, weight, x.dtype).dtype == x.dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 2, 7, model.SUMMED_ROWS, model.SUMMED_ROWS + 1])
def test_every_form_for_cpus_is_the_product(rows, dtype):
    keys = jax.random.split(jax.random.key(rows))
    x = jax.random.normal(keys[0], (rows, 1, 48), dtype)
    weight = jax.random.normal(keys[1], (5, 6, 48), dtype)
    wanted = np.einsum("btd,nhd->btnh", *(np.asarray(each, np.float64) for each in (x, weight)))
    wide = model.project(x, weight, jnp.float32)
    np.testing.assert_allclose(wide, wanted, atol=1e-4)
    got = model.project(x, weight)
    # Summed in float32, and rounded once.
    assert got.dtype == x.dtype and got.shape == wanted.shape
    np.testing.assert_array_equal(got, wide.astype(x.dtype))


def test_only_some_platforms_have_other_forms_than_a_product_of_matrices():
    weight = jnp.ones((8, 4))
    texts = {
        (rows, platform): jax.jit(model.project)
        .trace(jnp.ones((rows, 1, 4)), weight)
        .lower(lowering_platforms=(platform,))
        .as_text()
        for rows in (1, model.FEW_ROWS, model.FEW_ROWS + 1, model.SUMMED_ROWS + 1)
        for platform in ("cuda", "cpu", "tpu")
    }
    without = [key for key, text in texts.items() if "dot_general" not in text]
    assert without == [
        *((1, "cuda"), (model.FEW_ROWS, "cuda")),
        *((model.FEW_ROWS, "cpu"), (model.FEW_ROWS + 1, "cpu")),
    ]


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
    """Scanned or unrolled, of one kind or of two in turn: the same as written out."""
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
    if layers == "stacked":
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
