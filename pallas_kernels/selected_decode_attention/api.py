"""`selected_decode_attention`: one query token per row over a list of pages, others not read."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.reference import DecodeAttention
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.selected_decode_attention.reference import selected_decode_attention_reference

_BACKENDS = {"xla": selected_decode_attention_reference}


def selected_decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    fill: jax.Array,
    slots: jax.Array,
    layer: jax.Array | int = 0,
    *,
    scale: float | None = None,
    implementation: Implementation = None,
) -> DecodeAttention:
    """Attention of one token per row over the listed pages of one layer, at the cost of these.

    Args:
      q: `[B, N, H]` queries, N a multiple of K; query heads `k * G ... k * G + G - 1` share
        key/value head `k`.
      k_pages, v_pages: `[L, B', K, S, P, H]`; rows `b` of q read row `b // (B / B')`, so that
        neighbouring rows can share pages.
      fill: int32 `[B', K, S]` (or axes of 1), tokens in each page, 0..P. A slot with 0 is dead.
      slots: int32 `[B, K, C]`, distinct slots to read, in 0..S-1 (not checked: it is data); -1 for
        none.
      layer: int32 scalar, which layer of the buffers to read.
      scale: factor on the scores, `1 / sqrt(H)` by default.
      implementation: None picks by platform; "xla" forces the reference.

    Returns:
      `DecodeAttention` over the listed pages, its `page_lse` `[B, N, C]` in their order.

    Raises:
      ValueError: the shapes do not fit together; names the argument.
    """
    if k_pages.ndim != 6 or v_pages.shape != k_pages.shape:
        raise ValueError(
            f"k_pages has shape {k_pages.shape} and v_pages {v_pages.shape}; both must be "
            "[L, B', K, S, P, H]."
        )
    _, prompts, K, S, _, H = k_pages.shape
    if q.ndim != 3 or q.shape[0] % prompts or q.shape[2] != H or q.shape[1] % K:
        raise ValueError(
            f"q has shape {q.shape}; with k_pages {k_pages.shape} it must be [B, N, {H}], "
            f"B a multiple of {prompts} and N of {K}."
        )
    if fill.ndim != 3 or fill.shape[2] != S or not jnp.issubdtype(fill.dtype, jnp.integer):
        raise ValueError(
            f"fill is {fill.dtype}{list(fill.shape)}; it must be int32[{prompts}, {K}, {S}]."
        )
    if slots.ndim != 3 or slots.shape[:2] != (q.shape[0], K):
        raise ValueError(f"slots has shape {slots.shape}; it must be [{q.shape[0]}, {K}, any].")
    if not jnp.issubdtype(slots.dtype, jnp.integer):
        raise ValueError(f"slots has dtype {slots.dtype}; it must hold integers.")
    fill = jnp.broadcast_to(fill, (prompts, K, S))
    scale = H**-0.5 if scale is None else scale
    layer = jnp.asarray(layer, jnp.int32)
    return dispatch(
        "selected_decode_attention",
        _BACKENDS,
        implementation,
        q,
        k_pages,
        v_pages,
        fill,
        slots,
        layer,
        scale=scale,
    )
