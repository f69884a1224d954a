"""`stacked_product` for NVIDIA GPUs of compute capability 9.0: Pallas on Mosaic GPU.

Decoding multiplies few rows by much weight, so what counts is to read the weight once, and at the
full bandwidth. It is on the long side of the tensor-core product,

    out [64, B] += weight [64, columns] · x [B, columns]ᵀ

with 64 rows of weights per warpgroup and the rows of x, padded to a multiple of 8, on the short
side. A block has one or two warpgroups and reads its tiles of weights straight out of the layer's
place in the stack, several tiles ahead of the arithmetic. Where too few rows of weights are there
to fill the chip, several blocks share a contraction, and their float32 sums are added in one order
by whatever reads the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arrays import result
from pallas_kernels.hopper import COMPILER, TILE, require_hopper, store, tile_memory
from pallas_kernels.stacked_product.tuning import MOST_ROWS, Blocks, hopper_blocks

COPIES = 2
"""That a tile waits for: its weights, and its part of x."""


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

    Raises:
      NotImplementedError: another device than Hopper, another dtype than bfloat16, more rows than
        a block holds, or sizes that tiles of 64 do not fit.
    """
    require_hopper(device_kind)
    B, I = x.shape
    outs = [stack.shape[1] for stack in stacks]
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"x and the weights are {x.dtype}, not bfloat16")
    if B > MOST_ROWS:
        raise NotImplementedError(f"x has {B} rows; a block holds {MOST_ROWS}")
    if any(size % TILE for size in (I, *outs)):
        raise NotImplementedError(f"in is {I} and out {outs}, not all multiples of {TILE}")
    blocks = blocks or hopper_blocks(B, I, outs)
    height = blocks.warpgroups * TILE
    (parts,) = plgpu.kernel(
        partial(multiply_block, blocks=blocks, starts=starts_of(outs, height)),
        out_type=[
            result(
                blocks.splits,
                blocks.rows,
                sum(outs),
                dtype=dtype if blocks.splits == 1 else jnp.float32,
            )
        ],
        scratch_types=[
            tile_memory(blocks.stages, height, blocks.columns, width=TILE),
            tile_memory(blocks.stages, blocks.rows, blocks.columns, width=TILE),
            plgpu.Barrier(num_arrivals=COPIES, num_barriers=blocks.stages),
            plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=blocks.stages),
        ],
        grid=(sum(outs) // height, blocks.splits),
        grid_names=("tile", "split"),
        num_threads=blocks.warpgroups,
        thread_name="warpgroup",
        kernel_name="stacked_product",
        compiler_params=COMPILER,
        interpret=interpret,
    )(jnp.pad(x, ((0, blocks.rows - B), (0, 0))), list(stacks), jnp.reshape(layer, 1))
    total = parts[0]
    for part in range(1, blocks.splits):
        total = total + parts[part]
    ends = np.cumsum(outs)[:-1]
    return [each.astype(dtype) for each in jnp.split(total[:B], ends, axis=1)]


def starts_of(outs: list[int], height: int) -> list[int]:
    """The first tile of each stack, and the end of the last's."""
    return [0, *np.cumsum(np.asarray(outs) // height).tolist()]


def multiply_block(
    x_ref: Any,
    stack_refs: list[Any],
    layer_ref: Any,
    out_ref: Any,
    weights: Any,
    rows: Any,
    arrived: Any,
    free: Any,
    *,
    blocks: Blocks,
    starts: list[int],
) -> None:
    """One tile of weight rows times x, over one part of the contraction."""
    tile, split = lax.axis_index("tile"), lax.axis_index("split")
    warpgroup = lax.axis_index("warpgroup")
    height, layer = blocks.warpgroups * TILE, layer_ref[0]
    first = split * blocks.tiles
    count = jnp.minimum(blocks.tiles, x_ref.shape[1] // blocks.columns - first)

    def fetch(step: Any, stage: Any) -> None:
        columns = pl.ds((first + step) * blocks.columns, blocks.columns)
        plgpu.copy_gmem_to_smem(x_ref.at[:, columns], rows.at[stage], arrived.at[stage])
        for ref, start, end in zip(stack_refs, starts[:-1], starts[1:], strict=True):
            source = ref.at[layer, pl.ds((tile - start) * height, height), columns]
            copy = partial(
                plgpu.copy_gmem_to_smem, source, weights.at[stage], arrived.at[stage]
            )
            pl.when((tile >= start) & (tile < end))(copy)

    def refill(step: Any) -> None:
        """Reads the tile that takes the place of that of this step, which all have multiplied."""
        stage = lax.rem(step, jnp.int32(blocks.stages))
        if blocks.warpgroups > 1:
            plgpu.barrier_arrive(free.at[stage])

        @pl.when(warpgroup == 0)
        def _() -> None:
            if blocks.warpgroups > 1:
                plgpu.barrier_wait(free.at[stage])
            fetch(step + blocks.stages, stage)

    @pl.when(warpgroup == 0)
    def _() -> None:
        for ahead in range(min(blocks.stages, blocks.tiles)):
            pl.when(ahead < count)(partial(fetch, ahead, ahead))

    def multiply(total: Any) -> Any:
        @pl.loop(0, count)
        def _(step: jax.Array) -> None:
            stage = lax.rem(step, jnp.int32(blocks.stages))
            plgpu.barrier_wait(arrived.at[stage])
            own = weights.at[stage, pl.ds(warpgroup * TILE, TILE)]
            plgpu.wgmma(total, own, rows.at[stage].T)
            # The product before this one has ended; this one goes on.
            plgpu.wgmma_wait(1)
            more = (step > 0) & (step - 1 + blocks.stages < count)
            pl.when(more)(partial(refill, step - 1))

        return total[...]

    scope: Callable[..., Any] = pl.run_scoped
    total = scope(multiply, plgpu.WGMMAAccumulatorRef((TILE, blocks.rows), jnp.float32))
    place = pl.ds(tile * height + warpgroup * TILE, TILE)
    total = plgpu.layout_cast(total.astype(out_ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    store(out_ref.at[split, :, place].T, total)
