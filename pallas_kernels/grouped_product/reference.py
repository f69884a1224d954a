"""The definition of `grouped_product`, in plain jnp. Also the path of all but Hopper GPUs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def grouped_product_reference(
    x: jax.Array, owner: jax.Array, layer: jax.Array, *stacks: jax.Array, dtype: Any
) -> list[jax.Array]:
    """See `api.grouped_product`, which checks the arguments. Blocks without an owner give zeros."""
    experts = stacks[0].shape[1]
    dims = (((1,), (1,)), ((), ()))

    def multiply(rows: jax.Array, expert: jax.Array) -> list[jax.Array]:
        found = []
        for stack in stacks:
            at = layer, expert, jnp.int32(0), jnp.int32(0)
            weight = jax.lax.dynamic_slice(stack, at, (1, 1, *stack.shape[2:]))[0, 0]
            found.append(jax.lax.dot_general(rows, weight, dims, preferred_element_type=dtype))
        return found

    def nothing(rows: jax.Array, expert: jax.Array) -> list[jax.Array]:
        return [jnp.zeros((rows.shape[0], stack.shape[2]), dtype) for stack in stacks]

    def of_block(block: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
        rows, expert = block
        found: list[jax.Array] = jax.lax.cond(expert < experts, multiply, nothing, rows, expert)
        return found

    products: list[jax.Array] = jax.lax.map(of_block, (x, owner))
    return products
