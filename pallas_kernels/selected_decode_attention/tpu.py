"""`selected_decode_attention` for TPU (Pallas, Mosaic): each listed page is fetched on its own.

While a step computes, the pages of the next one are on their way into the other half of the
buffer. Places of the list that name no page, or an empty one, are not fetched.
"""

from __future__ import annotations

from functools import partial
from operator import methodcaller
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arrays import pad_groups, result
from pallas_kernels.decode_attention.reference import DecodeAttention
from pallas_kernels.decode_attention.tpu import Softmax, attend_block, chunk_tokens
from pallas_kernels.decode_attention.tuning import tpu_blocks
from pallas_kernels.selected_decode_attention.reference import chosen_slots
from pallas_kernels.tpu import check_served, check_whole_words, padded_rows


def selected_decode_attention_tpu(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    fill: jax.Array,
    slots: jax.Array,
    layer: jax.Array,
    *,
    scale: float,
    device_kind: str = "",
    pages: int | None = None,
) -> DecodeAttention:
    """See `api.selected_decode_attention`, which checks the arguments; a step takes `pages` slots.

    Raises:
      NotImplementedError: a dtype that the kernel does not take, no slots, or pages that are not
        whole words of 32 bits.
    """
    B, N, H = q.shape
    _, prompts, K, _, P, _ = k_pages.shape
    C = slots.shape[2]
    check_served(k_pages, C)
    check_whole_words(k_pages)
    if pages is None:
        pages = tpu_blocks(device_kind, 1, 1, C, P, H, k_pages.dtype.itemsize).pages
    per_head = -(-C // pages)
    steps, whole = B * K * per_head, per_head * pages
    G, rows = N // K, padded_rows(N // K)
    grouped = pad_groups(q, K, rows).reshape(B * K, rows, H)

    # What is not read, for whatever reason, is a slot of -1 with a fill of 0.
    _, filled = chosen_slots(fill, slots)
    slots = jnp.where(filled > 0, slots, -1)
    padding = (0, 0), (0, 0), (0, whole - C)
    chunk = chunk_tokens(pages, P)
    shape = (steps, pages * P // chunk, chunk // P)
    filled = jnp.pad(filled, padding).reshape(shape)
    slots = jnp.pad(slots, padding, constant_values=-1).reshape(steps, 1, pages)

    def of_head(*tail: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *tail), lambda g, _: (jax.lax.div(g, per_head), *(0 for _ in tail)))

    def of_step(*tail: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *tail), lambda g, _: (g, *(0 for _ in tail)))

    def slots_of(ahead: int) -> pl.BlockSpec:
        def index(g: Any, _: Any) -> Any:
            return jnp.minimum(g + ahead, steps - 1), 0, 0

        return pl.BlockSpec((1, 1, pages), index, memory_space=pltpu.SMEM)

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out, stats, lse = pl.pallas_call(
        partial(_kernel, per_head=per_head, samples=B // prompts, heads=K, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps,),
            in_specs=[
                slots_of(0),
                slots_of(1),
                of_head(rows, H),
                of_step(*shape[1:]),
                [anywhere] * 2,
            ],
            out_specs=[of_head(rows, H), of_head(rows, 2), of_step(shape[1], rows, shape[2])],
            scratch_shapes=[
                [pltpu.VMEM((2, pages, P, H), k_pages.dtype)] * 2,
                pltpu.SemaphoreType.DMA((2,)),
                Softmax.scratch(rows, H=H),
            ],
        ),
        out_shape=[
            result(B * K, rows, H),
            result(B * K, rows, 2),
            result(steps, shape[1], rows, shape[2]),
        ],
        # One step starts the copies of the next, so that they must follow each other.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * C * P * H,
            bytes_accessed=2 * B * K * C * P * H * k_pages.dtype.itemsize,
            transcendentals=B * N * C * P,
        ),
        name="selected_decode_attention",
    )(layer.reshape(1), slots, slots, grouped, filled, [k_pages, v_pages])
    lse = lse.reshape(B * K, per_head * shape[1], rows, shape[2])
    lse = jnp.moveaxis(lse, 2, 1).reshape(B, K, rows, whole)[:, :, :G, :C]
    return DecodeAttention(
        out[:, :G].reshape(B, N, H),
        stats[:, :G, 0].reshape(B, N),
        stats[:, :G, 1].reshape(B, N),
        lse.reshape(B, N, C),
    )


def _kernel(
    layer_ref: Any,
    slots_ref: Any,
    next_ref: Any,
    q_ref: Any,
    fill_ref: Any,
    pages_refs: Any,
    out_ref: Any,
    stats_ref: Any,
    lse_ref: Any,
    kv_refs: Any,
    done: Any,
    softmax: Softmax,
    *,
    per_head: int,
    samples: int,
    heads: int,
    scale: float,
) -> None:
    step, steps = pl.program_id(0), pl.num_programs(0)
    half, part = jax.lax.rem(step, 2), jax.lax.rem(step, per_head)

    def for_each_copy(of_step: jax.Array, slots: Any, act: Any) -> None:
        row_and_head = jax.lax.div(of_step, per_head)
        prompt = jax.lax.div(row_and_head, heads * samples)
        head, into = jax.lax.rem(row_and_head, heads), jax.lax.rem(of_step, 2)

        def of_page(place: jax.Array, _: None) -> None:
            slot = slots[0, 0, place]

            @pl.when(slot >= 0)
            def live() -> None:
                for pages, buffer in zip(pages_refs, kv_refs, strict=True):
                    page = pages.at[layer_ref[0], prompt, head, slot]
                    act(pltpu.make_async_copy(page, buffer.at[into, place], done.at[into]))

        jax.lax.fori_loop(0, slots.shape[2], of_page, None)

    start, wait = methodcaller("start"), methodcaller("wait")
    pl.when(step == 0)(partial(for_each_copy, step, slots_ref, start))
    pl.when(step + 1 < steps)(partial(for_each_copy, step + 1, next_ref, start))
    pl.when(part == 0)(softmax.clear)
    for_each_copy(step, slots_ref, wait)
    kv = [ref.at[half] for ref in kv_refs]
    attend_block(q_ref.at[0], kv, fill_ref.at[0], lse_ref.at[0], softmax, scale)
    pl.when(part == per_head - 1)(partial(softmax.write, out_ref.at[0], stats_ref.at[0]))
