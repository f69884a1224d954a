"""`page_bound` for NVIDIA GPUs of compute capability 9.0: Pallas on Mosaic GPU.

The bound is two plain products, `high · max(q, 0)` and `low · min(q, 0)`, with 64 pages on the long
side of the tensor-core product and a group of query heads, padded to 8, on the short one. One block
reads its share of the pages of one (row, key/value head), a few tiles ahead of the arithmetic.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arrays import pad_groups, result
from pallas_kernels.hopper import (
    COMPILER,
    TILE,
    choose_splits,
    choose_stages,
    commit_memory,
    grouping,
    product,
    require_head_dim,
    require_hopper,
    require_rows,
    store,
    tile_memory,
    tile_width,
)


def page_bound_gpu(
    q: jax.Array,
    key_min: jax.Array,
    key_max: jax.Array,
    layer: jax.Array,
    *,
    scale: float,
    device_kind: str,
    interpret: Any = None,
) -> jax.Array:
    """See `api.page_bound`, which checks the arguments.

    Raises:
      NotImplementedError: another device than Hopper, or sizes that tiles of 64 pages do not fit.
    """
    L, B, K, S, H = key_min.shape
    require_hopper(device_kind)
    if q.dtype != jnp.bfloat16 or key_min.dtype != q.dtype:
        raise NotImplementedError(f"q is {q.dtype} and key_min {key_min.dtype}, not bfloat16")
    require_head_dim(H)
    require_rows("S", S)
    G = q.shape[1] // K
    group, chunks = grouping(G, H)
    tiles, blocks = -(-S // TILE), B * K * chunks
    splits, stages = choose_splits(blocks, tiles), min(choose_stages(H), tiles)
    per_split = -(-tiles // splits)
    queries = pad_groups(q, K, chunks * group).reshape(blocks, group, H)

    def body(
        query_refs: Any,
        key_refs: Any,
        layer_ref: Any,
        out_ref: Any,
        query_smem: Any,
        key_smem: Any,
        out_smem: Any,
        query_barrier: Any,
        barriers: Any,
    ) -> None:
        block, split = lax.axis_index("block"), lax.axis_index("split")
        row = layer_ref[0] * (B * K) + lax.div(block, jnp.int32(chunks))
        first = split * per_split
        count = jnp.minimum(per_split, tiles - first)

        def fetch(tile: jax.Array, stage: jax.Array | int) -> None:
            pages = pl.ds(jnp.minimum(tile * TILE, S - TILE), TILE)
            for ref, smem in zip(key_refs, key_smem, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[row, pages], smem.at[stage], barriers.at[stage])

        for ref, smem in zip(query_refs, query_smem, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[block], smem, query_barrier)
        for ahead in range(min(stages, per_split)):
            pl.when(ahead < count)(partial(fetch, first + ahead, ahead))
        plgpu.barrier_wait(query_barrier)

        @pl.loop(0, count)
        def _(number: jax.Array) -> None:
            tile, stage = first + number, lax.rem(number, jnp.int32(stages))
            plgpu.barrier_wait(barriers.at[stage])
            factors = [(k.at[stage], q.T) for k, q in zip(key_smem, query_smem, strict=True)]
            bound = product(factors, TILE, group)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store(out_smem, bound * scale)
            commit_memory()
            plgpu.copy_smem_to_gmem(out_smem, out_ref.at[block, tile])
            pl.when(number + stages < count)(lambda: fetch(tile + stages, stage))

        plgpu.wait_smem_to_gmem(0)

    matrix = partial(tile_memory, width=tile_width(H))
    out = plgpu.kernel(
        body,
        out_type=result(blocks, tiles, TILE, group),
        scratch_types=[
            [matrix(group, H)] * 2,
            [matrix(stages, TILE, H)] * 2,
            plgpu.SMEM((TILE, group), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        grid=(blocks, splits),
        grid_names=("block", "split"),
        kernel_name="page_bound",
        compiler_params=COMPILER,
        interpret=interpret,
    )(
        [jnp.maximum(queries, 0), jnp.minimum(queries, 0)],
        [keys.reshape(L * B * K, S, H) for keys in (key_max, key_min)],
        jnp.reshape(layer, 1),
    )
    out = jnp.moveaxis(out.reshape(B, K, chunks, tiles * TILE, group), 3, 4)
    out = out.reshape(B, K, chunks * group, tiles * TILE)[:, :, :G]
    # The last tile ends with the last page and begins within the one before it.
    page = np.arange(S)
    place = np.where(page < (tiles - 1) * TILE, page, page + tiles * TILE - S)
    return (out if S % TILE == 0 else out[..., place]).reshape(B, K * G, S)
