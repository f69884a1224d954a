"""The kernel behind `stacked_product` on Hopper GPUs: Pallas on Mosaic GPU.

Decoding multiplies few rows by much weight, so what counts is to read the weight once, and at the
full bandwidth. It is on the long side of the tensor-core product,

    out [64, B] += weight [64, columns] · x [B, columns]ᵀ

with 64 rows of weights per warpgroup and the rows of x, padded to a multiple of 8, on the short
side. A block has up to three warpgroups and reads its tiles straight out of the layer's place in
the stack, several of them ahead of the arithmetic. Where there are too few rows of weights to fill
the chip, several blocks share a contraction; their float32 sums are added, always in one order, by
the fusion that reads the result, which costs no launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arrays import result
from pallas_kernels.hopper import COMPILER, TILE, store, tile_memory
from pallas_kernels.stacked_product.tuning import Blocks


class Scratch(NamedTuple):
    """A block's own shared memory, and the barriers at which its warpgroups wait."""

    weights: Any  # [stages, rows of weights, columns], the tiles in flight
    rows: Any  # [stages, rows of x, columns], what meets them
    arrived: Any  # a tile has been copied, both its parts
    free: Any  # all warpgroups have multiplied by a tile


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
    height, total = blocks.warpgroups * TILE, sum(outs)
    own = dtype if blocks.splits == 1 else jnp.float32
    (parts,) = plgpu.kernel(
        partial(multiply_block, blocks=blocks, starts=[0, *np.cumsum(outs) // height]),
        out_type=[result(blocks.splits, blocks.rows, total, dtype=own)],
        scratch_types=[
            Scratch(
                weights=tile_memory(blocks.stages, height, blocks.columns, width=TILE),
                rows=tile_memory(blocks.stages, blocks.rows, blocks.columns, width=TILE),
                arrived=plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
                free=plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=blocks.stages),
            )
        ],
        grid=(total // height, blocks.splits),
        grid_names=("tile", "split"),
        num_threads=blocks.warpgroups,
        thread_name="warpgroup",
        kernel_name="stacked_product",
        compiler_params=COMPILER,
        interpret=interpret,
    )(jnp.pad(x, ((0, blocks.rows - B), (0, 0))), list(stacks), jnp.reshape(layer, 1))
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
    warpgroup = lax.axis_index("warpgroup")
    height, layer = blocks.warpgroups * TILE, layer_ref[0]
    first = split * blocks.tiles
    count = jnp.minimum(blocks.tiles, x_ref.shape[1] // blocks.columns - first)

    def fetch(step: Any, stage: Any) -> None:
        columns = pl.ds((first + step) * blocks.columns, blocks.columns)
        plgpu.copy_gmem_to_smem(x_ref.at[:, columns], own.rows.at[stage], own.arrived.at[stage])
        for ref, start, end in zip(stack_refs, starts[:-1], starts[1:], strict=True):
            source = ref.at[layer, pl.ds((tile - start) * height, height), columns]
            copy = partial(
                plgpu.copy_gmem_to_smem, source, own.weights.at[stage], own.arrived.at[stage]
            )
            pl.when((tile >= start) & (tile < end))(copy)

    def refill(step: Any) -> None:
        """Reads the tile that takes the place of that of this step, which all have multiplied."""
        stage = lax.rem(step, jnp.int32(blocks.stages))
        if blocks.warpgroups > 1:
            plgpu.barrier_arrive(own.free.at[stage])

        @pl.when(warpgroup == 0)
        def _() -> None:
            if blocks.warpgroups > 1:
                plgpu.barrier_wait(own.free.at[stage])
            fetch(step + blocks.stages, stage)

    @pl.when(warpgroup == 0)
    def _() -> None:
        for ahead in range(min(blocks.stages, blocks.tiles)):
            pl.when(ahead < count)(partial(fetch, ahead, ahead))

    def add_up(total: Any) -> Any:
        @pl.loop(0, count)
        def _(step: jax.Array) -> None:
            stage = lax.rem(step, jnp.int32(blocks.stages))
            plgpu.barrier_wait(own.arrived.at[stage])
            weights = own.weights.at[stage, pl.ds(warpgroup * TILE, TILE)]
            plgpu.wgmma(total, weights, own.rows.at[stage].T)
            # The product before this one has ended; this one goes on.
            plgpu.wgmma_wait(1)
            more = (step > 0) & (step - 1 + blocks.stages < count)
            pl.when(more)(partial(refill, step - 1))

        return total[...]

    scope: Callable[..., Any] = pl.run_scoped
    total = scope(add_up, plgpu.WGMMAAccumulatorRef((TILE, blocks.rows), jnp.float32))
    place = pl.ds(tile * height + warpgroup * TILE, TILE)
    total = plgpu.layout_cast(total.astype(out_ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    store(out_ref.at[split, :, place].T, total)
