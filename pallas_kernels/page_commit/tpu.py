"""`page_commit` for TPU (Pallas, Mosaic): copies within the device's memory, nothing else moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arrays import result
from pallas_kernels.tpu import check_whole_words


def page_commit_tpu(
    pages: jax.Array, page: jax.Array, slot: jax.Array, *, device_kind: str = ""
) -> jax.Array:
    """See `api.page_commit`, which checks the arguments. The result lies where `pages` lay.

    Raises:
      NotImplementedError: a page is not whole words of 32 bits in every lane.
    """

    def place(pages_ref: Any, layer: Any, row: Any, head: Any, slot: Any) -> Any:
        return pages_ref.at[layer, row, head, slot]

    return copy_pages(pages, page, slot, place, "page_commit")


def copy_pages(
    buffer: jax.Array, page: jax.Array, at: jax.Array, place: Callable[..., Any], name: str
) -> jax.Array:
    """Copies `page [L, B, K, P, H]` into a buffer of pages, in place.

    `place` gives, of the buffer's ref, a layer, row and head, and what `at`, int32 `[L, B, K]`,
    says of them, the ref of the page to overwrite. `name` is the kernel's.

    Raises:
      NotImplementedError: a page is not whole words of 32 bits in every lane.
    """
    L, B, K, P, H = page.shape
    check_whole_words(buffer)

    def kernel(at_ref: Any, page_ref: Any, _: Any, buffer_ref: Any, done: Any) -> None:
        layer = pl.program_id(0)

        def copy(index: jax.Array) -> Any:
            row, head = jax.lax.div(index, K), jax.lax.rem(index, K)
            target = place(buffer_ref, layer, row, head, at_ref[0, 0, index])
            return pltpu.make_async_copy(page_ref.at[layer, row, head], target, done)

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
        out_shape=result(*buffer.shape, dtype=buffer.dtype),
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        input_output_aliases={2: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=0,
            bytes_accessed=2 * L * B * K * P * H * jnp.dtype(buffer.dtype).itemsize,
            transcendentals=0,
        ),
        name=name,
    )(at.reshape(L, 1, B * K), page, buffer)
    return written
