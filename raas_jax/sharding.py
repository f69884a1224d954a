"""Logical axes to mesh axes: one table for the weights and for the cache.

A mesh has the axes `data` (rows of the batch) and `model` (heads and mlp width). A single device
is the same code with a mesh of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from raas_jax.config import ModelConfig
from raas_jax.model import abstract_model, logical_axes

RULES: dict[str, str | None] = {
    "rows": "data",
    "heads": "model",
    "kv_heads": "model",
    "joined_heads": "model",  # heads times head_dim, cut only between heads
    "mlp": "model",
    "vocab": "model",
    "layers": None,
    "embed": None,
    "head_dim": None,
}


def make_mesh(data: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data * model` devices, by default the first ones of this process group.

    Raises:
      ValueError: there are not that many devices.
    """
    found = list(jax.devices() if devices is None else devices)
    if min(data, model) < 1 or data * model > len(found):
        raise ValueError(
            f"data={data} and model={model} ask for {data * model} devices; there are {len(found)}."
        )
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=found[: data * model],
    )


def partition(
    mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...], head_dim: int = 1
) -> PartitionSpec:
    """How an array with these logical axes lies on the mesh.

    An axis that its mesh axis does not divide is replicated: four key/value heads on eight devices
    are the usual case. An axis of joined heads counts in units of `head_dim`.

    Raises:
      KeyError: an axis that `RULES` does not name.
      ValueError: two axes of one array fall on the same mesh axis.
    """
    spec: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        target = RULES[axis]
        units = size // head_dim if axis == "joined_heads" else size
        divides = target is not None and units % mesh.shape[target] == 0
        spec.append(target if divides else None)
    used = [name for name in spec if name is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {axes} put two axes of one array on the same mesh axis: {spec}.")
    return PartitionSpec(*spec)


def weight_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """A sharding for every array of `Params.weights`, in its structure."""
    state = nnx.to_pure_dict(abstract_model(config, "float32")[1])
    shapes = jax.tree.map(lambda leaf: leaf.shape, state)
    return jax.tree.map(
        lambda axes, shape: NamedSharding(mesh, partition(mesh, axes, shape, config.head_dim)),
        logical_axes(config),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
