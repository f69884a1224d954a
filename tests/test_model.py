"""Pieces of the transformer that other tests only see as a whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_only_few_rows_on_a_gpu_are_not_a_product_of_matrices():
    weight = jnp.ones((8, 4))
    texts = {
        (rows, platform): jax.jit(model.project)
        .trace(jnp.ones((rows, 1, 4)), weight)
        .lower(lowering_platforms=(platform,))
        .as_text()
        for rows in (1, model.FEW_ROWS, model.FEW_ROWS + 1)
        for platform in ("cuda", "cpu", "tpu")
    }
    without = [key for key, text in texts.items() if "dot_general" not in text]
    assert without == [(1, "cuda"), (model.FEW_ROWS, "cuda")]
