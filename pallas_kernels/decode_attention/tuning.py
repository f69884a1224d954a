"""Block sizes of `decode_attention`: a heuristic, and what is known to differ by device kind."""

from __future__ import annotations

import dataclasses
import math

from pallas_kernels.dispatch import Target
from pallas_kernels.tpu import LANES, SUBLANES


@dataclasses.dataclass(frozen=True)
class TpuBlocks:
    """How the TPU kernel cuts its work."""

    heads: int  # key/value heads per step, a divisor of K
    pages: int  # slots per step
    splits: int  # into which the slots of a row are cut, to be merged at the end


CORES = {"TPU v4": 2, "TPU v5": 2}
"""Cores that share one device's memory and take parallel steps; 1 where not named."""

BLOCK_BYTES = {"TPU v4": 1 << 20, "TPU v5": 1 << 20, "TPU7x": 1 << 20}
"""Keys, and again values, per step: long enough to hide what a step costs in itself."""

DEFAULT_BLOCK_BYTES = 1 << 19
TOKENS_AT_MOST = 2048
UNEVEN_TOKENS_AT_MOST = 512
"""Where pages do not divide 128: the matrix that sums pages then spans the whole block."""


def prefers_xla(target: Target, P: int, H: int, pages: int | None = None) -> bool:
    """Whether plain XLA is the better choice where both would serve these pages.

    A single page of a row, where `pages` says how many it has, is too little work for a kernel.
    A TPU stores pages whose rows do not fill its tiles in another order, so that nothing is padded.
    The kernels want them padded, and to get there costs a copy of the whole buffer.
    """
    tiles = H % LANES == 0 and (P % SUBLANES == 0 or P in (1, 2, 4))
    return target.platform != "cpu" and (pages == 1 or (target.platform == "tpu" and not tiles))


def tpu_blocks(
    device_kind: str, B: int, K: int, S: int, P: int, H: int, itemsize: int
) -> TpuBlocks:
    """Blocks for these shapes: all heads and slots in one step where they are few."""
    room = BLOCK_BYTES.get(device_kind, DEFAULT_BLOCK_BYTES)
    # As they lie in memory: rows of whole lanes.
    token = -(-H // LANES) * LANES * itemsize
    most = TOKENS_AT_MOST if LANES % P == 0 else UNEVEN_TOKENS_AT_MOST
    tokens = min(most, max(1, room // token))
    pages = min(S, max(1, tokens // P))
    if pages < S and LANES % P == 0:
        pages = max(1, pages * P // LANES) * LANES // P
    cores = CORES.get(device_kind, 1)
    splits = 1
    if (B * K) % cores and 2 * cores > B * K and cores <= S:
        splits = cores
        pages = min(pages, -(-S // splits))
    # Heads that fit, but not so many that a core has nothing to do.
    heads = max(
        part
        for part in range(1, K + 1)
        if K % part == 0
        and (part == 1 or part * pages * P * token <= room)
        and (part == 1 or math.prod((B, K // part, splits)) >= cores)
    )
    return TpuBlocks(heads, pages, splits)
