"""`page_commit` on CPUs: the scatter of the reference, of bits."""

from __future__ import annotations

import jax

from pallas_kernels.arrays import as_bits, from_bits
from pallas_kernels.page_commit.reference import page_commit_reference


def page_commit_cpu(
    pages: jax.Array, page: jax.Array, slot: jax.Array, *, device_kind: str = ""
) -> jax.Array:
    """See `api.page_commit`, which checks the arguments; `device_kind` makes no difference."""
    return from_bits(page_commit_reference(as_bits(pages), as_bits(page), slot), pages.dtype)
