"""Weights that are no numbers are found when they are loaded, not in what the model then says."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from raas_jax.params import Params
from raas_jax.weights.hf import destinations, flatten

_NAMED = 5


def check_finite(params: Params) -> None:
    """Reads every array of stacked weights once, where it lies.

    Raises:
      ValueError: some are infinite or not a number; it names the first tensors, as Hugging Face
        calls them.
    """
    # By the devices they lie on, since one program runs on one set of them.
    groups: dict[Any, dict[str, jax.Array]] = {}
    for path, leaf in flatten(params.weights).items():
        groups.setdefault(frozenset(leaf.sharding.device_set), {})[path] = leaf
    flags = {path: flag for group in groups.values() for path, flag in _flags(group).items()}
    places = destinations(params.config).items()
    bad = [name for name, place in places if not flags[place.path][place.layer or 0]]
    if bad:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        # Float16 ends at 65,504, which bfloat16 and float32 numbers may be above.
        remedy = "load them as bfloat16, or " if params.dtype == jnp.float16 else ""
        raise ValueError(
            f"The weights in {params.source} have infinite values or no numbers (NaN) in "
            f"{', '.join(bad[:_NAMED])}{more}; {remedy}copy or export the model again."
        )


def _flags(weights: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    meshes = [x.sharding.mesh for x in weights.values() if isinstance(x.sharding, NamedSharding)]
    # Whole on every device, so that each process can read it.
    where = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    found: dict[str, np.ndarray] = jax.device_get(jax.jit(_finite, out_shardings=where)(weights))
    return found


def _finite(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A truth value for each layer of a stack, or one for another array."""
    found = {}
    for path, leaf in weights.items():
        rows = leaf if path.startswith("layers.") else leaf[None]
        # Several times faster on CPUs than `isfinite` of every number, and without a copy.
        found[path] = jnp.isfinite(jnp.max(jnp.abs(rows), axis=tuple(range(1, rows.ndim))))
    return found
