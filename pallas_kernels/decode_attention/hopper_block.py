"""What one block of the Hopper kernel does; `hopper.py` says how, and launches it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import TILE, commit_memory, product, store, tile_width

WORD = 32
"""Tokens per word of the mask of living tokens."""
LOG2_E = math.log2(math.e)
Scalar = jax.Array | int


class Operands(NamedTuple):
    """What the blocks read, in global memory."""

    q: Any  # [blocks, parts, group, H]
    k: Any  # [L * B' * owners, S * P, H]; each head owns its own, or one of a row is everyone's
    v: Any
    alive: Any  # int32 [B * K, 2 * tiles], a bit for each token that counts
    layer: Any  # int32 [1]
    starts: Any  # int32 [B * K, tiles * pieces] or None; see `hopper.attend_tiles`
    counts: Any  # int32 [B * K] or None


class Results(NamedTuple):
    """What the blocks write, in global memory, float32."""

    out: Any  # [blocks, splits, group, H], or H before group where values are on top
    max: Any  # [blocks, splits, group]
    page_lse: Any  # [blocks, tiles, pages, group]


class Scratch(NamedTuple):
    """A block's own shared memory, and the barriers at which it waits for copies into it."""

    q: Any  # [parts, group, H]
    k: Any  # [stages, 64, H], the tiles in flight
    v: Any
    weights: Any  # bfloat16 [2, group, 64]; all 64 heads unless values are on top
    member: Any  # bfloat16 [64, 64], 1 where a token (column) is on a page (row)
    page_lse: Any  # float32 [64, group], on its way to the results, as are `out` and `max`
    out: Any
    max: Any
    factor: Any  # float32 [64], what the output so far of each head is multiplied by
    q_barrier: Any
    k_barriers: Any
    v_barriers: Any
    k_halves: Any  # bfloat16 [2, 64, H], a float32 tile in two parts; otherwise None
    v_halves: Any


class Share(NamedTuple):
    """What one block reads."""

    row: Scalar  # Of the keys and values.
    pair: Scalar
    first: Scalar  # Of the pair's tiles.
    tiles: Scalar
    most: int  # What `tiles` is in any block.


class Living(NamedTuple):
    """Which tokens of a tile count: a bit for each, those of the first 32 in `low`."""

    low: jax.Array
    high: jax.Array

    def some(self) -> jax.Array:
        return (self.low | self.high) != 0

    def not_all(self) -> jax.Array:
        return (self.low & self.high) != -1

    def mask(self, columns: int) -> jax.Array:
        """Bool `[64, columns]`."""
        token = index(columns, 0)
        word = jnp.where(token < WORD, self.low, self.high)
        return (lax.shift_right_logical(word, token & (WORD - 1)) & 1) != 0

    def only(self, x: jax.Array) -> jax.Array:
        """`[64, columns]` with zeros for what is dead: it may be NaN, and 0 * NaN is NaN."""
        return jnp.where(self.mask(x.shape[1]), x, jnp.zeros_like(x))


def values_on_top(H: int) -> bool:
    """Whether the head dim fits the long side of the second product; else heads are put there."""
    return H % TILE == 0


def attend_block(
    read: Operands, write: Results, own: Scratch, *, owners: int, prompts: int, scale: float
) -> None:
    """Attends with a group of query heads to some tiles of its (row, key/value head) pair."""
    block, split = lax.axis_index("block"), lax.axis_index("split")
    blocks, (pairs, words) = read.q.shape[0], read.alive.shape
    tiles, splits = words // 2, write.out.shape[1]
    per_split = -(-tiles // splits)
    pair = lax.div(block, jnp.int32(blocks // pairs))
    prompt, owner = lax.div(pair, jnp.int32(pairs // prompts)), lax.rem(pair, jnp.int32(owners))
    row = (read.layer[0] * prompts + prompt) * owners + owner
    first = split * per_split
    count = jnp.minimum(per_split, (tiles if read.counts is None else read.counts[pair]) - first)
    attend = partial(
        attend_share, read, write, own, Share(row, pair, first, count, per_split), scale
    )
    if read.counts is None:
        attend()
    else:
        pl.when(count > 0)(attend)


def attend_share(read: Operands, write: Results, own: Scratch, share: Share, scale: float) -> None:
    """The same for a share of the pair's tiles."""
    row, pair, first, count, most = share
    block, split = lax.axis_index("block"), lax.axis_index("split")
    parts, group = read.q.shape[1:3]
    stages = own.k.shape[0]

    def living(tile: Scalar) -> Living:
        return Living(read.alive[pair, 2 * tile], read.alive[pair, 2 * tile + 1])

    def fetch(tile: Scalar, stage: Scalar) -> None:
        pl.when(living(tile).some())(partial(fetch_tile, read, own, row, pair, tile, stage))

    for part in range(parts):
        plgpu.copy_gmem_to_smem(read.q.at[block, part], own.q.at[part], own.q_barrier)
    for ahead in range(min(stages, most)):
        pl.when(ahead < count)(partial(fetch, first + ahead, ahead))
    write_constants(own, write.page_lse.shape[2])
    plgpu.barrier_wait(own.q_barrier)

    def step(number: jax.Array, carry: Any) -> Any:
        tile, stage = first + number, lax.rem(number, jnp.int32(stages))
        alive = living(tile)

        def attend(carry: Any) -> Any:
            out, peak, page_lse = attend_tile(own, stage, alive, scale, *carry)
            write_page_lse(own, page_lse, write.page_lse.at[block, tile])
            return out, peak

        carry = lax.cond(alive.some(), attend, lambda carry: carry, carry)
        pl.when(number + stages < count)(lambda: fetch(tile + stages, stage))
        return carry

    out = plgpu.layout_cast(jnp.zeros(own.out.shape, jnp.float32), plgpu.Layout.WGMMA)
    peak = jnp.full((group,), -jnp.inf, jnp.float32)
    peak = plgpu.layout_cast(peak, plgpu.Layout.WGMMA.reduce(0))
    out, peak = lax.fori_loop(0, count, step, (out, peak))
    write_output(own, out, peak, write.out.at[block, split], write.max.at[block, split])


def write_constants(own: Scratch, pages: int) -> None:
    """Writes the part of the shared memory that stays as it is."""
    member = lax.div(index(TILE, 1), jnp.int32(TILE // pages)) == index(TILE, 0)
    own.member[...] = jnp.where(member, 1.0, 0.0).astype(jnp.bfloat16)
    if not values_on_top(own.q.shape[2]):
        # Rows of heads that are only there to fill the long side.
        none = jnp.zeros((TILE, TILE), jnp.bfloat16)
        for part in range(2):
            own.weights[part] = plgpu.layout_cast(none, plgpu.Layout.WGMMA)
        factor = jnp.zeros((TILE,), jnp.float32)
        own.factor[...] = plgpu.layout_cast(factor, plgpu.Layout.WGMMA.reduce(1))


def fetch_tile(
    read: Operands, own: Scratch, row: Scalar, pair: Scalar, tile: Scalar, stage: Scalar
) -> None:
    """Starts the copies of a tile's keys and values."""
    tiles, tokens = read.alive.shape[1] // 2, read.k.shape[1]
    pieces = 1 if read.starts is None else read.starts.shape[1] // tiles
    size = TILE // pieces
    for ref, memory, barriers in (read.k, own.k, own.k_barriers), (read.v, own.v, own.v_barriers):
        for piece in range(pieces):
            if read.starts is None:
                start = jnp.minimum(tile * TILE, tokens - TILE)
            else:
                start = read.starts[pair, tile * pieces + piece]
            plgpu.copy_gmem_to_smem(
                ref.at[row, pl.ds(start, size)],
                memory.at[stage, pl.ds(piece * size, size)],
                barriers.at[stage],
            )


class Weighed(NamedTuple):
    """The sums after one more tile, and what it was given; scores are in powers of 2."""

    out: jax.Array
    peak: jax.Array  # [group]
    factor: jax.Array  # [group], what the sums so far were multiplied by
    weights: jax.Array  # [64, group]
    by_token: Any  # The same in two bfloat16 parts, in shared memory.


def attend_tile(
    own: Scratch, stage: jax.Array, alive: Living, scale: float, out: jax.Array, peak: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The output so far and its peak (of scores in powers of 2), and the tile's `page_lse`."""
    tile = weigh_tile(own, stage, alive, scale, out, peak)
    return tile.out, tile.peak, page_lse_of(own, tile)


def weigh_tile(
    own: Scratch, stage: jax.Array, alive: Living, scale: float, out: jax.Array, peak: jax.Array
) -> Weighed:
    """Adds a tile, in which something lives, to the output so far."""
    parts, group, H = own.q.shape
    plgpu.barrier_wait(own.k_barriers.at[stage])
    keys = keys_of(own, stage)
    queries = [own.q.at[part].T for part in range(parts)]
    scores = product(crossed(keys, queries), TILE, group)
    scores = jnp.where(alive.mask(group), scores * (scale * LOG2_E), -jnp.inf)
    new_peak = jnp.maximum(peak, jnp.max(scores, axis=0))
    factor = jnp.exp2(peak - new_peak)
    by_token = [own.weights.at[part, pl.ds(0, group)].T for part in range(2)]
    weights = jnp.exp2(scores - by_head(new_peak, TILE))
    for memory, half in zip(by_token, halves(weights), strict=True):
        memory[...] = plgpu.layout_cast(half, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.barrier_wait(own.v_barriers.at[stage])
    values = living_values_of(own, stage, alive)
    if values_on_top(H):
        commit_memory()
        factors = crossed([part.T for part in values], by_token)
        out = out * by_head(factor, H) + product(factors, H, group)
    else:
        # By column it was found, by row it is wanted.
        own.factor.at[pl.ds(0, group)][...] = factor
        commit_memory()
        by_row = plgpu.layout_cast(own.factor[...], plgpu.Layout.WGMMA.reduce(1))
        factors = crossed([own.weights.at[part] for part in range(2)], values)
        out = out * lax.broadcast_in_dim(by_row, (TILE, H), (0,)) + product(factors, TILE, H)
    return Weighed(out, new_peak, factor, weights, by_token)


def page_lse_of(own: Scratch, tile: Weighed) -> jax.Array:
    """Log-sum-exp of the scores of the tile's pages, in its first rows: `[64, group]`."""
    page_sum = product([(own.member, part) for part in tile.by_token], *tile.weights.shape)
    return by_head(tile.peak * (1 / LOG2_E), TILE) + jnp.log(page_sum)


def keys_of(own: Scratch, stage: jax.Array) -> list[Any]:
    """The keys of a tile in bfloat16: as they are, or in two parts."""
    if own.k_halves is None:
        return [own.k.at[stage]]
    parts = write_halves(own.k.at[stage], own.k_halves, None)
    commit_memory()
    return parts


def living_values_of(own: Scratch, stage: jax.Array, alive: Living) -> list[Any]:
    """The same of its values, with zeros for what is dead."""
    tile = own.v.at[stage]
    if own.v_halves is not None:
        return write_halves(tile, own.v_halves, alive)

    @pl.when(alive.not_all())
    def _() -> None:
        for columns in strips(tile):
            columns[...] = alive.only(columns[...])

    return [tile]


def write_halves(tile: Any, memory: Any, alive: Living | None) -> list[Any]:
    """Splits a float32 tile, with zeros for what is dead; returns where its parts are."""
    parts = [memory.at[part] for part in range(2)]
    for columns, *targets in zip(strips(tile), *map(strips, parts), strict=True):
        value = columns[...] if alive is None else alive.only(columns[...])
        for target, half in zip(targets, halves(value), strict=True):
            target[...] = half
    return parts


def write_page_lse(own: Scratch, page_lse: jax.Array, target: Any) -> None:
    """Starts the copy of a tile's pages `[pages, group]`, once that of the last tile has ended."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    store(own.page_lse, page_lse)
    commit_memory()
    plgpu.copy_smem_to_gmem(own.page_lse.at[pl.ds(0, target.shape[0])], target)


def write_output(own: Scratch, out: jax.Array, peak: jax.Array, out_ref: Any, max_ref: Any) -> None:
    """Copies the block's output and largest scores to the results, and waits for all copies."""
    store(own.out, out)
    own.max[...] = peak * (1 / LOG2_E)
    commit_memory()
    plgpu.copy_smem_to_gmem(own.out.at[pl.ds(0, out_ref.shape[0])], out_ref)
    plgpu.copy_smem_to_gmem(own.max, max_ref)
    plgpu.wait_smem_to_gmem(0)


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two bfloat16 arrays whose sum is x, to 16 bits."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def crossed(left: Sequence[Any], right: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Which part meets which: all but the small with the small, whose product does not matter."""
    parts = min(len(left), len(right))
    return [(left[i], right[j]) for i in range(parts) for j in range(parts - i)]


def strips(tile: Any) -> list[Any]:
    """A tile `[64, H]` by columns that lie together in shared memory."""
    width = tile_width(tile.shape[1])
    return [tile.at[:, pl.ds(column, width)] for column in range(0, tile.shape[1], width)]


def by_head(x: jax.Array, rows: int) -> jax.Array:
    """`[group]` in each of so many rows."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), (1,))


def index(columns: int, axis: int) -> jax.Array:
    """The row (axis 0) or column (1) of each place of a tile."""
    return plgpu.broadcasted_iota(jnp.int32, (TILE, columns), axis, layout=plgpu.Layout.WGMMA)
