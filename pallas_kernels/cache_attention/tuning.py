"""Where the separate operations are the better choice, and how the kernels cut their work."""

from __future__ import annotations

import jax

from pallas_kernels.cache_attention.segments import Segment
from pallas_kernels.decode_attention.tuning import (
    BLOCK_BYTES,
    DEFAULT_BLOCK_BYTES,
    TOKENS_AT_MOST,
    UNEVEN_TOKENS_AT_MOST,
    prefers_xla,
)
from pallas_kernels.dispatch import Target
from pallas_kernels.tpu import LANES

SHARED_READS = 2
"""Slots of a prompt over kept slots up to which a GPU may read it for each of its samples."""


def prefers_separate(
    target: Target, q: jax.Array, prompt: Segment | None, kept: Segment, current: Segment
) -> bool:
    """Whether a kernel of each segment is the better choice where one of all would serve, too.

    It is where a TPU would have to copy the pages first; where a mesh can split the rows but not
    the prompts; and on GPUs for a long prompt of many samples, which one kernel reads for each.
    """
    *_, P, H = current.k.shape
    if prefers_xla(target, P, H):
        return True
    if prompt is None:
        return False
    (B, _, _), prompts = q.shape, prompt.k.shape[1]
    ways = 1 if target.mesh is None else target.mesh.shape.get(target.rows, 1)
    if ways > 1 and B % ways == 0 and prompts % ways:
        return True
    slots = kept.tokens.shape[3]
    return target.platform == "gpu" and prompts < B and prompt.k.shape[3] > SHARED_READS * slots


def prompt_pages(device_kind: str, rows: int, slots: int, P: int, H: int, itemsize: int) -> int:
    """Pages of a prompt that a TPU's kernel takes at once, of so many rows; a chunk at least."""
    room = BLOCK_BYTES.get(device_kind, DEFAULT_BLOCK_BYTES)
    token = rows * -(-H // LANES) * LANES * itemsize
    most = TOKENS_AT_MOST if LANES % P == 0 else UNEVEN_TOKENS_AT_MOST
    pages = max(1, min(most, room // token) // P)
    if pages < slots and LANES % P == 0:
        pages = max(1, pages * P // LANES) * LANES // P
    return min(slots, pages)
