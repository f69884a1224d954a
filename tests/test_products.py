"""Products with weights: every form is the product, and no form copies a weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raas_jax import products


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 48), (5, 1, 48)])
def test_few_rows_on_a_gpu_are_the_product_of_all(shape, dtype):
    """The form for GPUs, here on a CPU, against the product in float64."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], shape, dtype)
    weight = jax.random.normal(keys[1], (30, 48), dtype)
    wanted = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    for form in (products._row_by_row, products._matmul):
        got = form(x, weight, jnp.dtype("float32"))
        assert got.shape == (*shape[:-1], 30)
        np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert products._row_by_row(x, weight, x.dtype).dtype == x.dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 2, products.MANY_ROWS - 1, products.MANY_ROWS, 65])
def test_every_form_for_cpus_is_the_product(rows, dtype):
    keys = jax.random.split(jax.random.key(rows))
    x = jax.random.normal(keys[0], (rows, 1, 48), dtype)
    weight = jax.random.normal(keys[1], (5, 6, 48), dtype)
    wanted = np.einsum("btd,nhd->btnh", *(np.asarray(each, np.float64) for each in (x, weight)))
    wide = products.project(x, weight, jnp.float32)
    np.testing.assert_allclose(wide, wanted, atol=1e-4)
    got = products.project(x, weight)
    # Summed in float32, and rounded once.
    assert got.dtype == x.dtype and got.shape == wanted.shape
    np.testing.assert_array_equal(got, wide.astype(x.dtype))


def test_a_gpu_has_another_form_for_few_rows():
    weight = jnp.ones((8, 4))
    texts = {
        (rows, platform): jax.jit(products.project)
        .trace(jnp.ones((rows, 1, 4)), weight)
        .lower(lowering_platforms=(platform,))
        .as_text()
        for rows in (1, products.FEW_ROWS, products.FEW_ROWS + 1)
        for platform in ("cuda", "cpu", "tpu")
    }
    without = [key for key, text in texts.items() if "dot_general" not in text]
    assert without == [(1, "cuda"), (products.FEW_ROWS, "cuda")]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_weight_of_the_layer_with_this_number(rows):
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(keys[0], (4, 5, 6, 48)), jax.random.normal(keys[1], (4, 7, 48))
    x = jax.random.normal(keys[2], (rows, 1, 48))

    @jax.jit
    def both(number):
        return products.project_all(x, [products.OfLayer(tuple(w), number) for w in weights])

    for number in range(4):
        for got, weight in zip(both(jnp.int32(number)), weights, strict=True):
            np.testing.assert_allclose(got, products.project(x, weight[number]), atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, products.MANY_ROWS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_separate_weights_are_not_copied(dtype, rows):
    """A product in a loop over layers needs no memory of the size of a weight."""
    weights = tuple(jnp.ones((256, 256), dtype) for _ in range(4))

    @jax.jit
    def all_layers(x, weights):
        def layer(x, number):
            return products.project(x, products.OfLayer(weights, number)), None

        return jax.lax.scan(layer, x, jnp.arange(4))[0]

    memory = all_layers.lower(jnp.ones((rows, 256), dtype), weights).compile().memory_analysis()
    assert memory.temp_size_in_bytes < weights[0].nbytes / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_table_that_is_looked_up_in_a_loop_is_not_copied(dtype):
    table = jax.random.normal(jax.random.key(0), (4096, 64), dtype)

    @jax.jit
    def follow(table, rows):
        def step(rows, _):
            found = products.look_up(table, rows)
            return (rows + jnp.abs(found[:, 0]).astype(jnp.int32) + 1) % 4096, found

        return jax.lax.scan(step, rows, None, length=3)

    rows = jnp.array([5, 4095], jnp.int32)
    memory = follow.lower(table, rows).compile().memory_analysis()
    assert memory.temp_size_in_bytes < table.nbytes / 2
    np.testing.assert_array_equal(follow(table, rows)[1][0], np.asarray(table)[[5, 4095]])
