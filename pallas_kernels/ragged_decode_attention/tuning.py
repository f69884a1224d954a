"""Block sizes of `ragged_decode_attention` on TPUs."""

from __future__ import annotations

import dataclasses

from pallas_kernels.decode_attention.tuning import (
    BLOCK_BYTES,
    CORES,
    DEFAULT_BLOCK_BYTES,
    TOKENS_AT_MOST,
    UNEVEN_TOKENS_AT_MOST,
)
from pallas_kernels.tpu import LANES, SUBLANES

STEP_BYTES = 1 << 18
"""What a TPU could have read in the time that a step costs in itself."""

ROWS_AT_MOST = 16
"""The rows of a step are written out one after the other in its program."""


@dataclasses.dataclass(frozen=True)
class RaggedBlocks:
    """How the TPU kernel cuts its work."""

    rows: int  # per step, a divisor of B
    pages: int  # of one head's range per step: a unit
    groups: int = 1  # of heads, a divisor of K; cores take one each


def alignment(P: int) -> int:
    """Pages of which a copy must begin and end on a multiple: single tokens lie in tiles of 8."""
    return SUBLANES if P == 1 else 1


def ragged_blocks(
    device_kind: str, B: int, K: int, P: int, H: int, itemsize: int, sizes: tuple[int, ...]
) -> RaggedBlocks:
    """The cheapest blocks for ranges of these sizes.

    Short units leave little of a range's last one unused, long ones make few steps. Rows that share
    a step make short units worthwhile.
    """
    room = BLOCK_BYTES.get(device_kind, DEFAULT_BLOCK_BYTES)
    page = P * -(-H // LANES) * LANES * itemsize
    cores = CORES.get(device_kind, 1)

    def cost(blocks: RaggedBlocks) -> tuple[float, int]:
        step = STEP_BYTES + 2 * blocks.rows * blocks.pages * page
        steps = B // blocks.rows * sum(-(-size // blocks.pages) for size in sizes)
        busy = min(cores, B // blocks.rows * blocks.groups)
        return steps * step / busy, -blocks.pages

    rows = [count for count in range(1, min(B, ROWS_AT_MOST) + 1) if B % count == 0]
    fitting = [
        RaggedBlocks(count, pages, cores if B // count % cores and K % cores == 0 else 1)
        for pages in _units(P, sizes[-1])
        for count in rows
        if count * pages * page <= room or (count, pages) == (1, _units(P, sizes[-1])[0])
    ]
    return min(fitting, key=cost)


def _units(P: int, most: int) -> list[int]:
    """Numbers of pages to choose from: whole rows of lanes, where pages fill them."""
    align = alignment(P)
    # What a range of so many pages covers, wherever it begins.
    whole = -(-(most + align - 1) // align) * align
    if LANES % P:
        limit = max(1, min(whole, UNEVEN_TOKENS_AT_MOST // P))
        return sorted({limit, *(1 << bit for bit in range(limit.bit_length()))})
    row = LANES // P
    if whole <= row:
        return [whole]
    return list(range(row, min(-(-whole // row) * row, TOKENS_AT_MOST // P) + 1, row))
