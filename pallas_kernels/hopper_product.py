"""Products of few rows with much weight on Hopper GPUs: the loop that several kernels share.

What counts is to read the weight once, and at the full bandwidth. It is on the long side of the
tensor-core product,

    out [64, rows] += weight [64, columns] · x [rows, columns]ᵀ

with 64 rows of weights per warpgroup and the rows of x, a multiple of 8, on the short side. Tiles
of both are copied several ahead of the arithmetic.
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


class Scratch(NamedTuple):
    """A block's own shared memory, and the barriers at which its warpgroups wait."""

    weights: Any  # [stages, rows of weights, columns], the tiles in flight
    rows: Any  # [stages, rows of x, columns], what meets them
    arrived: Any  # a tile has been copied, both its parts
    free: Any  # all warpgroups have multiplied by a tile

    @classmethod
    def of(cls, stages: int, warpgroups: int, rows: int, columns: int) -> Scratch:
        """For so many tiles in flight."""
        return cls(
            weights=tile_memory(stages, warpgroups * TILE, columns, width=TILE),
            rows=tile_memory(stages, rows, columns, width=TILE),
            arrived=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        )


def kernel_of(
    name: str,
    multiply_block: Callable[..., None],
    blocks: Any,
    *,
    shape: tuple[int, int, int],
    dtype: Any,
    outs: Sequence[int],
    others: tuple[str, int],
    interpret: Any,
) -> Callable[..., list[jax.Array]]:
    """A kernel whose grid has tiles of the weights of several stacks, and something beside them.

    Args:
      name: of the kernel.
      multiply_block: what a block does; it is told `blocks`, and as `starts` the number of the
        first tile of each stack, and the end.
      blocks: `warpgroups`, each with 64 rows of weights, `columns` of a tile, `stages` in flight.
      shape: of its only result, `[any, rows of x, out of all stacks]`.
      dtype: of the result.
      outs: how many rows the weights of each stack have.
      others: name and size of the grid's other axis, along which neighbours share a tile.
      interpret: of `plgpu.kernel`.
    """
    height = blocks.warpgroups * TILE
    kernel: Callable[..., list[jax.Array]] = plgpu.kernel(
        partial(multiply_block, blocks=blocks, starts=[0, *np.cumsum(outs) // height]),
        out_type=[result(*shape, dtype=dtype)],
        scratch_types=[Scratch.of(blocks.stages, blocks.warpgroups, shape[1], blocks.columns)],
        grid=(sum(outs) // height, others[1]),
        grid_names=("tile", others[0]),
        num_threads=blocks.warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=COMPILER,
        interpret=interpret,
    )
    return kernel


def add_up(fetch: Callable[[Any, Any], None], own: Scratch, count: Any, most: int) -> jax.Array:
    """The sum of so many products of tiles, at most `most`: float32 `[64, rows]` per warpgroup.

    `fetch(step, stage)` starts the two copies of a step's tiles, which arrive at `own.arrived`.
    """
    stages, rows = own.rows.shape[:2]
    warpgroups = own.weights.shape[1] // TILE
    warpgroup = lax.axis_index("warpgroup")

    def refill(step: Any) -> None:
        """Reads the tile that takes the place of that of this step, which all have multiplied."""
        stage = lax.rem(step, jnp.int32(stages))
        if warpgroups > 1:
            plgpu.barrier_arrive(own.free.at[stage])

        @pl.when(warpgroup == 0)
        def _() -> None:
            if warpgroups > 1:
                plgpu.barrier_wait(own.free.at[stage])
            fetch(step + stages, stage)

    @pl.when(warpgroup == 0)
    def _first() -> None:
        for ahead in range(min(stages, most)):
            pl.when(ahead < count)(partial(fetch, ahead, ahead))

    def sum_in(total: Any) -> Any:
        @pl.loop(0, count)
        def _(step: jax.Array) -> None:
            stage = lax.rem(step, jnp.int32(stages))
            plgpu.barrier_wait(own.arrived.at[stage])
            weights = own.weights.at[stage, pl.ds(warpgroup * TILE, TILE)]
            plgpu.wgmma(total, weights, own.rows.at[stage].T)
            # The product before this one has ended; this one goes on.
            plgpu.wgmma_wait(1)
            more = (step > 0) & (step - 1 + stages < count)
            pl.when(more)(partial(refill, step - 1))

        return total[...]

    scope: Callable[..., Any] = pl.run_scoped
    summed: jax.Array = scope(sum_in, plgpu.WGMMAAccumulatorRef((TILE, rows), jnp.float32))
    return summed


def fetch_weights(
    refs: Sequence[Any],
    starts: Sequence[int],
    at: Any,
    tile: Any,
    columns: Any,
    into: Any,
    done: Any,
) -> None:
    """Copies a tile of the weights `[out, in]` that lie at `at` in each of several stacks.

    Tiles are counted through all stacks; `starts` has the first of each, and the end.
    """
    height = into.shape[0]
    for ref, start, end in zip(refs, starts[:-1], starts[1:], strict=True):
        source = ref.at[(*at, pl.ds((tile - start) * height, height), columns)]
        copy = partial(plgpu.copy_gmem_to_smem, source, into, done)
        pl.when((tile >= start) & (tile < end))(copy)


def write(out_ref: Any, at: Any, first: Any, total: jax.Array) -> None:
    """Writes what `add_up` gave to the `[rows, out]` at `at`, from this number of `out` on."""
    place = pl.ds(first + lax.axis_index("warpgroup") * TILE, TILE)
    turned = plgpu.layout_cast(total.astype(out_ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    store(out_ref.at[at, :, place].T, turned)
