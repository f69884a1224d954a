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

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arrays import finite, merge_splits, pad_groups, result
from pallas_kernels.decode_attention.hopper_block import (
    WORD,
    Operands,
    Results,
    Scratch,
    attend_block,
    halves,
    values_on_top,
)
from pallas_kernels.decode_attention.reference import DecodeAttention
from pallas_kernels.hopper import (
    COMPILER,
    TILE,
    choose_ragged_splits,
    choose_splits,
    choose_stages,
    grouping,
    require_head_dim,
    tile_memory,
    tile_width,
)

MOST_FLOAT32 = 128
"""Head dim of float32 pages of which two tiles in flight and their halves fit in shared memory."""


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


def attend_tiles(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    alive: jax.Array,
    starts: jax.Array | None,
    layer: jax.Array,
    scale: float,
    interpret: Any,
    counts: jax.Array | None = None,
    mean: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of every group of query heads over the tiles of its row.

    Args:
      q: `[B, N, H]`.
      k_pages, v_pages: `[L, B', K, S, P, H]`, or `[L, B', 1, S, P, H]` that all heads read from.
      alive: bool `[B, K, tiles, 64]`, tokens that count.
      starts: int32 `[B, K, tiles, pieces]`, where in a row's `S * P` tokens each piece of a tile
        begins; None: tile `t` is in one piece and begins at `min(64 * t, S * P - 64)`.
      layer: int32 scalar.
      scale: factor on the scores.
      interpret: parameters of the interpreter; None compiles.
      counts: int32 `[K]`, how many of its tiles a head has; None: all.
      mean: where `counts` are given, what they are on an average over the layers.

    Returns:
      The unnormalised output, float32 `[B, K, G', H]`, the largest scores, `[B, K, G']`, and the
      log-sum-exp of each page in each tile, `[B, K, tiles, pages, G']`; G' is G, padded at the end.
    """
    L, prompts, owners, S, P, H = k_pages.shape
    (B, N, _), K = q.shape, alive.shape[1]
    group, chunks = grouping(N // K, H)
    blocks, tiles = B * K * chunks, alive.shape[2]
    exact, on_top = k_pages.dtype == jnp.float32, values_on_top(H)
    if counts is None:
        splits = choose_splits(blocks, tiles)
    else:
        splits = choose_ragged_splits(blocks, tiles, mean)
    stages = min(2 if exact else choose_stages(H), tiles)
    pages, pieces = max(1, TILE // P), 1 if starts is None else starts.shape[3]

    queries = pad_groups(q, K, chunks * group).reshape(blocks, group, H)
    bits = alive.reshape(B * K, tiles * TILE // WORD, WORD).astype(jnp.uint32)
    words = jnp.sum(bits << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
    operands = Operands(
        q=jnp.stack(halves(queries) if exact else [queries], axis=1),
        k=k_pages.reshape(L * prompts * owners, S * P, H),
        v=v_pages.reshape(L * prompts * owners, S * P, H),
        alive=lax.bitcast_convert_type(words, jnp.int32),
        layer=jnp.reshape(layer, 1),
        starts=None if starts is None else starts.reshape(B * K, tiles * pieces),
        counts=None if counts is None else jnp.tile(counts, B),
    )
    results = Results(
        out=result(blocks, splits, *((H, group) if on_top else (group, H))),
        max=result(blocks, splits, group),
        page_lse=result(blocks, tiles, pages, group),
    )
    scratch = block_memory(group, H, exact, stages, pieces)
    (found,) = plgpu.kernel(
        partial(attend_block, owners=owners, prompts=prompts, scale=scale),
        out_type=[results],
        scratch_types=[scratch],
        grid=(blocks, splits),
        grid_names=("block", "split"),
        kernel_name="decode_attention",
        compiler_params=COMPILER,
        interpret=interpret,
    )(operands)

    peak, out = found.max, jnp.swapaxes(found.out, 2, 3) if on_top else found.out
    if counts is not None:
        # Parts without a tile have ended at once, and written nothing.
        first = jnp.arange(splits) * -(-tiles // splits)
        some = jnp.repeat(first < jnp.tile(counts, B)[:, None], chunks, axis=0)[..., None]
        peak, out = jnp.where(some, peak, -jnp.inf), jnp.where(some[..., None], out, 0)
    top, factor = merge_splits(peak, 1)
    out = jnp.sum(out * factor[..., None], axis=1)
    lse = found.page_lse.reshape(B, K, chunks, tiles, pages, group)
    lse = jnp.moveaxis(lse, 2, 4).reshape(B, K, tiles, pages, chunks * group)
    living = jnp.any(alive.reshape(B, K, tiles, pages, TILE // pages), axis=-1)
    return (
        out.reshape(B, K, chunks * group, H),
        top.reshape(B, K, chunks * group),
        jnp.where(living[..., None], lse, -jnp.inf),
    )


def block_memory(group: int, H: int, exact: bool, stages: int, pieces: int = 1) -> Scratch:
    """The shared memory of a block that serves so many query heads, `exact` if in float32.

    A tile of keys, or of values, arrives in so many pieces.
    """
    on_top = values_on_top(H)
    matrix = partial(tile_memory, width=tile_width(H))
    tile_in_two = matrix(2, TILE, H) if exact else None
    tiles_in_flight = matrix(stages, TILE, H)
    if exact:
        width = min(tile_width(H), 32)
        tiles_in_flight = tile_memory(stages, TILE, H, width=width, dtype=jnp.float32)
    return Scratch(
        q=matrix(2 if exact else 1, group, H),
        k=tiles_in_flight,
        v=tiles_in_flight,
        weights=matrix(2, group if on_top else TILE, TILE),
        member=matrix(TILE, TILE),
        page_lse=plgpu.SMEM((TILE, group), jnp.float32),
        out=plgpu.SMEM((H, group) if on_top else (TILE, H), jnp.float32),
        max=plgpu.SMEM((group,), jnp.float32),
        factor=plgpu.SMEM((TILE,), jnp.float32),
        q_barrier=plgpu.Barrier(num_arrivals=2 if exact else 1),
        k_barriers=plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        v_barriers=plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        k_halves=tile_in_two,
        v_halves=tile_in_two,
    )


def finish(out: jax.Array, top: jax.Array, lse: jax.Array, q: jax.Array) -> DecodeAttention:
    """Without the padding: `[B, K, G', H]`, `[B, K, G']`, `[B, K, S, G']`, for q `[B, N, H]`."""
    B, N, H = q.shape
    G = N // out.shape[1]
    page_lse = jnp.swapaxes(lse, 2, 3)[:, :, :G].reshape(B, N, -1)
    top = top[..., :G].reshape(B, N)
    return DecodeAttention(
        out=out[:, :, :G].reshape(B, N, H),
        max=top,
        sum=jnp.sum(jnp.exp(page_lse - finite(top)[..., None]), axis=-1),
        page_lse=page_lse,
    )
