"""`ragged_page_commit` on CPUs: the scatter of the reference, of bits."""

from __future__ import annotations

import jax

from pallas_kernels.arrays import as_bits, from_bits
from pallas_kernels.ragged_page_commit.reference import ragged_page_commit_reference


def ragged_page_commit_cpu(
    pool: jax.Array, page: jax.Array, slot: jax.Array, starts: jax.Array, *, device_kind: str = ""
) -> jax.Array:
    """See `api.ragged_page_commit`, which checks the arguments; `device_kind` changes nothing."""
    written = ragged_page_commit_reference(as_bits(pool), as_bits(page), slot, starts)
    return from_bits(written, pool.dtype)
