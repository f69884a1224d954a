"""The kernel behind `grouped_product` on Hopper GPUs: Pallas on Mosaic GPU.

A block of the grid has a tile of the weights of one expert and the rows that go through it. It
reads both where they lie (`pallas_kernels.hopper_product`), and nothing where nobody owns the rows:
how many rows an expert has decides which blocks have work, and not how the program is compiled.
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

from pallas_kernels.grouped_product.tuning import Blocks
from pallas_kernels.hopper import TILE, says_it_reads
from pallas_kernels.hopper_product import Scratch, add_up, fetch_weights, kernel_of, write


def multiply(
    x: jax.Array,
    owner: jax.Array,
    layer: jax.Array,
    stacks: Sequence[jax.Array],
    dtype: Any,
    blocks: Blocks,
    interpret: Any = None,
) -> list[jax.Array]:
    """Products of bfloat16 `x [T, R, in]` with the owners' `[out, in]` of each stack."""
    T, R, _ = x.shape
    outs = [stack.shape[2] for stack in stacks]
    kernel = kernel_of(
        "grouped_product",
        multiply_block,
        blocks,
        shape=(T, R, sum(outs)),
        dtype=dtype,
        outs=outs,
        # Neighbours have the same tile: of one expert's blocks only the first finds it in no cache.
        others=("block", T),
        interpret=interpret,
    )
    L, E = stacks[0].shape[:2]
    weights = sum(stack.nbytes for stack in stacks) // (L * E)
    with says_it_reads(x.nbytes + owner.nbytes + min(T, E) * weights):
        (out,) = kernel(x, list(stacks), owner, jnp.reshape(layer, 1))
    return jnp.split(out, np.cumsum(outs)[:-1], axis=2)


def multiply_block(
    x_ref: Any,
    stack_refs: Sequence[Any],
    owner_ref: Any,
    layer_ref: Any,
    out_ref: Any,
    own: Scratch,
    *,
    blocks: Blocks,
    starts: Sequence[int],
) -> None:
    """A tile of its owner's weights times the rows of one block, if it has an owner.

    Tiles are counted through all stacks; `starts` has the first of each, and the end.
    """
    tile, block = lax.axis_index("tile"), lax.axis_index("block")
    layer, expert = layer_ref[0], owner_ref[block]
    count = x_ref.shape[2] // blocks.columns

    def fetch(step: Any, stage: Any) -> None:
        columns, done = pl.ds(step * blocks.columns, blocks.columns), own.arrived.at[stage]
        plgpu.copy_gmem_to_smem(x_ref.at[block, :, columns], own.rows.at[stage], done)
        at = layer, expert
        fetch_weights(stack_refs, starts, at, tile, columns, own.weights.at[stage], done)

    @pl.when(expert < stack_refs[0].shape[1])
    def _() -> None:
        total = add_up(fetch, own, count, count)
        write(out_ref, block, tile * blocks.warpgroups * TILE, total)
