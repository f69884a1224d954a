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
    choose_splits,
    choose_stages,
    grouping,
    require_hopper,
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
    device_kind: str,
    interpret: Any = None,
) -> Attended:
    """See `api.cache_attention`, which checks the arguments.

    Raises:
      NotImplementedError: another device than Hopper, a pool, or sizes that tiles of 64 tokens do
        not fit.
    """
    require_hopper(device_kind)
    if sizes is not None:
        raise NotImplementedError("the kept pages are a pool")
    require_tiles(q, kept.k)
    (B, N, H), (_, _, K, S, P, _) = q.shape, kept.k.shape
    if P % ROWS:
        raise NotImplementedError(f"a page has {P} tokens, not a multiple of {ROWS}")
    G, exact = N // K, kept.k.dtype == jnp.float32
    group, chunks = grouping(G, H)
    blocks = B * K * chunks
    segments = [x for x in (prompt, kept, current) if x is not None]
    tokens = [x.k.size // (len(x.k) * x.k.shape[1] * K * H) for x in segments]
    tiles = [-(-count // TILE) for count in tokens]
    splits = choose_splits(blocks, sum(tiles))
    stages = min(2 if exact else choose_stages(H), sum(tiles))
    pages, on_top = max(1, TILE // P), values_on_top(H)

    queries = pad_groups(q, K, chunks * group).reshape(blocks, group, H)
    *of_prompt, of_kept, of_current = (
        Pages(*(side.reshape(-1, count, H) for side in (x.k, x.v)))
        for x, count in zip(segments, tokens, strict=True)
    )
    operands = Operands(
        q=jnp.stack(halves(queries) if exact else [queries], axis=1),
        prompt=of_prompt[0] if of_prompt else None,
        kept=of_kept,
        current=of_current,
        lengths=None if prompt is None else prompt.tokens,
        fill=kept.tokens.reshape(-1, S),
        layers=tuple(jnp.reshape(x.layer, 1) for x in segments),
        written=jnp.reshape(current.tokens, 1),
    )
    results = Results(
        out=result(blocks, splits, *((H, group) if on_top else (group, H))),
        max=result(blocks, splits, group),
        sum=result(blocks, splits, group),
        page_lse=result(blocks, sum(tiles[-2:]), pages, group),
    )
    memory = Memory(block_memory(group, H, exact, stages), plgpu.SMEM((group,), jnp.float32))
    prompts = B if prompt is None else prompt.k.shape[1]
    (found,) = plgpu.kernel(
        partial(attend_block, sizes=Sizes(K, B // prompts, chunks, P, scale)),
        out_type=[results],
        scratch_types=[memory],
        grid=(blocks, splits),
        grid_names=("block", "split"),
        kernel_name="cache_attention",
        compiler_params=COMPILER,
        interpret=interpret,
    )(operands)

    merged = merge_parts(Parts(*found[:3]), G, chunks, interpret) if on_top else _merged(found, G)

    def by_head(x: jax.Array, *tail: int) -> jax.Array:
        """`[blocks, group, ...]` without the padding."""
        return x.reshape(B, K, chunks * group, *tail)[:, :, :G].reshape(B, N, *tail)

    # A page is in several parts where it is several tiles; a part without a token was not written.
    parts = max(1, P // TILE)
    begin = jnp.arange(parts, dtype=jnp.int32) * TILE
    lse = jnp.moveaxis(found.page_lse, 3, 1)
    of_kept_pages = lse[:, :, : tiles[-2]].reshape(blocks, group, -1)[..., : S * parts]
    fill = jax.lax.dynamic_index_in_dim(kept.tokens, kept.layer, 0, keepdims=False)
    filled = jnp.repeat(fill, G, axis=1)[..., None] > begin
    return Attended(
        out=merged.out.reshape(B, N, H),
        lse=by_head(merged.lse),
        kept_lse=_joined(by_head(of_kept_pages, S * parts).reshape(B, N, S, parts), filled),
        current_lse=_joined(by_head(lse[:, :, tiles[-2] :, 0], parts), current.tokens > begin),
    )


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
