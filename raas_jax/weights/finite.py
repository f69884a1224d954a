"""Weights that are no numbers are found when they are loaded, not in what the model then says."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from raas_jax import experts
from raas_jax.params import Params
from raas_jax.weights.hf import destinations, flatten

_NAMED = 5


def check_finite(params: Params) -> None:
    """Reads every array once, where it lies.

    Raises:
      ValueError: some are infinite or not a number; it names the first tensors, as Hugging Face
        calls them.
    """
    # By the devices they lie on, since one program runs on one set of them.
    groups: dict[Any, dict[str, Any]] = {}
    layers = params.weights["layers"]
    if isinstance(layers, tuple):
        layers = {name: tuple(layer[name] for layer in layers) for name in layers[0]}
    for path, leaf in flatten({**params.weights, "layers": layers}).items():
        groups.setdefault(frozenset(_first(leaf).sharding.device_set), {})[path] = leaf
    flags = {path: flag for group in groups.values() for path, flag in _flags(group).items()}
    places = destinations(params.config).items()
    bad = [
        name
        for name, place in places
        if not all(flags[path][place.at[0] if place.at else 0] for path in place.paths)
    ]
    if bad:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        # Float16 ends at 65,504, which bfloat16 and float32 numbers may be above.
        remedy = "load them as bfloat16, or " if params.dtype == jnp.float16 else ""
        raise ValueError(
            f"The weights in {params.source} have infinite values or no numbers (NaN) in "
            f"{', '.join(bad[:_NAMED])}{more}; {remedy}copy or export the model again."
        )


def _first(leaf: Any) -> jax.Array:
    """The array, or that of the first layer."""
    array: jax.Array = leaf[0] if isinstance(leaf, tuple) else leaf
    return array


def _flags(weights: dict[str, Any]) -> dict[str, np.ndarray]:
    shardings = [_first(leaf).sharding for leaf in weights.values()]
    meshes = [each.mesh for each in shardings if isinstance(each, NamedSharding)]
    # Whole on every device, so that each process can read it.
    where = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    found: dict[str, np.ndarray] = jax.device_get(jax.jit(_finite, out_shardings=where)(weights))
    return found


def _finite(weights: dict[str, Any]) -> dict[str, jax.Array]:
    """A truth value for each layer, or one for another array."""
    found = {}
    for path, leaf in weights.items():
        if isinstance(leaf, tuple):
            rows = [layer[None] for layer in leaf]
        else:
            stacked = path.startswith("layers.") or path in experts.BESIDE
            rows = [leaf if stacked else leaf[None]]
        found[path] = jnp.concatenate([_finite_rows(each) for each in rows])
    return found


def _finite_rows(rows: jax.Array) -> jax.Array:
    # Several times faster on CPUs than `isfinite` of every number, and without a copy.
    return jnp.isfinite(jnp.max(jnp.abs(rows), axis=tuple(range(1, rows.ndim))))
