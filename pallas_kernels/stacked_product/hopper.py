"""The kernel behind `stacked_product` on Hopper GPUs: Pallas on Mosaic GPU.

A block has up to three warpgroups and reads its tiles straight out of the layer's place in the
stack (`pallas_kernels.hopper_product`). Where there are too few rows of weights to fill the chip,
several blocks share a contraction; their float32 sums are added, always in one order, by the
fusion that reads the result, which costs no launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import TILE
from pallas_kernels.hopper_product import Scratch, add_up, fetch_weights, kernel_of, write
from pallas_kernels.stacked_product.tuning import Blocks


def multiply(
    x: jax.Array,
    layer: jax.Array,
    stacks: Sequence[jax.Array],
    dtype: Any,
    blocks: Blocks,
    interpret: Any = None,
) -> list[jax.Array]:
    """Products of bfloat16 `x [B, in]` with the layer's `[out, in]` of each stack, cut as said."""
    B, outs = x.shape[0], [stack.shape[1] for stack in stacks]
    kernel = kernel_of(
        "stacked_product",
        multiply_block,
        blocks,
        shape=(blocks.splits, blocks.rows, sum(outs)),
        dtype=dtype if blocks.splits == 1 else jnp.float32,
        outs=outs,
        others=("split", blocks.splits),
        interpret=interpret,
    )
    padded = jnp.pad(x, ((0, blocks.rows - B), (0, 0)))
    (parts,) = kernel(padded, list(stacks), jnp.reshape(layer, 1))
    out = parts[0, :B]
    for part in range(1, blocks.splits):
        out = out + parts[part, :B]
    return [each.astype(dtype) for each in jnp.split(out, np.cumsum(outs)[:-1], axis=1)]


def multiply_block(
    x_ref: Any,
    stack_refs: Sequence[Any],
    layer_ref: Any,
    out_ref: Any,
    own: Scratch,
    *,
    blocks: Blocks,
    starts: Sequence[int],
) -> None:
    """A tile of weight rows times x, over one part of the contraction.

    Tiles of rows are counted through all stacks; `starts` has the first of each, and the end.
    """
    tile, split = lax.axis_index("tile"), lax.axis_index("split")
    height, layer = blocks.warpgroups * TILE, layer_ref[0]
    first = split * blocks.tiles
    count = jnp.minimum(blocks.tiles, x_ref.shape[1] // blocks.columns - first)

    def fetch(step: Any, stage: Any) -> None:
        columns, done = (
            pl.ds((first + step) * blocks.columns, blocks.columns),
            own.arrived.at[stage],
        )
        plgpu.copy_gmem_to_smem(x_ref.at[:, columns], own.rows.at[stage], done)
        fetch_weights(stack_refs, starts, (layer,), tile, columns, own.weights.at[stage], done)

    write(out_ref, split, tile * height, add_up(fetch, own, count, blocks.tiles))
