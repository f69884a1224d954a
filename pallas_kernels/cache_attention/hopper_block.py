"""What one block of the Hopper kernel of `cache_attention` does; `gpu.py` launches it.

The tiles of a row and head follow one another: those of its prompt, of its kept pages, and of the
current one. A block takes its share of them, wherever they lie, and does with each what a block of
`decode_attention` does. Which tokens of a tile live it finds out itself, from the numbers of the
cache, so that no program has to run before it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.hopper_block import (
    LOG2_E,
    WORD,
    Living,
    Scalar,
    Scratch,
    by_head,
    page_lse_of,
    weigh_tile,
    write_constants,
    write_page_lse,
)
from pallas_kernels.hopper import TILE, commit_memory, store


class Pages(NamedTuple):
    """Keys and values of a segment, `[layers * rows * K, tokens, H]`, in global memory."""

    k: Any
    v: Any


class Operands(NamedTuple):
    """What the blocks read, in global memory."""

    q: Any  # [blocks, parts, group, H]
    prompt: Pages | None
    kept: Pages
    current: Pages
    lengths: Any  # int32 [B'], of the prompts
    fill: Any  # int32 [Lg * B * K, S], of the kept pages
    layers: Any  # int32 [1] each: of prompt, kept and current
    written: Any  # int32 [1], tokens of the current page


class Results(NamedTuple):
    """What the blocks write, in global memory, float32."""

    out: Any  # [blocks, splits, group, H], or H before group where values are on top
    max: Any  # [blocks, splits, group]
    sum: Any  # [blocks, splits, group]
    page_lse: Any  # [blocks, kept and current tiles, pages, group]


class Memory(NamedTuple):
    """A block's shared memory."""

    block: Scratch
    sum: Any  # float32 [group], on its way to the results


class Sizes(NamedTuple):
    """What a block is compiled for."""

    K: int
    samples: int
    chunks: int  # of a key/value head's query heads
    P: int
    scale: float


class Place(NamedTuple):
    """Where a segment's tiles are: among all tiles of a pair, and its pages in memory."""

    first: int
    tiles: int
    pages: Pages
    row: Scalar

    def fetch(self, own: Scratch, tile: Scalar, stage: Scalar) -> None:
        """Starts the copies of a tile, if it is one of them; the last may be shorter."""
        tokens = self.pages.k.shape[1]
        local = tile - self.first
        whole, rest = tokens // TILE, tokens % TILE

        def copy(size: int) -> None:
            both = (self.pages.k, own.k, own.k_barriers), (self.pages.v, own.v, own.v_barriers)
            for ref, memory, barriers in both:
                plgpu.copy_gmem_to_smem(
                    ref.at[self.row, pl.ds(pl.multiple_of(local * TILE, TILE), size)],
                    memory.at[stage, pl.ds(0, size)],
                    barriers.at[stage],
                )

        if whole:
            pl.when((local >= 0) & (local < whole))(partial(copy, TILE))
        if rest:
            pl.when(local == whole)(partial(copy, rest))


def attend_block(read: Operands, write: Results, memory: Memory, *, sizes: Sizes) -> None:
    """Attends with a group of query heads to some tiles of its row and key/value head."""
    own = memory.block
    block, split = lax.axis_index("block"), lax.axis_index("split")
    parts, group = read.q.shape[1:3]
    stages, splits = own.k.shape[0], write.out.shape[1]
    pairs = read.q.shape[0] // sizes.chunks
    pair = lax.div(block, jnp.int32(sizes.chunks))
    row, head = lax.div(pair, jnp.int32(sizes.K)), lax.rem(pair, jnp.int32(sizes.K))
    prompt = lax.div(row, jnp.int32(sizes.samples))

    def place(first: int, pages: Pages, layer: Any, rows: int, at: Scalar) -> Place:
        return Place(first, -(-pages.k.shape[1] // TILE), pages, layer[0] * rows + at)

    of_layers, places, tiles = list(read.layers), [], 0
    if read.prompt is not None:
        rows = pairs // sizes.samples
        at = prompt * sizes.K + head
        places.append(place(0, read.prompt, of_layers[0], rows, at))
        tiles = places[-1].tiles
    generated = tiles
    for pages, layer in zip((read.kept, read.current), of_layers[-2:], strict=True):
        places.append(place(tiles, pages, layer, pairs, pair))
        tiles += places[-1].tiles
    living = partial(living_in, read, places, prompt, sizes.P)

    per_split = -(-tiles // splits)
    first = split * per_split
    count = jnp.minimum(per_split, tiles - first)

    def fetch(tile: Scalar, stage: Scalar) -> None:
        @pl.when(living(tile).some())
        def _() -> None:
            for each in places:
                each.fetch(own, tile, stage)

    for part in range(parts):
        plgpu.copy_gmem_to_smem(read.q.at[block, part], own.q.at[part], own.q_barrier)
    for ahead in range(min(stages, per_split)):
        pl.when(ahead < count)(partial(fetch, first + ahead, ahead))
    write_constants(own, write.page_lse.shape[2])
    plgpu.barrier_wait(own.q_barrier)

    def step(number: jax.Array, carry: Any) -> Any:
        tile, stage = first + number, lax.rem(number, jnp.int32(stages))
        alive = living(tile)

        def attend(carry: Any) -> Any:
            out, peak, total = carry
            found = weigh_tile(own, stage, alive, sizes.scale, out, peak)

            @pl.when(tile >= generated)
            def _() -> None:
                target = write.page_lse.at[block, tile - generated]
                write_page_lse(own, page_lse_of(own, found), target)

            return found.out, found.peak, total * by_head(found.factor, TILE) + found.weights

        carry = lax.cond(alive.some(), attend, lambda carry: carry, carry)
        pl.when(number + stages < count)(lambda: fetch(tile + stages, stage))
        return carry

    out = plgpu.layout_cast(jnp.zeros(own.out.shape, jnp.float32), plgpu.Layout.WGMMA)
    peak = jnp.full((group,), -jnp.inf, jnp.float32)
    peak = plgpu.layout_cast(peak, plgpu.Layout.WGMMA.reduce(0))
    total = plgpu.layout_cast(jnp.zeros((TILE, group), jnp.float32), plgpu.Layout.WGMMA)
    out, peak, total = lax.fori_loop(0, count, step, (out, peak, total))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    store(own.out, out)
    own.max[...] = peak * (1 / LOG2_E)
    memory.sum[...] = jnp.sum(total, axis=0)
    commit_memory()
    target = write.out.at[block, split]
    plgpu.copy_smem_to_gmem(own.out.at[pl.ds(0, target.shape[0])], target)
    plgpu.copy_smem_to_gmem(own.max, write.max.at[block, split])
    plgpu.copy_smem_to_gmem(memory.sum, write.sum.at[block, split])
    plgpu.wait_smem_to_gmem(0)


def living_in(read: Operands, places: list[Place], prompt: Scalar, P: int, tile: Scalar) -> Living:
    """Which tokens of a tile count."""
    *before, kept, current = places
    local = tile - current.first
    living = before_token(read.written[0] - local * TILE)
    living = choose(local >= 0, living, of_kept(read.fill, kept, P, tile))
    if before:
        in_prompt = before_token(read.lengths[prompt] - tile * TILE)
        living = choose(tile < kept.first, in_prompt, living)
    return living


def of_kept(fill: Any, kept: Place, P: int, tile: Scalar) -> Living:
    """Of a tile of the kept pages, in which several pages are or which is a part of one."""
    local, slots = jnp.maximum(tile - kept.first, 0), fill.shape[1]
    if P >= TILE:
        parts = jnp.int32(P // TILE)
        slot = jnp.minimum(lax.div(local, parts), slots - 1)
        return before_token(fill[kept.row, slot] - lax.rem(local, parts) * TILE)
    low, high = jnp.int32(0), jnp.int32(0)
    for page in range(TILE // P):
        slot = local * (TILE // P) + page
        tokens = jnp.where(slot < slots, fill[kept.row, jnp.minimum(slot, slots - 1)], 0)
        upto, start = before_token(tokens + page * P), page * P
        low |= upto.low & ~_ones(start)
        high |= upto.high & ~_ones(start - WORD)
    return Living(low, high)


def before_token(token: jax.Array) -> Living:
    """The tokens before this one, be it negative or beyond the tile."""

    def word(count: jax.Array) -> jax.Array:
        bits = lax.shift_left(jnp.int32(1), jnp.clip(count, 0, WORD - 1)) - 1
        return jnp.where(count >= WORD, jnp.int32(-1), bits)

    return Living(word(token), word(token - WORD))


def _ones(count: int) -> int:
    """As many low bits of an int32 word."""
    return (1 << max(count, 0)) - 1 if count < WORD - 1 else (-1 if count >= WORD else 2**31 - 1)


def choose(condition: jax.Array, one: Living, other: Living) -> Living:
    return Living(*(jnp.where(condition, *pair) for pair in zip(one, other, strict=True)))
