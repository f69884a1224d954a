"""`ragged_page_commit` for TPU (Pallas, Mosaic): copies within the device's memory, in place."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.page_commit.tpu import copy_pages


def ragged_page_commit_tpu(
    pool: jax.Array, page: jax.Array, slot: jax.Array, starts: jax.Array, *, device_kind: str = ""
) -> jax.Array:
    """See `api.ragged_page_commit`, which checks the arguments. The result lies where `pool` lay.

    Raises:
      NotImplementedError: a page is not whole words of 32 bits in every lane.
    """

    def place(pool_ref: Any, layer: Any, row: Any, head: Any, at: Any) -> Any:
        return pool_ref.at[row, at]

    # On a mesh each device has its own part of the pool.
    at = starts[:, None] % pool.shape[1] + slot
    return copy_pages(pool, page, at, place, "ragged_page_commit")
