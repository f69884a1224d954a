"""`grouped_product` for NVIDIA GPUs; the kernel for compute capability 9.0 is in `hopper.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_product.hopper import multiply
from pallas_kernels.grouped_product.tuning import MOST_ROWS, Blocks, hopper_blocks
from pallas_kernels.hopper import ROWS, TILE, require_hopper


def grouped_product_gpu(
    x: jax.Array,
    owner: jax.Array,
    layer: jax.Array,
    *stacks: jax.Array,
    dtype: Any,
    device_kind: str,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> list[jax.Array]:
    """See `api.grouped_product`, which checks the arguments.

    Raises:
      NotImplementedError: the kernel does not serve these arguments; it says why.
    """
    T, R, width = x.shape
    outs = [stack.shape[2] for stack in stacks]
    require(device_kind, R, x.dtype, [width, *outs])
    if blocks is None:
        blocks = hopper_blocks(min(T, stacks[0].shape[1]), R, width, outs)
    return multiply(x, owner, layer, stacks, dtype, blocks, interpret)


def require(device_kind: str, rows: int, dtype: Any, widths: Sequence[int]) -> None:
    """Raises NotImplementedError for another GPU, and for what the tiles cannot hold."""
    require_hopper(device_kind)
    if dtype != jnp.bfloat16:
        raise NotImplementedError(f"x and the weights are {dtype}, not bfloat16")
    if rows % ROWS or rows > MOST_ROWS:
        raise NotImplementedError(
            f"blocks have {rows} rows, no multiple of {ROWS} up to {MOST_ROWS}"
        )
    if any(size % TILE for size in widths):
        raise NotImplementedError(f"in and out are {list(widths)}, not all multiples of {TILE}")
