"""`page_bound` for TPU (Pallas, Mosaic): two products per block of pages, one pass over each."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arrays import pad_groups, result
from pallas_kernels.decode_attention.tuning import tpu_blocks
from pallas_kernels.tpu import check_served, dot, padded_rows, precision_for


def page_bound_tpu(
    q: jax.Array,
    key_min: jax.Array,
    key_max: jax.Array,
    layer: jax.Array,
    *,
    scale: float,
    device_kind: str = "",
) -> jax.Array:
    """See `api.page_bound`, which checks the arguments.

    Raises:
      NotImplementedError: a dtype that the kernel does not take, or no slots at all.
    """
    B, N, H = q.shape
    _, _, K, S, _ = key_min.shape
    check_served(key_min, S)
    # Two keys per page: as `decode_attention` with pages of one token.
    blocks = tpu_blocks(device_kind, B, K, S, 1, H, key_min.dtype.itemsize)
    heads, pages = blocks.heads, S if blocks.splits > 1 else blocks.pages
    G, rows = N // K, padded_rows(N // K)
    precision = precision_for(key_min)

    def kernel(_: Any, q_ref: Any, low_ref: Any, high_ref: Any, out_ref: Any) -> None:
        for head in range(heads):
            # max(q * low, q * high) is q * high where q > 0 and q * low where q < 0.
            query, low, high = q_ref[0, head], low_ref[0, 0, head], high_ref[0, 0, head]
            zero = jnp.zeros_like(query)
            upper = dot(jnp.maximum(query, zero), high, (1, 1), precision)
            lower = dot(jnp.minimum(query, zero), low, (1, 1), precision)
            out_ref[0, head] = scale * (upper + lower)

    keys = pl.BlockSpec((1, 1, heads, pages, H), lambda b, h, s, layer: (layer[0], b, h, s, 0))
    out: jax.Array = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K // heads, -(-S // pages)),
            in_specs=[
                pl.BlockSpec((1, heads, rows, H), lambda b, h, s, _: (b, h, 0, 0)),
                keys,
                keys,
            ],
            out_specs=pl.BlockSpec((1, heads, rows, pages), lambda b, h, s, _: (b, h, 0, s)),
        ),
        out_shape=result(B, K, rows, S),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel")
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * S * H,
            bytes_accessed=2 * B * K * S * H * key_min.dtype.itemsize,
            transcendentals=0,
        ),
        name="page_bound",
    )(layer.reshape(1), pad_groups(q, K, rows), key_min, key_max)
    return out[:, :, :G].reshape(B, N, S)
