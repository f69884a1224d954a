"""How `stacked_product` is cut into blocks on a Hopper GPU: a heuristic, from its bandwidths."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from pallas_kernels.hopper import MULTIPROCESSORS, ROWS, TILE, TILE_BYTES

MOST_ROWS = 256
"""Rows of x for which a warpgroup has the registers: the tensor cores take no more at once."""
SHARED_ROWS = 128
"""Up to so many, two blocks fit on one multiprocessor."""
ENOUGH = 124
"""Multiprocessors that take all of the memory's bandwidth."""
ALONE_BYTES = 200 * 1024
"""For the tiles in flight, where a block has a multiprocessor to itself."""
CACHE_SPEED = 1.6
"""Bandwidth of the L2 cache over that of the memory."""
PART_COST = 3
"""How often a part of a sum moves: it is written, and read by the residual and by the norm."""
MOST_WARPGROUPS, MOST_SPLITS = 3, 8
SHORTEST = 8
"""Tiles of 64 columns that a part of a sum has at least, so that it is more than a beginning."""


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


def hopper_blocks(B: int, width: int, outs: Sequence[int]) -> Blocks:
    """Blocks for `x [B, width]` and weights of so many rows, multiples of 64 as `width` is.

    Of all ways the one that takes least time if only bandwidth counted: of the memory for weights,
    of the cache for weights, for x, which every block reads again, and for the parts of sums that
    are split; both for as long as the fullest multiprocessor takes.
    """
    rows, total = -(-B // ROWS) * ROWS, sum(outs)
    resident = 2 if rows <= SHARED_ROWS else 1
    weights = 2 * total * width

    def count(warpgroups: int, splits: int) -> int:
        return total // (warpgroups * TILE) * splits

    def cost(way: tuple[int, int]) -> float:
        warpgroups, splits = way
        again = weights * rows / (warpgroups * TILE)
        parts = PART_COST * 4 * splits * rows * total if splits > 1 else 0
        moved = max(weights, (weights + again) / CACHE_SPEED) + parts / CACHE_SPEED
        blocks, slots = count(*way), MULTIPROCESSORS * resident
        waves = -(-blocks // slots)
        return moved * (waves * slots / blocks if waves > 1 else max(1, ENOUGH / blocks))

    heights = range(1, MOST_WARPGROUPS + 1)
    ways = itertools.product(
        [each for each in heights if all(out % (each * TILE) == 0 for out in outs)],
        range(1, max(1, min(MOST_SPLITS, width // TILE // SHORTEST)) + 1),
    )
    warpgroups, splits = min(ways, key=cost)
    room = ALONE_BYTES
    if resident > 1 and count(warpgroups, splits) > MULTIPROCESSORS:
        room = TILE_BYTES
    wide = width % (2 * TILE) == 0 and room >= 4 * (warpgroups * TILE + rows) * 4 * TILE
    columns = 2 * TILE if wide else TILE
    tiles = -(-(width // columns) // splits)
    stages = room // ((warpgroups * TILE + rows) * columns * 2)
    # No part without a tile.
    splits = -(-(width // columns) // tiles)
    return Blocks(rows, warpgroups, columns, tiles, splits, max(2, min(8, stages, tiles)))
