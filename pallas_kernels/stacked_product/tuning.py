"""How `stacked_product` is cut into blocks on a Hopper GPU: a heuristic, from its bandwidths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pallas_kernels.hopper import MULTIPROCESSORS, ROWS, TILE, TILE_BYTES

MOST_ROWS = 256
"""Rows of x for which one warpgroup has the registers: the tensor cores take no more at once."""
WHOLE_BYTES = 200 * 1024
"""For the tiles in flight, where a block has a multiprocessor to itself."""
FEW = 32
"""Rows of x up to which a tile of them is small beside one of 64 rows of weights."""
LONG = 4
"""Tiles that a part of a contraction has at least, so that filling the pipeline is not all."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the kernel cuts its work.

    Attributes:
      rows: of x, padded.
      warpgroups: in a block, each with 64 rows of weights.
      columns: of weights and x in a tile.
      tiles: of columns that a block adds up, at most.
      splits: blocks that share the contraction of one tile of rows.
      stages: tiles in flight.
    """

    rows: int
    warpgroups: int
    columns: int
    tiles: int
    splits: int
    stages: int


def hopper_blocks(B: int, I: int, outs: Sequence[int]) -> Blocks:
    """Blocks for `x [B, I]` and weights of so many rows, multiples of 64 as `I` is.

    What bounds it is reading the weights. Every block also reads its part of x, from the L2 cache,
    whose bandwidth is less than twice that of the memory: many rows of x are shared by twice the
    rows of weights. A contraction is split only where there would else be fewer blocks than four
    fifths of the multiprocessors, since a part costs a float32 result to be written and read.
    """
    rows = -(-B // ROWS) * ROWS
    pairs = all(out % (2 * TILE) == 0 for out in outs)
    warpgroups = 2 if rows > FEW and pairs else 1
    columns = 2 * TILE if rows <= FEW and I % (2 * TILE) == 0 else TILE
    across, along = sum(outs) // (warpgroups * TILE), I // columns
    splits = -(-MULTIPROCESSORS * 4 // (5 * across))
    splits = max(1, min(splits, along // LONG))
    tiles = -(-along // splits)
    # No part without a tile.
    splits = -(-along // tiles)
    alone = across * splits <= MULTIPROCESSORS or rows > TILE
    tile = (warpgroups * TILE + rows) * columns * 2
    stages = max(2, min(8, (WHOLE_BYTES if alone else TILE_BYTES) // tile, tiles))
    return Blocks(rows, warpgroups, columns, tiles, splits, stages)
