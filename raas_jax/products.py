"""Products with weights and look-ups in them, in the form that the platform runs fastest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import Target, stacked_product

MANY_ROWS = 8
"""From so many rows on, a half-precision product on a CPU is faster with the weight on the left."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfLayer:
    """A weight of the layer with this number, of all layers' weights, none of which is copied.

    XLA on CPUs copies what it takes out of a stack by a number before it multiplies by it. Here
    each layer's product stands in a branch of its own and reads its own array where it lies, while
    all that is around the products is compiled once.

    Attributes:
      weights: `[*out, in]`, one for each layer.
      number: int32 scalar, traced.
    """

    weights: tuple[jax.Array, ...]
    number: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfStack:
    """The weight of the layer with this number, in the stack of all layers' weights.

    XLA on GPUs copies what it takes out of a stack before it multiplies by it; a kernel is given
    the whole stack, and reads its layer where it lies.

    Attributes:
      stack: `[L, *out, in]`.
      number: int32 scalar, traced.
      target: what is compiled for (static).
      inward: whether a mesh that splits heads cuts `in`, and not `out` (static).
    """

    stack: jax.Array
    number: jax.Array
    target: Target = dataclasses.field(metadata={"static": True})
    inward: bool = dataclasses.field(default=False, metadata={"static": True})


Weight = jax.Array | OfLayer | OfStack


def project(x: jax.Array, weight: Weight, dtype: Any = None) -> jax.Array:
    """`x [..., in]` times `weight [*out, in]` → `[..., *out]`, accumulated in float32.

    The result has `dtype`, by default that of `x`.
    """
    return project_all(x, [weight], dtype)[0]


def project_all(x: jax.Array, weights: Sequence[Weight], dtype: Any = None) -> list[jax.Array]:
    """`project` by each of several weights, all in one form and all of one layer."""
    stacks = [weight for weight in weights if isinstance(weight, OfStack)]
    if stacks:
        return _project_in_place(x, stacks, dtype)
    chosen = [weight for weight in weights if isinstance(weight, OfLayer)]
    if not chosen:
        arrays = [weight for weight in weights if not isinstance(weight, OfLayer | OfStack)]
        return _project_each(arrays, dtype, x)
    branches = [
        functools.partial(_project_each, of_layer, dtype)
        for of_layer in zip(*(weight.weights for weight in chosen), strict=True)
    ]
    found: list[jax.Array] = jax.lax.switch(chosen[0].number, branches, x)
    return found


def look_up(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows `[...]`, int32, of a table `[V, D]` → `[..., D]`."""
    found: jax.Array = jax.lax.platform_dependent(table, rows, default=_take, cpu=_take_in_place)
    return found


def _take(table: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.take(table, rows, axis=0)


def _take_in_place(table: jax.Array, rows: jax.Array) -> jax.Array:
    """The same, where XLA would make a float32 copy of a half-precision table before a loop."""
    return _take(*jax.lax.optimization_barrier((table, rows)))


def _project_in_place(x: jax.Array, weights: Sequence[OfStack], dtype: Any) -> list[jax.Array]:
    one = weights[0]
    found = stacked_product(
        x.reshape(-1, x.shape[-1]),
        [weight.stack.reshape(weight.stack.shape[0], -1, x.shape[-1]) for weight in weights],
        one.number,
        dtype=dtype,
        inward=one.inward,
        target=one.target,
    )
    return [
        out.reshape(*x.shape[:-1], *weight.stack.shape[1:-1])
        for out, weight in zip(found, weights, strict=True)
    ]


def _project_each(weights: Sequence[jax.Array], dtype: Any, x: jax.Array) -> list[jax.Array]:
    return [_project(x, weight, dtype) for weight in weights]


def _project(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    flat = weight.reshape(-1, weight.shape[-1])
    dtype = dtype or x.dtype
    out: jax.Array = jax.lax.platform_dependent(
        x,
        flat,
        default=functools.partial(_matmul, dtype=dtype),
        cpu=functools.partial(_matmul_on_cpu, dtype=dtype),
    )
    return out.reshape(*x.shape[:-1], *weight.shape[:-1])


def _matmul(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dims, preferred_element_type=dtype)


def _matmul_on_cpu(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    """The same, as XLA runs it fastest on CPUs; `raas_jax.lab.bench.products` has the times.

    It multiplies half-precision numbers as they are where there are two rows and the result is
    float32; otherwise it first makes float32 copies of them. With the weight on the left float32
    products of two rows and more take half of the time, half-precision ones of many two thirds, if
    XLA is kept from turning them round again.
    """
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if weight.dtype.itemsize == 4:
        turn = count > 1
    else:
        turn = count >= MANY_ROWS
        rows = jnp.concatenate([rows, rows]) if count == 1 else rows
    if turn:
        out = jax.lax.optimization_barrier(_matmul(weight, rows, jnp.float32)).T
    else:
        out = _matmul(rows, weight, jnp.float32)[:count]
    found: jax.Array = out.astype(dtype).reshape(*x.shape[:-1], -1)
    return found
