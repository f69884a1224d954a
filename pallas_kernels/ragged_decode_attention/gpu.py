"""`ragged_decode_attention` for NVIDIA GPUs of compute capability 9.0.

The kernel is that of `decode_attention`. A head's tiles of 64 tokens follow one another from the
beginning of its range on; the last one is moved back so that it ends with the range, and leaves out
what the one before it has covered. (Copies begin on a multiple of 8 tokens. Where pages are smaller
a head's first and last tile may hold up to 7 tokens of its neighbours, and the only tile of a short
range holds more of them; they do not count.)

Heads differ in their tiles. Each is cut into parts of no more tiles than heads have on an average,
so that a long head is shared by more blocks of threads. All heads are given as many parts as the
longest needs, and those that have no tile end before they read or write anything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.hopper import attend_tiles, finish, require_tiles
from pallas_kernels.decode_attention.reference import DecodeAttention
from pallas_kernels.hopper import ROWS, TILE, require_hopper, require_rows


def ragged_decode_attention_gpu(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    fill: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    layer: jax.Array,
    *,
    sizes: tuple[int, ...],
    scale: float,
    device_kind: str,
    interpret: Any = None,
) -> DecodeAttention:
    """See `api.ragged_decode_attention`, which checks the arguments.

    Raises:
      NotImplementedError: another device than Hopper, or sizes that tiles of 64 tokens do not fit.
    """
    require_hopper(device_kind)
    require_tiles(q, k_pool)
    (_, T, P, _), (B, K, S), L = k_pool.shape, fill.shape, starts.shape[0]
    require_rows("T * P", T * P)
    every = places_of_tiles(starts % T, counts, S, P, T * P)
    places = TilePlaces(*(x[layer] for x in every))
    tiles, pieces = places.slot.shape[1:]

    filled = jnp.take_along_axis(fill, places.slot.reshape(1, K, -1), axis=2)
    filled = jnp.where(places.mine, filled.reshape(B, K, tiles, pieces), 0)
    token = places.inside[..., None] + jnp.arange(TILE // pieces)
    alive = (token < filled[..., None]).reshape(B, K, tiles, TILE)
    begin = jnp.broadcast_to(places.start[..., None], (B, K, tiles, 1))
    mean = -(-T * P // (L * K * TILE))
    out, top, lse = attend_tiles(
        q, k_pool[None, :, None], v_pool[None, :, None], alive, begin, jnp.int32(0), scale,
        interpret, places.tiles, mean,
    )  # fmt: skip

    # A page's pieces, wherever they are; slots beyond the range have none that count.
    lse = lse.reshape(B, K, tiles * pieces, -1)
    lse = jnp.take_along_axis(lse, places.piece[None, ..., None], axis=2)
    lse = jax.nn.logsumexp(lse.reshape(B, K, S, -1, lse.shape[-1]), axis=3)
    within = jnp.arange(S) < counts[layer][:, None]
    lse = jnp.where((within & (fill > 0))[..., None], lse, -jnp.inf)
    return finish(out, top, lse, q)


class TilePlaces(NamedTuple):
    """Where the tiles of every head lie. A tile is made of pieces: pages, or a part of one."""

    tiles: jax.Array  # [..., K], tiles that a head has
    start: jax.Array  # [..., K, tiles], first token, of the pool's
    slot: jax.Array  # [..., K, tiles, pieces], of the head's range
    inside: jax.Array  # [..., K, tiles, pieces], first token, of the page's
    mine: jax.Array  # Bool: in the head's range, and in no tile before.
    piece: jax.Array  # [..., K, S * P / tokens of a piece], where a slot's pieces are


def places_of_tiles(
    starts: jax.Array, counts: jax.Array, most: int, page: int, tokens: int
) -> TilePlaces:
    """The places of all tiles, for ranges of at most so many pages, in a pool of so many tokens."""
    begin, end = starts * page, (starts + counts) * page
    base = begin // ROWS * ROWS
    upto = -(-end // ROWS) * ROWS
    tiles = -(-(most * page + max(0, ROWS - page)) // TILE)
    edge = base[..., None] + jnp.arange(tiles) * TILE
    latest = jnp.minimum(jnp.maximum(base, upto - TILE), tokens - TILE)
    start = jnp.minimum(edge, latest[..., None])

    size = min(page, TILE)
    place = start[..., None] + jnp.arange(0, TILE, size)
    slot = place // page - starts[..., None, None]
    ours = (slot >= 0) & (slot < counts[..., None, None])

    # The other way round, from a slot to its pieces.
    token = begin[..., None] + jnp.arange(0, most * page, size)
    tile = jnp.minimum((token - base[..., None]) // TILE, tiles - 1)
    found = token - jnp.minimum(base[..., None] + tile * TILE, latest[..., None])
    piece = tile * (TILE // size) + jnp.minimum(found // size, TILE // size - 1)
    return TilePlaces(
        tiles=-(-(end - base) // TILE),
        start=start,
        slot=jnp.clip(slot, 0, most - 1),
        inside=place % page,
        mine=ours & (place >= edge[..., None]),
        piece=piece,
    )
