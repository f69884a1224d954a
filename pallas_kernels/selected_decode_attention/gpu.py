"""`selected_decode_attention` for NVIDIA GPUs of compute capability 9.0.

The kernel is that of `decode_attention`; a tile of 64 tokens is read in pieces, page by page.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.hopper import attend_tiles, finish, require_tiles
from pallas_kernels.decode_attention.reference import DecodeAttention
from pallas_kernels.hopper import ROWS, TILE, require_hopper
from pallas_kernels.selected_decode_attention.reference import chosen_slots


def selected_decode_attention_gpu(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    fill: jax.Array,
    slots: jax.Array,
    layer: jax.Array,
    *,
    scale: float,
    device_kind: str,
    interpret: Any = None,
) -> DecodeAttention:
    """See `api.selected_decode_attention`, which checks the arguments.

    Raises:
      NotImplementedError: another device than Hopper, or sizes that tiles of 64 tokens do not fit.
    """
    require_hopper(device_kind)
    require_tiles(q, k_pages)
    P, (B, K, C) = k_pages.shape[4], slots.shape
    if P % ROWS:
        raise NotImplementedError(f"a page has {P} tokens, no multiple of {ROWS}")
    pages = max(1, TILE // P)
    slots = jnp.pad(slots, ((0, 0), (0, 0), (0, -C % pages)), constant_values=-1)
    listed = slots.shape[-1]
    tiles, piece = listed * P // TILE, min(P, TILE)
    (_, _, page), filled = chosen_slots(fill, slots)
    alive = (jnp.arange(P) < filled[..., None]).reshape(B, K, tiles, TILE)
    starts = page[..., None] * P + jnp.arange(0, P, piece)
    starts = starts.reshape(B, K, tiles, TILE // piece)
    out, top, lse = attend_tiles(q, k_pages, v_pages, alive, starts, layer, scale, interpret)
    if P > TILE:
        lse = jax.nn.logsumexp(lse.reshape(B, K, listed, P // TILE, -1), axis=3)
    lse = lse.reshape(B, K, listed, -1)[:, :, :C]
    return finish(out, top, lse, q)
