"""`ragged_page_commit` for TPU (Pallas, Mosaic): copies within the device's memory, in place."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arrays import result
from pallas_kernels.tpu import check_whole_words


def ragged_page_commit_tpu(
    pool: jax.Array, page: jax.Array, slot: jax.Array, starts: jax.Array, *, device_kind: str = ""
) -> jax.Array:
    """See `api.ragged_page_commit`, which checks the arguments. The result lies where `pool` lay.

    Raises:
      NotImplementedError: a page is not whole words of 32 bits in every lane.
    """
    (L, B, K), (_, T, P, H) = slot.shape, pool.shape
    check_whole_words(pool)
    # On a mesh each device has its own part of the pool.
    at = starts[:, None] % T + slot

    def kernel(at_ref: Any, page_ref: Any, _: Any, pool_ref: Any, done: Any) -> None:
        layer = pl.program_id(0)

        def copy(index: jax.Array) -> Any:
            row, head = jax.lax.div(index, K), jax.lax.rem(index, K)
            return pltpu.make_async_copy(
                page_ref.at[layer, row, head], pool_ref.at[row, at_ref[0, 0, index]], done
            )

        # All of a layer's copies are under way at once.
        jax.lax.fori_loop(0, B * K, lambda index, _: copy(index).start(), None)
        jax.lax.fori_loop(0, B * K, lambda index, _: copy(index).wait(), None)

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    written: jax.Array = pl.pallas_call(
        kernel,
        grid=(L,),
        in_specs=[
            pl.BlockSpec((1, 1, B * K), lambda layer: (layer, 0, 0), memory_space=pltpu.SMEM),
            anywhere,
            anywhere,
        ],
        out_specs=anywhere,
        out_shape=result(*pool.shape, dtype=pool.dtype),
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        input_output_aliases={2: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=0,
            bytes_accessed=2 * L * B * K * P * H * jnp.dtype(pool.dtype).itemsize,
            transcendentals=0,
        ),
        name="ragged_page_commit",
    )(at.reshape(L, 1, B * K), page, pool)
    return written
