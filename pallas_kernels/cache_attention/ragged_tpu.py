"""`cache_attention` over ranges of a pool, for TPU (Pallas, Mosaic): one pass over all segments.

As in `ragged_decode_attention` a step takes a unit of pages of one head, for a few rows; the grid
is as long as a layer has units. A head's first units are of its prompt, which Pallas fetches; the
others of its range, which the kernel copies itself; with the last goes the current page.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import methodcaller
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arrays import pad_groups, result
from pallas_kernels.cache_attention.reference import prompt_fill
from pallas_kernels.cache_attention.segments import Attended, Segment
from pallas_kernels.cache_attention.tpu import Cut, attend_current, in_hbm
from pallas_kernels.cache_attention.tuning import prompt_pages
from pallas_kernels.decode_attention.tpu import Softmax, attend_block
from pallas_kernels.decode_attention.tuning import CORES
from pallas_kernels.ragged_decode_attention.tpu import live_from, unit_places
from pallas_kernels.ragged_decode_attention.tuning import RaggedBlocks, ragged_blocks
from pallas_kernels.tpu import check_served, check_whole_words, padded_rows

Scalar = jax.Array | int


def ragged_cache_attention_tpu(
    q: jax.Array,
    prompt: Segment | None,
    kept: Segment,
    current: Segment,
    starts: jax.Array,
    counts: jax.Array,
    *,
    sizes: tuple[int, ...],
    scale: float,
    device_kind: str = "",
    blocks: RaggedBlocks | None = None,
) -> Attended:
    """See `tpu.cache_attention_tpu`.

    Raises:
      NotImplementedError: a dtype that the kernel does not take, pages of one token or that are
        not whole words of 32 bits, or rows that share a prompt.
    """
    (B, N, H), (_, T, P, _) = q.shape, kept.k.shape
    _, _, K, S = kept.tokens.shape
    check_served(kept.k, S)
    check_whole_words(kept.k)
    if P == 1:
        raise NotImplementedError("pages are single tokens")
    if prompt is not None and prompt.k.shape[1] != B:
        raise NotImplementedError("several rows share a prompt")
    itemsize = kept.k.dtype.itemsize
    if blocks is None:
        blocks = ragged_blocks(device_kind, B, K, P, H, itemsize, sizes)
    rows, pages, groups = blocks.rows, blocks.pages, blocks.groups
    G, heads = N // K, padded_rows(N // K)
    of_prompt = None
    if prompt is not None:
        filled = prompt_fill(prompt)[:, None]
        fitting = prompt_pages(device_kind, rows, filled.shape[2], P, H, itemsize)
        of_prompt = Cut.of(filled, fitting, P)
    first = 0 if of_prompt is None else of_prompt.blocks

    # Units per head at most, and of a group of heads.
    units_at_most = -(-S // pages)
    most = first + units_at_most
    longest, whole = K // groups * most, units_at_most * pages
    begin = starts % T
    places, units = unit_places(first - (-counts // pages), groups, most)
    ranges = jnp.stack([begin, begin + counts], axis=1)
    places, units, ranges, count = (x[kept.layer] for x in (places, units, ranges, counts))

    fill = jax.lax.dynamic_index_in_dim(kept.tokens, kept.layer, 0, keepdims=False)
    fill = jnp.where(jnp.arange(S) < count[:, None], fill, 0)
    of_kept = Cut.of(jnp.pad(fill, ((0, 0), (0, 0), (0, whole - S))), pages, P)
    live = jnp.any(of_kept.live.reshape(B // rows, rows, K, units_at_most), axis=1)
    # The units of the prompt are none of those that the kernel copies.
    live = jnp.pad(live, ((0, 0), (0, 0), (first, 0)))
    last = jnp.zeros((1,), jnp.int32)
    if of_prompt is not None:
        ends = jnp.sum(of_prompt.live.reshape(B // rows, rows, first), axis=2, dtype=jnp.int32)
        # Prompts fill their pages in order.
        last = jnp.max(ends, axis=1)

    def place_of(g: Any, j: Any, places: Any) -> tuple[Any, Any]:
        place = places[g * longest + j]
        return jax.lax.div(place, most), jax.lax.rem(place, most)

    def of_unit(*tail: int) -> pl.BlockSpec:
        def index(b: Any, g: Any, j: Any, places: Any, *_: Any) -> Any:
            head, unit = place_of(g, j, places)
            return b, head, jnp.maximum(unit - first, 0), *(0 for _ in tail)

        return pl.BlockSpec((rows, 1, 1, *tail), index)

    def of_head(*tail: int, layer: bool = False) -> pl.BlockSpec:
        def index(b: Any, g: Any, j: Any, places: Any, *scalars: Any) -> Any:
            head, _ = place_of(g, j, places)
            at = b, head, *(0 for _ in tail)
            return (scalars[-1][1], *at) if layer else at

        return pl.BlockSpec((*((1,) * layer), rows, 1, *tail), index)

    def prompt_block(b: Any, unit: Any, scalars: Any) -> Any:
        block = jnp.minimum(jnp.minimum(unit, first - 1), scalars[-2][b] - 1)
        return jnp.maximum(block, 0)

    def prompt_index(b: Any, g: Any, j: Any, places: Any, *scalars: Any) -> Any:
        head, unit = place_of(g, j, places)
        return scalars[-1][0], b, head, prompt_block(b, unit, scalars), 0, 0

    def fill_index(b: Any, g: Any, j: Any, places: Any, *scalars: Any) -> Any:
        return b, 0, prompt_block(b, place_of(g, j, places)[1], scalars), 0, 0

    alone = CORES.get(device_kind, 1) == 1
    # On one core a step also starts the copies of the next block or group of heads.
    outer: Literal["arbitrary", "parallel"] = "arbitrary" if alone else "parallel"
    buffer = pltpu.VMEM((2, rows, pages, P, H), kept.k.dtype)
    shape = of_kept.chunked
    specs: list[Any] = [
        of_head(heads, H),
        of_unit(*shape),
        [pl.BlockSpec(memory_space=pltpu.HBM)] * 2,
        [of_head(P, H, layer=True)] * 2,
    ]
    operands: list[Any] = [
        pad_groups(q, K, heads),
        of_kept.fills,
        [kept.k, kept.v],
        [current.k, current.v],
    ]
    if prompt is not None and of_prompt is not None:
        specs += [
            pl.BlockSpec((rows, 1, 1, *of_prompt.chunked), fill_index),
            [pl.BlockSpec((1, rows, 1, of_prompt.pages, P, H), prompt_index)] * 2,
        ]
        operands += [of_prompt.fills, [in_hbm(x) for x in (prompt.k, prompt.v)]]
    prompt_layer = current.layer if prompt is None else prompt.layer
    numbers = jnp.stack([prompt_layer, current.layer, current.tokens])
    mean = T // starts.shape[0] + K * (0 if prompt is None else prompt.k.shape[3])
    out, stats, lse = pl.pallas_call(
        partial(_kernel, K=K, first=first, most=most, alone=alone, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(B // rows, groups, jnp.max(units)),
            in_specs=specs,
            out_specs=[of_head(heads, H), of_head(heads, 2), of_unit(shape[0], heads, shape[1])],
            scratch_shapes=[
                Buffers([buffer] * 2, pltpu.SemaphoreType.DMA((2,)), pltpu.SMEM((1,), jnp.int32)),
                Softmax.scratch(rows, heads, H=H),
            ],
        ),
        out_shape=[
            result(B, K, heads, H),
            result(B, K, heads, 2),
            result(B, K, units_at_most, shape[0], heads, shape[1]),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=(outer, outer, "arbitrary")),
        # Of a layer that has its share of the pool.
        cost_estimate=pl.CostEstimate(
            flops=4 * B * G * mean * P * H,
            bytes_accessed=2 * B * mean * P * H * itemsize,
            transcendentals=B * G * mean * P,
        ),
        name="cache_attention",
    )(places, units, ranges, live_from(live.reshape(-1)), last, numbers, *operands)
    # Units, chunks and pages in a chunk are, in this order, the slots.
    lse = jnp.moveaxis(lse, 4, 2).reshape(B, K, heads, whole)[:, :, :G, :S]
    # What was not visited was not written.
    lse = jnp.where((fill > 0)[:, :, None], lse, -jnp.inf)
    return Attended(
        out[:, :, :G].reshape(B, N, H),
        stats[:, :, :G, 0].reshape(B, N),
        lse.reshape(B, N, S),
        stats[:, :, :G, 1].reshape(B, N),
    )


class Buffers(NamedTuple):
    """Pages on their way, and those that are computed with."""

    kv: Any  # [2, rows, pages, P, H] each
    done: Any  # A semaphore for each half.
    half: Any  # [1], the half that the next live unit is in


def _kernel(
    places_ref: Any,
    units_ref: Any,
    ranges_ref: Any,
    live_ref: Any,
    last_ref: Any,
    numbers_ref: Any,
    q_ref: Any,
    fill_ref: Any,
    pool_refs: Any,
    current_refs: Any,
    *refs: Any,
    K: int,
    first: int,
    most: int,
    alone: bool,
    scale: float,
) -> None:
    *of_prompt, out_ref, stats_ref, lse_ref, buffers, softmax = refs
    block, group, step = (pl.program_id(axis) for axis in range(3))
    groups = units_ref.shape[0]
    longest = K // groups * most
    rows, pages = buffers.kv[0].shape[1:3]
    place = places_ref[group * longest + step]
    unit = jax.lax.rem(place, most)
    number = block * (K * most) + place
    sequence = block * groups + group

    def pages_left(place: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first page of a unit of the range, and how many there are from it on."""
        head, unit = jax.lax.div(place, most), jax.lax.rem(place, most) - first
        page = ranges_ref[0, head] + unit * pages
        return page, ranges_ref[1, head] - page

    def for_each_copy(number: jax.Array, half: Scalar, act: Callable[[Any], None]) -> None:
        row = jax.lax.div(number, K * most) * rows
        page, left = pages_left(jax.lax.rem(number, K * most))

        def copy(shift: Scalar, size: int) -> None:
            for pool, buffer in zip(pool_refs, buffers.kv, strict=True):
                source = pool.at[pl.ds(row, rows), pl.ds(page + shift, size)]
                target = buffer.at[half, :, pl.ds(shift, size)]
                act(pltpu.make_async_copy(source, target, buffers.done.at[half]))

        pl.when(left >= pages)(partial(copy, 0, pages))
        # The last pages of a range: as many as its binary digits say, largest first.
        for bit in reversed(range((pages - 1).bit_length())):
            size = 1 << bit
            before = left & -(2 * size)
            pl.when((left < pages) & ((left & size) != 0))(partial(copy, before, size))

    def start(number: jax.Array, half: Scalar) -> None:
        # Where cores share the work, each has the sequence of its own block and group.
        mine = alone | (jax.lax.div(number, longest) == sequence)
        some = number < live_ref.shape[0] - 1
        pl.when(some & mine)(partial(for_each_copy, number, half, methodcaller("start")))

    opening = (number == 0) if alone else (step == 0)

    @pl.when(opening)
    def _() -> None:
        buffers.half[0] = 0
        start(live_ref[number], 0)

    # A group may have fewer units than the longest.
    exists = step < units_ref[group]
    pl.when(exists & (unit == 0))(softmax.clear)

    if first:
        prompt_fill_ref, prompt_refs = of_prompt

        @pl.when(exists & (unit < jnp.minimum(last_ref[block], first)))
        def attend_prompt() -> None:
            for row in range(rows):
                kv = [ref.at[0, row, 0] for ref in prompt_refs]
                fill = prompt_fill_ref.at[row, 0, 0]
                attend_block(q_ref.at[row, 0], kv, fill, None, softmax.of_head(row), scale)

    @pl.when(exists & (live_ref[number] == number))
    def attend_range() -> None:
        half = buffers.half[0]
        start(live_ref[number + 1], 1 - half)
        for_each_copy(number, half, methodcaller("wait"))
        for row in range(rows):
            kv = [buffer.at[half, row] for buffer in buffers.kv]
            fill, lse = fill_ref.at[row, 0, 0], lse_ref.at[row, 0, 0]
            attend_block(q_ref.at[row, 0], kv, fill, lse, softmax.of_head(row), scale)
        buffers.half[0] = 1 - half

    @pl.when(exists & (unit >= first) & (pages_left(place)[1] <= pages))
    def finish() -> None:
        for row in range(rows):
            kv = [ref.at[0, row, 0] for ref in current_refs]
            own = softmax.of_head(row)
            page_lse = attend_current(q_ref.at[row, 0], kv, numbers_ref[2], own, scale)
            total = own.total[:, 0:1]
            out_ref[row, 0] = own.acc[...] / total
            stats_ref[row, 0, :, 0:1] = own.peak[:, 0:1] + jnp.log(total)
            stats_ref[row, 0, :, 1:2] = page_lse
