"""`page_commit`: write one full page into a chosen slot of every (layer, row, head)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_integers
from pallas_kernels.decode_attention.tuning import prefers_xla
from pallas_kernels.dispatch import Implementation, Target, dispatch, load
from pallas_kernels.page_commit.cpu import page_commit_cpu
from pallas_kernels.page_commit.reference import page_commit_reference

# On GPUs the reference is one scatter in place already, and nothing else.
_BACKENDS = {
    "xla": page_commit_reference,
    "cpu": page_commit_cpu,
    "tpu": load("pallas_kernels.page_commit.tpu", "page_commit_tpu"),
}
_AXES = ("LBKSPH", "LBKPH", "LBK"), "LBKSPH"


def page_commit(
    pages: jax.Array,
    page: jax.Array,
    slot: jax.Array,
    *,
    implementation: Implementation = None,
    target: Target | None = None,
) -> jax.Array:
    """Overwrites `pages[l, b, k, slot[l, b, k]]` with `page[l, b, k]`.

    Args:
      pages: `[L, B, K, S, P, H]`; donate it, and the write happens in place.
      page: `[L, B, K, P, H]`, same dtype.
      slot: int32 `[L, B, K]`, each in 0..S-1 (not checked: it is data).
      implementation: None picks by target and arguments; "xla", "cpu" or "tpu" forces one.
      target: what is compiled for; the default backend where not given.

    Returns:
      The updated `pages`.

    Raises:
      ValueError: the shapes or dtypes do not fit together, named; or no backend serves them.
    """
    if pages.ndim != 6:
        raise ValueError(f"pages has shape {pages.shape}; it must be [L, B, K, S, P, H].")
    wanted = pages.shape[:3] + pages.shape[4:]
    if page.shape != wanted or page.dtype != pages.dtype:
        raise ValueError(
            f"page is {page.dtype}{list(page.shape)}; it must be {pages.dtype}{list(wanted)}."
        )
    if slot.shape != pages.shape[:3]:
        raise ValueError(
            f"slot is {slot.dtype}{list(slot.shape)}; it must be int32{list(pages.shape[:3])}."
        )
    check_integers("slot", slot, "the slot of each page")
    return dispatch(
        "page_commit",
        _BACKENDS,
        implementation,
        target,
        (pages, page, slot.astype(jnp.int32)),
        _AXES,
        prefers_xla=functools.partial(prefers_xla, P=pages.shape[4], H=pages.shape[5]),
    )
