"""What one block of the Hopper kernel of `cache_attention` does; `gpu.py` launches it.

The tiles of a row and head follow one another: those of its prompt, of the current page, and of its
kept ones. A block takes its share of them, wherever they lie, and does with each what a block of
`decode_attention` does. Which tokens of a tile live it finds out itself, from the numbers of the
cache, so that no program has to run before it.

Where heads have ranges of a pool, they differ in their tiles. All are given as many blocks as the
longest needs; those that have no tile write that they found nothing. The last tile of the pool's
last range may have to begin earlier than it should, and leaves out what the one before it covers.
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
from pallas_kernels.hopper import ROWS, TILE, commit_memory, store


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
    lengths: Any  # int32 [B'], of the prompts; or None
    fill: Any  # int32 [Lg * B * K, S], of the kept pages
    starts: Any  # int32 [Lg, K], of the ranges of a pool `[B, T * P, H]`; or None
    counts: Any  # int32 [Lg, K]; or None
    prompt_layer: Any  # int32 [1]; or None
    kept_layer: Any  # int32 [1]
    current_layer: Any  # int32 [1]
    written: Any  # int32 [1], tokens of the current page


class Results(NamedTuple):
    """What the blocks write, in global memory, float32."""

    out: Any  # [blocks, splits, group, H], or H before group where values are on top
    max: Any  # [blocks, splits, group]
    sum: Any  # [blocks, splits, group]
    page_lse: Any  # [blocks, current and kept tiles, pages, group]


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
    per_split: int  # tiles of a block
    scale: float


class Place(NamedTuple):
    """Where a segment's tiles are: among all tiles of a pair, and in memory."""

    first: int
    pages: Pages
    row: Scalar

    @property
    def tiles(self) -> int:
        tokens: int = self.pages.k.shape[1]
        return -(-tokens // TILE)

    def fetch(self, own: Scratch, tile: Scalar, stage: Scalar) -> None:
        """Starts the copies of a tile, if it is one of them; the last may be shorter."""
        whole, rest = divmod(self.pages.k.shape[1], TILE)
        local = tile - self.first
        copy = partial(copy_tile, self.pages, own, self.row, local * TILE, stage)
        if whole:
            pl.when((local >= 0) & (local < whole))(partial(copy, TILE))
        if rest:
            pl.when(local == whole)(partial(copy, rest))

    def living(self, alive: Scalar, tile: Scalar) -> Living:
        """Where the first so many tokens of the segment live."""
        return before_token(alive - (tile - self.first) * TILE)


class KeptPlace(NamedTuple):
    """The same of the kept pages: all of a row, or of a pool's a range."""

    first: int
    pages: Pages
    row: Scalar
    fill: Any  # [Lg * B * K, S]
    fill_row: Scalar
    P: int
    held: Scalar  # pages
    begin: Scalar | None  # the range's first token; None: all are the row's own

    @property
    def end(self) -> Scalar:
        """The first tile after them."""
        return self.first + lax.div(self.held * self.P + (TILE - 1), jnp.int32(TILE))

    def fetch(self, own: Scratch, tile: Scalar, stage: Scalar) -> None:
        """See `Place.fetch`."""
        if self.begin is None:
            Place(self.first, self.pages, self.row).fetch(own, tile, stage)
        else:
            begin, _ = self.start(tile, self.begin)
            copy = partial(copy_tile, self.pages, own, self.row, begin, stage, TILE)
            pl.when(tile >= self.first)(copy)

    def start(self, tile: Scalar, begin: Scalar) -> tuple[Scalar, Scalar]:
        """Where a tile of the range begins in its row, and how many tokens too early."""
        wanted = begin + (tile - self.first) * TILE
        begin = jnp.minimum(wanted, self.pages.k.shape[1] - TILE)
        return begin, wanted - begin

    def living(self, tile: Scalar) -> Living:
        """Which tokens of a tile live: several pages are in it, or it is a part of one."""
        local, slots = jnp.maximum(tile - self.first, 0), self.fill.shape[1]
        if self.P >= TILE:
            parts = jnp.int32(self.P // TILE)
            slot = jnp.minimum(lax.div(local, parts), slots - 1)
            return before_token(self.fill[self.fill_row, slot] - lax.rem(local, parts) * TILE)
        low, high = jnp.int32(0), jnp.int32(0)
        early = jnp.int32(0)
        if self.begin is not None:
            early = lax.div(self.start(tile, self.begin)[1], jnp.int32(self.P))
        for page in range(TILE // self.P):
            slot = local * (TILE // self.P) + page - early
            mine = (page >= early) & (slot < self.held)
            tokens = self.fill[self.fill_row, jnp.clip(slot, 0, slots - 1)]
            start = page * self.P
            upto = before_token(jnp.where(mine, tokens, 0) + start)
            low |= upto.low & ~_ones(start)
            high |= upto.high & ~_ones(start - WORD)
        return Living(low, high)


def copy_tile(
    pages: Pages, own: Scratch, row: Scalar, begin: Any, stage: Scalar, size: int
) -> None:
    """Starts the copies of so many tokens of a row, from a multiple of eight on."""
    both = (pages.k, own.k, own.k_barriers), (pages.v, own.v, own.v_barriers)
    for ref, memory, barriers in both:
        plgpu.copy_gmem_to_smem(
            ref.at[row, pl.ds(pl.multiple_of(begin, ROWS), size)],
            memory.at[stage, pl.ds(0, size)],
            barriers.at[stage],
        )


def attend_block(read: Operands, write: Results, memory: Memory, *, sizes: Sizes) -> None:
    """Attends with a group of query heads to some tiles of its row and key/value head."""
    own = memory.block
    block, split = lax.axis_index("block"), lax.axis_index("split")
    parts, group = read.q.shape[1:3]
    stages = own.k.shape[0]
    pairs, K = read.q.shape[0] // sizes.chunks, sizes.K
    pair = lax.div(block, jnp.int32(sizes.chunks))
    row, head = lax.div(pair, jnp.int32(K)), lax.rem(pair, jnp.int32(K))
    prompt = lax.div(row, jnp.int32(sizes.samples))

    places: list[Any] = []
    if read.prompt is not None:
        at = (read.prompt_layer[0] * (pairs // sizes.samples // K) + prompt) * K + head
        places.append(Place(0, read.prompt, at))
    generated = places[0].tiles if places else 0
    current = Place(generated, read.current, read.current_layer[0] * pairs + pair)
    kept = kept_place(read, generated + current.tiles, row, head, pair, sizes)
    places += [current, kept]

    def living(tile: Scalar) -> Living:
        found = current.living(read.written[0], tile)
        found = choose(tile >= kept.first, kept.living(tile), found)
        if generated:
            found = choose(tile < generated, places[0].living(read.lengths[prompt], tile), found)
        return found

    first = split * sizes.per_split
    count = jnp.clip(kept.end - first, 0, sizes.per_split)

    def fetch(tile: Scalar, stage: Scalar) -> None:
        @pl.when(living(tile).some())
        def _() -> None:
            for each in places:
                each.fetch(own, tile, stage)

    for part in range(parts):
        plgpu.copy_gmem_to_smem(read.q.at[block, part], own.q.at[part], own.q_barrier)
    for ahead in range(min(stages, sizes.per_split)):
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


def kept_place(
    read: Operands, first: int, row: Scalar, head: Scalar, pair: Scalar, sizes: Sizes
) -> KeptPlace:
    """Where the kept pages of a row and head are."""
    pairs, tokens = read.q.shape[0] // sizes.chunks, read.kept.k.shape[1]
    layer = read.kept_layer[0]
    own_row = layer * pairs + pair
    if read.starts is None:
        count, begin = jnp.int32(tokens // sizes.P), None
    else:
        # Of the part of the pool that is here.
        start = lax.rem(read.starts[layer, head], jnp.int32(tokens // sizes.P))
        count, begin = read.counts[layer, head], start * sizes.P
    own = own_row if begin is None else row
    return KeptPlace(first, read.kept, own, read.fill, own_row, sizes.P, count, begin)


def before_token(token: Scalar) -> Living:
    """The tokens before this one, be it negative or beyond the tile."""

    def word(count: Scalar) -> jax.Array:
        bits = lax.shift_left(jnp.int32(1), jnp.clip(count, 0, WORD - 1)) - 1
        return jnp.where(count >= WORD, jnp.int32(-1), bits)

    return Living(word(token), word(token - WORD))


def _ones(count: int) -> int:
    """As many low bits of an int32 word."""
    return (1 << max(count, 0)) - 1 if count < WORD - 1 else (-1 if count >= WORD else 2**31 - 1)


def choose(condition: jax.Array | bool, one: Living, other: Living) -> Living:
    return Living(*(jnp.where(condition, *pair) for pair in zip(one, other, strict=True)))
