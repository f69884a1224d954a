"""`page_commit`: write one full page into a chosen slot of every (layer, row, head)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.page_commit.reference import page_commit_reference

_BACKENDS = {"xla": page_commit_reference}


def page_commit(
    pages: jax.Array,
    page: jax.Array,
    slot: jax.Array,
    *,
    implementation: Implementation = None,
) -> jax.Array:
    """Overwrites `pages[l, b, k, slot[l, b, k]]` with `page[l, b, k]`.

    Args:
      pages: `[L, B, K, S, P, H]`; donate it, and the write happens in place.
      page: `[L, B, K, P, H]`, same dtype.
      slot: int32 `[L, B, K]`, each in 0..S-1 (not checked: it is data).
      implementation: None picks by platform; "xla" forces the reference.

    Returns:
      The updated `pages`.

    Raises:
      ValueError: the shapes or dtypes do not fit together; names the argument.
    """
    if pages.ndim != 6:
        raise ValueError(f"pages has shape {pages.shape}; it must be [L, B, K, S, P, H].")
    wanted = pages.shape[:3] + pages.shape[4:]
    if page.shape != wanted or page.dtype != pages.dtype:
        raise ValueError(
            f"page is {page.dtype}{list(page.shape)}; it must be {pages.dtype}{list(wanted)}."
        )
    if slot.shape != pages.shape[:3] or not jnp.issubdtype(slot.dtype, jnp.integer):
        raise ValueError(
            f"slot is {slot.dtype}{list(slot.shape)}; it must be int32{list(pages.shape[:3])}."
        )
    return dispatch("page_commit", _BACKENDS, implementation, pages, page, slot)
