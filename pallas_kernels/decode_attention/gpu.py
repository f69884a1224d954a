"""`decode_attention` for NVIDIA GPUs of compute capability 9.0; the kernel is in `hopper.py`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention.hopper import attend_tiles, finish, require_tiles
from pallas_kernels.decode_attention.reference import DecodeAttention
from pallas_kernels.hopper import TILE, require_hopper, require_rows


def decode_attention_gpu(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    fill: jax.Array,
    layer: jax.Array,
    *,
    scale: float,
    device_kind: str,
    interpret: Any = None,
) -> DecodeAttention:
    """See `api.decode_attention`, which checks the arguments.

    Raises:
      NotImplementedError: another device than Hopper, or sizes that tiles of 64 tokens do not fit.
    """
    require_hopper(device_kind)
    require_tiles(q, k_pages)
    _, B, K, S, P, _ = k_pages.shape
    tokens = S * P
    require_rows("S * P", tokens)
    tiles = -(-tokens // TILE)
    # The last tile ends with the last token, and leaves out what the one before it has covered.
    token = np.minimum(np.arange(tiles) * TILE, tokens - TILE)[:, None] + np.arange(TILE)
    alive = (jnp.arange(P) < fill[..., None]).reshape(B, K, tokens)
    alive = alive[..., token] if tokens % TILE else alive.reshape(B, K, tiles, TILE)
    alive = alive & (token >= np.arange(tiles)[:, None] * TILE)
    out, top, lse = attend_tiles(q, k_pages, v_pages, alive, None, layer, scale, interpret)
    if P > TILE:
        lse = jax.nn.logsumexp(lse.reshape(B, K, S, P // TILE, -1), axis=3)
    elif tokens % TILE:
        last = S - (tiles - 1) * (TILE // P)
        before = lse[:, :, :-1].reshape(B, K, -1, lse.shape[-1])
        lse = jnp.concatenate([before, lse[:, :, -1, -last:]], axis=2)
    return finish(out, top, lse.reshape(B, K, S, -1), q)
