"""Products with weights: every form is the product, and no form copies a weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Target
from raas_jax import products


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


def stacks_of(target, inward=False):
    """Two stacks of four layers, as they are given for the layer with a number."""
    keys = jax.random.split(jax.random.key(0))
    stacks = [jax.random.normal(keys[0], (4, 5, 6, 48)), jax.random.normal(keys[1], (4, 7, 48))]
    return stacks, lambda number: [products.OfStack(w, number, target, inward) for w in stacks]


@pytest.mark.parametrize("kind", ["", "NVIDIA A100-SXM4-80GB"])
@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 48), (3, 3, 48)])
def test_a_weight_of_the_stack_with_this_number(shape, kind):
    """What other GPUs have instead of the kernel, and plain XLA; it runs here, on a CPU."""
    stacks, of_layer = stacks_of(Target("gpu" if kind else "cpu", kind))
    x = jax.random.normal(jax.random.key(1), shape)
    both = jax.jit(lambda number: products.project_all(x, of_layer(number)))
    for number in range(4):
        for got, stack in zip(both(jnp.int32(number)), stacks, strict=True):
            wanted = np.tensordot(np.float64(x), np.float64(stack[number]), (-1, -1))
            assert got.dtype == x.dtype and got.shape == wanted.shape
            np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "kind", "dtype", "kernel", "dot"),
    [
        (1, "NVIDIA H100 80GB HBM3", "bfloat16", True, False),
        (256, "NVIDIA H200", "bfloat16", True, False),
        (257, "NVIDIA H100 80GB HBM3", "bfloat16", False, True),
        (8, "NVIDIA H100 80GB HBM3", "float32", False, False),
        (8, "NVIDIA A100-SXM4-80GB", "bfloat16", False, False),
        (9, "NVIDIA A100-SXM4-80GB", "bfloat16", False, True),
    ],
)
def test_which_form_a_gpu_has_for_a_stack(rows, kind, dtype, kernel, dot):
    def product(x, stack, number):
        return products.project(x, products.OfStack(stack, number, Target("gpu", kind)))

    arrays = jnp.ones((rows, 1, 64), dtype), jnp.ones((2, 64, 64), dtype), jnp.int32(1)
    text = jax.jit(product).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in text, "dot_general" in text) == (kernel, dot)


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
