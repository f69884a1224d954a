"""`Params.random`: what benchmarks decode with."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QWEN3

from raas_jax.model import abstract_weights
from raas_jax.params import Params


def test_random_weights_are_drawn_in_their_dtype():
    config = dataclasses.replace(QWEN3, tie_word_embeddings=False, qkv_bias=True)
    whole, half = (Params.random(config, 3, dtype).weights for dtype in ("float32", "bfloat16"))
    abstract = abstract_weights(config, "bfloat16")
    assert jax.tree.map(jnp.shape, half) == jax.tree.map(jnp.shape, abstract)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(b.dtype), b), whole, half)
    matrices = [leaf for leaf in jax.tree.leaves(whole) if np.std(leaf) > 0]
    # Of 7 kinds in a layer, the table and the head no two are alike.
    assert len({float(leaf.reshape(-1)[0]) for leaf in matrices}) == len(matrices) == 9
    for leaf in matrices:
        assert np.mean(leaf**2) * leaf.shape[-1] == pytest.approx(1, rel=0.5)
