"""Logical axes to mesh axes: one table for the weights and for the cache.

A mesh has the axes `data` (rows of the batch) and `model` (heads and mlp width). A single device
is the same code with a mesh of one.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import Target
from raas_jax import checks
from raas_jax.config import ModelConfig
from raas_jax.model import Weights, abstract_weights, logical_axes
from raas_jax.params import Params

RULES: dict[str, str | None] = {
    "rows": "data",
    "heads": "model",
    "kv_heads": "model",
    "pool_pages": "model",  # of all layers and heads, by head
    "joined_heads": "model",  # heads times head_dim, cut only between heads
    "mlp": "model",
    "vocab": "model",
    "layers": None,
    "experts": None,  # each is split in its width, so that all devices work for every token
    "embed": None,
    "head_dim": None,
    "any": None,
}


def make_mesh(data: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data * model` devices, by default the first ones of this process group.

    Raises:
      TypeError: no ints. ValueError: there are not that many devices.
    """
    data, model = checks.integer("data", data, 1), checks.integer("model", model, 1)
    found = list(jax.devices() if devices is None else devices)
    if data * model > len(found):
        raise ValueError(
            f"data={data} and model={model} ask for {data * model} devices; there are {len(found)}."
        )
    # Eight ways over a torus of 4 x 4 x 4 take one side and half of another.
    grid = mesh_utils.create_device_mesh(
        (data, model), found[: data * model], allow_split_physical_axes=True
    )
    return Mesh(grid, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def check_mesh(mesh: Any) -> None:
    """Raises TypeError for what is no mesh of these axes."""
    if mesh is not None and not (isinstance(mesh, Mesh) and mesh.axis_names == ("data", "model")):
        raise TypeError(
            f"mesh is {checks.short(mesh)}; expected one from raas_jax.make_mesh, or None."
        )


def target_of(mesh: Mesh | None) -> Target | None:
    """What a decode on this mesh is compiled for; None without one."""
    check_mesh(mesh)
    return None if mesh is None else Target.of(mesh)


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


def weight_shardings(config: ModelConfig, mesh: Mesh) -> Weights:
    """A sharding for every array of the weights, in the structure of `abstract_weights`."""

    def of(axes: tuple[str, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition(mesh, axes, leaf.shape, config.head_dim))

    def is_names(node: Any) -> bool:
        return isinstance(node, tuple)

    shapes = abstract_weights(config, "float32")
    found: Weights = jax.tree.map(of, logical_axes(config), shapes, is_leaf=is_names)
    return found


def state_shardings(state: Any, mesh: Mesh, *, rows_divide: bool = True) -> Any:
    """A sharding for every array of a `DecodeState`, or of its shapes: by rows and kv heads.

    Without `rows_divide` all rows lie on every device, as the few do that are about to join.
    """
    rows = "rows" if rows_divide else "any"

    def of(axes: tuple[str, ...], tree: Any) -> Any:
        def one(leaf: Any) -> NamedSharding:
            rest = ("any",) * (leaf.ndim - len(axes))
            return NamedSharding(mesh, partition(mesh, (*axes[: leaf.ndim], *rest), leaf.shape))

        return jax.tree.map(one, tree)

    by_head, by_row = ("layers", rows, "kv_heads"), (rows,)
    cache = state.cache
    splits = cache.current.k.shape[2] % mesh.shape["model"] == 0
    in_pool = rows, "pool_pages" if splits else "any"

    def of_kept(kept: Any) -> Any:
        pages = in_pool if kept.k.ndim < kept.fill.ndim + 2 else by_head
        return dataclasses.replace(
            of(by_head, kept),
            **{name: of(pages, getattr(kept, name)) for name in ("k", "v", "bounds")},
        )

    return dataclasses.replace(
        state,
        cache=dataclasses.replace(
            of(by_head, cache),
            prompt=dataclasses.replace(
                of(by_head, cache.prompt), lengths=of(by_row, cache.prompt.lengths)
            ),
            kept=tuple(map(of_kept, cache.kept)),
        ),
        meta=of(by_head, state.meta),
        rows=of(by_row, state.rows),
        stop_tokens=of((), state.stop_tokens),
    )


def place_weights(params: Params, mesh: Mesh) -> Params:
    """The parameters on the mesh; says once what it replicates for want of a divisor."""
    ways, heads = mesh.shape["model"], params.config.num_key_value_heads
    if heads % ways:
        warnings.warn(
            f"{heads} key/value heads do not divide by model={ways}: each device of the model axis "
            "holds all of them. A model axis that divides them takes less memory.",
            stacklevel=3,
        )
    weights = jax.device_put(params.stacked().weights, weight_shardings(params.config, mesh))
    placed = dataclasses.replace(params, weights=weights)
    return placed.separate() if isinstance(params.weights["layers"], tuple) else placed
