"""`ragged_decode_attention` for TPU (Pallas, Mosaic): one pass over the ranges, flash style.

A unit is a number of pages that follow one another in one head's range. A step takes a unit of one
head for a few rows, whose pages lie at the same places of the pool; the units of a layer's heads
follow one another, and the grid is as long as a layer has units, which differs from layer to layer.
The range's pages and no others are copied, those of the next step while this one computes; a unit
in which nothing lives is not. What one step does for a row is that of `decode_attention`.
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
from pallas_kernels.decode_attention.reference import DecodeAttention
from pallas_kernels.decode_attention.tpu import Softmax, attend_block, chunk_tokens
from pallas_kernels.decode_attention.tuning import CORES
from pallas_kernels.ragged_decode_attention.tuning import RaggedBlocks, alignment, ragged_blocks
from pallas_kernels.tpu import check_served, padded_rows

Scalar = jax.Array | int


def ragged_decode_attention_tpu(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    fill: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    layer: jax.Array,
    *,
    sizes: tuple[int, ...],
    scale: float,
    device_kind: str = "",
    blocks: RaggedBlocks | None = None,
) -> DecodeAttention:
    """See `api.ragged_decode_attention`; `blocks` replaces the heuristic's.

    Raises:
      NotImplementedError: a dtype that the kernel does not take, pages that are not whole words of
        32 bits, or single tokens in a pool that does not fill its tiles.
    """
    B, N, H = q.shape
    (_, T, P, _), (_, K, S) = k_pool.shape, fill.shape
    align = alignment(P)
    check_served(k_pool, S)
    if P == 1 and T % align:
        raise NotImplementedError(f"a pool of {T} single tokens is not whole tiles of {align}")
    if P > 1 and P * k_pool.dtype.itemsize % 4:
        raise NotImplementedError(f"a page of {P} {k_pool.dtype} tokens is not whole words")
    if blocks is None:
        blocks = ragged_blocks(device_kind, B, K, P, H, k_pool.dtype.itemsize, sizes)
    rows, pages, groups = blocks.rows, blocks.pages, blocks.groups
    G, heads = N // K, padded_rows(N // K)
    # Units per head at most, and of a group of heads.
    most = -(-(S + align - 1) // pages)
    longest, whole = K // groups * most, most * pages

    begin = starts % T
    first = begin // align * align
    end = -(-(begin + counts) // align) * align
    places, units = unit_places(-(-(end - first) // pages), groups, most)
    ranges = jnp.stack([first, end], axis=1)
    places, units, ranges, begin, count = (x[layer] for x in (places, units, ranges, begin, counts))

    fill = jnp.where(jnp.arange(S) < count[:, None], fill, 0)
    offset = (begin % align)[:, None]
    padded = jnp.pad(fill, ((0, 0), (0, 0), (align - 1, whole - S)))
    padded = select_shift(padded, align - 1 - offset, whole, align)
    chunk = chunk_tokens(pages, P)
    shape = (pages * P // chunk, chunk // P)
    fills = padded.reshape(B, K, most, *shape)
    live = jnp.any(padded.reshape(B // rows, rows, -1, pages) > 0, axis=(1, 3))

    def of_unit(*tail: int) -> pl.BlockSpec:
        def index(b: Any, g: Any, j: Any, places: Any, *_: Any) -> Any:
            place = places[g * longest + j]
            return b, jax.lax.div(place, most), jax.lax.rem(place, most), *(0 for _ in tail)

        return pl.BlockSpec((rows, 1, 1, *tail), index)

    def of_head(*tail: int) -> pl.BlockSpec:
        def index(b: Any, g: Any, j: Any, places: Any, *_: Any) -> Any:
            return b, jax.lax.div(places[g * longest + j], most), *(0 for _ in tail)

        return pl.BlockSpec((rows, 1, *tail), index)

    if P == 1:
        # Pages of one token lie as one long page would; so they are said to be.
        k_pool, v_pool = (x.reshape(B, T, H) for x in (k_pool, v_pool))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    alone = CORES.get(device_kind, 1) == 1
    # On one core a step also starts the copies of the next block or group of heads.
    outer: Literal["arbitrary", "parallel"] = "arbitrary" if alone else "parallel"
    buffer = pltpu.VMEM((2, rows, pages, *k_pool.shape[2:]), k_pool.dtype)
    out, stats, lse = pl.pallas_call(
        partial(_kernel, K=K, most=most, align=align, alone=alone, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(B // rows, groups, jnp.max(units)),
            in_specs=[of_head(heads, H), of_unit(*shape), [anywhere] * 2],
            out_specs=[of_head(heads, H), of_head(heads, 2), of_unit(shape[0], heads, shape[1])],
            scratch_shapes=[
                Buffers(
                    [buffer] * 2, pltpu.SemaphoreType.DMA((2,)), pltpu.SMEM((1,), jnp.int32)
                ),
                Softmax.scratch(rows, heads, H=H),
            ],
        ),
        out_shape=[
            result(B, K, heads, H),
            result(B, K, heads, 2),
            result(B, K, most, shape[0], heads, shape[1]),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=(outer, outer, "arbitrary")),
        # Of a layer that has its share of the pool.
        cost_estimate=pl.CostEstimate(
            flops=4 * B * G * (T // starts.shape[0]) * P * H,
            bytes_accessed=2 * B * (T // starts.shape[0]) * P * H * k_pool.dtype.itemsize,
            transcendentals=B * G * (T // starts.shape[0]) * P,
        ),
        name="ragged_decode_attention",
    )(places, units, ranges, live_from(live.reshape(-1)), pad_groups(q, K, heads), fills,
      [k_pool, v_pool])  # fmt: skip
    # Units, chunks and pages in a chunk are, in this order, the slots.
    lse = jnp.moveaxis(lse, 4, 2).reshape(B, K, heads, whole)[:, :, :G]
    lse = jnp.pad(lse, ((0, 0),) * 3 + ((0, align - 1),))
    lse = select_shift(lse, offset[:, None], S, align)
    # What was not visited was not written.
    lse = jnp.where((fill > 0)[:, :, None], lse, -jnp.inf)
    return DecodeAttention(
        out[:, :, :G].reshape(B, N, H),
        stats[:, :, :G, 0].reshape(B, N),
        stats[:, :, :G, 1].reshape(B, N),
        lse.reshape(B, N, S),
    )


def unit_places(units: jax.Array, groups: int, most: int) -> tuple[jax.Array, jax.Array]:
    """Which unit each step of a group of heads takes, from the units of every head `[L, K]`.

    Returns:
      `head * most + unit of the head`, int32 `[L, groups * K / groups * most]`, a group's last one
      again in place of those that there are not; and the units of each group, `[L, groups]`.
    """
    L, K = units.shape
    units = units.reshape(L, groups, 1, K // groups)
    ends = jnp.cumsum(units, axis=-1)
    step = jnp.minimum(jnp.arange(K // groups * most), ends[:, :, 0, -1:] - 1)
    # The heads whose last unit lies before this step.
    passed = step[..., None] >= ends
    head = jnp.sum(passed, axis=-1)
    unit = step - jnp.sum(jnp.where(passed, units, 0), axis=-1)
    head = head + jnp.arange(groups)[:, None] * (K // groups)
    places = head * most + unit
    return places.astype(jnp.int32).reshape(L, -1), ends[:, :, 0, -1].astype(jnp.int32)


def select_shift(x: jax.Array, shift: jax.Array, size: int, ways: int) -> jax.Array:
    """`x[..., shift : shift + size]` where the shift, below `ways`, differs by the axes before."""
    found = x[..., :size]
    for by in range(1, ways):
        found = jnp.where(shift == by, x[..., by : by + size], found)
    return found


def live_from(live: jax.Array) -> jax.Array:
    """The first live unit from each on, or a number too large: int32 `[units + 1]`."""
    number = jnp.arange(live.size, dtype=jnp.int32)
    coming = jnp.where(live, number, live.size)
    return jnp.pad(jax.lax.cummin(coming, reverse=True), (0, 1), constant_values=live.size)


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
    q_ref: Any,
    fill_ref: Any,
    pool_refs: Any,
    out_ref: Any,
    stats_ref: Any,
    lse_ref: Any,
    buffers: Buffers,
    softmax: Softmax,
    *,
    K: int,
    most: int,
    align: int,
    alone: bool,
    scale: float,
) -> None:
    block, group, step = (pl.program_id(axis) for axis in range(3))
    groups = units_ref.shape[0]
    longest = K // groups * most
    rows, pages = buffers.kv[0].shape[1:3]
    place = places_ref[group * longest + step]
    number = block * (K * most) + place
    sequence = block * groups + group

    def pages_left(place: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first page of a unit, and how many there are of the range from it on."""
        head, unit = jax.lax.div(place, most), jax.lax.rem(place, most)
        page = ranges_ref[0, head] + unit * pages
        return page, ranges_ref[1, head] - page

    def for_each_copy(number: jax.Array, half: Scalar, act: Callable[[Any], None]) -> None:
        row = jax.lax.div(number, K * most) * rows
        page, left = pages_left(jax.lax.rem(number, K * most))

        def copy(shift: Scalar, size: int) -> None:
            start = pl.multiple_of(page + shift, align)
            into = pl.multiple_of(jnp.int32(shift), align)
            for pool, buffer in zip(pool_refs, buffers.kv, strict=True):
                source = pool.at[pl.ds(row, rows), pl.ds(start, size)]
                target = buffer.at[half, :, pl.ds(into, size)]
                act(pltpu.make_async_copy(source, target, buffers.done.at[half]))

        pl.when(left >= pages)(partial(copy, 0, pages))
        # The last pages of a range: as many as its binary digits say, largest first.
        for bit in reversed(range(align.bit_length() - 1, (pages - 1).bit_length())):
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
    pl.when(exists & (jax.lax.rem(place, most) == 0))(softmax.clear)

    @pl.when(exists & (live_ref[number] == number))
    def attend() -> None:
        half = buffers.half[0]
        start(live_ref[number + 1], 1 - half)
        for_each_copy(number, half, methodcaller("wait"))
        for row in range(rows):
            kv = [buffer.at[half, row] for buffer in buffers.kv]
            fill, lse = fill_ref.at[row, 0, 0], lse_ref.at[row, 0, 0]
            attend_block(q_ref.at[row, 0], kv, fill, lse, softmax.of_head(row), scale)
        buffers.half[0] = 1 - half

    last = pages_left(place)[1] <= pages
    pl.when(exists & last)(partial(softmax.write, out_ref.at[:, 0], stats_ref.at[:, 0]))
