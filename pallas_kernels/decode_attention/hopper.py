"""The kernel behind both decode attentions on Hopper GPUs: Pallas on Mosaic GPU.

One block of 128 threads reads its share of the tokens of one (row, key/value head) in tiles of 64,
a few tiles ahead of the arithmetic. The tokens are on the long side of the tensor-core products:

    scores [64, G] = keys [64, H] · qᵀ        out [H, G] += valuesᵀ [H, 64] · weights [64, G]

so a group of G query heads is padded to 8, not to 64. (A head dim that is no multiple of 64 does
not fit the long side; there the second product is `weightsᵀ · values`, its heads padded to 64.)

The sum of each page's weights is a third such product, with a matrix that says which token is on
which page; for it the weights are split into two bfloat16 parts, since one alone would cost the
page masses their accuracy. Float32 queries, keys and values are split likewise and the three
products that matter are summed, since the tensor cores would round float32 to ten bits.

A tile without a living token is not read. One with some is read whole, and what is dead in it never
matters: its scores are masked, and its values set to zero before they are multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.reference import DecodeAttention
from pallas_kernels.hopper import (
    COMPILER,
    TILE,
    choose_splits,
    choose_stages,
    grouping,
    require_head_dim,
    tile_memory,
    tile_width,
)

WORD = 32
"""Tokens per word of the mask of living tokens."""
MOST_FLOAT32 = 128
"""Head dim of float32 pages of which two tiles in flight and their halves fit in shared memory."""
LOG2_E = math.log2(math.e)


def require_tiles(q: jax.Array, k_pages: jax.Array) -> None:
    """Raises NotImplementedError for what the tiles cannot hold."""
    P, H = k_pages.shape[-2:]
    if q.dtype != k_pages.dtype or k_pages.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(
            f"q is {q.dtype} and the pages {k_pages.dtype}, not both bfloat16 or both float32"
        )
    require_head_dim(H)
    if k_pages.dtype == jnp.float32 and H > MOST_FLOAT32:
        raise NotImplementedError(f"the head dim is {H}; in float32 at most {MOST_FLOAT32} fit")
    if P % TILE and TILE % P:
        raise NotImplementedError(
            f"a page of {P} tokens neither divides a tile of {TILE} nor is several"
        )


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two bfloat16 arrays whose sum is x, to 16 bits."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def attend_tiles(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    alive: jax.Array,
    starts: jax.Array | None,
    layer: jax.Array,
    scale: float,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of every group of query heads over the tiles of its row.

    Args:
      q: `[B, N, H]`.
      k_pages, v_pages: `[L, B', K, S, P, H]`.
      alive: bool `[B, K, tiles, 64]`, tokens that count.
      starts: int32 `[B, K, tiles, pieces]`, where in a row's `S * P` tokens each piece of a tile
        begins; None: tile `t` is in one piece and begins at `min(64 * t, S * P - 64)`.
      layer: int32 scalar.
      scale: factor on the scores.
      interpret: parameters of the interpreter; None compiles.

    Returns:
      The unnormalised output, float32 `[B, K, G', H]`, the largest scores, `[B, K, G']`, and the
      log-sum-exp of each page in each tile, `[B, K, tiles, pages, G']`; G' is G, padded at the end.
    """
    L, prompts, K, S, P, H = k_pages.shape
    B, N, _ = q.shape
    samples, tiles = B // prompts, alive.shape[2]
    group, chunks = grouping(N // K, H)
    blocks = B * K * chunks
    exact, width, values_on_top = k_pages.dtype == jnp.float32, tile_width(H), H % 64 == 0
    parts = 2 if exact else 1
    # Which part of the left side meets which of the right; that of the small ones is dropped.
    pairs = [(0, 0), (0, 1), (1, 0)][: 3 if exact else 1]
    splits = choose_splits(blocks, tiles)
    stages = min(2 if exact else choose_stages(H), tiles)
    per_split = -(-tiles // splits)
    pages = max(1, TILE // P)
    pieces = 1 if starts is None else starts.shape[3]
    piece_rows = TILE // pieces

    queries = q.reshape(B, K, N // K, H)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, chunks * group - N // K), (0, 0)))
    bits = alive.reshape(B * K, tiles * TILE // WORD, WORD).astype(jnp.uint32)
    words = jnp.sum(bits << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
    queries = queries.reshape(blocks, group, H)
    operands = [
        jnp.stack(halves(queries) if exact else [queries], axis=1),
        k_pages.reshape(L * prompts * K, S * P, H),
        v_pages.reshape(L * prompts * K, S * P, H),
        lax.bitcast_convert_type(words, jnp.int32),
        jnp.reshape(layer, 1),
    ]
    if starts is not None:
        operands.append(starts.reshape(B * K, tiles * pieces))

    def body(
        q_ref: Any, k_ref: Any, v_ref: Any, words_ref: Any, layer_ref: Any, *rest: Any
    ) -> None:
        starts_ref, *refs = rest if starts is not None else (None, *rest)
        out_ref, max_ref, lse_ref, q_smem, k_smem, v_smem, weights_smem, member_smem = refs[:8]
        lse_smem, out_smem, max_smem, factor_smem, *refs = refs[8:]
        q_barrier, k_barriers, v_barriers, *halves_smem = refs
        block, split = lax.axis_index("block"), lax.axis_index("split")
        query = lax.div(block, jnp.int32(chunks))
        prompt, head = lax.div(query, jnp.int32(K * samples)), lax.rem(query, jnp.int32(K))
        row = (layer_ref[0] * prompts + prompt) * K + head
        first = split * per_split
        count = jnp.minimum(per_split, tiles - first)

        def living(tile: jax.Array) -> tuple[jax.Array, jax.Array]:
            return words_ref[query, 2 * tile], words_ref[query, 2 * tile + 1]

        def fetch(tile: jax.Array, slot: jax.Array | int) -> None:
            """Starts reading a tile, unless nothing in it lives."""
            low, high = living(tile)

            @pl.when((low | high) != 0)
            def _() -> None:
                for ref, smem, barriers in (k_ref, k_smem, k_barriers), (v_ref, v_smem, v_barriers):
                    for piece in range(pieces):
                        if starts_ref is None:
                            start = jnp.minimum(tile * TILE, S * P - TILE)
                        else:
                            start = starts_ref[query, tile * pieces + piece]
                        plgpu.copy_gmem_to_smem(
                            ref.at[row, pl.ds(start, piece_rows)],
                            smem.at[slot, pl.ds(piece * piece_rows, piece_rows)],
                            barriers.at[slot],
                        )

        for part in range(parts):
            plgpu.copy_gmem_to_smem(q_ref.at[block, part], q_smem.at[part], q_barrier)
        for ahead in range(min(stages, per_split)):
            pl.when(ahead < count)(partial(fetch, first + ahead, ahead))

        def index(columns: int, axis: int) -> jax.Array:
            return plgpu.broadcasted_iota(
                jnp.int32, (TILE, columns), axis, layout=plgpu.Layout.WGMMA
            )

        # Which page of the tile (row) each token (column) is on.
        member = lax.div(index(TILE, 1), jnp.int32(min(P, TILE))) == index(TILE, 0)
        member_smem[...] = jnp.where(member, 1.0, 0.0).astype(jnp.bfloat16)
        if not values_on_top:
            # Rows of heads that are only there to fill the long side.
            none = jnp.zeros((TILE, TILE), jnp.bfloat16)
            for part in range(2):
                weights_smem[part] = plgpu.layout_cast(none, plgpu.Layout.WGMMA)
            factor_smem[...] = plgpu.layout_cast(
                jnp.zeros((TILE,), jnp.float32), plgpu.Layout.WGMMA.reduce(1)
            )
        plgpu.barrier_wait(q_barrier)

        def mask(low: jax.Array, high: jax.Array, columns: int) -> jax.Array:
            token = index(columns, 0)
            word = jnp.where(token < WORD, low, high)
            return (lax.shift_right_logical(word, token & (WORD - 1)) & 1) != 0

        def product(factors: list[tuple[Any, Any]], rows: int, columns: int) -> jax.Array:
            def multiply(total: Any) -> jax.Array:
                for left, right in factors:
                    plgpu.wgmma(total, left, right)
                return total[...]

            return pl.run_scoped(multiply, plgpu.ACC((rows, columns), jnp.float32))

        def by_head(x: jax.Array, rows: int) -> jax.Array:
            return lax.broadcast_in_dim(x, (rows, group), (1,))

        def split_tile(tile: Any, smem: Any, living: Callable[[int], jax.Array] | None) -> None:
            """Writes the halves of a float32 tile, with zeros for what is dead."""
            for column in range(0, H, width):
                value = tile.at[:, pl.ds(column, width)][...]
                if living is not None:
                    value = jnp.where(living(width), value, jnp.zeros_like(value))
                for part, half in enumerate(halves(value)):
                    smem.at[part, :, pl.ds(column, width)][...] = half

        def attend(tile: jax.Array, slot: jax.Array, carry: Any) -> Any:
            out, peak = carry
            low, high = living(tile)
            plgpu.barrier_wait(k_barriers.at[slot])
            keys, values = [k_smem.at[slot]], [v_smem.at[slot]]
            if exact:
                split_tile(keys[0], halves_smem[0], None)
                plgpu.commit_smem()
                keys, values = ([smem.at[part] for part in range(2)] for smem in halves_smem)
            queries = [q_smem.at[part].transpose((1, 0)) for part in range(parts)]
            scores = product([(keys[i], queries[j]) for i, j in pairs], TILE, group)
            scores = jnp.where(mask(low, high, group), scores * (scale * LOG2_E), -jnp.inf)
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=0))
            factor = jnp.exp2(peak - new_peak)
            for part, half in enumerate(halves(jnp.exp2(scores - by_head(new_peak, TILE)))):
                half = plgpu.layout_cast(half, plgpu.Layout.WGMMA_TRANSPOSED)
                weights_smem.at[part, pl.ds(0, group)].transpose((1, 0))[...] = half
            plgpu.barrier_wait(v_barriers.at[slot])
            # A dead value may be NaN, and 0 * NaN is NaN.
            if exact:
                split_tile(v_smem.at[slot], halves_smem[1], partial(mask, low, high))
            else:

                @pl.when((low & high) != -1)
                def _() -> None:
                    for column in range(0, H, width):
                        part = v_smem.at[slot, :, pl.ds(column, width)]
                        value = part[...]
                        part[...] = jnp.where(mask(low, high, width), value, jnp.zeros_like(value))

            if not values_on_top:
                factor_smem.at[pl.ds(0, group)][...] = factor
            plgpu.commit_smem()
            by_token = [
                weights_smem.at[part, pl.ds(0, group)].transpose((1, 0)) for part in range(2)
            ]
            if values_on_top:
                factors = [(values[i].transpose((1, 0)), by_token[j]) for i, j in pairs]
                out = out * by_head(factor, H) + product(factors, H, group)
            else:
                factor = plgpu.layout_cast(factor_smem[...], plgpu.Layout.WGMMA.reduce(1))
                factors = [(weights_smem.at[j], values[i]) for i, j in pairs]
                out = out * lax.broadcast_in_dim(factor, (TILE, H), (0,))
                out += product(factors, TILE, H)
            of_page = product([(member_smem, by_token[part]) for part in range(2)], TILE, group)
            lse = by_head(new_peak * (1 / LOG2_E), TILE) + jnp.log(of_page)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            lse_smem[...] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, pages)], lse_ref.at[block, tile])
            return out, new_peak

        def step(number: jax.Array, carry: Any) -> Any:
            tile, slot = first + number, lax.rem(number, jnp.int32(stages))
            low, high = living(tile)
            carry = lax.cond(
                (low | high) != 0,
                lambda carry: attend(tile, slot, carry),
                lambda carry: carry,
                carry,
            )
            pl.when(number + stages < count)(lambda: fetch(tile + stages, slot))
            return carry

        zero = plgpu.layout_cast(jnp.zeros(out_sizes, jnp.float32), plgpu.Layout.WGMMA)
        low_peak = plgpu.layout_cast(
            jnp.full((group,), -jnp.inf, jnp.float32), plgpu.Layout.WGMMA.reduce(0)
        )
        out, peak = lax.fori_loop(0, count, step, (zero, low_peak))
        out_smem[...] = out
        max_smem[...] = peak * (1 / LOG2_E)
        plgpu.commit_smem()
        rows = H if values_on_top else group
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, rows)], out_ref.at[block, split])
        plgpu.copy_smem_to_gmem(max_smem, max_ref.at[block, split])
        plgpu.wait_smem_to_gmem(0)

    out_sizes = (H, group) if values_on_top else (TILE, H)
    matrix = partial(tile_memory, width=width)
    tiles_in_flight = (
        tile_memory(stages, TILE, H, width=min(width, 32), dtype=jnp.float32)
        if exact
        else matrix(stages, TILE, H)
    )
    out, peak, lse = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(
                (blocks, splits, *((H, group) if values_on_top else (group, H))), jnp.float32
            ),
            jax.ShapeDtypeStruct((blocks, splits, group), jnp.float32),
            jax.ShapeDtypeStruct((blocks, tiles, pages, group), jnp.float32),
        ),
        scratch_types=[
            matrix(parts, group, H),
            tiles_in_flight,
            tiles_in_flight,
            matrix(2, group if values_on_top else TILE, TILE),
            matrix(TILE, TILE),
            plgpu.SMEM((TILE, group), jnp.float32),
            plgpu.SMEM(out_sizes, jnp.float32),
            plgpu.SMEM((group,), jnp.float32),
            plgpu.SMEM((TILE,), jnp.float32),
            plgpu.Barrier(num_arrivals=parts),
            plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
            plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
            *([matrix(2, TILE, H)] * 2 if exact else []),
        ],
        grid=(blocks, splits),
        grid_names=("block", "split"),
        compiler_params=COMPILER,
        interpret=interpret,
    )(*operands)

    top = jnp.max(peak, axis=1)
    factor = jnp.exp(peak - jnp.where(jnp.isneginf(top), 0.0, top)[:, None])
    if values_on_top:
        out = jnp.swapaxes(out, 2, 3)
    out = jnp.sum(out * factor[..., None], axis=1)
    lse = jnp.moveaxis(lse.reshape(B, K, chunks, tiles, pages, group), 2, 4)
    living = jnp.any(alive.reshape(B, K, tiles, pages, TILE // pages), axis=-1)
    return (
        out.reshape(B, K, chunks * group, H),
        top.reshape(B, K, chunks * group),
        jnp.where(living[..., None], lse.reshape(B, K, tiles, pages, chunks * group), -jnp.inf),
    )


def finish(out: jax.Array, top: jax.Array, lse: jax.Array, q: jax.Array) -> DecodeAttention:
    """Without the padding: `[B, K, G', H]`, `[B, K, G']`, `[B, K, S, G']`, for q `[B, N, H]`."""
    B, N, H = q.shape
    G = N // out.shape[1]
    page_lse = jnp.swapaxes(lse, 2, 3)[:, :, :G].reshape(B, N, -1)
    top = top[..., :G].reshape(B, N)
    safe = jnp.where(jnp.isneginf(top), 0.0, top)
    return DecodeAttention(
        out=out[:, :, :G].reshape(B, N, H),
        max=top,
        sum=jnp.sum(jnp.exp(page_lse - safe[..., None]), axis=-1),
        page_lse=page_lse,
    )
