"""`cache_attention` for GPUs of compute capability 9.0; the kernel is in `hopper_block.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arrays import merge_splits, pad_groups, result
from pallas_kernels.cache_attention.hopper_block import (
    Memory,
    Operands,
    Pages,
    Results,
    Sizes,
    attend_block,
)
from pallas_kernels.cache_attention.hopper_merge import Merged, Parts, merge_parts
from pallas_kernels.cache_attention.segments import Attended, Segment
from pallas_kernels.decode_attention.hopper import block_memory, require_tiles
from pallas_kernels.decode_attention.hopper_block import halves, values_on_top
from pallas_kernels.hopper import (
    COMPILER,
    ROWS,
    TILE,
    choose_ragged_splits,
    choose_splits,
    choose_stages,
    grouping,
    require_hopper,
    require_rows,
)


def cache_attention_gpu(
    q: jax.Array,
    prompt: Segment | None,
    kept: Segment,
    current: Segment,
    starts: jax.Array | None,
    counts: jax.Array | None,
    *,
    sizes: tuple[int, ...] | None,
    scale: float,
    dtype: Any = jnp.float32,
    device_kind: str,
    interpret: Any = None,
) -> Attended:
    """See `api.cache_attention`, which checks the arguments; `dtype` is that of `Attended.out`.

    Raises:
      NotImplementedError: another device than Hopper, or sizes that tiles of 64 tokens do not fit.
    """
    require_hopper(device_kind)
    require_tiles(q, kept.k)
    (B, N, H), (_, _, K, P, _) = q.shape, current.k.shape
    S, G, exact = kept.tokens.shape[3], N // K, kept.k.dtype == jnp.float32
    if P % ROWS:
        raise NotImplementedError(f"a page has {P} tokens, not a multiple of {ROWS}")
    if sizes is not None:
        require_rows("T * P", kept.k.shape[1] * P)
    group, chunks = grouping(G, H)
    blocks, prompts = B * K * chunks, B if prompt is None else prompt.k.shape[1]
    before = (0 if prompt is None else _tiles(prompt.k.shape[3] * P)) + _tiles(P)
    tiles = before + _tiles(S * P)
    if sizes is None:
        splits = choose_splits(blocks, tiles)
    else:
        pages = kept.k.shape[1] // kept.tokens.shape[0] // K
        splits = choose_ragged_splits(blocks, tiles, before + _tiles(pages * P))
    per_split = -(-tiles // splits)
    stages, on_top = min(2 if exact else choose_stages(H), tiles), values_on_top(H)

    def pages_of(segment: Segment, tokens: int) -> Pages:
        return Pages(*(side.reshape(-1, tokens, H) for side in (segment.k, segment.v)))

    def number(x: jax.Array) -> jax.Array:
        return jnp.reshape(x, 1)

    queries = pad_groups(q, K, chunks * group).reshape(blocks, group, H)
    operands = Operands(
        q=jnp.stack(halves(queries) if exact else [queries], axis=1),
        prompt=None if prompt is None else pages_of(prompt, prompt.k.shape[3] * P),
        kept=pages_of(kept, (S if sizes is None else kept.k.shape[1]) * P),
        current=pages_of(current, P),
        lengths=None if prompt is None else prompt.tokens,
        fill=kept.tokens.reshape(-1, S),
        starts=starts,
        counts=counts,
        prompt_layer=None if prompt is None else number(prompt.layer),
        kept_layer=number(kept.layer),
        current_layer=number(current.layer),
        written=number(current.tokens),
    )
    results = Results(
        out=result(blocks, splits, *((H, group) if on_top else (group, H))),
        max=result(blocks, splits, group),
        sum=result(blocks, splits, group),
        page_lse=result(blocks, _tiles(P) + _tiles(S * P), max(1, TILE // P), group),
    )
    memory = Memory(block_memory(group, H, exact, stages), plgpu.SMEM((group,), jnp.float32))
    (found,) = plgpu.kernel(
        partial(attend_block, sizes=Sizes(K, B // prompts, chunks, P, per_split, scale)),
        out_type=[results],
        scratch_types=[memory],
        grid=(blocks, splits),
        grid_names=("block", "split"),
        kernel_name="cache_attention",
        compiler_params=COMPILER,
        interpret=interpret,
    )(operands)
    if on_top:
        merged = merge_parts(Parts(*found[:3]), G, chunks, dtype, interpret)
    else:
        merged = _merged(found, G)

    def by_head(x: jax.Array, *tail: int) -> jax.Array:
        """`[blocks, group, ...]` without the padding."""
        return x.reshape(B, K, chunks * group, *tail)[:, :, :G].reshape(B, N, *tail)

    # A page is in several parts where it is several tiles; a part without a token was not written.
    parts = max(1, P // TILE)
    begin = jnp.arange(parts, dtype=jnp.int32) * TILE
    lse = jnp.moveaxis(found.page_lse, 3, 1)
    of_kept = lse[:, :, _tiles(P) :].reshape(blocks, group, -1)
    if starts is not None and counts is not None:
        pool = kept.k.shape[1]
        start, count = (x[kept.layer] for x in (starts % pool, counts))
        of_kept = _moved_back(of_kept, start, count, pool, P, chunks)
    of_kept = by_head(of_kept[..., : S * parts], S * parts).reshape(B, N, S, parts)
    fill = jax.lax.dynamic_index_in_dim(kept.tokens, kept.layer, 0, keepdims=False)
    filled = jnp.repeat(fill, G, axis=1)[..., None] > begin
    of_current = by_head(lse[:, :, : _tiles(P), 0], parts)
    return Attended(
        out=merged.out.reshape(B, N, H).astype(dtype),
        lse=by_head(merged.lse),
        kept_lse=_joined(of_kept, filled),
        current_lse=_joined(of_current, current.tokens > begin),
    )


def _tiles(tokens: int) -> int:
    return -(-tokens // TILE)


def _moved_back(
    lse: jax.Array, start: jax.Array, count: jax.Array, pages: int, P: int, chunks: int
) -> jax.Array:
    """By slots, the pages `[blocks, group, slots]` of ranges `[K]` of a pool of so many pages.

    Those of a tile that had to begin too early lie as many places further on.
    """
    each = max(1, TILE // P)
    last = start + (count - 1) // each * each
    early = jnp.maximum(last + each - pages, 0)
    slot = jnp.arange(lse.shape[2])
    found, padded = lse, jnp.pad(lse, ((0, 0), (0, 0), (0, each)))
    early, last = (jnp.repeat(x, chunks)[:, None, None] for x in (early, last - start))
    heads = lse.reshape(-1, early.shape[0], *lse.shape[1:])
    found, padded = heads, padded.reshape(*heads.shape[:3], -1)
    for by in range(1, each):
        moved = padded[..., by : by + lse.shape[2]]
        found = jnp.where((early == by) & (slot >= last), moved, found)
    return found.reshape(lse.shape)


def _merged(parts: Results, G: int) -> Merged:
    """What `merge_parts` does, by XLA, for head dims that do not fit its layout."""
    top, factor = merge_splits(parts.max, 1)
    total = jnp.sum(parts.sum * factor, axis=1)
    out = jnp.sum(parts.out * factor[..., None], axis=1) / total[..., None]
    chunks = -(-G // out.shape[1])
    by_head = out.reshape(-1, chunks * out.shape[1], out.shape[2])
    return Merged(by_head[:, :G], top + jnp.log(total))


def _joined(lse: jax.Array, living: jax.Array) -> jax.Array:
    """Log-sum-exp of whole pages, from that of their parts in the last axis."""
    lse = jnp.where(living, lse, -jnp.inf)
    return lse[..., 0] if lse.shape[-1] == 1 else jax.nn.logsumexp(lse, axis=-1)
