"""`decode_attention`: one query token per row over contiguous pages of keys and values."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.reference import DecodeAttention, decode_attention_reference
from pallas_kernels.dispatch import Implementation, dispatch

_BACKENDS = {"xla": decode_attention_reference}


def decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    fill: jax.Array,
    layer: jax.Array | int = 0,
    *,
    scale: float | None = None,
    implementation: Implementation = None,
) -> DecodeAttention:
    """Attention of one token per row over the pages of one layer, with the mass of every page.

    Args:
      q: `[B, N, H]` queries, N a multiple of K; query heads `k * G ... k * G + G - 1` share
        key/value head `k`.
      k_pages, v_pages: `[L, B, K, S, P, H]`; the whole buffer, so that no layer is sliced out.
      fill: int32 `[B, K, S]` (or `[B, 1, S]`, or `[1, 1, S]`), tokens in each page, 0..P. A slot
        with 0 is dead: its contents, NaN included, never matter.
      layer: int32 scalar, which layer of the buffer to read.
      scale: factor on the scores, `1 / sqrt(H)` by default.
      implementation: None picks by platform; "xla" forces the reference.

    Returns:
      `DecodeAttention`; merge it with other segments, or divide `out` by `sum`.

    Raises:
      ValueError: the shapes do not fit together; names the argument.
    """
    _check(q, k_pages, v_pages, fill)
    fill = jnp.broadcast_to(fill, (q.shape[0], *k_pages.shape[2:4]))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    layer = jnp.asarray(layer, jnp.int32)
    return dispatch(
        "decode_attention", _BACKENDS, implementation, q, k_pages, v_pages, fill, layer, scale=scale
    )


def _check(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, fill: jax.Array) -> None:
    if k_pages.ndim != 6 or v_pages.shape != k_pages.shape:
        raise ValueError(
            f"k_pages has shape {k_pages.shape} and v_pages {v_pages.shape}; both must be "
            "[L, B, K, S, P, H]."
        )
    _, B, K, S, _, H = k_pages.shape
    if q.ndim != 3 or q.shape[0] != B or q.shape[2] != H or q.shape[1] % K:
        raise ValueError(
            f"q has shape {q.shape}; with k_pages {k_pages.shape} it must be [{B}, N, {H}], "
            f"N a multiple of {K}."
        )
    if fill.ndim != 3 or fill.shape[2] != S or fill.shape[0] not in (1, B):
        raise ValueError(f"fill has shape {fill.shape}; it must be [{B}, {K}, {S}].")
    if not jnp.issubdtype(fill.dtype, jnp.integer):
        raise ValueError(f"fill has dtype {fill.dtype}; it must be an integer count of tokens.")
