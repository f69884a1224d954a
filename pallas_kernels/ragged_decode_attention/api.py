"""`ragged_decode_attention`: one query token per row over heads' own ranges of a pool of pages."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_pool
from pallas_kernels.decode_attention.reference import DecodeAttention
from pallas_kernels.decode_attention.tuning import prefers_xla
from pallas_kernels.dispatch import Implementation, Target, dispatch, load
from pallas_kernels.ragged_decode_attention.cpu import ragged_decode_attention_cpu
from pallas_kernels.ragged_decode_attention.reference import ragged_decode_attention_reference
from pallas_kernels.ranges import Ranges

_BACKENDS = {
    "xla": ragged_decode_attention_reference,
    "cpu": ragged_decode_attention_cpu,
    "tpu": load("pallas_kernels.ragged_decode_attention.tpu", "ragged_decode_attention_tpu"),
    "gpu": load("pallas_kernels.ragged_decode_attention.gpu", "ragged_decode_attention_gpu"),
}
_AXES = (
    ("BNH", "BTPH", "BTPH", "BKS", "LK", "LK", ""),
    DecodeAttention._make(["BNH", "BN", "BN", "BNS"]),
)


def ragged_decode_attention(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    fill: jax.Array,
    layer: jax.Array | int,
    *,
    ranges: Ranges,
    scale: float | None = None,
    implementation: Implementation = None,
    target: Target | None = None,
) -> DecodeAttention:
    """`decode_attention` where each layer and key/value head has as many pages as it was given.

    Args:
      q: `[B, N, H]` queries, N a multiple of K; query heads `k * G ... k * G + G - 1` share
        key/value head `k`.
      k_pool, v_pool: `[B, T, P, H]`, the pages of all layers and heads as `ranges` lays them out.
      fill: int32 `[B, K, S]`, tokens in each page of this layer, 0..P, counted from the beginning
        of the head's range; S is `ranges.most`. A slot with 0 is dead: its contents, NaN included,
        never matter. Slots beyond a head's range must be 0.
      layer: int32 scalar, which layer's ranges to read.
      ranges: static; the pages of every layer and head.
      scale: factor on the scores, `1 / sqrt(H)` by default.
      implementation: None picks by target and arguments; "xla", "cpu", "tpu" or "gpu" forces one.
      target: what is compiled for; the default backend where not given. A mesh splits the heads
        only into as many parts as the ranges have.

    Returns:
      `DecodeAttention`; `page_lse` is `[B, N, S]`, -inf beyond a head's range.

    Raises:
      ValueError: the shapes or dtypes do not fit together, named; or no backend serves them.
    """
    fill, layer = check_pool(q, k_pool, v_pool, fill, layer, ranges)
    target = (Target.of() if target is None else target).in_parts(ranges.parts)
    return dispatch(
        "ragged_decode_attention",
        _BACKENDS,
        implementation,
        target,
        (
            *(q, k_pool, v_pool, fill),
            *(jnp.asarray(ranges.starts), jnp.asarray(ranges.counts, jnp.int32), layer),
        ),
        _AXES,
        prefers_xla=functools.partial(
            prefers_xla, P=k_pool.shape[2], H=k_pool.shape[3], pages=ranges.most
        ),
        sizes=ranges.sizes,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
