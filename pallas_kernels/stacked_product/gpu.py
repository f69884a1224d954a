"""`stacked_product` for NVIDIA GPUs; the kernel for compute capability 9.0 is in `hopper.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import TILE, require_hopper
from pallas_kernels.stacked_product.hopper import multiply
from pallas_kernels.stacked_product.tuning import MOST_ROWS, Blocks, hopper_blocks

MOST_SUMMED = 8
"""Rows up to which XLA sums products in one pass over the weights; more would read them twice."""


def stacked_product_gpu(
    x: jax.Array,
    layer: jax.Array,
    *stacks: jax.Array,
    dtype: Any,
    device_kind: str,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> list[jax.Array]:
    """See `api.stacked_product`, which checks the arguments.

    What the kernel does not serve is summed row by row, up to `MOST_SUMMED` rows.

    Raises:
      NotImplementedError: neither serves these arguments; it says why the kernel does not.
    """
    try:
        require_hopper(device_kind)
        require_tiles(x, stacks)
    except NotImplementedError:
        if x.shape[0] > MOST_SUMMED:
            raise
        return sums_by_row(x, layer, *stacks, dtype=dtype)
    if blocks is None:
        rows, width = x.shape
        blocks = hopper_blocks(rows, width, [stack.shape[1] for stack in stacks])
    return multiply(x, layer, stacks, dtype, blocks, interpret)


def require_tiles(x: jax.Array, stacks: Sequence[jax.Array]) -> None:
    """Raises NotImplementedError for what the tiles cannot hold."""
    (B, width), outs = x.shape, [stack.shape[1] for stack in stacks]
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"x and the weights are {x.dtype}, not bfloat16")
    if B > MOST_ROWS:
        raise NotImplementedError(f"x has {B} rows; a block holds {MOST_ROWS}")
    if any(size % TILE for size in (width, *outs)):
        raise NotImplementedError(f"in is {width} and out {outs}, not all multiples of {TILE}")


def sums_by_row(x: jax.Array, layer: jax.Array, *stacks: jax.Array, dtype: Any) -> list[jax.Array]:
    """The products as sums, which XLA fuses with the slice: it copies what `dot` multiplies by."""

    def product(stack: jax.Array) -> jax.Array:
        weight = jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False).astype(jnp.float32)
        sums = [jnp.sum(weight * row, axis=-1) for row in x.astype(jnp.float32)]
        return jnp.stack(sums).astype(dtype)

    return [product(stack) for stack in stacks]
