"""Fingerprints: every bit counts, where it lies counts, how it is stored does not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params

from raas_jax import identity


@pytest.fixture(scope="module")
def params():
    return random_params()


def test_every_bit_of_every_array_counts(params):
    seen = {identity.of_model(params)}
    leaves, tree = jax.tree.flatten(params.weights)
    for number, leaf in enumerate(leaves):
        bits = np.asarray(leaf).view(np.uint32).copy()
        for at in {0, bits.size // 2, bits.size - 1}:
            for bit in (0, 12, 31):
                changed = bits.copy()
                changed.reshape(-1)[at] ^= np.uint32(1 << bit)
                weights = [*leaves]
                weights[number] = jnp.asarray(changed.view(np.float32))
                other = dataclasses.replace(params, weights=jax.tree.unflatten(tree, weights))
                seen.add(identity.of_model(other))
    assert len(seen) == 1 + sum(3 * len({0, leaf.size // 2, leaf.size - 1}) for leaf in leaves)


def test_order_counts(params):
    q = params.weights["layers"]["q"]
    for moved in (q[::-1], jnp.roll(q, 1, axis=-1)):
        layers = {**params.weights["layers"], "q": moved}
        other = dataclasses.replace(params, weights={**params.weights, "layers": layers})
        assert identity.of_model(other) != identity.of_model(params)


def test_storage_does_not(params):
    assert identity.of_model(params.separate()) == identity.of_model(params)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("model",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    moved = dataclasses.replace(params, weights=jax.device_put(params.weights, spread))
    assert identity.of_model(moved) == identity.of_model(params)


def test_config_and_dtype_count(params):
    config = dataclasses.replace(params.config, rms_norm_eps=1e-5)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params.weights)
    found = {
        identity.of_model(each)
        for each in (
            params,
            dataclasses.replace(params, config=config),
            dataclasses.replace(params, weights=half),
        )
    }
    assert len(found) == 3


def test_arrays_and_values():
    tree = {"a": jnp.arange(5), "b": jnp.ones((2, 3), bool), "c": jnp.zeros(0)}
    assert identity.of_arrays(tree) == identity.of_arrays({**tree})
    for name, other in (
        ("a", jnp.arange(5)[::-1]),
        ("b", jnp.zeros((2, 3), bool)),
        ("c", jnp.zeros((0, 1))),
    ):
        assert identity.of_arrays({**tree, name: other}) != identity.of_arrays(tree)
    assert identity.of_json({"a": [1, {"b": None}], "c": 1.5}) == identity.of_json(
        {"c": 1.5, "a": [1, {"b": None}]}
    )
    assert identity.of_json([1, 2]) != identity.of_json([2, 1]) != identity.of_json(["2", 1])
