"""How `grouped_product` is cut into blocks on a Hopper GPU: a heuristic."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pallas_kernels.hopper import MULTIPROCESSORS, TILE, TILE_BYTES

MOST_ROWS = 128
"""Rows of x in a block: with more of them two do not fit on one multiprocessor."""
ENOUGH_BLOCKS = 4 * MULTIPROCESSORS
"""From so many on, half as many of twice the height fill the chip too, and read x half as often."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the kernel cuts its work.

    Attributes:
      warpgroups: in a block, each with 64 rows of weights.
      columns: of weights and x in a tile.
      stages: tiles in flight.
    """

    warpgroups: int
    columns: int
    stages: int


def hopper_blocks(experts: int, rows: int, width: int, outs: Sequence[int]) -> Blocks:
    """For up to so many experts with blocks of `rows`, weights of `width` and `outs`.

    The sizes are multiples of 64. Two blocks share a multiprocessor, so that one reads while the
    other begins or ends.
    """
    high = experts * sum(outs) // TILE >= ENOUGH_BLOCKS and all(
        out % (2 * TILE) == 0 for out in outs
    )
    warpgroups = 2 if high else 1
    across = 2 * (warpgroups * TILE + rows)
    wide = width % (2 * TILE) == 0 and across * 2 * TILE * 4 <= TILE_BYTES
    columns = 2 * TILE if wide else TILE
    stages = TILE_BYTES // (across * columns)
    return Blocks(warpgroups, columns, max(2, min(8, stages, width // columns)))
